"""Captions that do less than they seem to: missing, unread, cut off, or left out."""

from __future__ import annotations

from collections.abc import Iterable

from blora.preflight.dataset import Folder, Picture, caption_path, has_caption
from blora.preflight.report import Report
from blora.text import first_few

CAPTION_ENDINGS = frozenset(".txt .caption .captions .cap .tag .tags".split())


def other_captions(pictures: Iterable[Picture], folder: Folder) -> list[str]:
    """Names of files that look like captions of these pictures and are not read."""
    beside: dict[str, list[str]] = {}
    for path in sorted(folder.path.iterdir()):
        if path.suffix.lower() in CAPTION_ENDINGS:
            beside.setdefault(path.stem, []).append(path.name)
    wanted = [name for p in pictures for name in dict.fromkeys((p.path.stem, p.path.name))]
    return [name for key in wanted for name in beside.get(key, [])]


def check_caption_files(folder: Folder, report: Report) -> None:
    """Pictures without a caption, and captions under a name that is not read."""
    missing = [picture for picture in folder.pictures if not has_caption(picture, folder)]
    if not missing or not folder.caption_extension:
        return
    count, extension = len(folder.pictures), folder.caption_extension
    others = other_captions(missing, folder)
    names = first_few(picture.path.name for picture in missing)
    without = f'{len(missing)} of {count} images in "{folder.name}" have no {extension} caption'
    instead = f'"{folder.class_tokens}", the class_tokens'
    if others:
        report.warnings.append(
            f"{without} and are trained {f'as {instead}' if folder.class_tokens else 'without one'}"
            f": {first_few(others)} {'is' if len(others) == 1 else 'are'} not read: rename to "
            f"{extension}, or correct caption_extension"
        )
    elif not folder.class_tokens:
        report.warnings.append(f"{without}: {names}")
    elif len(missing) < count:
        report.notes.append(f"{without} and are trained as {instead}: {names}")


def check_listed_captions(folder: Folder, report: Report) -> None:
    """Pictures to which a metadata_file gives no word, or none that is trained."""
    if not folder.metadata:
        return
    empty = [picture.path.name for picture in folder.pictures if not picture.caption.strip()]
    text = folder.metadata.read_text(encoding="utf-8", errors="replace") if empty else ""
    has_lost_tags = folder.has_wildcards and '"tags"' in text
    if empty:
        report.warnings.append(
            f'{len(empty)} of {len(folder.pictures)} images in "{folder.name}" are trained without '
            f'a word: {first_few(empty)}: give each a "caption" there'
            + (", or remove enable_wildcard, which drops tags without one" if has_lost_tags else "")
        )


def check_kept(folder: Folder, report: Report) -> None:
    """Captions that were changed since sd-scripts kept them."""
    changed = []
    for picture in folder.pictures if folder.cache else ():
        lines = [line.strip() for line in lines_of(picture, folder)]
        if lines and picture.caption not in (lines[0], "\n".join(filter(None, lines))):
            changed.append(picture.path.name)
    if changed:
        report.warnings.append(
            f'captions are trained as "{folder.cache}" has them, since cache_info is set, and '
            f"differ now, {len(changed)} in all: {first_few(changed)}: delete that file"
        )


def check_dropped(folder: Folder, report: Report) -> None:
    """Captions of which no word is ever trained."""
    if folder.dropped_by:
        report.warnings.append(
            f'no caption of "{folder.name}" is trained, since {" and ".join(folder.dropped_by)} '
            "drops every word at each step: lower or remove it"
        )


def lines_of(picture: Picture, folder: Folder) -> list[str]:
    """The lines of a picture's caption file, none where it has no such file."""
    path = caption_path(picture.path, folder.caption_extension)
    if not folder.caption_extension or not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def unread_lines(picture: Picture, folder: Folder) -> list[str]:
    """The lines of the caption file that the trainer ignores, without the blank ones."""
    lines = [] if folder.has_wildcards else lines_of(picture, folder)[1:]
    return [line.strip() for line in lines if line.strip()]


def check_caption_lines(folder: Folder, report: Report) -> None:
    """Captions of which only the first line is read, or whose first line is empty."""
    blank, longer = [], []
    for picture in folder.pictures:
        lines = lines_of(picture, folder)
        name = caption_path(picture.path, folder.caption_extension).name
        if lines and not picture.caption:
            blank.append(name)
        elif unread_lines(picture, folder):
            longer.append(name)
    if blank:
        report.warnings.append(
            "captions that begin with an empty line are trained as empty, "
            f'{len(blank)} in "{folder.name}": {first_few(blank)}: put the words on the first line'
        )
    if longer:
        report.warnings.append(
            "captions of several lines are trained with their first line alone, "
            f'{len(longer)} in "{folder.name}": {first_few(longer)}: make it one line, or set '
            "enable_wildcard = true, which draws a line at each step"
        )


def check_caption_length(folder: Folder, report: Report) -> None:
    """Captions that are cut at the trainer's number of tokens."""
    cut = {p.path.name: p.tokens for p in folder.pictures if p.tokens > folder.most_tokens}
    if not cut:
        return
    longest = max(cut.values())
    enough = next((most for most in (150, 225) if longest <= most), 0)
    names = first_few(f"{name} ({tokens})" for name, tokens in cut.items())
    report.warnings.append(
        f"captions are cut after {folder.most_tokens} tokens, {len(cut)} in "
        f'"{folder.name}": {names}: shorten them'
        + (f", or give --max_token_length={enough}" if enough else "")
    )


def check_affix(folder: Folder, report: Report) -> None:
    """A caption_prefix or caption_suffix that cached captions leave out."""
    if folder.has_affix and all(p.prompt == p.caption for p in folder.pictures):
        report.warnings.append(
            f'caption_prefix and caption_suffix of "{folder.name}" are not trained with '
            "--cache_text_encoder_outputs: write them into the captions"
        )


def check_captions(folders: Iterable[Folder], report: Report) -> None:
    """Every warning and note on captions."""
    checks = (
        check_caption_files, check_listed_captions, check_caption_lines, check_caption_length,
        check_affix, check_kept, check_dropped,
    )  # fmt: skip
    for folder in folders:
        for check in checks if folder.metadata or folder.path.is_dir() else ():
            check(folder, report)
