import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra import provenance


def test_the_commit_is_that_of_this_checkout() -> None:
    checkout = Path(provenance.__file__).parents[1]
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False)
    expected = asked.stdout.strip() if asked.returncode == 0 else ""  # a fresh repository has no commit yet
    assert provenance.git_commit() == expected


def test_code_inside_another_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    (tmp_path / "site-packages" / "infra").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "site-packages" / "infra" / "provenance.py"))
    assert provenance.git_commit.__wrapped__() == ""


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise OSError("no entry for this uid")

    monkeypatch.setattr(getpass, "getuser", fail)
    assert provenance.user_name() == f"uid {os.getuid()}"


def test_a_process_is_known_to_have_ended() -> None:
    code = "from infra.provenance import this_process; print(this_process())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert provenance.has_ended(done.stdout.strip())
    assert not provenance.has_ended(provenance.this_process())
    assert not provenance.has_ended("another-host:1:0.00")
    assert not provenance.has_ended("")
