"""What blora/preflight/files.py finds in the prompts of sample pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kohya_folder import ROOT

from blora.preflight import files
from blora.preflight.options import parse_options
from blora.preflight.report import Report
from blora.text import BloraError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str = "") -> None:
    Path(name).write_text(text, encoding="utf-8")


def looked(**given: str | bool) -> Report:
    line = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    report = Report()
    try:
        files.check_samples(parse_options(line), report)
    except BloraError as error:
        report.errors.append(str(error))
    return report


def clean(**given: str | bool) -> bool:
    report = looked(**given)
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
ENDS_IT = (
    'the prompts in "{}" would end the training at the first sample: put them in '
    "[[prompt.subset]] of a .toml, without repeating what [prompt] sets, or in a list in a .json"
)


@pytest.mark.parametrize("given", SAMPLES)
def test_samples_without_prompts_are_an_error(given):
    assert looked(**given).errors == [
        f"--{next(iter(given))} asks for samples without their prompts: add --sample_prompts"
    ]
    assert clean(**given, sample_prom="gone")


@pytest.mark.parametrize("given", SAMPLES)
def test_prompts_that_are_missing_are_a_warning_as_sd_scripts_goes_on(given):
    report = looked(**given, sample_prompts="gone.md")
    assert report.errors == []
    assert report.warnings == [
        'no prompts at "gone.md", so there will be no samples: correct --sample_prompts'
    ]


@pytest.mark.parametrize("given", SAMPLES)
def test_prompts_are_known_by_their_ending(given):
    for name in ("prompts.md", "prompts.TXT"):
        write(name)
        assert looked(**given, sample_prompts=name).errors == [
            f'"{name}" ends in none of .txt, .toml, .json, by which sd-scripts reads prompts: '
            "rename it, and correct --sample_prompts"
        ]
    for name, text in PROMPTS.items():
        write(name, text)
        assert clean(**given, sample_prompts=name)


@pytest.mark.parametrize("given", SAMPLES)
def test_prompts_that_are_not_utf_8_are_an_error(given):
    Path("prompts.txt").write_bytes("a café".encode("cp1252"))
    assert looked(**given, sample_prompts="prompts.txt").errors == [
        '"prompts.txt" is not UTF-8, and would end the training at the first sample: save the '
        "--sample_prompts as UTF-8"
    ]


def test_the_sample_prompts_pass_and_are_three():
    shutil.copyfile(ROOT / "blora_prompts.txt", "blora_prompts.txt")
    assert clean(sample_at_first=True, sample_prompts="blora_prompts.txt")
    prompts = files.read_prompts(Path("blora_prompts.txt"))
    assert [prompt.split(" --")[0] for prompt in prompts] == [
        r"A \[v\] on a beach",
        r"A lighthouse in \[v\] style",
        "A lighthouse",
    ]


UNREADABLE = [
    ("toml", "", ENDS_IT),
    ("toml", "prompt = 1", ENDS_IT),
    ("toml", "[prompt]", ENDS_IT),
    ("toml", PROMPTS["prompts.toml"] + "width = 64", ENDS_IT),
    ("json", '{"prompt": "a dog"}', ENDS_IT),
    ("json", '"a dog"', ENDS_IT),
    ("json", "[1]", ENDS_IT),
    ("toml", "a dog", 'the prompt file "{}" is not valid TOML ('),
    ("json", "a dog", 'the prompt file "{}" is not valid JSON ('),
]


@pytest.mark.parametrize(("ending", "text", "told"), UNREADABLE)
def test_prompts_that_sd_scripts_cannot_read_are_an_error(ending, text, told):
    name = f"prompts.{ending}"
    write(name, text)
    [error] = looked(sample_at_first=True, sample_prompts=name).errors
    assert error.startswith(told.format(name))


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.txt", "# a comment\n\n"), ("p.json", "[]"), ("p.json", "{}"), ("p.json", '""')],
)
def test_a_file_without_a_prompt_is_a_warning(name, text):
    write(name, text)
    assert looked(sample_at_first=True, sample_prompts=name).warnings == [
        f'no prompt in "{name}", so there will be no samples: add one'
    ]


@pytest.mark.parametrize("before", [" ", "\t", "\ufeff"])
def test_a_comment_that_sd_scripts_takes_for_a_prompt_is_a_warning(before):
    write("prompts.txt", f"{before}# a comment\na dog # 1\n")
    assert looked(sample_at_first=True, sample_prompts="prompts.txt").warnings == [
        'a comment in "prompts.txt" will be drawn as a prompt: # has to be the first character of '
        "the line, without a space or a byte order mark before it"
    ]


@pytest.mark.parametrize("given", [{}, {"sample_every_n_steps": "0"}])
def test_prompts_that_are_never_read_may_be_missing(given):
    assert clean(**given, sample_prompts="gone.md")
