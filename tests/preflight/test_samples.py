"""The prompts of sample pictures, checked before the first is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from kohya_folder import ROOT
from sdxl_train_network_options import build_parser

from blora.preflight.files import check_samples, read_prompts
from blora.preflight.report import Report
from blora.text import BloraError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str = "") -> None:
    Path(name).write_text(text, encoding="utf-8")


def check(**given: str | bool) -> Report:
    line = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    report = Report()
    try:
        check_samples(build_parser().parse_args(line), report)
    except BloraError as error:
        report.errors.append(str(error))
    return report


def clean(**given: str | bool) -> bool:
    report = check(**given)
    return report.errors == report.warnings == report.notes == []


SAMPLES = [
    {"sample_every_n_steps": "100"},
    {"sample_every_n_epochs": "1"},
    {"sample_at_first": True},
]


PROMPTS = {
    "prompts.txt": "# a comment\n\na dog\n",
    "prompts.toml": '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a dog"\n',
    "prompts.json": '["a dog", {"prompt": "a cat", "width": 512}]',
}
UNREADABLE = (
    'sd-scripts cannot read the prompts in "{}", which ends the training at the first sample: '
    "write them as in blora_prompts.txt ("
)


@pytest.mark.parametrize("given", SAMPLES)
def test_samples_without_prompts_are_an_error(given):
    assert check(**given).errors == [
        "sampling is on, but no prompts are given: add --sample_prompts"
    ]


@pytest.mark.parametrize("given", SAMPLES)
def test_prompts_that_are_missing_are_a_warning_as_sd_scripts_goes_on(given):
    report = check(**given, sample_prompts="gone.md")
    assert report.errors == []
    assert report.warnings == [
        'no prompts at "gone.md", so no samples will be drawn: correct --sample_prompts'
    ]


@pytest.mark.parametrize("given", SAMPLES)
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_sd_scripts_reads_pass(given, name):
    write(name, PROMPTS[name])
    assert clean(**given, sample_prompts=name)


def test_the_sample_prompts_pass_and_are_three():
    prompts = read_prompts(ROOT / "blora_prompts.txt")
    assert [prompt.split(" --")[0] for prompt in prompts] == [
        r"A \[v\] on a beach",
        r"A lighthouse in \[v\] style",
        "A lighthouse",
    ]


BROKEN = [
    ("toml", "", "KeyError: 'prompt'"),
    ("toml", "prompt = 1", "TypeError: "),
    ("toml", "[prompt]", "KeyError: 'subset'"),
    ("toml", PROMPTS["prompts.toml"] + "width = 64", "TypeError: "),
    ("toml", "a dog", "TomlDecodeError: "),
    ("json", '{"prompt": "a dog"}', "TypeError: it is not a list of texts and tables)"),
    ("json", '"a dog"', "TypeError: it is not a list of texts and tables)"),
    ("json", "[1]", "TypeError: it is not a list of texts and tables)"),
    ("json", "a dog", "JSONDecodeError: Expecting value: line 1 column 1 (char 0))"),
    ("json", "[" * 100_000, "RecursionError: "),
    ("txt", "a café", "UnicodeDecodeError: "),
    ("md", "a dog", "ValueError: its name ends in none of .txt, .toml, .json)"),
    ("TXT", "a dog", "ValueError: its name ends in none of .txt, .toml, .json)"),
]


@pytest.mark.parametrize(("ending", "text", "why"), BROKEN)
def test_prompts_that_sd_scripts_cannot_read_are_an_error(ending, text, why):
    name = f"prompts.{ending}"
    Path(name).write_bytes(text.encode("cp1252"))
    [error] = check(sample_at_first=True, sample_prompts=name).errors
    assert error.startswith(UNREADABLE.format(name) + why)


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.txt", "# a comment\n\n"), ("p.json", "[]"), ("p.json", "{}"), ("p.json", '""')],
)
def test_a_file_without_a_prompt_is_a_warning(name, text):
    write(name, text)
    assert check(sample_at_first=True, sample_prompts=name).warnings == [
        f'no prompt in "{name}", so no samples will be drawn: add one'
    ]


@pytest.mark.parametrize("before", [" ", "\t", "\ufeff"])
def test_a_comment_that_sd_scripts_takes_for_a_prompt_is_a_warning(before):
    write("prompts.txt", f"{before}# a comment\na dog # 1\n")
    assert check(sample_at_first=True, sample_prompts="prompts.txt").warnings == [
        'a comment in "prompts.txt" will be drawn as a prompt: # has to be the first character of '
        "the line, without a space or a byte order mark before it"
    ]


@pytest.mark.parametrize("given", [{}, {"sample_every_n_steps": "0"}])
def test_prompts_that_are_never_read_may_be_missing(given):
    assert clean(**given, sample_prompts="gone.md")
