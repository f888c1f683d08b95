"""Who ran which commit: what a record of a run must say besides its settings."""

import functools
import getpass
import os
import subprocess
from pathlib import Path


def user_name() -> str:
    """The user's login name, or "uid N" where the user has none, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@functools.cache
def git_commit() -> str:
    """The commit of this checkout, or "" where git is missing or the code was installed without its repository.

    A package folder inside somebody else's repository must not be recorded with that one's commit.
    """
    checkout = Path(__file__).resolve().parents[1]
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        top, commit = subprocess.check_output(command, cwd=checkout, text=True, stderr=subprocess.DEVNULL).splitlines()
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return commit if Path(top) == checkout else ""
