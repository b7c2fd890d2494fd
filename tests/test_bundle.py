"""What a user copies: the right files, under names that a kohya folder does not have."""

from __future__ import annotations

import json
import subprocess

from bundle_files import BUNDLE, tracked
from kohya_folder import ROOT, install


def test_the_readmes_copy_command_installs_the_bundle_and_nothing_else(tmp_path):
    install(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == BUNDLE
    assert len(list((tmp_path / "lycoris_presets").glob("*.toml"))) == 5


def test_nothing_that_is_copied_takes_a_name_of_a_kohya_folder():
    hosts = json.loads((ROOT / "tests/data/host_root_names.json").read_text())
    taken = {name.lower() for host in ("sd-scripts", "kohya_ss") for name in hosts[host]}
    assert not taken & {name.lower() for name in BUNDLE}
    assert all("blora" in name or name == "lycoris_presets" for name in BUNDLE)


def test_what_is_run_has_its_run_bit_and_what_is_imported_has_none():
    listing = subprocess.run(
        ["git", "ls-files", "--stage", "*.sh", ".ci/run", "blora_*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for mode, _, _, name in (line.split() for line in listing.stdout.splitlines()):
        is_run = not name.endswith(".py") or (ROOT / name).read_text().startswith("#!")
        assert mode == ("100755" if is_run else "100644"), name


def test_git_delivers_bat_files_with_windows_line_ends_and_scripts_with_unix_ones():
    for name in tracked("*.bat", "*.sh", "*.py", ".ci/run"):
        done = subprocess.run(
            ["git", "check-attr", "eol", "--", name], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.strip().endswith("crlf" if name.endswith(".bat") else ": lf")
