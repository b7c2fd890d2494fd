"""The recipes "a smaller file" and "go on training a slice", and a training without internet.

networks/resize_lora.py resizes files as wide as SDXL's layers, LyCORIS loads slices into
sd-scripts' own SDXL, and sd-scripts saves its tokenizers for another machine.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kohya_folder import ROOT
from lora_algebra import Module, alpha_over_rank, final_weight, read_modules, weight_change
from lora_files import CONTENT, METADATA, STYLE, lora_module, write
from lora_forms import FORMS, INPUT, base_weight, make_module, write_modules
from preset_modules import block_modules
from readme_commands import blocks_of
from real_kohya import BEFORE_0_10, KOHYA_ROOT, SUPPORT, kohya_python
from safetensors import safe_open
from safetensors.torch import load_file
from slicing import all_traits, refusal, slice_lora, stored
from torch import Tensor

pytestmark = pytest.mark.slow

MILLIONTH = 1e-6


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---- A smaller file ------------------------------------------------------------------------------

RESIZE = """
import json, sys
from networks import resize_lora
for line in json.load(sys.stdin):
    resize_lora.resize(resize_lora.setup_parser().parse_args(line))
"""
DYNAMIC = "--dynamic_method sv_fro --dynamic_param 0.99"
RANK, NEW_RANK = 40, 32  # the new one as the page has it
ATTENTION, KERNEL = INPUT["attention"], INPUT["3x3"]
LOHA, LOKR = ("LoHa", "LoHa, tucker"), ("LoKr, both whole", "LoKr, w2 factored", "LoKr, tucker")


def two_blocks(rank: int, projections: tuple[str, ...]) -> dict[str, Tensor]:
    """Attention of transformer block 0 in content and style, no two modules alike.

    Each rank of a module does less than the one before it.
    """
    names = list(itertools.product((CONTENT, STYLE), (1, 2), projections))
    tensors: dict[str, Tensor] = {}
    for index, (block, attention, projection) in enumerate(names):
        name = block.format(0, attention, projection)
        made = lora_module(name, rank=rank, alpha=rank, dtype=torch.float32)
        fade = 0.5 + 0.45 * index / len(names)
        made[f"{name}.lora_down.weight"] *= (fade ** torch.arange(rank))[:, None]
        tensors |= {key: tensor.half() for key, tensor in made.items()}
    return tensors


def singular_values(module: Module) -> Tensor:
    """Those of a LoRA module's change in float64, by the triangles of its factors: they are few."""
    up, down = (module[f"lora_{end}.weight"].double() for end in ("up", "down"))
    triangles = [torch.linalg.qr(factor).R for factor in (up, down.T)]
    return alpha_over_rank(module) * torch.linalg.svdvals(triangles[0] @ triangles[1].T)


def excess(before: Module, after: Module) -> float:
    """By how much a module is farther off than the best of its rank, beside its change."""
    change, singular = weight_change(before), singular_values(before)
    best = singular[len(after["lora_down.weight"]) :].norm()
    return (((weight_change(after) - change).norm() - best) / singular.norm()).item()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict[str, Path]:
    """The page's two commands, run as they are; every file by its stem."""
    folder = tmp_path_factory.mktemp("recipe")
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    section = page.split("\n## A smaller file\n")[1].split("\n## ")[0]
    [typed] = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    resize, cut = map(shlex.split, typed.splitlines())
    trained = folder / resize[resize.index("--model") + 1]
    trained.parent.mkdir(parents=True)
    write(trained, two_blocks(RANK, ("q", "k", "v", "out_0")))
    kohya_python(Path(KOHYA_ROOT, resize[1]), *resize[2:], cwd=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert slice_lora(*cut[2:]) == 0
    return {path.stem: path for path in (trained, *folder.glob("*.safetensors"))}


def worst_excess(before: Path, after: Path, rank: int) -> float:
    """The largest excess of a file's modules, all of which are now of this rank."""
    old, new = read_modules(before), read_modules(after)
    assert list(new) == list(old)
    assert {len(module["lora_down.weight"]) for module in new.values()} == {rank}
    return max(excess(old[name], new[name]) for name in old)


def test_a_resized_lora_is_the_best_of_its_rank_but_for_the_rounding_of_fp16(recipe):
    worst = worst_excess(recipe["my_project_1"], recipe["my_smaller"], NEW_RANK)
    assert worst < torch.finfo(torch.float16).eps / 2


def test_a_slice_of_it_is_the_resized_file_bit_for_bit_under_a_name_of_its_own(recipe):
    resized, content = stored(recipe["my_smaller"]), stored(recipe["my_content"])
    assert content == {key: resized[key] for key in content}
    assert len(content) == 3 * 8
    assert {kind for kind, _, _ in content.values()} == {"F16"}
    told = metadata(recipe["my_content"])
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("32", "32.0")
    assert told["ss_training_comment"].startswith(
        "content of my_smaller.safetensors at 1; dimension is resized from 40 to 32"
    )
    # This is why the slicer comes second: programs tell files apart by this name.
    names = [metadata(recipe[stem])["ss_output_name"] for stem in ("my_smaller", "my_content")]
    assert names == [METADATA["ss_output_name"], "my_content"]


@pytest.fixture(scope="module")
def resized(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Files of other forms before and after, all in one run of the tool."""
    if "LORA_DOWN_UP_FORMATS" not in Path(KOHYA_ROOT, "networks/resize_lora.py").read_text("utf-8"):
        pytest.skip("sd-scripts before 0.10 stops at a file without a LoRA on a Linear")
    folder = tmp_path_factory.mktemp("resized")
    dora = make_module(ATTENTION, FORMS["LoRA"], 4, 4.0, torch.float16)
    lengths = base_weight(ATTENTION).square().sum(0, keepdim=True).sqrt()
    noise = torch.randn(lengths.shape, generator=torch.Generator().manual_seed(0))
    dora["dora_scale"] = (lengths * (1 + 0.01 * noise)).half()
    files = {
        name: {layer: make_module(layer, FORMS[name], 4, 4.0, torch.float16)}
        for name in (*LOHA, *LOKR, "LoCon, tucker")
        for layer in [KERNEL if "tucker" in name else ATTENTION]
    }
    files |= {"DoRA": {ATTENTION: dora}, "tucker, same rank": files["LoCon, tucker"]}
    two = write(folder / "two.safetensors", two_blocks(16, ("q",)))
    paths, options = {}, {}
    for name, made in files.items():
        paths[name] = folder / f"{name}.safetensors"
        write_modules(paths[name], made, METADATA)
        options[name] = f"--save_precision fp16 --new_rank {4 if 'same' in name else 2}"
    options["dynamic"] = f"{DYNAMIC} --save_precision fp16 --new_rank 12"
    options["no precision"] = "--new_rank 12"
    pairs = {n: (paths.get(n, two), folder / f"{n}, resized.safetensors") for n in options}
    lines = [
        ["--model", str(before), "--save_to", str(after), *options[name].split()]
        for name, (before, after) in pairs.items()
    ]
    kohya_python("-c", RESIZE, cwd=folder, question=lines)
    return pairs


def test_without_a_precision_the_file_is_in_fp32_and_the_best_of_its_rank_to_a_millionth(resized):
    assert worst_excess(*resized["no precision"], 12) < MILLIONTH
    kinds = [{kind for kind, _, _ in stored(path).values()} for path in resized["no precision"]]
    assert kinds == [{"F16"}, {"F32"}]


def alphas(path: Path) -> set[float]:
    return {module["alpha"].item() for module in read_modules(path).values()}


def test_dynamic_ranks_leave_alphas_that_differ_until_both_traits_are_cut_into_one(
    resized, tmp_path
):
    _, dynamic = resized["dynamic"]
    assert metadata(dynamic)["ss_network_dim"] == "Dynamic"
    one, both = tmp_path / "one.safetensors", tmp_path / "both.safetensors"
    cut = "--loras", dynamic, "--output_path"
    assert slice_lora(*cut, one) == slice_lora(*cut, both, "--traits", "content", "style") == 0
    assert [len(alphas(path)) for path in (dynamic, one, both)] == [4, 2, 1]
    before, after = read_modules(dynamic), read_modules(both)
    for name, module in before.items():
        change = weight_change(module)
        assert (weight_change(after[name]) - change).norm() < 1e-3 * change.norm()


@pytest.mark.parametrize("form", [*LOHA, *LOKR])
def test_loha_and_lokr_are_left_as_they_are_with_metadata_that_is_not_true(resized, form):
    before, after = resized[form]
    assert stored(after) == stored(before)
    told = metadata(after)
    assert told["ss_training_comment"] == "dimension is resized from None to 2; "
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("2", "None")


def cut_all(lora: Path, folder: Path) -> list[str | Path]:
    """Options of the slicer that put every module into a slice."""
    place = ["--output_path", folder / "slice.safetensors"]
    return ["--loras", lora, "--traits", "all", "--traits_file", all_traits(folder), *place]


def test_a_tucker_core_no_longer_fits_its_factors_and_the_slicer_refuses_it(
    resized, tmp_path, capsys
):
    _, after = resized["LoCon, tucker"]
    [module] = read_modules(after).values()
    assert {suffix: list(tensor.shape) for suffix, tensor in module.items()} == {
        "alpha": [],
        "lora_down.weight": [2, 4, 1, 1],
        "lora_mid.weight": [4, 4, 3, 3],
        "lora_up.weight": [320, 2, 1, 1],
    }
    sentence = refusal(capsys, *cut_all(after, tmp_path))
    assert sentence.startswith(f'every "all" module in {after} is incomplete (')


def test_nor_does_it_at_the_same_rank_and_the_slicer_warns_of_it(resized, tmp_path, capsys):
    """The factors are turned and the core is not, which no shape shows."""
    path = resized["tucker, same rank"][1]
    (before,), (after,) = (read_modules(p).values() for p in resized["tucker, same rank"])
    assert {s: t.shape for s, t in after.items()} == {s: t.shape for s, t in before.items()}
    change = weight_change(before)
    assert (weight_change(after) - change).norm() > 0.5 * change.norm()
    assert slice_lora(*cut_all(path, tmp_path)) == 0
    assert capsys.readouterr().err.startswith(f"warning: {path.name} was resized, ")


def test_a_dora_keeps_its_scale_and_gets_the_best_factors(resized):
    (before,), (after,) = (read_modules(path).values() for path in resized["DoRA"])
    assert torch.equal(after["dora_scale"], before["dora_scale"])
    assert abs(excess(before, after)) < MILLIONTH
    base = base_weight(ATTENTION)
    apart = (final_weight(after, base) - final_weight(before, base)).norm()
    assert apart < singular_values(before)[2:].norm()


# ---- Continue training a slice -------------------------------------------------------------------

SLICE_RANK, SLICE_ALPHA = 4, 2.0
WITH_PRESET = [
    *"--pretrained_model_name_or_path=none --network_module=lycoris.kohya".split(),
    *f"--network_train_unet_only --network_dim={SLICE_RANK} --network_alpha={SLICE_ALPHA}".split(),
    *"--network_args preset=lycoris_presets/blora_content_style.toml".split(),
]
COMMAND_LINES = {
    "same": WITH_PRESET,
    "half the alpha": [*WITH_PRESET, f"--network_alpha={SLICE_ALPHA / 2}"],
    "another rank": [*WITH_PRESET, f"--network_dim={2 * SLICE_RANK}"],
    "DoRA": [*WITH_PRESET, "dora_wd=True", "wd_on_output=False"],
}


BOTH = block_modules("output_blocks_0_1") | block_modules("output_blocks_1_1")


def write_slices(folder: Path, names: list[str], dora: bool) -> None:
    """The same content slice with all 80 modules, cut by the slicer."""
    tensors = {}
    for module in sorted(BOTH):
        made = lora_module(module, rank=SLICE_RANK, alpha=SLICE_ALPHA)
        if dora:
            inputs = made[f"{module}.lora_down.weight"].shape[1]
            made[f"{module}.dora_scale"] = torch.linspace(1, 2, inputs)[None].half()
        tensors |= made
    parent = write(folder / "parent.safetensors", tensors)
    for name in names:
        assert slice_lora("--loras", parent, "--output_path", folder / f"{name}.safetensors") == 0


@pytest.fixture(scope="module")
def going_on(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder with slices, and what LyCORIS makes of them: see kohya_probe.py."""
    folder = tmp_path_factory.mktemp("going_on")
    write_slices(folder, ["alone", "same", "half the alpha", "another rank"], dora=False)
    write_slices(folder, ["DoRA", "DoRA, alone"], dora=True)
    path = str(folder / "{}.safetensors").format
    question = {
        "command_lines": COMMAND_LINES,
        "continue": {path(name): name for name in COMMAND_LINES},
        "from_file": [path("alone"), path("DoRA, alone")],
        "save": {path(n): path(f"{n}, trained") for n in ("alone", "half the alpha", "DoRA")},
    }
    probe = [SUPPORT / "kohya_probe.py", KOHYA_ROOT]
    answer = json.loads(kohya_python(*probe, cwd=ROOT, path=ROOT, question=question))
    return folder, {Path(file).stem: told for file, told in answer["loaded"].items()}


def sliced_again(folder: Path, name: str) -> Path:
    """The content of what was trained."""
    trained, again = (folder / f"{name}, {when}.safetensors" for when in ("trained", "again"))
    assert slice_lora("--loras", trained, "--output_path", again) == 0
    return again


def test_dim_from_weights_trains_the_slices_modules_from_where_they_were(going_on):
    _, found = going_on
    assert set(found["alone"]["modules"]) == block_modules("output_blocks_0_1")
    assert found["alone"]["differing"] == []
    assert max(found["alone"]["off"], found["alone"]["saved_off"]) < MILLIONTH


@pytest.mark.parametrize("name", ["alone", "DoRA"])
def test_what_is_then_saved_gives_the_same_keys_when_it_is_sliced_again(going_on, name):
    folder, _ = going_on
    paths = folder / f"{name}.safetensors", sliced_again(folder, name)
    before, after = map(load_file, paths)
    assert sorted(after) == sorted(before)
    moved = [key for key in before if not torch.equal(after[key].half(), before[key])]
    assert sorted(moved) == sorted(key for key in before if not key.endswith(".alpha"))


def test_the_preset_trains_both_blocks_and_the_slice_is_exact_at_its_own_rank_and_alpha(going_on):
    _, found = going_on
    for name in ("same", "DoRA"):
        assert (set(found[name]["modules"]), found[name]["differing"]) == (BOTH, [])
        assert found[name]["off"] < MILLIONTH


def test_at_half_the_alpha_the_slice_trains_at_half_its_strength_and_is_saved_at_twice(going_on):
    folder, found = going_on
    half = found["half the alpha"]
    assert half["differing"] == []
    assert [half["off"], half["saved_off"]] == pytest.approx([0.5, 0.5], abs=MILLIONTH)
    assert alphas(sliced_again(folder, "half the alpha")) == {SLICE_ALPHA}


def test_another_rank_is_refused(going_on):
    assert "size mismatch" in going_on[1]["another rank"]["refused"]


def test_dim_from_weights_is_refused_for_a_dora_with_a_scale_of_its_inputs(going_on):
    assert "doesn't match the broadcast shape" in going_on[1]["DoRA, alone"]["refused"]


# ---- Without internet ----------------------------------------------------------------------------


@pytest.mark.skipif(BEFORE_0_10, reason="0.9 has no strategy_sdxl")
def test_the_pages_line_saves_both_tokenizers_where_sd_scripts_looks_for_them(
    tmp_path, monkeypatch, cached_tokenizers
):
    made = Path(cached_tokenizers.partition("=")[2])
    downloaded = {}
    for folder in filter(Path.is_dir, made.iterdir()):  # as huggingface_hub keeps a download
        kept = tmp_path / f"hub/models--{folder.name.replace('_', '--')}"
        shutil.copytree(folder, kept / "snapshots/0123")
        (kept / "refs").mkdir()
        (kept / "refs/main").write_text("0123")
        downloaded[folder.name] = json.loads((folder / "vocab.json").read_text("utf-8"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    [line] = [line for line in "".join(blocks_of("upkeep", "")).splitlines() if " -c " in line]
    kohya_python(*shlex.split(line)[1:], cwd=tmp_path)
    saved = {path.parent.name: path for path in tmp_path.glob("tokenizers/*/vocab.json")}
    assert {name: json.loads(p.read_text("utf-8")) for name, p in saved.items()} == downloaded
