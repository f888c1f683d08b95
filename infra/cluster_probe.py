"""What a node of a cluster is asked about itself.

This module travels to the node as code, so that it also runs where our packages are old or missing. Hence it uses the standard
library only, and takes and gives plain values.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

_MLFLOW_SECONDS = 5.0
_SOURCES = (".py", ".html")


class FolderMark(TypedDict):
    """A folder that this process should share with the driver.

    `url` is its path or URL, `theirs` a file that the driver has written into it, `mine` the name for a copy of that.
    """

    url: str
    theirs: str
    mine: str


class RawSample(TypedDict):
    """The folder of the raw videos, and some of what the driver sees in it: name, whether it is a folder, size in bytes."""

    url: str
    entries: list[tuple[str, bool, int]]


class Asked(TypedDict):
    """What is asked.

    `packages` of ours, to find; `distributions` whose versions to tell; `ffmpeg`, a function of ours that tells its version, as
    "module:function"; `folders` by name; `tracking_uri` of MLflow; `ray_dir`, where Ray keeps what does not fit into memory.
    """

    packages: Sequence[str]
    distributions: Sequence[str]
    ffmpeg: str | None
    folders: dict[str, FolderMark]
    raw: RawSample | None
    tracking_uri: str | None
    ray_dir: str | None


class Facts(TypedDict):
    """What a process says of itself.

    `versions` have None for what is missing. `sources` are those that it would import, as `source_digests` gives them, and
    `roots` the folders that they come from. Of `ffmpeg` it tells the version or a problem. What is wrong with a folder, the raw
    videos and MLflow is a text, "" if nothing is; None means not asked, or a file of the driver. `disks` are free and all bytes
    by folder. `niceness` is beyond that of the process that started this one.
    """

    python: str
    versions: dict[str, str | None]
    sources: dict[str, str]
    roots: list[str]
    ffmpeg: tuple[str, str]
    folders: dict[str, str]
    raw: str | None
    tracking: str | None
    disks: dict[str, tuple[int, int]]
    ray_dir: str | None
    niceness: int


class Probe:
    """Lives on the node, in a process that is started as every task's is."""

    def look(self, asked: Asked) -> Facts:
        """See `look`."""
        return look(asked)

    def time(self) -> float:
        """Seconds since 1970."""
        return time.time()


def look(asked: Asked) -> Facts:
    """What this process finds."""
    roots = {name: _package_root(name) for name in asked["packages"]}
    local = [folder["url"] for folder in asked["folders"].values() if "://" not in folder["url"]]
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in asked["distributions"]},
        "sources": source_digests(roots),
        "roots": sorted({str(Path(root).parent) for root in roots.values() if root}),
        "ffmpeg": _ffmpeg(asked["ffmpeg"]),
        "folders": {name: _folder_problem(**folder) for name, folder in asked["folders"].items()},
        "raw": None if asked["raw"] is None else _raw_problem(**asked["raw"]),
        "tracking": _tracking_problem(asked["tracking_uri"]),
        "disks": _disks([tempfile.gettempdir(), *local, *filter(None, [asked["ray_dir"]])]),
        "ray_dir": asked["ray_dir"],
        "niceness": os.getpriority(os.PRIO_PROCESS, 0) - os.getpriority(os.PRIO_PROCESS, os.getppid()),
    }


def source_digests(roots: dict[str, str]) -> dict[str, str]:
    """Short hashes of all source files of our packages, by path as "infra/cluster.py".

    Args:
        roots: a package's folder by its name, "" if it is missing.
    """
    found = {}
    for name, root in roots.items():
        files = sorted(Path(root).rglob("*")) if root else []
        for path in files:
            if path.suffix in _SOURCES and path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                found[f"{name}/{path.relative_to(root).as_posix()}"] = digest
    return found


def _package_root(name: str) -> str:
    """The folder from which this process imports a package; "" if it cannot."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return str(places[0]) if places else ""


def _version(distribution: str) -> str | None:
    """As installed, without importing it: of several the first on the path, which is the one that an import finds."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ffmpeg(where: str | None) -> tuple[str, str]:
    """The version that our own function says, as this process imports it, or a problem."""
    if where is None:
        return "", ""
    module, _, function = where.partition(":")
    try:
        return str(getattr(importlib.import_module(module), function)()), ""
    except Exception as error:  # whatever is wrong here is what was asked
        return "", str(error) or type(error).__name__


def _folder_problem(url: str, theirs: str, mine: str) -> str:
    """Why this process does not share a folder with the driver; "" if it does."""
    try:
        if "://" in url:
            folder = importlib.import_module("infra.filesystems").Folder(url)
            folder.write_bytes(mine, folder.read_bytes(theirs))
        elif not Path(url).is_dir():
            return "there is no such folder"
        elif not Path(url, theirs).is_file():
            return "it is another folder of that name"
        else:
            Path(url, mine).write_bytes(Path(url, theirs).read_bytes())
    except Exception as error:  # of the disk, the network, or of old code of ours
        return f"{error}"
    return ""


def _raw_problem(url: str, entries: Iterable[tuple[str, bool, int]]) -> str:
    """Why this process does not see the raw videos that the driver sees; "" if it does."""
    for name, is_folder, size in entries:
        try:
            if "://" in url:
                folder = importlib.import_module("infra.filesystems").Folder(url)
                is_same = bool((folder / name).entries()) if is_folder else folder.size(name) == size
            else:
                path = Path(url, name)
                is_same = path.is_dir() == is_folder and (is_folder or path.stat().st_size == size)
        except Exception as error:
            return f"{error}"
        if not is_same:
            return f"{name} in it is not what the driver sees"
    return ""


def _tracking_problem(uri: str | None) -> str | None:
    """Why MLflow's server does not answer this process; "" if it does."""
    if uri is None or not uri.startswith(("http://", "https://")):
        return None
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_MLFLOW_SECONDS):  # noqa: S310
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code in (401, 404) else f"it answers {error.code}"  # it asks for a password, or is behind a gateway
    except (OSError, ValueError) as error:
        return f"{error}"


def _disks(folders: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Free and all bytes of their disks."""
    found = {}
    for folder in folders:
        with suppress(OSError):  # that it is missing, others say
            usage = shutil.disk_usage(folder)
            found[folder] = usage.free, usage.total
    return found
