"""Removing from a store what is not wanted any more: `sagsm store gc`.

What somebody uses now, what the user keeps, and all that these were made from stays. The rest is first renamed, in a step in
which no run can begin to rely on it, and then deleted: a gc that is killed leaves each artifact complete or not there, and the
next one ends its work.

    store/<stage>/<fingerprint>.removed-<id>/    taken away; what is left of it is deleted by the next gc
"""

import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ConfigError, PipelineError
from infra.filesystems import Folder
from infra.settings import nearest
from infra.storage import fsync_dir
from infra.tracking import unsent_files
from pipelines.artifacts import MANIFEST, Store
from pipelines.leases import Key, is_being_made, leased, nobody_leases
from pipelines.store_inventory import (
    LOCK,
    REMOVED,
    RUN_FILE,
    Inventory,
    Item,
    Leftover,
    needs,
    outside_of,
    take_inventory,
)

_DAY_SECONDS = 86_400.0
_MIN_DIGITS = 4
_COMMITS = (
    "dataset.json",
    "manifest.json",
)  # of a shard set and of a checkpoint: removed first, so that no part passes for a whole


@dataclass(frozen=True)
class Keep:
    """What is to stay, with all that it was made from; where nothing is said, every artifact and all unfinished work.

    Attributes:
        names: of experiments; or fingerprints, at least 4 digits of them; or ids of MLflow runs.
        last: of each stage, for each experiment and variant, so many of the newest.
        days: what was finished, or worked on, in so many days.
    """

    names: tuple[str, ...] = ()
    last: int | None = None
    days: float | None = None

    @property
    def is_all(self) -> bool:
        """Whether only leftovers go."""
        return not self.names and self.last is None and self.days is None


@dataclass(frozen=True)
class Collected:
    """What a gc has done, or would do.

    Attributes:
        removed: artifacts and unfinished work.
        leftovers: what else was removed.
        kept: what stays.
        outside: URLs of what belongs to the removed and lies elsewhere; removed with them only if that was asked for.
    """

    removed: tuple[Item, ...]
    leftovers: tuple[Leftover, ...]
    kept: tuple[Item, ...]
    outside: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """That are, or would be, freed on this disk."""
        return sum(item.num_bytes for item in self.removed) + sum(leftover.num_bytes for leftover in self.leftovers)


def plan_gc(workdir: Path, keep: Keep) -> Collected:
    """What `collect` would remove now; changes nothing.

    Raises:
        ConfigError, PipelineError: as `collect`.
    """
    store = Store(workdir / "store")
    return _choose(workdir, take_inventory(store, leased(store.root)), keep)


def collect(workdir: Path, keep: Keep, *, outside: bool = False) -> Collected:
    """Remove what `keep` does not keep, and leftovers.

    Args:
        workdir: holds the store.
        keep: what is to stay.
        outside: also what belongs to the removed and lies elsewhere (`Item.outside`).

    Raises:
        ConfigError: if a name of `keep` means nothing in this store.
        PipelineError: if an artifact cannot be read, so that nobody knows what it was made from; or if something could not be
            deleted: all else was, and the next gc tries again.
    """
    store = Store(workdir / "store")
    if not store.root.is_dir():
        return Collected((), (), (), ())
    with nobody_leases(store.root) as leases:
        chosen = _choose(workdir, take_inventory(store, leases), keep)
        doomed = [_take_away(item) for item in chosen.removed]
    doomed += [leftover.path for leftover in chosen.leftovers]
    problems = []
    for path in doomed:
        try:
            if outside:
                for url in outside_of(path):
                    _delete_elsewhere(Folder(url))
            _delete(path)
        except OSError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise PipelineError(
            f"{len(problems)} of {len(doomed)} could not be deleted: {'; '.join(problems[:3])}. No run takes them for "
            "artifacts any more; check permissions and the network, then run gc again"
        )
    return chosen


def choose(items: Collection[Item], keep: Keep, *, used: Iterable[Key], now: float) -> set[Key]:
    """The keys that stay.

    Args:
        items: all of a store.
        keep: what the user wants.
        used: what somebody needs now.
        now: seconds since 1970.

    Raises:
        ConfigError: if a name means nothing.
    """
    roots = {*used, *(item.key for item in items if item.used_by)}
    if keep.is_all:
        roots |= {item.key for item in items}
    for name in keep.names:
        roots |= _named(items, name)
    if keep.days is not None:
        roots |= {item.key for item in items if item.modified >= now - keep.days * _DAY_SECONDS}
    if keep.last is not None:
        groups = defaultdict(list)
        for item in sorted(items, key=lambda item: -item.modified):
            groups[item.stage, item.experiment, item.variant].append(item.key)
        roots |= {key for group in groups.values() for key in list(dict.fromkeys(group))[: keep.last]}
    return needs(items, roots)


def _choose(workdir: Path, inventory: Inventory, keep: Keep) -> Collected:
    unread = [item for item in inventory.items if not item.is_readable]
    if unread:
        raise PipelineError(
            f"what {unread[0].stage} {unread[0].fingerprint} needs is not known, so nothing was removed: {unread[0].problem}"
        )
    unsent = {path.resolve() for path in unsent_files(workdir)}
    used = [item.key for item in inventory.items if any(path.is_relative_to(item.path.resolve()) for path in unsent)]
    kept = choose(inventory.items, keep, used=used, now=time.time())
    removed = tuple(item for item in inventory.items if item.key not in kept)
    left = [url for leftover in inventory.leftovers for url in outside_of(leftover.path)]
    return Collected(
        removed,
        inventory.leftovers,
        tuple(item for item in inventory.items if item.key in kept),
        tuple(dict.fromkeys([*(url for item in removed for url in item.outside), *left])),
    )


def _named(items: Iterable[Item], name: str) -> set[Key]:
    items = list(items)
    found = {item.key for item in items if item.experiment == name}
    if not found and len(name) >= _MIN_DIGITS:
        found = {item.key for item in items if item.fingerprint.startswith(name) or item.mlflow_run_id == name}
    if not found:
        known = sorted({item.experiment for item in items} - {""})
        raise ConfigError(
            f"--keep {name!r} is no experiment, fingerprint or MLflow run of this store; "
            + (nearest(name, known) if known else "it is empty")
        )
    return found


def _take_away(item: Item) -> Path:
    """Rename an artifact, so that from here on it is none; what was known of unfinished work goes with it."""
    target = item.path.with_name(f"{item.fingerprint}{REMOVED}{uuid.uuid4().hex[:8]}")
    if not item.is_finished:
        with suppress(FileNotFoundError):
            item.path.with_suffix(RUN_FILE).rename(item.path / RUN_FILE)
    item.path.rename(target)
    with suppress(FileNotFoundError):
        if not is_being_made(item.path):
            item.path.with_suffix(LOCK).unlink()
    fsync_dir(target.parent)
    return target


def _delete(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for name in (MANIFEST, RUN_FILE):
        (path / name).unlink(missing_ok=True)
    with suppress(FileNotFoundError):  # another gc is at it
        shutil.rmtree(path)


def _delete_elsewhere(folder: Folder) -> None:
    """Everything in the folder of one artifact, whose name is its fingerprint; links are not followed."""
    if folder.local is not None:
        if folder.local.is_symlink() or not folder.local.is_dir():
            folder.local.unlink(missing_ok=True)
            return
        for path in folder.local.rglob("*"):
            if path.name in _COMMITS:
                path.unlink()
        shutil.rmtree(folder.local)
        return
    try:
        entries = folder.entries()
    except FileNotFoundError:
        return
    for entry in sorted(entries, key=lambda entry: entry.name not in _COMMITS):
        if entry.is_folder:
            _delete_elsewhere(folder / entry.name)
        else:
            folder.delete(entry.name)
