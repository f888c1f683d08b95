"""What is in a store: artifacts, unfinished work, what killed programs have left; who made it and what needs it.

An artifact is needed by those whose `inputs` name it. Nothing here changes the store or asks a network.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.errors import PipelineError
from infra.filesystems import Folder
from pipelines.artifacts import MANIFEST, Store
from pipelines.leases import Key, is_being_made

PARTIAL, RUN_FILE, LOCK = ".partial", ".run", ".lock"
REMOVED = ".removed-"  # an artifact that `sagsm store gc` has taken away
_PLACES = {"shards": "output", "train": "checkpoints"}  # by stage, the setting of its section that leads elsewhere
_LEFTOVERS = {".damaged-": "a damaged artifact that was made again", REMOVED: "half removed by an earlier gc"}


@dataclass(frozen=True)
class Item:
    """An artifact of the store, or work on one that is not finished.

    Attributes:
        stage: of the DAG.
        fingerprint: names it, with the stage.
        path: the folder; of unfinished work that which ends in ".partial".
        is_finished: whether it is an artifact.
        problem: why a run would make it again; "" if it is whole.
        is_readable: whether its manifest could be read; else all below but the last three is unknown.
        experiment: that made it; "" if nobody knows.
        variant: of a comparison; "" if it belongs to no single one.
        mlflow_run_id: of the run that made it.
        inputs: what it was made from.
        outside: URLs of what belongs to it and lies elsewhere: its shard set (`shards.output`), copies of its checkpoints
            (`train.checkpoints`).
        num_bytes: on this disk.
        modified: seconds since 1970; of an artifact, when it was finished.
        used_by: who is using it now; "" if nobody.
    """

    stage: str
    fingerprint: str
    path: Path
    is_finished: bool
    problem: str
    is_readable: bool
    experiment: str
    variant: str
    mlflow_run_id: str | None
    inputs: tuple[Key, ...]
    outside: tuple[str, ...]
    num_bytes: int
    modified: float
    used_by: str = ""

    @property
    def key(self) -> Key:
        """Stage and fingerprint."""
        return self.stage, self.fingerprint

    @property
    def state(self) -> str:
        """In words."""
        words = self.problem or ("complete" if self.is_finished else "unfinished")
        return f"{words}, in use by {self.used_by}" if self.used_by else words


@dataclass(frozen=True)
class Leftover:
    """What nobody will ever read again: of a killed program, or a lock of an artifact that is gone.

    Attributes:
        path: a file or folder.
        what: in words.
        num_bytes: on this disk.
    """

    path: Path
    what: str
    num_bytes: int


@dataclass(frozen=True)
class Inventory:
    """All that is in a store: `items`, stages in the order of their first; `leftovers`; `unknown` paths, which are not ours."""

    items: tuple[Item, ...]
    leftovers: tuple[Leftover, ...]
    unknown: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        return sum(item.num_bytes for item in self.items) + sum(leftover.num_bytes for leftover in self.leftovers)

    def needed_by(self) -> dict[Key, list[Item]]:
        """For each artifact the items that were made from it."""
        found: dict[Key, list[Item]] = defaultdict(list)
        for item in self.items:
            for key in item.inputs:
                found[key].append(item)
        return found

    def experiments(self) -> dict[Key, list[str]]:
        """For each item the experiments that made it or something from it, as far as the store knows."""
        needed_by, found = self.needed_by(), {item.key: {item.experiment} - {""} for item in self.items}
        for item in self.items:
            for later in _closure([item.key], lambda key: [each.key for each in needed_by.get(key, [])]):
                found[item.key] |= found.get(later, set())
        return {key: sorted(names) for key, names in found.items()}


def needs(items: Iterable[Item], keys: Iterable[Key]) -> set[Key]:
    """The keys, and all that they were made from, directly or through others."""
    inputs: dict[Key, list[Key]] = defaultdict(list)
    for item in items:
        inputs[item.key] += item.inputs
    return _closure(keys, lambda key: inputs.get(key, []))


def take_inventory(store: Store, leases: Mapping[Key, str]) -> Inventory:
    """Look through a store.

    Args:
        store: may be missing.
        leases: as `leases.leased` gives them.
    """
    items: list[Item] = []
    leftovers: list[Leftover] = []
    unknown: list[Path] = []
    for folder in sorted(path for path in store.root.glob("*") if path.is_dir() and not path.name.startswith(".")):
        names = {path.name: path for path in folder.iterdir()}
        for name, path in sorted(names.items()):
            fingerprint, dot, rest = name.partition(".")
            suffix = dot + rest
            if path.is_dir() and suffix == "" and (path / MANIFEST).is_file():
                items.append(_artifact(store, folder.name, fingerprint, leases))
            elif path.is_dir() and suffix == PARTIAL:
                items.append(_unfinished(folder.name, fingerprint, path, leases))
            elif what := _left_by(names, fingerprint, suffix):
                leftovers.append(Leftover(path, what, measure(path)[0]))
            elif suffix not in (LOCK, RUN_FILE):
                unknown.append(path)
    first: dict[str, float] = {}
    for item in items:
        first[item.stage] = min(item.modified, first.get(item.stage, item.modified))
    items.sort(key=lambda item: (first[item.stage], item.stage, item.modified))
    return Inventory(tuple(items), tuple(leftovers), tuple(unknown))


def measure(path: Path) -> tuple[int, float]:
    """Bytes of a file, or of all files in a folder, and when the newest was changed; what vanishes meanwhile does not count."""
    num_bytes, newest, todo = 0, 0.0, [path]
    while todo:
        current = todo.pop()
        try:
            status = current.lstat()
            if current.is_dir() and not current.is_symlink():
                todo += [Path(entry.path) for entry in os.scandir(current)]
            else:
                num_bytes += status.st_size
            newest = max(newest, status.st_mtime)
        except FileNotFoundError:
            continue
    return num_bytes, newest


def outside_of(path: Path) -> tuple[str, ...]:
    """`Item.outside` of an artifact that gc has taken away; none of other leftovers."""
    fingerprint, mark, _ = path.name.partition(REMOVED)
    for name in (MANIFEST, RUN_FILE) if mark else ():
        try:
            return _outside(path.parent.name, fingerprint, json.loads((path / name).read_bytes())["config"])
        except (OSError, ValueError, KeyError):
            continue
    return ()


def _artifact(store: Store, stage: str, fingerprint: str, leases: Mapping[Key, str]) -> Item:
    path = store.folder(stage, fingerprint)
    used_by = leases.get((stage, fingerprint), "")
    num_bytes, _ = measure(path)
    modified = (path / MANIFEST).stat().st_mtime
    try:
        problem = store.find(stage, fingerprint)[1]
        manifest = json.loads((path / MANIFEST).read_bytes())
        about = _about(stage, fingerprint, manifest)
    except PipelineError as error:
        return Item(stage, fingerprint, path, True, str(error), False, "", "", None, (), (), num_bytes, modified, used_by)
    return replace(about, path=path, is_finished=True, problem=problem, num_bytes=num_bytes, modified=modified, used_by=used_by)


def _unfinished(stage: str, fingerprint: str, path: Path, leases: Mapping[Key, str]) -> Item:
    num_bytes, modified = measure(path)
    used_by = leases.get((stage, fingerprint), "") or ("another process" if is_being_made(path) else "")
    try:
        known = json.loads(path.with_suffix(RUN_FILE).read_bytes())
        about = _about(stage, fingerprint, known)
    except (OSError, ValueError):  # killed in its first moments
        about = _about(stage, fingerprint, {})
    return replace(about, path=path, num_bytes=num_bytes, modified=modified, used_by=used_by)


def _about(stage: str, fingerprint: str, known: Mapping[str, Any]) -> Item:
    """What a manifest says, or the file beside unfinished work."""
    inputs = tuple((name.partition(":")[0], key) for name, key in known.get("inputs", {}).items())
    return Item(
        stage,
        fingerprint,
        Path(),
        False,
        "",
        True,
        known.get("experiment", ""),
        known.get("variant", ""),
        known.get("mlflow_run_id", known.get("run_id")),
        inputs,
        _outside(stage, fingerprint, known.get("config", {})),
        0,
        0.0,
    )


def _outside(stage: str, fingerprint: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    place = config.get(stage, {}).get(_PLACES.get(stage, ""))
    return (str(Folder(place) / fingerprint),) if place else ()


def _left_by(names: Mapping[str, Path], fingerprint: str, suffix: str) -> str:
    """What a name that is no artifact and no work stands for, if it is ours and of no more use; else ""."""
    for beginning, what in _LEFTOVERS.items():
        if suffix.startswith(beginning):
            return what
    has_owner = fingerprint in names or fingerprint + PARTIAL in names
    if suffix == RUN_FILE and fingerprint + PARTIAL not in names:
        return "the note of a run whose work is gone"
    if suffix == LOCK and not has_owner and not is_being_made(names[fingerprint + suffix].with_suffix("")):
        return "the lock of an artifact that is gone"
    return ""


def _closure(keys: Iterable[Key], following: Any) -> set[Key]:
    found: set[Key] = set()
    todo = list(keys)
    while todo:
        key = todo.pop()
        if key not in found:
            found.add(key)
            todo += following(key)
    return found
