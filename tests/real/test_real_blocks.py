"""What blora_blocks.py has sd-scripts' gen_img.py draw, on a full-size SDXL of random weights.

With BLORA_E2E=1: three loads of the model on a CPU, five minutes and 16 GB of memory. The pictures
are compared with those that gen_img.py draws by itself, and what each attn2 hears is counted.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from real_drawing import SIZE, Kohya, make_kohya, pixels

from blora.blocks import attention_blocks

pytestmark = pytest.mark.slow

FIRST, SECOND, GUIDED = "A fox on a beach", "A watercolour of a teapot", "--l 7 --n blurry"
EACH = {name: block.kohya for name, block in attention_blocks().items()}
DEPTHS = {"IN04": 2, "IN05": 2, "OUT03": 2, "OUT04": 2, "OUT05": 2}  # ten in the others
ALL = "+".join(EACH)


@pytest.fixture(scope="module")
def kohya(tmp_path_factory) -> Kohya:
    made = make_kohya(tmp_path_factory, "blocks")
    prompts = ["--prompt", f"{FIRST} {GUIDED}", "--other", SECOND]
    made.draw("blora_blocks.py", *prompts, "--blocks", "OUT00", "OUT01", ALL, f"{ALL}+POOLED")
    options = f"{GUIDED} --w {SIZE} --h {SIZE} --s 1 --d 1"
    own = {"first": FIRST, "second": SECOND}
    lines = [f"{text} {options} --f {name}.png" for name, text in own.items()]
    made.gen_img("\n".join(lines), "own")
    return made


@pytest.fixture(scope="module")
def calls(kohya) -> list[list[str]]:
    """Look, layer and texts of each call; look 0 is the model, 1 keeps, 2 to 12 are the blocks."""
    looks = [{"prompt": 0, "blocks": [], "is_kept": is_kept} for is_kept in (False, True)]
    looks += [{"prompt": 0, "blocks": [block], "is_kept": False} for block in EACH.values()]
    (kohya.path / "looks.json").write_text(json.dumps(looks))
    options = f"{GUIDED} --w 64 --h 64 --s 1 --d 1"
    order = [(SECOND, 1), *((FIRST, look) for look in (0, *range(2, len(looks))))]
    lines = [f"{text} {options} --am {look}" for text, look in order]
    network = ["--network_module", "counted_injection", "--network_weights", "looks.json"]
    kohya.gen_img("\n".join(lines), "counted", *network)
    return [line.split() for line in (kohya.path / "looks.calls").read_text().splitlines()]


def drawn(kohya: Kohya, name: str) -> np.ndarray:
    [path] = kohya.path.glob(f"random_sdxl_blocks/own_{name.replace('+', '_')}_seed1_*.png")
    return pixels(path)


@pytest.mark.parametrize("name", ["first", "second"])
def test_with_no_block_it_is_the_picture_of_the_bare_model_to_the_bit(kohya, name):
    picture = drawn(kohya, name)
    assert picture.shape == (SIZE, SIZE, 3)
    assert np.array_equal(picture, pixels(kohya.path / f"own/{name}.png"))


def test_with_all_blocks_and_the_pooled_text_it_is_the_second_prompts_to_the_bit(kohya):
    assert np.array_equal(drawn(kohya, f"{ALL}+POOLED"), drawn(kohya, "second"))


def test_with_all_blocks_alone_it_is_not_as_the_pooled_text_is_the_first_prompts(kohya):
    assert (drawn(kohya, ALL) != drawn(kohya, "second")).any()


def test_each_block_makes_another_picture(kohya):
    names = "first", "second", "OUT00", "OUT01", ALL
    assert len({drawn(kohya, name).tobytes() for name in names}) == len(names)


@pytest.mark.parametrize(("look", "block"), enumerate(EACH, start=2))
def test_every_attn2_of_the_block_hears_the_second_prompt_and_no_other_one(calls, look, block):
    heard = [call[1:] for call in calls if call[0] == str(look)]
    assert len(heard) == 70
    second = {layer for layer, _, conditional in heard if conditional == "second"}
    start, depth = f"{EACH[block]}.transformer_blocks", DEPTHS.get(block, 10)
    assert second == {f"{start}.{index}.attn2" for index in range(depth)}
    assert Counter(conditional for *_, conditional in heard) == {
        "second": depth,
        "first": 70 - depth,
    }


def test_the_unconditional_half_never_hears_anything_but_the_negative_prompt(calls):
    """Which both prompts have in common; the call that keeps the second's text came first."""
    assert {unconditional for look, _, unconditional, _ in calls if look not in "01"} == {"both"}
