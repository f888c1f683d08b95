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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_MLFLOW_SECONDS = 5.0
_SOURCES = (".py", ".html")


class Probe:
    """Lives on the node, in a process that is started as every task's is."""

    def look(self, question: dict[str, Any]) -> dict[str, Any]:
        """See `look`."""
        return look(question)

    def time(self) -> float:
        """Seconds since 1970."""
        return time.time()


def look(question: dict[str, Any]) -> dict[str, Any]:
    """What this process finds.

    Args:
        question: `packages` to import; `distributions` whose versions are asked; `calls`, functions by name, each as
            "module:function"; `folders` by name, each with its `url`, the file `theirs` that the driver has written into it,
            and the name of a file `mine` to write; `raw`, a folder's `url` and some of its `entries` (name, is_folder, size),
            or None; `tracking_uri`, or None.

    Returns:
        `python` and `versions` (None for what is missing); `sources` as `source_digests` gives them, and `roots`, the folders
        that they come from; `calls`, each with its `answer` or its `problem`; `folders` and `raw` with a problem, "" if there
        is none; `tracking` likewise, None if it was not asked or is a file; `free` bytes by folder; `niceness` beyond that of
        the process that started this one.
    """
    roots = {name: _package_root(name) for name in question["packages"]}
    folders = {name: _folder_problem(**folder) for name, folder in question["folders"].items()}
    local = {folder["url"] for folder in question["folders"].values() if "://" not in folder["url"]}
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in question["distributions"]},
        "roots": sorted({str(Path(root).parent) for root in roots.values() if root}),
        "sources": source_digests(roots),
        "calls": {name: _called(where) for name, where in question["calls"].items()},
        "folders": folders,
        "raw": None if question["raw"] is None else _raw_problem(**question["raw"]),
        "tracking": _tracking_problem(question["tracking_uri"]),
        "free": {folder: _free_bytes(folder) for folder in {tempfile.gettempdir(), *local}},
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


def _called(where: str) -> dict[str, str]:
    """The answer of one of our own functions, as this process imports it, or why there is none."""
    module, _, function = where.partition(":")
    try:
        return {"answer": str(getattr(importlib.import_module(module), function)()), "problem": ""}
    except Exception as error:  # whatever is wrong here is what was asked
        return {"answer": "", "problem": f"{error}" or type(error).__name__}


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


def _free_bytes(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
