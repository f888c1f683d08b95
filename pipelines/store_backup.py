"""Backup of a work directory, while others work in it, and the way back: `sagsm store backup`, `sagsm store restore`.

    DEST/store/<stage>/<fingerprint>/    finished artifacts; artifact.json is written last, as in the store
         mlflow.db                       the embedded MLflow, as it was at one moment
         mlflow-artifacts/               its files
         mlflow-spool/                   what ended runs could not send to their MLflow server
         backup.json                     what was backed up when, and from where; written last

DEST is a folder or lies in an object store. A second backup to the same place copies only what is new. A backup that is killed
leaves there what the last one has left, or newer: each artifact complete or not there, each other file old or new. What is not
backed up: raw videos, unfinished work (`train.checkpoints` copies that of trainings), and what lies elsewhere (`Item.outside`).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.errors import ConfigError, DataError
from infra.filesystems import Entry, Folder
from infra.progress import OnProgress
from infra.storage import atomic_path, write_bytes
from infra.tracking import embedded_uri, spool_folder
from infra.tracking_backup import ARTIFACTS, check_database, copy_database, relocate_database, relocate_journal
from infra.tracking_spool import read_left
from pipelines.artifacts import MANIFEST, Store
from pipelines.leases import lease, leased
from pipelines.store_inventory import Item, take_inventory

FORMAT_VERSION = 1
ABOUT = "backup.json"
_DATABASE, _SPOOL = "mlflow.db", "mlflow-spool"
_CHUNK_BYTES = 1 << 20
_STAGE, _FINGERPRINT = re.compile(r"[a-z_]+"), re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Backup:
    """What was copied, in either direction.

    Attributes:
        num_artifacts: of the store that are there now.
        num_copied: of these, copied this time.
        num_bytes: copied this time, MLflow's files included.
        num_runs: of the embedded MLflow; None if there is none.
        damaged: artifacts that were left out, with the reason.
        unfinished: work that was left out.
        outside: URLs of what belongs to the artifacts and is not in the backup.
    """

    num_artifacts: int
    num_copied: int
    num_bytes: int
    num_runs: int | None
    damaged: tuple[str, ...]
    unfinished: tuple[str, ...]
    outside: tuple[str, ...]


def back_up(workdir: Path, place: Folder, on_progress: OnProgress) -> Backup:
    """Copy finished artifacts and the embedded MLflow to `place`; others may work meanwhile.

    Raises:
        ConfigError: if there is nothing to copy, or the place lies in the work directory.
        PipelineError: if MLflow's database cannot be copied.
        OSError: if the disk or the network fails.
    """
    workdir = workdir.resolve()
    store = Store(workdir / "store")
    if not store.root.is_dir() and not (workdir / _DATABASE).exists():
        raise ConfigError(f"found no store and no mlflow.db in {workdir}; expected a work directory; name it with --workdir")
    if place.local is not None and place.local.resolve().is_relative_to(workdir):
        raise ConfigError(f"{place} lies in {workdir}, which it is to outlive; expected another place, best another disk")
    place.make()
    items = take_inventory(store, leased(store.root)).items
    finished = [item for item in items if item.is_finished]
    num_copied = num_bytes = 0
    damaged = [f"{item.stage} {item.fingerprint}: {item.problem}" for item in finished if item.problem]
    kept = [item for item in finished if not item.problem]
    with lease(store.root, [item.key for item in kept], f"sagsm store backup {place}"):
        for number, item in enumerate(kept):
            on_progress(number, len(kept), f"artifacts, now {item.stage} {item.fingerprint}")
            try:
                copied = _copy_artifact(Folder(item.path), place / "store" / item.stage / item.fingerprint)
            except (DataError, FileNotFoundError) as error:
                damaged.append(f"{item.stage} {item.fingerprint}: {error}")
                continue
            num_copied, num_bytes = num_copied + (copied > 0), num_bytes + copied
        # In this order nothing that the database counts on is missing: a record leaves the journal once the database has it,
        # and files are there before the database says so.
        num_bytes += _copy_unsent(workdir / _SPOOL, place / _SPOOL)
        num_runs = _copy_embedded(workdir / _DATABASE, place)
        num_bytes += sum(_copy_new(Folder(workdir / ARTIFACTS), place / ARTIFACTS))
    bad = {text.partition(":")[0] for text in damaged}
    whole = [item for item in kept if f"{item.stage} {item.fingerprint}" not in bad]
    place.write_bytes(ABOUT, _describe(workdir, whole, num_runs))
    outside = tuple(url for item in whole for url in item.outside)
    unfinished = tuple(f"{item.stage} {item.fingerprint}" for item in items if not item.is_finished)
    return Backup(len(whole), num_copied, num_bytes, num_runs, tuple(damaged), unfinished, outside)


def restore(place: Folder, workdir: Path, on_progress: OnProgress) -> Backup:
    """Bring a backup into a work directory, which may have another path than before; interrupted, the same call goes on.

    Raises:
        ConfigError: if the work directory has an MLflow database already.
        DataError: if the place holds no backup, or the copy of the database is damaged.
        OSError: if the disk or the network fails.
    """
    about = _read_about(place)
    workdir = workdir.resolve()
    if (workdir / _DATABASE).exists():
        raise ConfigError(f"{workdir} has an mlflow.db; expected a work directory without one; name another with --workdir")
    store = Store(workdir / "store")
    num_copied = num_bytes = 0
    damaged = []
    for number, (stage, fingerprint, modified_ns) in enumerate(about["artifacts"]):
        on_progress(number, len(about["artifacts"]), f"artifacts, now {stage} {fingerprint}")
        if store.find(stage, fingerprint)[0] is not None:
            continue
        try:
            num_bytes += _restore_artifact(store, place / "store" / stage / fingerprint, stage, fingerprint, modified_ns)
            num_copied += 1
        except (DataError, FileNotFoundError) as error:
            damaged.append(f"{stage} {fingerprint}: {error}")
    old = Path(about["workdir"])
    num_bytes += _restore_unsent(place / _SPOOL, old, workdir)
    num_bytes += sum(_copy_new(place / ARTIFACTS, Folder(workdir / ARTIFACTS)))
    if about["num_runs"] is not None:
        with atomic_path(workdir / _DATABASE) as temporary:  # the last: with it the restore is done
            with place.fetch(_DATABASE) as copy:
                shutil.copyfile(copy, temporary)
            check_database(temporary)
            relocate_database(temporary, old, workdir)
    num_artifacts = len(about["artifacts"]) - len(damaged)
    return Backup(num_artifacts, num_copied, num_bytes, about["num_runs"], tuple(damaged), (), tuple(about["outside"]))


def _describe(workdir: Path, items: Sequence[Item], num_runs: int | None) -> bytes:
    about = {
        "format_version": FORMAT_VERSION,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "workdir": str(workdir),
        "num_runs": num_runs,
        "artifacts": [[item.stage, item.fingerprint, int(item.modified * 1e9)] for item in items],
        "outside": [url for item in items for url in item.outside],
    }
    return (json.dumps(about, indent=2) + "\n").encode()


def _read_about(place: Folder) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(place.read_bytes(ABOUT))
        if about["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{place}/{ABOUT} has format version {about['format_version']}, this program reads {FORMAT_VERSION}; use the "
                "program that wrote it"
            )
        for stage, fingerprint, _ in about["artifacts"]:  # they become paths
            if not _STAGE.fullmatch(stage) or not _FINGERPRINT.fullmatch(fingerprint):
                raise ValueError(f"{stage} {fingerprint} is no artifact")
        return about
    except FileNotFoundError as error:
        raise DataError(f"{place} holds no {ABOUT}; expected what `sagsm store backup` has written, to its end") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}/{ABOUT} is damaged: {error}; expected what `sagsm store backup` has written") from error


def _copy_artifact(source: Folder, target: Folder) -> int:
    """Copy a finished artifact, its manifest last, unless it is there; returns the bytes copied.

    Raises:
        DataError: if a file is not the one that its manifest describes.
        FileNotFoundError: if one is gone.
    """
    data = source.read_bytes(MANIFEST)
    if target.size(MANIFEST) == len(data) and target.read_bytes(MANIFEST) == data:
        return 0
    target.make()
    target.delete(MANIFEST)  # of the same stage made another time, which is whole no longer
    _remove_torn(target)
    num_bytes = _copy_files(source, target, json.loads(data)["files"])
    target.write_bytes(MANIFEST, data)
    return num_bytes + len(data)


def _restore_artifact(store: Store, source: Folder, stage: str, fingerprint: str, modified_ns: int) -> int:
    data = source.read_bytes(MANIFEST)
    with store.work_on(stage, fingerprint) as partial:
        try:
            num_bytes = _copy_files(source, Folder(partial), json.loads(data)["files"])
        except DataError:
            shutil.rmtree(partial)  # or the next run would go on from it
            raise
        write_bytes(partial / MANIFEST, data)
        os.utime(partial / MANIFEST, ns=(modified_ns, modified_ns))
        store.publish(partial, stage, fingerprint)
    return num_bytes + len(data)


def _copy_files(source: Folder, target: Folder, files: Mapping[str, Mapping[str, Any]]) -> int:
    for name, entry in files.items():
        _parent(target, name).make()
        digest = hashlib.sha256()
        with source.open(name) as file, target.create(name) as path, path.open("wb") as copy:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
            if digest.hexdigest() != entry["sha256"]:
                raise DataError(f"{source}/{name} is damaged: its content has changed since it was written")
    return sum(entry["bytes"] for entry in files.values())


def _copy_new(source: Folder, target: Folder) -> Iterator[int]:
    """Copy the files of a folder and those below it that the target has not, or has older or of another size; yields sizes."""
    try:
        entries = source.entries()
    except FileNotFoundError:
        return
    target.make()
    _remove_torn(target)
    there = {entry.name: entry for entry in _entries(target)}
    for entry in entries:
        if entry.is_folder:
            yield from _copy_new(source / entry.name, target / entry.name)
        elif not entry.name.startswith(".tmp-") and (entry.name not in there or _differs(entry, there[entry.name])):
            with source.open(entry.name) as file, target.create(entry.name) as path, path.open("wb") as copy:
                shutil.copyfileobj(file, copy, _CHUNK_BYTES)
            yield entry.size


def _remove_torn(folder: Folder) -> None:
    """What a killed backup was writing."""
    for name in folder.list():
        if name.startswith(".tmp-"):
            folder.delete(name)


def _differs(source: Entry, target: Entry) -> bool:
    return source.size != target.size or source.modified_ns > target.modified_ns


def _entries(folder: Folder) -> tuple[Entry, ...]:
    try:
        return folder.entries()
    except FileNotFoundError:
        return ()


def _copy_embedded(database: Path, place: Folder) -> int | None:
    if not database.exists():
        return None
    with place.create(_DATABASE) as path:
        return copy_database(database, path)


def _copy_unsent(spool: Path, place: Folder) -> int:
    num_bytes = 0
    for folder in sorted(path for path in spool.glob("*") if path.is_dir()):
        files, target = read_left(folder), place / folder.name
        for name in _names(target):  # of an earlier backup; it was sent since
            target.delete(name)
        for name, data in files.items():
            _parent(target, name).make()
            target.write_bytes(name, data)
            num_bytes += len(data)
    return num_bytes


def _restore_unsent(place: Folder, old: Path, workdir: Path) -> int:
    embedded, there = (spool_folder(embedded_uri(home), home / ARTIFACTS) for home in (workdir, old))
    num_bytes = 0
    for entry in _entries(place):
        source = place / entry.name
        target = Folder(embedded if entry.name == there.name else embedded.with_name(entry.name))
        for name in _names(source):
            data = source.read_bytes(name)
            _parent(target, name).make()
            target.write_bytes(name, relocate_journal(data, old, workdir) if name.endswith(".journal") else data)
            num_bytes += len(data)
    return num_bytes


def _names(folder: Folder, prefix: str = "") -> list[str]:
    """The names of all files in a folder and below it, relative to it."""
    names = []
    for entry in _entries(folder):
        if entry.is_folder:
            names += _names(folder / entry.name, f"{prefix}{entry.name}/")
        else:
            names.append(prefix + entry.name)
    return names


def _parent(folder: Folder, name: str) -> Folder:
    above = name.rpartition("/")[0]
    return folder / above if above else folder
