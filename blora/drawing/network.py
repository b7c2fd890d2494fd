"""A network as gen_img.py asks for it: what is the same for each of ours."""

from __future__ import annotations


class Network:
    """A network that decides with each picture anew what it does, by its multiplier (--am)."""

    def is_mergeable(self) -> bool:
        """No: gen_img.py would merge it once and for all."""
        return False

    def load_state_dict(self, weights: object, strict: bool) -> str:
        """Nothing to load: what a picture needs is made when it is drawn."""
        return "none"

    def to(self, *args: object, **kwargs: object) -> Network:
        """Nothing to move."""
        return self
