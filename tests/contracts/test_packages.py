"""The Debian packages that tests need: named once, installed by `make packages`, which CI runs."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / ".ci" / "packages"
LINES = [line for line in (ROOT / ".ci" / "packages.txt").read_text().splitlines() if not line.startswith("#")]


def test_each_package_comes_with_what_it_is_for():
    assert LINES
    for line in LINES:
        name, _, reason = line.partition("#")
        assert len(name.split()) == 1
        assert len(reason.split()) > 2


def test_ci_and_contributors_are_sent_to_them():
    assert "make packages" in (ROOT / ".ci" / "run").read_text().splitlines()
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert "make packages" in contributing
    assert ".ci/packages.txt" in contributing


@pytest.mark.skipif(not Path("/usr/bin/dpkg-query").exists(), reason="this is no Debian system")
def test_what_is_there_is_left_alone_and_what_is_missing_needs_root(tmp_path):
    listed = tmp_path / "packages.txt"
    listed.write_text("# what every Debian has\ndpkg  # installs\n")
    done = subprocess.run([INSTALL, listed], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    with tempfile.NamedTemporaryFile("w") as names:  # pytest's folders are closed to others
        names.write("dpkg\nno-such-package  # for nothing\n")
        names.flush()
        Path(names.name).chmod(0o644)
        everybody = ["setpriv", "--reuid=65534", "--clear-groups", "bash", "-c", INSTALL.read_text(), "packages", names.name]
        done = subprocess.run(everybody, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: missing Debian packages: no-such-package; expected root to install them: sudo make packages\n"
