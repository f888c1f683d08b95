"""What people see of long work: bars with the time left on a terminal, few plain lines elsewhere."""

import os
import pty
import re
import subprocess
import sys

import pytest

SHOW = """
import time
from infra.progress import StageProgress
with StageProgress() as progress:
    show = progress.for_stage("shards")
    for done in range(0, 41, 10):
        show(done, 96, "1,204 videos/s, 47,022 frames/s, 1,520.7 MB/s, 12 rejected [bold]")
        time.sleep(0.15)
    progress.close_stage("shards")
    progress.say("  shards    ran")
"""


def test_without_a_terminal_there_are_plain_lines_and_no_empty_one():
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "shards: 0/96 1,204 videos/s, 47,022 frames/s, 1,520.7 MB/s, 12 rejected [bold]",
        "  shards    ran",
    ]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_narrow_terminal_shows_count_and_time_left_in_full(columns):
    """Rich would shorten them to make room for the text, of which the beginning is enough."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    with subprocess.Popen([sys.executable, "-c", SHOW], stdin=theirs, stderr=theirs, env=environment) as child:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # how Linux says that the other end is closed
            pass
        assert child.wait(60) == 0
    os.close(ours)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "\n").splitlines()
    last = next(line for line in reversed(lines) if "40/96" in line)
    assert re.search(r" 40/96 0:00:0\d 1,204 videos/s", last), last
    assert max(map(len, lines)) <= columns
