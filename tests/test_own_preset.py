"""The preset and the traits of chosen blocks: LyCORIS trains those blocks by it, the slicer cuts
them apart, and what cannot be written is refused before anything is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import toml
from kohya_folder import ROOT
from lora_files import SHAPES, lora_module, write
from lycoris_releases import LYCORIS, NEWEST, trained_under, with_release
from slicing import modules, slice_lora

from blora.blocks import attention_block
from blora.preset import attention_layers, trained_by, write_own
from blora.text import BloraError

FIRST, REST = "IN04+IN05+IN07+IN08+MID+OUT00", "OUT01+OUT02+OUT03+OUT04+OUT05"
CHOICES = {
    # preset: content, style, modules of each, parameters per rank
    "my_content_style": ("OUT00", "OUT01+OUT02", 80, 160, 660_480),
    "middle_style": ("", "MID", 0, 80, 220_160),
    "shallow_content": ("IN04+IN05", "", 32, 0, 52_224),
    "ends_content_style": ("IN04", "OUT05", 16, 16, 52_224),
    "all_content_style": (FIRST, REST, 352, 208, 1_451_520),
}
SHARED = "OUT01 is in --content and --style: leave it in one"
NO_BLOCKS = "--write has no blocks to write: give it some, such as --content OUT00 --style OUT01"
NOT_PLAIN = (
    '"{}" is not a plain file name: give --write up to 60 letters (a to z), digits, - and _, a '
    "letter or digit first"
)
OF_THE_BUNDLE = (
    '"{}" begins like a file of the bundle, which an update may overwrite: give --write another '
    "name"
)


def groups(content: str, style: str) -> dict:
    """The blocks of both, as the command line has them: "OUT01+OUT02"."""
    words = {"content": content, "style": style}
    return {
        group: tuple(attention_block(word) for word in text.split("+") if word)
        for group, text in words.items()
    }


def attention_of(blocks: str) -> set[str]:
    """The attention modules of blocks, picked from SDXL's own by their names."""
    names = [attention_block(word).kohya.replace(".", "_") for word in blocks.split("+") if word]
    inside = rf"lora_unet_({'|'.join(names)})_transformer_blocks_\d_attn\d_to_(q|k|v|out_0)"
    return {module for module in SHAPES if re.fullmatch(inside, module)}


def kohya_folder(path: Path) -> Path:
    (path / "lycoris_presets").mkdir()
    return path


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return kohya_folder(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """The preset and the traits of each choice, by the preset's name."""
    folder = kohya_folder(tmp_path_factory.mktemp("kohya"))
    return {
        preset: write_own(preset.split("_")[0], groups(content, style), folder)
        for preset, (content, style, *_) in CHOICES.items()
    }


@pytest.fixture(scope="module")
def whole_lora(tmp_path_factory) -> Path:
    """A LoRA of everything in SDXL that has a matrix or a convolution."""
    tensors = {}
    for name in SHAPES:
        tensors |= lora_module(name, rank=1)
    return write(tmp_path_factory.mktemp("lora") / "whole.safetensors", tensors)


@pytest.fixture(scope="module")
def trained_by_release(written) -> dict[str, dict[str, dict]]:
    return {
        release: trained_under(release, *(p for p, _ in written.values())) for release in LYCORIS
    }


# ---- What is written -----------------------------------------------------------------------------


def test_the_files_are_named_after_the_groups_and_lie_where_the_bundles_own_do(written):
    for preset, (file, traits) in written.items():
        assert file.name == f"{preset}.toml"
        assert traits.name == f"{preset.split('_')[0]}_traits.json"
        assert file.parent == traits.parent / "lycoris_presets"


def test_a_preset_says_first_what_it_trains_with_which_traits_and_at_what_cost(folder):
    preset, _ = write_own("my", groups("OUT00", "OUT01+OUT02"), folder)
    assert preset.read_text() == (
        "# Content (output_blocks.0.1) and style (output_blocks.1.1, output_blocks.2.1), "
        "attention only,\n"
        "# chosen with blora_blocks.py. For either launcher; my_traits.json has the traits to "
        "slice with.\n"
        "# Costs 660,480 parameters per rank.\n"
        "enable_conv = false\n"
        "unet_target_module = []\n"
        "unet_target_name = [\n"
        r"  'output_blocks\.0\.1\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$',"
        "\n"
        r"  'output_blocks\.1\.1\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$',"
        "\n"
        r"  'output_blocks\.2\.1\.transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)$',"
        "\n"
        "]\n"
        "text_encoder_target_module = []\n"
        "text_encoder_target_name = []\n"
    )


def test_for_the_paper_s_blocks_both_files_say_what_the_bundle_s_own_say(folder):
    preset, traits = write_own("my", groups("OUT00", "OUT01"), folder)
    ours = toml.load(ROOT / "lycoris_presets/blora_content_style.toml")
    assert toml.load(preset) == ours | {"text_encoder_target_name": []}
    ours = json.loads((ROOT / "blora_traits.json").read_text())
    assert json.loads(traits.read_text()) == {name: ours[name] for name in ("content", "style")}
    assert (ROOT / "blora_traits.json").read_text().startswith(traits.read_text()[:-4])


def test_a_block_that_is_given_twice_is_trained_once(folder):
    preset, traits = write_own("my", groups("OUT00+output_blocks.0.1", ""), folder)
    assert len(toml.load(preset)["unet_target_name"]) == 1
    assert len(json.loads(traits.read_text())["content"]["whitelist"]) == 1


# ---- What LyCORIS and the slicer make of it ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("release", LYCORIS)
def test_lycoris_trains_exactly_the_attention_of_the_blocks(trained_by_release, release, choice):
    content, style, in_content, in_style, cost = CHOICES[choice]
    modules = trained_by_release[release][choice]
    assert sorted(modules["unet"]) == sorted(attention_of(content) | attention_of(style))
    assert len(modules["unet"]) == in_content + in_style
    assert modules["text_encoders"] == []
    assert modules["unet_parameters"] == cost


@pytest.mark.parametrize("choice", CHOICES)
def test_the_first_comment_has_the_blocks_and_the_cost(written, choice):
    content, style, *_, cost = CHOICES[choice]
    lines = written[choice][0].read_text().splitlines()
    comment = " ".join(line[2:] for line in lines if line.startswith("# "))
    chosen = groups(content, style)
    blocks = [block.kohya for group in chosen.values() for block in group]
    assert re.findall(r"\w+_blocks?\.\d[.\d]*", comment) == blocks
    assert f"Costs {cost:,} parameters per rank." in comment
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("choice", CHOICES)
def test_the_slicer_cuts_each_trait_and_nothing_else_out_of_a_lora_of_everything(
    written, whole_lora, choice
):
    content, style, in_content, in_style, _ = CHOICES[choice]
    _, traits = written[choice]
    wanted = {"content": attention_of(content), "style": attention_of(style)}
    assert [len(kept) for kept in wanted.values()] == [in_content, in_style]
    for trait in filter(wanted.get, wanted):
        output = whole_lora.with_name(f"{trait}.safetensors")
        options = ("--traits", trait, "--traits_file", traits, "--output_path", output)
        assert slice_lora("--loras", whole_lora, *options) == 0
        assert modules(output) == wanted[trait]


def test_both_traits_at_once_are_two_files(written, whole_lora):
    _, traits = written["my_content_style"]
    options = ("--traits", "content", "style", "--traits_file", traits, "--not_combined")
    output = whole_lora.with_name("cut.safetensors")
    assert slice_lora("--loras", whole_lora, *options, "--output_path", output) == 0
    cuts = [modules(output.with_name(f"cut_{trait}.safetensors")) for trait in ("content", "style")]
    assert cuts == [attention_of("OUT00"), attention_of("OUT01+OUT02")]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_layers_of_blocks_are_their_attention(choice):
    content, style, *_ = CHOICES[choice]
    blocks = [block for group in groups(content, style).values() for block in group]
    layers = [layer.module for layer in attention_layers(blocks)]
    assert sorted(layers) == sorted(attention_of(content) | attention_of(style))


# ---- LyCORIS is asked ----------------------------------------------------------------------------


def asked(release: str, *presets: Path) -> list[list[str]]:
    """What trained_by says of presets, one after the other; nothing else may be printed."""
    code = (
        "import json, sys; from pathlib import Path; from blora.preset import trained_by\n"
        "print(json.dumps([trained_by(Path(preset)) for preset in sys.argv[1:]]))"
    )
    return json.loads(with_release(release, "-c", code, *presets))


@pytest.mark.slow
@pytest.mark.parametrize("release", LYCORIS)
def test_lycoris_is_asked_in_silence_and_answers_for_every_preset_anew(written, release):
    answers = asked(release, *(preset for preset, _ in written.values()))
    for answer, (content, style, *_) in zip(answers, CHOICES.values(), strict=True):
        assert sorted(answer) == sorted(attention_of(content) | attention_of(style))


@pytest.mark.slow
def test_a_preset_that_trains_something_else_is_answered_as_it_is(written, tmp_path):
    text = written["middle_style"][0].read_text()
    fewer, more = tmp_path / "fewer.toml", tmp_path / "more.toml"
    fewer.write_text(text.replace("to_(q|k|", "to_(k|"))
    more.write_text(text.replace(r"attn[12]\.to_(q|k|v|out\.0)$", ".*"))
    of_fewer, of_more = map(set, asked(NEWEST, fewer, more))
    middle = attention_of("MID")
    assert of_fewer == {module for module in middle if not module.endswith("_to_q")}
    start = "lora_unet_middle_block_1_transformer_blocks_"
    assert of_more - middle == {
        f"{start}{depth}_ff_net_{part}" for depth in range(10) for part in ("0_proj", "2")
    }


@pytest.mark.slow
def test_what_lycoris_cannot_build_is_one_sentence(tmp_path):
    with pytest.raises(BloraError) as error:
        trained_by(tmp_path / "none.toml")
    assert str(error.value).startswith(f"LyCORIS builds no network by {tmp_path}/none.toml (")
    assert "\n" not in str(error.value)


def test_without_lycoris_the_caller_hears_so(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "lycoris.kohya", None)
    with pytest.raises(ImportError):
        trained_by(written["middle_style"][0])


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "style", "sentence"),
    [
        ("my", "", "", NO_BLOCKS),
        ("my", "OUT00+OUT01", "MID+output_blocks.1.1", SHARED),
        *(
            (name, "OUT00", "", NOT_PLAIN.format(name.replace("\n", r"\n")))
            for name in ("", "my/own", "..", "my.toml", "mein schönes", "-x", "my\n", "C:own",
                         "x" * 61)
        ),
        *(
            (name, "OUT00", "OUT01", OF_THE_BUNDLE.format(name))
            for name in ("blora", "BLoRA_content", "bdora")
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(folder, name, content, style, sentence):
    with pytest.raises(BloraError) as error:
        write_own(name, groups(content, style), folder)
    assert str(error.value) == sentence
    assert everything(folder) == {}


def test_a_folder_without_presets_is_no_kohya_folder(tmp_path):
    with pytest.raises(BloraError) as error:
        write_own("my", groups("OUT00", "OUT01"), tmp_path)
    assert str(error.value) == (
        f"no folder {tmp_path}/lycoris_presets: copy the bundle into a kohya sd-scripts or "
        "kohya_ss folder"
    )


@pytest.mark.parametrize("taken", ["lycoris_presets/my_content_style.toml", "my_traits.json"])
@pytest.mark.parametrize("content", [b"my own\n", b"\xff\xfe", None])
def test_another_file_of_the_name_is_kept_and_nothing_is_written(folder, taken, content):
    (folder / taken).mkdir() if content is None else (folder / taken).write_bytes(content)
    before = everything(folder)
    with pytest.raises(BloraError) as error:
        write_own("my", groups("OUT00", "OUT01"), folder)
    assert (
        str(error.value)
        == f"{folder / taken} is there already: give --write another name, or delete it"
    )
    assert everything(folder) == before


def test_the_same_choice_again_keeps_the_files(folder):
    paths = write_own("my", groups("OUT00", "OUT01"), folder)
    dates = [path.stat().st_mtime_ns for path in paths]
    assert write_own("my", groups("output_blocks.0.1", "out1"), folder) == paths
    assert [path.stat().st_mtime_ns for path in paths] == dates


@pytest.mark.parametrize("failing", ["my_content_style.toml", "my_traits.json"])
@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_where_one_file_fails_the_other_does_not_stay(folder, monkeypatch, failing, step):
    real = getattr(Path, step)

    def failing_step(path: Path, *args, **options):
        if failing in path.name:
            raise OSError(28, "No space left on device")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, step, failing_step)
    with pytest.raises(BloraError, match=rf"^cannot write .*{failing} \(.*No space left"):
        write_own("my", groups("OUT00", "OUT01"), folder)
    assert everything(folder) == {}
