"""Who ran which commit: what a record of a run must say besides its settings."""

import functools
import getpass
import os
import socket
import subprocess
from pathlib import Path

import psutil


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


def this_process() -> str:
    """A name of this process that no other one ever has: host, process id, start time."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def has_ended(process: str) -> bool:
    """Whether a process, named as by `this_process`, is known to have ended; False for those of other hosts.

    Example:
        >>> has_ended(this_process())
        False
    """
    host, _, rest = process.partition(":")
    pid, _, created = rest.partition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" != created
    except psutil.NoSuchProcess:
        return True
