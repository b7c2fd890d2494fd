"""Every algorithm that PEFT can save is cut as PEFT merges it, or refused by its name."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from exact_strength import slice_all
from lora_algebra import bias_change, final_weight, read_modules, weight_change
from lora_files import CONTENT, lora_module
from peft_files import LAYERS, Setting, adapted, assert_near, merges
from safetensors.torch import load_file, save_file
from slicing import everything
from torch import Tensor, nn

QUERY, QUERY_MODULE = next(iter(LAYERS.items()))
ONE_LAYER = {QUERY: QUERY_MODULE}
OTHER = {"r": 4, "alpha": 6, "init_weights": False}
# By PEFT's own name, peft_type in the settings.
CUT: dict[str, Setting] = {
    "LORA": ("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": False}),
    "LOHA": ("LoHaConfig", OTHER),
    "LOKR": ("LoKrConfig", OTHER),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "init_weights": False}),
}
REFUSED: dict[str, Setting] = {
    "ADALORA": ("AdaLoraConfig", {"total_step": 10}),
    "ADAMSS": ("AdamssConfig", {}),
    "BEFT": ("BeftConfig", {}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "C3A": ("C3AConfig", {"block_size": 32}),
    "DEFT": ("DeftConfig", {}),
    "DELORA": ("DeloraConfig", {}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 10}),
    "FROD": ("FrodConfig", {}),
    "GLORA": ("GloraConfig", {}),
    "GRALORA": ("GraloraConfig", {}),
    "HIRA": ("HiraConfig", {}),
    "HRA": ("HRAConfig", {}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "LILY": ("LilyConfig", {}),
    "LN_TUNING": ("LNTuningConfig", {}),
    "MISS": ("MissConfig", {}),
    "OSF": ("OSFConfig", {}),
    "PEANUT": ("PeanutConfig", {}),
    "POLY": ("PolyConfig", {}),
    "PSOFT": ("PsoftConfig", {}),
    "PVERA": ("PveraConfig", {}),
    "RANDLORA": ("RandLoraConfig", {}),
    "ROAD": ("RoadConfig", {}),
    "SHIRA": ("ShiraConfig", {"r": 4}),
    "SUPERTUNING": ("SupertuningConfig", {}),
    "TINYLORA": ("TinyLoraConfig", {}),
    "TRAINABLE_TOKENS": ("TrainableTokensConfig", {"token_indices": [1, 2]}),
    "UNILORA": ("UniLoraConfig", {}),
    "VBLORA": ("VBLoRAConfig", {"num_vectors": 8, "vector_length": 32}),
    "VERA": ("VeraConfig", {}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 10}),
}
# They change what a language model reads or how it is run, not layers such as SDXL has.
NOT_OF_LAYERS = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
}  # fmt: skip


class Saved(NamedTuple):
    kind: str
    lora: Path  # beside its adapter_config.json
    named: dict[str, Tensor]  # from the model's state_dict, with an adapter of another name


ADAPTER = "my стиль-1"


def state_with_name(setting: Setting) -> dict[str, Tensor]:
    """The adapter's tensors in the model's own state_dict, where its name stands in each key."""
    state = adapted(setting, ONE_LAYER, ADAPTER).state_dict()
    return {key: tensor.clone() for key, tensor in state.items() if ADAPTER in key}


@pytest.fixture(scope="module", params=REFUSED)
def only_pefts(request: pytest.FixtureRequest, tmp_path_factory) -> Saved:
    setting, folder = REFUSED[request.param], tmp_path_factory.mktemp("adapter")
    adapted(setting, ONE_LAYER).save_pretrained(folder)
    lora = folder / "adapter_model.safetensors"
    return Saved(request.param, lora, state_with_name(setting))


def names(sentence: str, kind: str) -> bool:
    """Whether a sentence names the algorithm, however it is written: VB-LoRA is VBLORA."""
    return kind.replace("_", "") in re.sub(r"[\W_]", "", sentence).upper()


def test_each_algorithm_of_this_peft_is_in_the_tables():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == {*CUT, *REFUSED, *NOT_OF_LAYERS}


@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_what_only_peft_can_load_is_refused_by_the_name_in_its_settings(
    only_pefts, slicer, strength
):
    assert slicer(only_pefts.lora, "--alphas", strength, *everything(slicer.folder)) == 1
    sentence = slicer.sentence.replace("UniLoRA", "UNILORA")  # known by its one tensor
    assert sentence == (
        f"{only_pefts.lora} is PEFT's {only_pefts.kind}, which kohya's names cannot express: use "
        "it with PEFT"
    )


@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_without_its_settings_it_is_refused_by_its_tensors(only_pefts, slicer, strength):
    lora = Path(shutil.copy(only_pefts.lora, slicer.folder / "alone.safetensors"))
    assert slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 1
    assert names(slicer.sentence, only_pefts.kind)
    save_file(only_pefts.named, lora)
    assert slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 1
    assert names(slicer.sentence, only_pefts.kind)


@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_beside_a_lora_of_other_layers_it_is_left_out_and_named_or_refused(
    only_pefts, slicer, strength
):
    other = CONTENT.format(0, 1, "q")
    for tensors in (load_file(only_pefts.lora), only_pefts.named):
        lora = slicer.folder / "both.safetensors"
        save_file(tensors | lora_module(other), lora)
        if slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 0:
            assert set(read_modules(slicer.output)) == {other}
        assert any(key in slicer.err for key in tensors)


# ---- LoRA, LoHa, LoKr and OFT --------------------------------------------------------------------

DORA = ("LoraConfig", CUT["LORA"][1] | {"use_dora": True})
EXACT = {kind: CUT[kind] for kind in ("LORA", "LOHA", "LOKR")} | {"DoRA": DORA}


@pytest.mark.parametrize("setting", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(
    "adapter", ["default", "my-adapter", "стиль", "a b", "v1,5", "weight", "0"]
)
def test_an_adapter_has_any_name_in_a_models_own_state(tmp_path, setting, adapter):
    """Its keys end in `lora_A.my-adapter.weight` or `hada_w1_a.my-adapter`."""
    model = adapted(setting, LAYERS, adapter)
    state = {key: t.clone() for key, t in model.state_dict().items() if "base_layer" not in key}
    assert all(f".{adapter}" in key for key in state)
    lora = tmp_path / "in.safetensors"
    save_file(state, lora)
    modules = read_modules(slice_all(lora, 1.0))
    wanted = merges(model.base_model.model, LAYERS)
    assert set(modules) == set(wanted)
    for name, merge in wanted.items():
        unscaled = merge.change / merge.scaling  # as nothing says the alpha
        if setting is not DORA:
            assert_near(weight_change(modules[name]), unscaled)
        else:
            ones = [1] * (merge.base.dim() - 1)
            assert modules[name]["dora_scale"].shape == (len(merge.base), *ones)


def test_an_oft_is_copied_with_a_word_on_who_reads_it(slicer):
    model = adapted(CUT["OFT"], ONE_LAYER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)  # PEFT sums a series for the inverse, which holds for small ones
    model.save_pretrained(slicer.folder / "adapter")
    lora = slicer.folder / "adapter/adapter_model.safetensors"
    assert slicer(lora, *everything(slicer.folder)) == 0
    assert "OneTrainer" in slicer.err
    module = model.base_model.model.get_submodule(QUERY).double()
    base = module.base_layer.weight.detach().clone()
    module.merge()
    [slice_of_it] = read_modules(slicer.output).values()
    assert_near(weight_change(slice_of_it, base), module.base_layer.weight - base, 1e-4)
    assert slicer(lora, "--alphas", "0.5", *everything(slicer.folder)) == 1


# ---- What else a LoraConfig says -----------------------------------------------------------------

EVEN = {"r": 4, "lora_alpha": 6}
MATRIX = {"target_modules": [QUERY]}  # what some can train alone
SAME_CHANGE = {
    "a start from noise": {"init_lora_weights": "gaussian"},
    "an orthogonal start": {"init_lora_weights": "orthogonal"} | MATRIX,
    "MiCA": {"init_lora_weights": "mica"} | MATRIX,
    "a start from data": {"init_lora_weights": "eva"} | MATRIX,
    "a bias of lora_B": {"lora_bias": True},
    "trained biases": {"bias": "all"},
    "trained biases of its layers": {"bias": "lora_only"},
    "VeLoRA": {"velora_config": "VeloraConfig"} | MATRIX,
    "MonteCLoRA": {"monteclora_config": "MontecloraConfig"} | MATRIX,
    "a whole layer beside": {"modules_to_save": ["conv_in"]} | MATRIX,
}
# What the sentence must name.
OTHER_CHANGE = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "KaSA": {"kasa_config": "KasaConfig"},
    "BD-LoRA": {"use_bdlora": "BdLoraConfig"},
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
}


def with_config(options: dict[str, object]) -> dict[str, object]:
    """The options with PEFT's own objects for names of classes."""
    from peft.tuners.lora import config

    needs = {"BdLoraConfig": {"target_modules_bd_a": ["to_q"], "nblocks": 2}}
    made = {}
    for name, value in options.items():
        is_class = isinstance(value, str) and value.endswith("Config")
        made[name] = getattr(config, value)(**needs.get(value, {})) if is_class else value
    return EVEN | made


@pytest.mark.parametrize("options", SAME_CHANGE.values(), ids=SAME_CHANGE)
@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_what_leaves_the_merge_as_it_is_leaves_the_slice(slicer, options, strength):
    model = adapted(("LoraConfig", with_config(options)), LAYERS, trained=True)
    model.save_pretrained(slicer.folder / "adapter")
    lora = slicer.folder / "adapter/adapter_model.safetensors"
    layers = {layer: LAYERS[layer] for layer in options.get("target_modules", LAYERS)}
    assert slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 0
    assert "warning: no alpha" not in slicer.err
    modules = read_modules(slicer.output)
    wanted = merges(model.base_model.model, layers)
    assert set(modules) == set(wanted)
    for name, merge in wanted.items():
        assert_near(weight_change(modules[name]), float(strength) * merge.change)
        if "lora_bias" in options:
            assert_near(bias_change(modules[name]), float(strength) * merge.bias_change)


@pytest.mark.parametrize(("name", "options"), OTHER_CHANGE.items())
@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_what_makes_the_merge_another_is_refused_by_its_name(slicer, name, options, strength):
    adapted(("LoraConfig", with_config(options)), ONE_LAYER).save_pretrained(slicer.folder / "a")
    lora = slicer.folder / "a/adapter_model.safetensors"
    assert slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 1
    assert name in slicer.sentence


@pytest.mark.parametrize("name", ["KaSA", "BD-LoRA"])
@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_factors_of_another_meaning_are_refused_without_settings_too(slicer, name, strength):
    options = with_config(OTHER_CHANGE[name])
    adapted(("LoraConfig", options), ONE_LAYER).save_pretrained(slicer.folder / "a")
    lora = slicer.folder / "b.safetensors"
    shutil.copy(slicer.folder / "a/adapter_model.safetensors", lora)
    assert slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 1
    assert name in slicer.sentence


# ---- diffusers' own U-Net ------------------------------------------------------------------------

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn{}"
FUSED = {ATTENTION.format(1): ("to_qkv", "qkv"), ATTENTION.format(2): ("to_kv", "kv")}
KOHYA = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn{}_to_{}"


@pytest.fixture(scope="module")
def untouched() -> nn.Module:
    from diffusers_sdxl import sdxl_pipeline

    return sdxl_pipeline((1, 1, 1)).unet


@pytest.fixture
def unet(untouched) -> nn.Module:
    """A U-Net of SDXL's layers, with numbers in those that the tests train."""
    model = copy.deepcopy(untouched)
    torch.manual_seed(0)
    for layer in (
        *LAYERS,
        *(f"{attention}.to_{letter}" for attention in FUSED for letter in "qkv"),
    ):
        module = model.get_submodule(layer)
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(torch.randn(parameter.shape)))
    return model


def save_unet(unet: nn.Module, folder: Path, setting: Setting, adapter: str) -> Path:
    """What diffusers saves of a U-Net with an adapter; the settings are in the metadata."""
    import peft

    name, options = setting
    unet.add_adapter(getattr(peft, name)(**options), adapter_name=adapter)
    unet.save_lora_adapter(folder, adapter_name=adapter)
    return folder / "pytorch_lora_weights.safetensors"


TARGETS = {"target_modules": list(LAYERS)}
BY_LAYER = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"^conv_in": 1.5, "resnets.*short": 9}}
LORA = CUT["LORA"][1] | TARGETS
IN_METADATA: dict[str, Setting] = {
    "alpha": ("LoraConfig", LORA),
    "rank-stabilized": ("LoraConfig", LORA | {"use_rslora": True}),
    "by pattern": ("LoraConfig", LORA | BY_LAYER),
    "rank-stabilized by pattern": ("LoraConfig", LORA | BY_LAYER | {"use_rslora": True}),
    "DoRA": ("LoraConfig", LORA | {"use_dora": True}),
    "DoRA by pattern": ("LoraConfig", LORA | BY_LAYER | {"use_dora": True}),
    "LoHa": ("LoHaConfig", OTHER | TARGETS),
    "LoKr": ("LoKrConfig", OTHER | TARGETS),
}


@pytest.mark.parametrize("setting", IN_METADATA.values(), ids=IN_METADATA)
@pytest.mark.parametrize("adapter", ["default", "my-adapter"])
def test_what_a_unet_saves_changes_what_peft_merges(unet, slicer, setting, adapter):
    lora = save_unet(unet, slicer.folder / "unet", setting, adapter)
    is_dora = "use_dora" in setting[1]
    wanted = merges(unet, LAYERS)
    for strength in (1.0,) if is_dora else (1.0, 0.5, -1.0):
        assert slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 0
        assert slicer.err == ""
        modules = read_modules(slicer.output)
        assert set(modules) == set(wanted)
        for name, merge in wanted.items():
            found = final_weight(modules[name], merge.base) - merge.base
            assert_near(found, strength * merge.change)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("strength", ["1", "0.5"])
def test_a_start_from_the_base_model_is_refused_in_metadata_too(unet, slicer, start, strength):
    setting = ("LoraConfig", {"init_lora_weights": start, "target_modules": [QUERY]})
    lora = save_unet(unet, slicer.folder / "unet", setting, "default")
    assert slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 1
    assert f"init_lora_weights={start}" in slicer.sentence


def test_a_tuner_of_pefts_alone_is_refused_in_metadata_too(unet, slicer):
    lora = save_unet(unet, slicer.folder / "unet", with_target(REFUSED["ADALORA"]), "default")
    assert slicer(lora, *everything(slicer.folder)) == 1
    assert "ADALORA" in slicer.sentence


def with_target(setting: Setting) -> Setting:
    return setting[0], setting[1] | {"target_modules": [QUERY]}


FUSED_SETTINGS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rank-stabilized, by pattern": {"use_rslora": True, "alpha_pattern": {"to_kv": 2}},
}


@pytest.mark.parametrize("options", FUSED_SETTINGS.values(), ids=FUSED_SETTINGS)
def test_fused_projections_are_split_into_those_of_sdxl(unet, slicer, options):
    for attention in FUSED:
        unet.get_submodule(attention).fuse_projections()
    targets = {"target_modules": [f"{of}.{name}" for of, (name, _) in FUSED.items()]}
    lora = save_unet(unet, slicer.folder / "unet", ("LoraConfig", LORA | options | targets), "a")
    wanted = merges(unet, {name: name for name in targets["target_modules"]})
    for strength in (1.0,) if "use_dora" in options else (1.0, 0.5):
        assert slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 0
        modules = read_modules(slicer.output)
        for number, (of, (fused, letters)) in enumerate(FUSED.items(), start=1):
            merge = wanted[f"{of}.{fused}"]
            parts = [x.chunk(len(letters)) for x in (merge.base, merge.merged)]
            for letter, base, merged in zip(letters, *parts, strict=True):
                module = modules.pop(KOHYA.format(number, letter))
                change = final_weight(module, base) - base
                assert_near(change, strength * (merged - base))
        assert modules == {}


# ---- Programs that pip does not have, by the layout of their keys --------------------------------

OUT = "output_blocks.0.1.transformer_blocks.0.attn1.to_out.0"
OUT_MODULE = f"lora_unet_{OUT.replace('.', '_')}"


@pytest.mark.parametrize("place", [OUT_MODULE, f"diffusion_model.{OUT}"])
def test_a_bias_of_swarmuis_extraction_is_scaled_with_the_factors(slicer, place):
    lora = slicer.folder / "swarm.safetensors"
    values = torch.randn(1280)
    factors = lora_module(OUT_MODULE, dtype=torch.float32).items()
    tensors = {key.replace(OUT_MODULE, place): tensor for key, tensor in factors}
    save_file(tensors | {f"{place}.bias.diff": values}, lora)
    for strength in (1.0, 0.5, -1.0):
        assert slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 0
        [module] = read_modules(slicer.output).values()
        assert set(module) == {"alpha", "diff_b", "lora_down.weight", "lora_up.weight"}
        assert_near(module["diff_b"], strength * values)


def test_a_whole_change_of_ziplora_is_a_diff(slicer):
    lora = slicer.folder / "zip.safetensors"
    change = torch.randn(640, 640)
    save_file({f"unet.unet.{QUERY}.lora.weight": change}, lora)
    for strength in (1.0, 0.5):
        assert slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 0
        assert_near(read_modules(slicer.output)[QUERY_MODULE]["diff"], strength * change)


def test_a_t_lora_of_its_own_repository_is_exact_or_refused(slicer):
    """p diag(lambda) q less the same of where it started, in six tensors."""
    shapes = {"q_layer.weight": (2, 640), "p_layer.weight": (640, 2), "lambda_layer": (1, 2)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    names = {"q_layer.weight": "base_q.weight", "p_layer.weight": "base_p.weight"}
    names |= {"lambda_layer": "base_lambda"}
    tensors |= {names[name]: torch.randn_like(tensors[name]) for name in shapes}

    def product(*of: str) -> Tensor:
        q, p, middle = (tensors[name] for name in of)
        return p * middle @ q

    change = product(*shapes) - product(*(names[name] for name in shapes))
    lora = slicer.folder / "tlora.safetensors"
    place = QUERY.replace(".to_q", ".processor.to_q_lora")
    save_file({f"{place}.{name}": tensor.float() for name, tensor in tensors.items()}, lora)
    for strength in (1.0, 0.5):
        if slicer(lora, "--alphas", strength, *everything(slicer.folder)) == 0:
            assert_near(weight_change(read_modules(slicer.output)[QUERY_MODULE]), strength * change)
        else:
            assert "base_q" in slicer.sentence or "T-LoRA" in slicer.sentence
