"""Prompts, the names of pictures, the order of saves, and what goes to gen_img.py."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from comparing import save
from lora_files import CONTENT, STYLE

from blora.drawing.comparison import Comparison, labels, plan_columns, plan_drawings, read_saves
from blora.drawing.generator import card_options, check_options, is_whole, reason
from blora.drawing.pictures import Drawing, Prompt, parse_prompt, read_prompts
from blora.sdxl import Trait
from blora.slicer.reader import read_lora
from blora.text import BloraError

TRAITS = [
    Trait(name, (f"output_blocks_{n}_1_",), ()) for name, n in {"content": 0, "style": 1}.items()
]
COLUMNS = plan_columns(TRAITS, [1.0])


@pytest.mark.parametrize(
    ("line", "seeds", "more", "expected"),
    [
        ("A fox", [], "", Prompt("A fox", "", (1,))),
        ("A fox", [4, 5, 4], "", Prompt("A fox", "", (4, 5))),
        ("A fox --d 7 --l 5", [], "", Prompt("A fox", " --l 5", (7,))),
        ("A fox --l 5 --d 7,8", [], "", Prompt("A fox", " --l 5", (7, 8))),
        ("A fox --D 7", [2], "", Prompt("A fox", "", (2,))),
        ("A fox --d 7 --l 5 --d 9", [], "", Prompt("A fox", " --l 5", (7,))),
        ("A fox --w 512", [], " --w 64", Prompt("A fox", " --w 512 --w 64", (1,))),
        (
            "A fox --n a dog --with dash --d 3",
            [],
            "",
            Prompt("A fox", " --n a dog --with dash", (3,)),
        ),
    ],
)
def test_a_line_is_words_options_and_seeds(line, seeds, more, expected):
    assert parse_prompt(line, seeds, more) == expected


def test_a_comment_may_be_indented_as_gen_img_skips_it_without_the_blanks(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("  # A cat\nA fox\n")
    assert read_prompts(path, [], "") == [Prompt("A fox", "", (1,))]


@pytest.mark.parametrize("line", [" --d 5", "--l 7", "\t--n blurry"])
def test_a_line_without_words_is_refused_as_gen_img_takes_its_options_for_words(line, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text(f"A fox\n{line}\n")
    sentence = f"a prompt in {path} has no words: write them before the options"
    with pytest.raises(BloraError) as refusal:
        read_prompts(path, [], "")
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    ("line", "is_several"),
    [
        ("A {e$$red|blue} fox", True),
        ("A fox --n {E$$1$$red|blue}", True),
        ("A {2$$red|blue|green} fox", False),
        ("A {red|blue} fox for $$", False),
    ],
)
def test_only_an_enumeration_draws_several_pictures(line, is_several, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text(f"{line}\n")
    if not is_several:
        assert len(read_prompts(path, [], "")) == 1
        return
    with pytest.raises(BloraError, match=r"draws several pictures: write each variant as a"):
        read_prompts(path, [], "")


def test_a_prompt_file_may_begin_with_a_mark_and_a_prompt_in_it_twice_is_one(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbf# none\r\nA fox\r\n\r\nA dog --d 2\r\nA fox\r\n")
    assert read_prompts(path, [], "") == [Prompt("A fox", "", (1,)), Prompt("A dog", "", (2,))]
    path.write_bytes(b"A fox in Z\xfcrich\n")
    with pytest.raises(BloraError, match=r"p\.txt is not in UTF-8: save it so \(invalid"):
        read_prompts(path, [], "")


def test_a_picture_s_name_tells_what_it_is_and_every_setting_changes_it():
    settings = {"seed": 1, "slices": [{"strength": 1.0}], "options": ["--fp16"]}
    drawing = Drawing(3, Prompt("A fox", " --l 7", (1,)), 1, "b/my 1_style", settings)
    assert drawing.file.startswith("b_my_1_style_")
    assert drawing.line == f"A fox --l 7 --d 1 --am 3 --f {drawing.file}"
    others = [{"seed": 2}, {"slices": [{"strength": 0.5}]}, {"options": []}]
    changed = [replace(drawing, settings=settings | other).file for other in others]
    assert len({drawing.file, *changed}) == 4
    assert replace(drawing, look=9).file == drawing.file  # a number of the one run alone
    for long in ("x" * 999, "\u7d75" * 999):  # a file system counts bytes
        assert len(replace(drawing, name=long).file.encode()) < 150


def test_a_folder_is_its_saves_in_the_order_of_their_steps(tmp_path):
    for name, steps in {"a-2": 200, "a-10": 1000, "a": 1500, "a-1": 30, "other": None}.items():
        save(tmp_path / f"{name}.safetensors", steps, name="a")
    (tmp_path / "state").mkdir()
    expected = ["a-1", "a-2", "a-10", "a", "other"]
    for word in (str(tmp_path), f"{tmp_path}/*.safetensors", f"{tmp_path}/[ao]*"):
        assert [lora.path.stem for lora in read_saves([word], COLUMNS)] == expected
    named = [str(tmp_path / f"{name}.safetensors") for name in ("a", "a-1", "a")]
    assert [lora.path.stem for lora in read_saves(named, COLUMNS)] == ["a-1", "a"]


def test_a_file_with_the_letters_of_a_pattern_in_its_name_is_a_file(tmp_path):
    path = save(tmp_path / "my [v].safetensors", 1)
    assert [lora.path for lora in read_saves([str(path)], COLUMNS)] == [path]


def test_a_pattern_in_a_folder_with_the_letters_of_one_finds_its_files(tmp_path):
    path = save(tmp_path / "my [v]/a.safetensors", 1)
    word = str(path.with_name("*.safetensors"))
    assert [lora.path for lora in read_saves([word], COLUMNS)] == [path]


def test_two_trainings_in_a_folder_are_not_mixed_and_equal_names_get_their_folder(tmp_path):
    for name, steps, training in (("x1", 10, "b"), ("y1", 20, "a"), ("x2", 30, "b")):
        save(tmp_path / f"{name}.safetensors", steps, name=training)
    saves = read_saves([str(tmp_path)], COLUMNS)
    assert [lora.path.stem for lora in saves] == ["y1", "x1", "x2"]
    twice = [read_lora(save(tmp_path / f"{f}/x1.safetensors", 10)) for f in ("one", "two")]
    assert labels([*saves[:1], *twice]) == ["y1", "one/x1", "two/x1"]


def test_columns_are_each_trait_at_each_strength_and_then_all_together():
    names = {
        (2, (1.0,)): ["content", "style", "both"],
        (1, (1.0,)): ["content"],
        (1, (1.0, 1.0)): ["content"],
        (2, (0.6, 1.0)): [
            f"{name} at {strength}" for name in ("content", "style", "both")
            for strength in ("0.6", "1")
        ],
    }  # fmt: skip
    assert {
        key: [column.name for column in plan_columns(TRAITS[: key[0]], [*key[1]])] for key in names
    } == names
    third = [*TRAITS, Trait("layout", ("input_blocks_8_1_",), ())]
    assert plan_columns(third, [1.0])[-1].name == "content and style and layout"


def test_pictures_are_ordered_by_look_so_that_each_is_merged_once(tmp_path):
    saves = [read_lora(save(tmp_path / f"{n}.safetensors", n, CONTENT, STYLE)) for n in (1, 2)]
    prompts = [Prompt("A fox", "", (1, 2)), Prompt("A dog", "", (3,))]
    drawings = plan_drawings(saves, COLUMNS, prompts, {})
    assert [drawing.look for drawing in drawings] == sorted([*range(7)] * 3)
    assert [(d.prompt.text, d.seed) for d in drawings[:4]] == [
        ("A fox", 1), ("A fox", 2), ("A dog", 3), ("A fox", 1),
    ]  # fmt: skip
    assert len({drawing.file for drawing in drawings}) == 21


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["--fp16", "--sdpa", "--no_half_vae"]),
        (["--bf16"], ["--sdpa", "--no_half_vae"]),
        (["--xformers", "--no_half_vae"], ["--fp16"]),
    ],
)
def test_a_card_gets_what_sdxl_needs_there_where_the_options_do_not_choose(words, expected):
    assert card_options(words, has_card=True) == expected
    assert card_options(words, has_card=False) == []


def test_options_that_are_given_already_are_refused_and_others_are_not():
    for word in ("--ckpt", "--outdir=x", "--network_mod", "--n_iter", "--W"):
        with pytest.raises(BloraError, match=r"is set already: leave it out$"):
            check_options([word])
    check_options(["--sampler", "ddim", "--vae", "v.safetensors", "--negative_scale", "-1", "--"])


@pytest.mark.parametrize(
    ("log", "code", "sentence"),
    [
        ("Traceback\n  File x\nOSError: Can't load tokenizer\n", 1, "Can't load tokenizer"),
        ("loading\ngen_img.py: error: unrecognized arguments: --x\n", 2,
         "gen_img.py: error: unrecognized arguments: --x"),
        ("torch.cuda.SomeError: it broke\nlast words\n", 1, "it broke"),
        ("AssertionError\n", 1, "AssertionError"),
        ("", 3, "exit code 3"),
        ("prompt 1/2: a terror: out of memory\n 40%|##  | 10/25\n", -11, "exit code -11"),
    ],
)  # fmt: skip
def test_the_reason_is_the_last_thing_that_was_raised(log, code, sentence):
    assert reason(log, code) == f"gen_img.py stopped: {sentence}"


@pytest.mark.parametrize(
    ("log", "code"),
    [
        ("RuntimeError: HIP out of memory.", 1),
        ("torch.cuda.OutOfMemoryError: CUDA out of memory.", 1),
        ("MemoryError", 1),
        ("OSError: The paging file is too small for this operation to complete.", 1),
    ],
)
def test_too_little_memory_is_told_with_what_to_lower(log, code):
    assert reason(log, code).startswith("gen_img.py ran out of memory: lower --size")
    assert reason("", -9).startswith("gen_img.py was killed: if memory ran out, lower --size")


def test_a_picture_is_whole_once_its_end_is_written(tmp_path):
    path = tmp_path / "a.png"
    assert not is_whole(path)
    for data, whole in ((b"", False), (b"PNG", False), (b"...IEND\xaeB`\x82", True)):
        path.write_bytes(data)
        assert is_whole(path) == whole


def test_a_trait_that_keeps_other_modules_and_another_strength_are_other_pictures(tmp_path):
    lora = read_lora(save(tmp_path / "x.safetensors", 1))
    narrow = replace(TRAITS[0], blacklist=("attn1",))
    columns = plan_columns([TRAITS[0]], [1.0, 0.5]) + plan_columns([narrow], [1.0])
    drawn = plan_drawings([lora], columns, [Prompt("", "", (1,))], {})
    # All have another name too, but for the first and the last.
    assert {drawing.name.split("_prompt")[0] for drawing in (drawn[1], drawn[3])} == {
        "x_content at 1", "x_content"
    }  # fmt: skip
    one, two = (replace(d, name="x").file for d in (drawn[1], drawn[3]))
    half = replace(drawn[2], name="x").file
    assert len({one, two, half}) == 3


def test_a_lora_of_the_same_name_elsewhere_is_another_picture(tmp_path):
    paths = [save(Path(tmp_path / f"{n}/x.safetensors"), n, rank=n) for n in (1, 2)]
    one, two = (plan_drawings([read_lora(p)], COLUMNS, [Prompt("", "", (1,))], {}) for p in paths)
    assert one[0].file == two[0].file  # without a LoRA
    assert not {d.file for d in one[1:]} & {d.file for d in two[1:]}


def drawn_of(lora: Path) -> set[str]:
    """The names of the pictures of its looks."""
    drawings = plan_drawings([read_lora(lora)], COLUMNS, [Prompt("", "", (1,))], {})
    return {drawing.file for drawing in drawings[1:]}


def test_loras_of_one_name_size_and_date_are_different_pictures(tmp_path):
    drawn: list[set[str]] = []
    for steps in (100, 200):
        lora = save(tmp_path / str(steps) / "last.safetensors", steps)
        os.utime(lora, (0, 0))
        drawn.append(drawn_of(lora))
    assert not drawn[0] & drawn[1]


def test_another_alpha_in_the_settings_beside_a_lora_of_peft_is_another_picture(tmp_path):
    lora, drawn = save(tmp_path / "adapter_model.safetensors", None), []
    for alpha in (2, 4):
        (tmp_path / "adapter_config.json").write_text(f'{{"r": 2, "lora_alpha": {alpha}}}')
        drawn.append(drawn_of(lora))
    assert not drawn[0] & drawn[1]


def test_prompts_of_the_same_words_are_told_apart_by_their_options(tmp_path):
    saves = [read_lora(save(tmp_path / "x.safetensors", 1))]
    prompts = [Prompt("A fox", f" --l {scale}", (1, 2)) for scale in (5, 9)]
    drawings = plan_drawings(saves, COLUMNS, [*prompts, Prompt("A dog", " --l 5", (1,))], {})
    page = tmp_path / "compare.html"
    comparison = Comparison(page, Path("m.safetensors"), drawings, [], None, saves, COLUMNS)
    assert [section.title for section in comparison.sections(lambda _: None)] == [
        "A fox --l 5, seed 1",
        "A fox --l 5, seed 2",
        "A fox --l 9, seed 1",
        "A fox --l 9, seed 2",
        "A dog, seed 1",
    ]
