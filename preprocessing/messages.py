"""What ffmpeg's messages say, at the level `level+info`."""

import re
from collections.abc import Sequence
from pathlib import Path

_NUM_DETAIL_LINES = 5
_MAX_DETAIL_CHARS = 600

_MESSAGE = re.compile(r"^((?:\[[^\]]* @ 0x[0-9a-fA-F]+\] )*)\[(warning|error|fatal|panic)\] (.*)$")
_TOO_LATE = re.compile(r"^\[Eval @ 0x[0-9a-fA-F]+\] \[info\] \d+\.\d+$")
_RATE = re.compile(r"Stream #0:0.*: Video: mjpeg.*?, (\d+(?:\.\d+)?)(k?) fps")


def complaints(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts of all errors, and of those messages that mean that the file ends before its own header says so."""
    messages = [found for line in lines if (found := _MESSAGE.match(line))]
    serious = [found[3] for found in messages if found[2] != "warning"]
    return serious, [found[3] for found in messages if _says_cut(found[1], found[3])]


def says_too_long(lines: Sequence[str]) -> bool:
    """Whether the filter that watches the time has met a frame after the limit."""
    return any(_TOO_LATE.match(line) for line in lines)


def output_rate(lines: Sequence[str]) -> float | None:
    """Frames per second of the output, which is what the container says unless it was changed; None if it is unknown."""
    rates = [float(found[1]) * (1000 if found[2] else 1) for line in lines if (found := _RATE.search(line))]
    return rates[-1] if rates else None


def clean_detail(messages: Sequence[str], path: Path) -> str:
    """The first and the last few messages as one printable line without the folder names of this machine."""
    few = messages if len(messages) <= _NUM_DETAIL_LINES else [messages[0], *messages[1 - _NUM_DETAIL_LINES :]]
    return printable("; ".join(few).replace(f"file:{path}", path.name).replace(str(path), path.name))


def printable(text: str) -> str:
    """A text from outside, short and without control characters."""
    return "".join(char if char.isprintable() else "?" for char in text[:_MAX_DETAIL_CHARS])


def _says_cut(source: str, message: str) -> bool:
    """Whether a demuxer's message means that the file ends before what its own header promises.

    MPEG transport streams mark packets as corrupt after every gap in reception, which is no cut.
    """
    if "partial file" in message or "File ended prematurely" in message:
        return True
    return message.startswith("Packet corrupt (stream") and "mpegts" not in source
