"""Draw docs/rank.svg: rank against parameters, file size and memory beside the model.

Run it as: python tools/plot_ranks.py
"""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from blora.sdxl import load_traits, sdxl_layers

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "docs/rank.svg"
RANKS = {16: "", 32: "", 64: "paper", 128: "", 256: "", 512: "", 1024: "original"}  # whose it is
FILE = 2  # bytes of a parameter in fp16
GREY, ORANGE, BLUE = "#656d76", "#b84a00", "#0b66b8"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": CHART.name,  # the same ids in every run
    "font.sans-serif": ["DejaVu Sans"],  # its widths place the text: it comes with matplotlib
    "font.size": 20,
    "hatch.linewidth": 0.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color"), GREY),
}
NAMED = 'role="img" aria-labelledby="title desc"'
HEAD = """<title id="title">Rank against parameters, file size and memory beside the model</title>
 <desc id="desc">{}</desc>
 <style>
  text {{ font-family: system-ui, "Segoe UI", Roboto, Arial, sans-serif !important }}
  @media (prefers-color-scheme: dark) {{ svg {{ filter: invert(1) hue-rotate(180deg) }} }}
 </style>
 """


def trained_shapes() -> list[tuple[int, ...]]:
    """[out, in] of each matrix that content and style train."""
    traits = load_traits(ROOT / "blora_traits.json")
    chosen = (traits["content"], traits["style"])
    layers = [layer for layer in sdxl_layers()["unet"].values() if layer.shape[1:]]  # no norms
    return [layer.shape for layer in layers if any(t.keeps(layer.module) for t in chosen)]


def memory_of(shapes: list[tuple[int, ...]]) -> int:
    """Bytes beside the model for each rank, in fp32: the weight, its gradient and Prodigy's state.

    The state is four numbers for each weight of lora_down, [rank, in], and three for each of
    lora_up, [out, rank], which begins at zero.
    """
    return 4 * sum((2 + 3) * outputs + (2 + 4) * inputs for outputs, inputs in shapes)


def size_text(size: float) -> str:
    """Bytes as "902 MB" or "10.0 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def plot_sizes(axes: Axes, per_rank: float, *, color: str, marker: str, label: str) -> None:
    """A line over all ranks, each marker with its size in bytes."""
    axes.plot(
        list(RANKS),
        [per_rank * rank for rank in RANKS],
        ms=15,
        lw=3,
        color=color,
        marker=marker,
        label=label,
    )
    for rank in RANKS:
        at = (rank, per_rank * rank)
        # The line rises to the right of every marker but the last.
        dx, ha = (0, "center") if rank == max(RANKS) else (6, "right")
        axes.annotate(size_text(at[1]), at, (dx, 17), "data", "offset points", ha=ha, weight=700)


def outgrown(shapes: list[tuple[int, ...]]) -> tuple[int, str]:
    """The rank above which a LoRA is larger than the smallest matrix that it changes."""
    # The matrix holds in x out numbers, and the LoRA in + out for each rank.
    rank, (outputs, inputs) = min((math.prod(shape) // sum(shape), shape) for shape in shapes)
    matrices = f"the {inputs} x {outputs} matrices"
    return rank, f"above rank {rank}\na LoRA is larger than\n{matrices}\nthat it changes"


def plot(shapes: list[tuple[int, ...]]) -> Figure:
    """The chart, 720 x 684 in an SVG."""
    per_rank = sum(map(sum, shapes))
    figure = Figure(figsize=(10, 9.5))
    axes = figure.add_axes((0.075, 0.15, 0.9, 0.75), xscale="log", yscale="log")
    axes.set(xlim=(11.8, 1470), ylim=(8e6, 2.4e10))
    memory = "memory beside the model, in fp32:\nweights, gradients and Prodigy's state"
    plot_sizes(axes, memory_of(shapes), color=ORANGE, marker="D", label=memory)
    plot_sizes(axes, FILE * per_rank, color=BLUE, marker="o", label="file, in fp16")
    axes.legend(loc="upper left", bbox_to_anchor=(-0.03, 1), frameon=False, handlelength=1)
    limit, text = outgrown(shapes)
    axes.axvline(limit, color=GREY, lw=2)
    axes.axvspan(limit, axes.get_xlim()[1], fc="none", ec=GREY, hatch="/", lw=0)
    axes.annotate(text, (limit, 1e7), (-14, 0), "data", "offset points", ha="right", ma="left")
    title = "Both scales are logarithmic: twice the rank, twice the cost."
    axes.set_title(f"Content and style: {len(shapes)} layers.\n{title}", loc="left", size=20)
    labels = [f"{rank}\n{user}\n{per_rank * rank / 1e6:.3g} M" for rank, user in RANKS.items()]
    axes.set_xticks(list(RANKS), labels)
    axes.set_xlabel(f"rank, and parameters: {per_rank:,} x rank", labelpad=8)
    axes.minorticks_off()
    axes.yaxis.set_visible(False)
    axes.spines[["top", "left", "right"]].set_visible(False)
    return figure


def describe(shapes: list[tuple[int, ...]]) -> str:
    """The chart in words."""
    per_rank = sum(map(sum, shapes))
    sizes = [(rank, FILE * per_rank * rank, memory_of(shapes) * rank) for rank in RANKS]
    ranks = [f"rank {n}: file {size_text(f)}, memory {size_text(m)}" for n, f, m in sizes]
    return "; ".join([*ranks, " ".join(outgrown(shapes)[1].split())])


def svg() -> str:
    """The file: the same in every run, with a description, and with colours for a dark page."""
    shapes = trained_shapes()
    with matplotlib.style.context(["default", STYLE]), io.StringIO() as file:
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        plot(shapes).savefig(file, format="svg", transparent=True, metadata=no_metadata)
        drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace("<svg", f"<svg {NAMED}", 1)
    return drawn.replace("<defs>", HEAD.format(describe(shapes)) + "<defs>", 1)


if __name__ == "__main__":
    CHART.write_text(svg(), encoding="utf-8", newline="\n")
