"""SDXL's attention blocks, by whatever name somebody gives one."""

from __future__ import annotations

import pytest

from blora.blocks import Block, attention_block, attention_blocks
from blora.text import BloraError

BLOCKS = [
    Block("IN04", "input_blocks.4.1", "down_blocks.1.attentions.0"),
    Block("IN05", "input_blocks.5.1", "down_blocks.1.attentions.1"),
    Block("IN07", "input_blocks.7.1", "down_blocks.2.attentions.0"),
    Block("IN08", "input_blocks.8.1", "down_blocks.2.attentions.1"),
    Block("MID", "middle_block.1", "mid_block.attentions.0"),
    Block("OUT00", "output_blocks.0.1", "up_blocks.0.attentions.0"),
    Block("OUT01", "output_blocks.1.1", "up_blocks.0.attentions.1"),
    Block("OUT02", "output_blocks.2.1", "up_blocks.0.attentions.2"),
    Block("OUT03", "output_blocks.3.1", "up_blocks.1.attentions.0"),
    Block("OUT04", "output_blocks.4.1", "up_blocks.1.attentions.1"),
    Block("OUT05", "output_blocks.5.1", "up_blocks.1.attentions.2"),
]
NAMES = "IN04, IN05, IN07, IN08, MID, OUT00, OUT01, OUT02, OUT03, OUT04, OUT05"


def test_they_are_eleven_in_the_order_of_the_forward_pass():
    assert list(attention_blocks().items()) == [(block.lbw, block) for block in BLOCKS]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.lbw)
def test_each_has_its_names_in_any_case_with_dots_or_underscores_and_a_prefix(block):
    for name in (block.lbw, block.kohya, block.diffusers):
        plain = name.replace(".", "_")
        for word in (name, name.lower(), name.upper(), plain, f"lora_unet_{plain}_"):
            assert attention_block(word) == block


@pytest.mark.parametrize(
    ("word", "lbw"),
    [("out0", "OUT00"), ("In8", "IN08"), ("M00", "MID"), ("mid_block", "MID"),
     ("output_blocks.2", "OUT02")],
)  # fmt: skip
def test_a_shorter_name_is_understood_where_there_is_one_attention_block_of_it(word, lbw):
    assert attention_block(word).lbw == lbw


@pytest.mark.parametrize(
    "word",
    ["OUT07", "IN01", "BASE", "te1", "up_blocks.0", "output_blocks.0.0", "input_blocks.6.0", "",
     "out", "content"],
)  # fmt: skip
def test_what_is_none_is_named_with_those_there_are(word):
    with pytest.raises(BloraError) as error:
        attention_block(word)
    assert str(error.value) == f'SDXL has no attention block "{word}": choose one of {NAMES}'
