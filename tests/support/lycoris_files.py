"""Files that LyCORIS itself saves of layers of SDXL, and what it makes of a file."""

from __future__ import annotations

from pathlib import Path

import torch
from lycoris_modules import SDXL, make_tree
from torch import Tensor, nn

UNET = [
    "input_blocks.1.0.in_layers.2",
    "input_blocks.4.0.skip_connection",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k",
]
TRANSFORMER = "input_blocks.4.1.transformer_blocks.0"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"

# What follows network_args on kohya's command line, by algorithm and form.
SCALED = {
    "LoRA": {"algo": "lora"},
    "LoCon, tucker": {"algo": "locon", "use_tucker": "True"},
    "rank-stabilized LoRA": {"algo": "lora", "rs_lora": "True"},
    "LoHa": {"algo": "loha"},
    "LoHa, tucker": {"algo": "loha", "use_tucker": "True"},
    "LoKr, w2 factored": {"algo": "lokr"},
    "LoKr, both factored": {"algo": "lokr", "decompose_both": True},
    "LoKr, tucker": {"algo": "lokr", "use_tucker": "True"},
    "LoKr, both whole": {"algo": "lokr", "full_matrix": "True"},
    "full": {"algo": "full"},
    "IA3": {"algo": "ia3"},
    "GLoRA": {"algo": "glora"},
    # of which LyCORIS reads no convolution that it wrote
    "DyLoRA": {"algo": "dylora", "block_size": "1", "preset": "attn-mlp"},
    "norm": {"algo": "lora", "train_norm": "True"},
}
DORA = {
    f"{algo}, by {side}": {"algo": algo, "dora_wd": "True", "wd_on_output": by_row}
    for algo in ("lora", "loha", "lokr")
    for side, by_row in (("row", "True"), ("column", "False"))
}
REFUSED = DORA | {
    "OFT": {"algo": "diag-oft"},
    "OFT, rescaled": {"algo": "diag-oft", "rescaled": "True", "constraint": "0.01"},
    "BOFT": {"algo": "boft", "rank": 10},  # the smallest that goes into SDXL's widths
    # which begins with an SVD of each weight: seconds for each as wide as a text encoder
    "T-LoRA": {"algo": "tlora", "preset": "unet-transformer-only"},
}


def models() -> tuple[nn.Module, list[nn.Module]]:
    """A U-Net and two text encoders with a few of SDXL's layers; always the same numbers."""
    torch.manual_seed(0)
    unet = make_tree({name: SDXL["unet"][name] for name in UNET})
    unet.get_submodule(TRANSFORMER).add_module("norm1", nn.LayerNorm(640))
    return unet, [make_tree({TEXT: SDXL[encoder][TEXT]}) for encoder in ("te1", "te2")]


def base_weights() -> dict[str, Tensor]:
    """The weights of the models' layers by the names of LyCORIS' modules."""
    loras = lycoris_network({"algo": "lora"}).loras
    return {lora.lora_name: lora.org_module[0].weight.detach() for lora in loras}


def lycoris_network(arguments: dict[str, object]) -> nn.Module:
    """LyCORIS' network as kohya makes it for a training, on the models."""
    from lycoris.kohya import create_network

    options = {"rank": 2, "warn_on_unmatched": False} | arguments
    unet, encoders = models()
    network = create_network(1.0, options.pop("rank"), 1.5, None, encoders, unet, **options)
    network.apply_to(encoders, unet, True, True)
    return network


def lycoris_file(
    path: Path, arguments: dict[str, object], dtype: torch.dtype, moved: float = 0.1
) -> Path:
    """A file that LyCORIS saved after a training moved every parameter by some `moved`."""
    network = lycoris_network(arguments)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    network.save_weights(str(path), dtype, None)
    return path


def reload_lycoris(path: Path, arguments: dict[str, object]) -> dict[str, nn.Module]:
    """The modules of a network of this kind with the weights of a file, by name."""
    if arguments["algo"] == "dylora":  # which LyCORIS loads as the LoRA it has become
        arguments = arguments | {"algo": "lora"}
    network = lycoris_network(arguments)
    state = network.load_weights(str(path))
    assert set(state) <= {"missing keys"}
    assert all(key.endswith((".scalar", ".dtype_tensor")) for key in state.get("missing keys", []))
    return {lora.lora_name: lora for lora in network.loras}


def lycoris_change(module: nn.Module) -> list[Tensor]:
    """The module's change as LyCORIS computes it in training: of the weight, and of the bias."""
    if type(module).__name__ in ("LohaModule", "LokrModule"):
        return [module.get_weight(module.shape)]  # get_diff_weight has alpha / rank in it twice
    return [change for change in module.get_diff_weight() if change is not None]
