"""What is compared: the saves of trainings, row by row, and their slices, column by column."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob
from itertools import combinations, groupby, product
from pathlib import Path
from typing import Any

from blora.drawing.gallery import Gallery
from blora.drawing.pictures import Drawing, Prompt, digest, stamp
from blora.sdxl import Trait
from blora.sheet import Heading, Line, Section
from blora.slicer.cut import Cut, Slice, take_slice
from blora.slicer.keys import DORA
from blora.slicer.modules import Lora
from blora.slicer.output import build_output
from blora.slicer.peft import PEFT_CONFIG
from blora.slicer.reader import BaseModel, lora_file, read_lora
from blora.text import BloraError, counted, say, shortened

WITHOUT = "without"


@dataclass(frozen=True)
class Column:
    """What a column shows of every save: traits at a strength."""

    name: str
    traits: tuple[Trait, ...]
    strength: float

    def cuts(self, lora: Lora) -> list[Cut]:
        """The slices of a save that it shows."""
        return [Cut(lora.path, trait, self.strength) for trait in self.traits]


# ---- Rows: the saves -----------------------------------------------------------------------------


def steps_of(lora: Lora) -> int | None:
    """How many steps a save was trained, as sd-scripts writes it."""
    text = lora.metadata.get("ss_steps", "")
    return int(text) if re.fullmatch(r"\d{1,12}", text) else None


def steps_text(lora: Lora) -> str:
    """The same for a reader: "1,000 steps", or nothing."""
    steps = steps_of(lora)
    return "" if steps is None else f"{steps:,} steps"


def by_training(lora: Lora) -> tuple[str, bool, int, str]:
    """The order of saves: by training and its steps, those without steps last."""
    steps = steps_of(lora)
    return lora.metadata.get("ss_output_name", ""), steps is None, steps or 0, lora.path.name


def files_of(word: str) -> list[Path]:
    """The files of a folder or of a pattern, which cmd leaves as it is; or the one it names."""
    path = Path(word)
    if path.is_dir():
        return sorted(path.glob("*.safetensors")) or [lora_file(path)]
    if not path.exists() and re.search(r"[*?\[]", word):
        # A folder that is there is no pattern, such as "my [v]".
        start = escape(str(path.parent)) if path.parent.is_dir() else str(path.parent)
        found = map(Path, glob(str(Path(start, path.name))))  # noqa: PTH207  (it may be absolute)
        return sorted(file for file in found if file.is_file())
    return [path]


def grouped(words: Iterable[str]) -> Iterator[tuple[str, list[Path]]]:
    """The files that are named, in groups: bash makes many names of one folder of a pattern."""
    for place, named in groupby(words, lambda word: Path(word).is_file() and Path(word).parent):
        if isinstance(place, Path):
            yield str(place), list(map(Path, named))
        else:
            yield from ((word, files_of(word)) for word in named)


def lacking(lora: Lora, columns: Iterable[Column]) -> str:
    """The name of a trait of which a save has nothing; "" where it has all."""
    traits = (trait for column in columns for trait in column.traits)
    return next((t.name for t in traits if not any(map(t.keeps, lora.modules))), "")


def read_group(files: list[Path], columns: list[Column]) -> Iterator[Lora]:
    """The LoRAs among several files; what is none, or has no trait, is left out and said.

    Slices often lie beside saves, and a save that is being written is not whole.
    """
    for file in files:
        try:
            lora = read_lora(file)
        except BloraError as error:
            say(f"note: left out {file.name} ({error})")
            continue
        if trait := lacking(lora, columns):
            say(f"note: left out {file.name}, which has nothing of {trait}")
        else:
            yield lora


def read_saves(words: Iterable[str], columns: list[Column]) -> list[Lora]:
    """The LoRAs that are named, those of a folder or a pattern in the order of their steps."""
    saves: list[Lora] = []
    for name, files in grouped(words):
        if len(files) == 1:
            saves.append(read_lora(files[0]))
            continue
        group = sorted(read_group(files, columns), key=by_training)
        if not group:
            raise BloraError(f'no LoRA to compare in "{name}": correct --loras')
        saves += group
    return list({lora.path.resolve(): lora for lora in saves}.values())


def labels(saves: list[Lora]) -> list[str]:
    """What to call each save: its file's name, with its folder's where two have the same."""
    stems = [lora.path.stem for lora in saves]
    return [
        stem if stems.count(stem) == 1 else f"{lora.path.resolve().parent.name}/{stem}"
        for stem, lora in zip(stems, saves, strict=True)
    ]


# ---- Columns: the slices -------------------------------------------------------------------------


def plan_columns(traits: list[Trait], strengths: list[float]) -> list[Column]:
    """Each trait at each strength, and all of them together."""
    groups: list[tuple[Trait, ...]] = [(trait,) for trait in traits]
    if len(traits) > 1:
        groups.append(tuple(traits))
    columns = []
    strengths = list(dict.fromkeys(strengths))
    for group, strength in product(groups, strengths):
        name = "both" if len(group) == len(traits) == 2 else " and ".join(t.name for t in group)
        at = "" if strengths == [1] else f" at {strength:g}"
        columns.append(Column(f"{name}{at}", group, strength))
    return columns


def check_apart(slices: list[Slice]) -> None:
    """Refuse traits that cannot be shown together, as they hold the same modules."""
    for one, two in combinations(slices, 2):
        if {m.name for m in one.modules} & {m.name for m in two.modules}:
            names = " and ".join(f'"{shortened(piece.cut.trait.name)}"' for piece in (one, two))
            raise BloraError(f"{names} hold the same modules: leave one out of --traits")


def check_without_base(slices: list[Slice]) -> None:
    """Refuse a DoRA at another strength than 1 where the checkpoint is not one file."""
    for piece in slices:
        if any(DORA in module.tensors for module in piece.modules):
            raise BloraError(
                f"{piece.lora.path} is a DoRA, which at another strength than 1 needs the weights "
                "of the checkpoint: give --checkpoint as one .safetensors file, or leave "
                "--strengths out"
            )


def check_slices(saves: list[Lora], columns: list[Column], base: BaseModel | None) -> None:
    """Cut everything once, without writing it; BloraError where a slice cannot be cut or drawn."""
    from blora.drawing.slices import check_drawable

    remarks = []
    for lora, column in product(saves, columns):
        slices = [take_slice(lora, cut) for cut in column.cuts(lora)]
        check_apart(slices)
        if not base and column.strength != 1:
            check_without_base(slices)
        build_output(lora.path, slices, base, has_metadata=False).try_values()
        for piece in slices:
            check_drawable(piece.modules, lora.path)
            remarks += piece.remarks
    for remark in dict.fromkeys(remarks):
        say(remark)


# ---- Pictures ------------------------------------------------------------------------------------


def look_settings(lora: Lora, column: Column) -> list[dict[str, Any]]:
    """What decides a look: the file, PEFT's settings beside it, what is kept, the strength."""
    config = lora.path.with_name(PEFT_CONFIG)
    return [
        {
            "lora": stamp(lora.path),
            "config": digest(config.read_bytes()) if config.is_file() else "",
            "trait": cut.trait.name,
            "keeps": [cut.trait.whitelist, cut.trait.blacklist],
            "strength": cut.strength,
        }
        for cut in column.cuts(lora)
    ]


def plan_drawings(
    saves: list[Lora], columns: list[Column], prompts: list[Prompt], common: dict[str, Any]
) -> list[Drawing]:
    """Every picture: first those without a LoRA, then save by save and column by column."""
    looks: list[tuple[str, list[dict[str, Any]]]] = [(WITHOUT, [])]
    for label, lora in zip(labels(saves), saves, strict=True):
        looks += [(f"{label}_{c.name}", look_settings(lora, c)) for c in columns]
    return [
        Drawing(
            look,
            prompt,
            seed,
            f"{name}_prompt{number}_seed{seed}",
            common | {"slices": cuts, "prompt": prompt.text + prompt.options, "seed": seed},
        )
        for look, (name, cuts) in enumerate(looks)
        for number, prompt in enumerate(prompts, start=1)
        for seed in prompt.seeds
    ]


@dataclass(frozen=True)
class Comparison(Gallery):
    """Every save of some trainings, without a LoRA and with its slices."""

    base: BaseModel | None  # the checkpoint's weights, where it is one file: a DoRA needs them
    saves: list[Lora]
    columns: list[Column]
    title = "What each save learned"
    module = "blora.drawing.slices"

    def write_looks(self, path: Path) -> None:
        """Write what the network module of gen_img.py reads."""
        from blora.drawing.slices import write_looks

        looks = [[], *(c.cuts(lora) for lora in self.saves for c in self.columns)]
        write_looks(path, looks, self.checkpoint if self.base else None)

    def intro(self) -> str:
        """What the page shows, in words."""
        names = " and ".join(dict.fromkeys(trait.name for c in self.columns for trait in c.traits))
        return (
            f"{self.checkpoint.name} without a LoRA, and with the {names} of each save. "
            "A click opens a picture in full; its settings are in the file."
        )

    def rows(self) -> str:
        """What it has rows of, counted."""
        return counted(len(self.saves), "save")

    def sections(self, advance: Callable[[int], object]) -> Iterator[Section]:
        """One for each prompt and seed: a row a save, the picture without a LoRA beside all."""
        names = [
            (label, steps_text(lora))
            for label, lora in zip(labels(self.saves), self.saves, strict=True)
        ]
        cells = list(product(names, self.columns))
        subjects: dict[tuple[Prompt, int], list[Drawing]] = {}
        for drawing in self.drawings:
            subjects.setdefault((drawing.prompt, drawing.seed), []).append(drawing)
        texts = {(prompt.text, prompt.options) for prompt, _ in subjects}
        headings = (Heading(WITHOUT), *(Heading(column.name) for column in self.columns))
        for (prompt, seed), (bare, *others) in subjects.items():
            pictures = [self.cell(bare, self.checkpoint.stem, rows=len(self.saves))]
            for drawing, ((name, steps), _) in zip(others, cells, strict=True):
                lines = [Line(steps, "detail")] if steps else []
                pictures.append(self.cell(drawing, name, *lines))
            is_one = [text for text, _ in texts].count(prompt.text) == 1
            title = prompt.text if is_one else f"{prompt.text}{prompt.options}"
            advance(len(pictures))
            yield Section(f"{title}, seed {seed}", tuple(pictures), headings)
