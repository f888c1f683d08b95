"""What is wrong with a node of a cluster, and what to do: judged from what it says of itself (`cluster_probe`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.version import InvalidVersion, Version

from infra.cluster import PACKAGES, SPILL_LIMIT, checkout
from infra.cluster_probe import Facts
from infra.storage import MINIMUM_FREE_BYTES

HERE = "this process"
"""What the driver is called where nodes have their names."""

# Whether a run breaks, or its numbers change, where a node has another version or none.
_BREAKS = {"ray": True, "torch": True, "torchvision": True, "pyarrow": True, "mlflow": False, "webdataset": False}
DISTRIBUTIONS = (*_BREAKS, "sagsm")
"""Whose versions are shown; of our own it is the code that counts."""

_CLOCK_WARN_SECONDS = 2.0
_CLOCK_BREAK_SECONDS = 60.0  # S3 refuses requests from 15 minutes on; times of files and records lie before
_FILES_SHOWN = 3


@dataclass(frozen=True)
class Question:
    """What a run needs of every node.

    Attributes:
        folders: local or remote ones that all nodes read and write, by name ("store"); local ones are made if need be.
        raw: the folder of the raw videos, read by all nodes; None if nobody reads them.
        tracking_uri: of MLflow; None leaves it out. Only the driver needs it.
        ffmpeg: a function of ours, as "module:function", that returns the version of ffmpeg; None if nobody decodes.
    """

    folders: Mapping[str, str] = field(default_factory=dict)
    raw: str | None = None
    tracking_uri: str | None = None
    ffmpeg: str | None = None


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        node: name of the node, or `HERE`.
        check: what was looked at: "torch", "clock", "store" and so on.
        text: what was found, what was expected, and what to do.
        breaks: whether a run cannot be trusted to work so.
    """

    node: str
    check: str
    text: str
    breaks: bool

    def __str__(self) -> str:
        return f"{self.node}: {self.text}"


def problems(name: str, facts: Facts, question: Question) -> list[Finding]:
    """What is wrong with a node, or the driver, by itself.

    Args:
        name: of the node, or `HERE`.
        facts: what it says.
        question: what was asked.
    """
    found = []
    for purpose, problem in facts["folders"].items():
        if problem:
            text = f"does not share the {purpose} {question.folders[purpose]}: {problem}; mount one folder there on all nodes"
            found.append(Finding(name, purpose, text, True))
    if facts["raw"]:
        text = f"does not see the raw videos in {question.raw}: {facts['raw']}; mount or copy them there"
        found.append(Finding(name, "raw videos", text, True))
    if facts["tracking"]:
        text = f"MLflow at {question.tracking_uri} does not answer: {facts['tracking']}; start it, or set MLFLOW_TRACKING_URI"
        found.append(Finding(name, "MLflow", text, name == HERE))
    if facts["ffmpeg"][1]:
        found.append(Finding(name, "ffmpeg", f"ffmpeg cannot be used: {facts['ffmpeg'][1]}", True))
    for folder, (free, total) in facts["disks"].items():
        if free < MINIMUM_FREE_BYTES:
            text = f"{free / 1e6:,.0f} MB are free in {folder}; expected {MINIMUM_FREE_BYTES / 1e6:,.0f} MB: free some space"
            found.append(Finding(name, "free disk", text, True))
        elif folder == facts["ray_dir"] and 1 - free / total > SPILL_LIMIT:
            text = f"the disk of {folder} is more than {SPILL_LIMIT:.0%} full, and Ray spills no object to it; free some space"
            found.append(Finding(name, "free disk", text, False))
    if facts["niceness"] > 0 and name != HERE:
        text = f"tasks run there at niceness {facts['niceness']}, after all other programs; start it with RAY_worker_niceness=0"
        found.append(Finding(name, "niceness", text, False))
    return found


def differences(name: str, facts: Facts, here: Facts) -> list[Finding]:
    """What a node has otherwise than the driver.

    Args:
        name: of the node.
        facts: what it says.
        here: what the driver says.
    """
    found = []
    if facts["python"] != here["python"]:
        text = f"has Python {facts['python']}, {HERE} {here['python']}; start it in the same image or environment"
        found.append(Finding(name, "Python", text, True))
    for package, breaks in _BREAKS.items():
        theirs, ours = facts["versions"][package], here["versions"][package]
        if ours is not None and theirs != ours:
            alike = theirs is not None and _public(theirs) == _public(ours)  # 2.14.1+cpu and 2.14.1+cu130
            text = f"has {f'{package} {theirs}' if theirs else f'no {package}'}, {HERE} {ours}"
            text += f"; install it there: pip install {package}=={_public(ours)}"
            found.append(Finding(name, package, text, breaks and not alike))
    there, at_home = facts["ffmpeg"][0], here["ffmpeg"][0]
    if there and at_home and there != at_home:
        text = f"has ffmpeg {there}, {HERE} {at_home}: shards written there have other bytes, the next run writes them again"
        found.append(Finding(name, "ffmpeg", f"{text}; install the same one on all nodes", False))
    return found + _stale(name, facts, here)


def _stale(name: str, facts: Facts, here: Facts) -> list[Finding]:
    theirs, ours = facts["sources"], here["sources"]
    differ = sorted(path for path in {*theirs, *ours} if theirs.get(path) != ours.get(path))
    if not differ:
        return []
    if not theirs:
        text = f"imports none of our packages ({', '.join(PACKAGES)})"
    else:
        shown = ", ".join(differ[:_FILES_SHOWN]) + (", ..." if len(differ) > _FILES_SHOWN else "")
        text = f"imports other code than {checkout()}: {len(differ)} of {len({*theirs, *ours})} files differ ({shown}), "
        text += f"from {', '.join(facts['roots'])}"
    cure = "look for an old copy in its PYTHONPATH, site-packages or image, and start it without"
    return [Finding(name, "code", f"{text}; {cure}", True)]


def late(name: str, clock_seconds: float, clock_error: float) -> list[Finding]:
    """Whether a node's clock is off by more than `clock_error`, the error of the measurement, explains; all in seconds."""
    off = abs(clock_seconds) - clock_error
    if off < _CLOCK_WARN_SECONDS:
        return []
    direction = "ahead of" if clock_seconds > 0 else "behind"
    text = f"its clock is {abs(clock_seconds):,.1f} s {direction} that of {HERE}; let both keep time by NTP (`timedatectl`)"
    return [Finding(name, "clock", text, off >= _CLOCK_BREAK_SECONDS)]


def _public(version: str) -> str:
    try:
        return Version(version).public
    except InvalidVersion:
        return version
