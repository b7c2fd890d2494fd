"""A gallery: pictures, those of them that are not drawn yet, and the page that shows all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blora.drawing.generator import draw, has_card
from blora.drawing.pictures import Drawing
from blora.sheet import Bar, Line, Picture, Section, make_thumbnail, thumbnail_limit, write_page
from blora.text import counted, printable, progress_bar, say


@dataclass(frozen=True)
class Gallery(ABC):
    """Pictures to draw with a checkpoint, and a page to show them."""

    page: Path
    checkpoint: Path
    drawings: list[Drawing]
    words: list[str]  # gen_img.py's options, but for the model and the network
    title = ""
    module = ""  # the network module for gen_img.py

    @property
    def folder(self) -> Path:
        """Of the pictures."""
        return self.page.with_suffix("")

    @abstractmethod
    def write_looks(self, path: Path) -> None:
        """Write what the network module reads."""

    @abstractmethod
    def intro(self) -> str:
        """What the page shows, in words."""

    @abstractmethod
    def rows(self) -> str:
        """What it has rows of, counted: "3 saves"."""

    @abstractmethod
    def sections(self, advance: Callable[[int], object]) -> Iterator[Section]:
        """The page's sections; `advance` is given the number of pictures that are done."""

    @property
    def options(self) -> list[str]:
        """gen_img.py's options, but for the network's file."""
        return ["--ckpt", str(self.checkpoint), "--network_module", self.module, *self.words]

    def first_lines(self) -> list[str]:
        """Prompts that gen_img.py draws before the missing ones, and that nobody keeps."""
        return []

    def path(self, drawing: Drawing) -> Path:
        """Where a picture is, or is going to be."""
        return self.folder / drawing.file

    def is_drawn(self, drawing: Drawing) -> bool:
        """Whether a picture is there."""
        return self.path(drawing).is_file()

    def missing(self) -> list[Drawing]:
        """The pictures that are not drawn yet."""
        return [drawing for drawing in self.drawings if not self.is_drawn(drawing)]

    def cell(self, drawing: Drawing, name: str, *lines: Line | Bar, rows: int = 1) -> Picture:
        """A picture as the page shows it; an empty frame where it is not drawn yet."""
        from PIL import Image

        if not self.is_drawn(drawing):
            return Picture(name, None, (*lines, Line("not drawn yet", "note")), rows=rows)
        path = self.path(drawing)
        with Image.open(path) as image:
            thumbnail = make_thumbnail(image, thumbnail_limit(len(self.drawings)))
        return Picture(name, thumbnail, lines, link=f"{self.folder.name}/{path.name}", rows=rows)

    def write(self) -> None:
        """Write the page."""
        # 490 pictures of 1024 x 1024 took a minute on two busy cores.
        with progress_bar(len(self.drawings), desc="the page", unit="picture") as advance:
            write_page(self.page, self.title, Line(self.intro()), self.sections(advance))

    def run(self) -> None:
        """Draw what is missing, and write the page of what there is, whatever happens."""
        missing, number = self.missing(), len(self.drawings)
        announce(len(missing), number)
        try:
            if missing:
                draw(missing, self.folder, self.options, self.write_looks, self.first_lines())
        finally:
            if (left := len(self.missing())) < number:
                self.write()
                drawn = f"{counted(number - left, 'picture')} of {self.rows()}"
                print(printable(f"-> {self.page}: {drawn}"))
            if left:
                say(f"note: {left} of {number} pictures are left")


def announce(missing: int, number: int) -> None:
    """Say what is going to be drawn, and on what."""
    if missing and not has_card():
        say(
            "warning: torch finds no graphics card, so the pictures are drawn on the processor: "
            "install torch with CUDA"
        )
    if missing == number:
        say(f"drawing {counted(number, 'picture')}, once the model is loaded")
    elif missing:
        say(f"drawing {missing} of {counted(number, 'picture')}, the others are there already")
    else:
        say(f"nothing to draw: {counted(number, 'picture')} are there already")
