"""A copy of the checkpoints in another place, such as an object store, so that another machine can go on from there.

    <place>/step-00000123/weights.safetensors, optimizer.pt, then manifest.json, as on the local disk (checkpoint.py)

A thread of rank 0 copies each checkpoint once it is whole; training waits for it only at its end. Since the manifest goes up
last, a folder without one is none. The files are opened before the copy begins and hashed on the way, so that neither pruning
nor damage of the local ones gets into the copy. As on the disk, the two newest and the best are kept.
"""

import hashlib
import json
import logging
import shutil
import threading
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from infra.errors import DataError, PipelineError, SagsmError
from infra.filesystems import Folder
from infra.storage import fsync_dir, fsync_file
from pipelines.training import checkpoint
from pipelines.training.checkpoint import MANIFEST
from pipelines.training.metrics import EpochMetrics, best_epoch

_NUM_LATEST_KEPT = 2
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_AFTER_FAILURE = 30.0
_LAST_ATTEMPTS = 3  # each with the retries of `Folder`, about 20 seconds
_CHUNK_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class CheckpointMirror:
    """Copies checkpoints while its `with` block runs; at the end of a block without error, the newest must have got there.

    A copy that fails is a warning, and the next attempt takes what is newest then. So checkpoints may be left out, as they are
    when they come faster than they can be copied; the best one never is, once a later one is there.

    Args:
        folder: of the local checkpoints.
        place: where the copies go.

    Raises:
        PipelineError: at the end of the block, if the newest checkpoint could not be copied.
    """

    def __init__(self, folder: Path, place: Folder) -> None:
        self._folder, self._place = folder, place
        self._copied: str | None = None  # the newest one that is there
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint-mirror", daemon=True)

    def __enter__(self) -> "CheckpointMirror":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if kind is not None and not issubclass(kind, SagsmError):
            return  # a lost peer or a defect: the process may have to end at once
        self._thread.join()
        for _ in range(_LAST_ATTEMPTS):
            problem = self._copy_newest()
            if problem is None:
                return
        if kind is None:
            raise PipelineError(
                f"the last checkpoint could not be copied to {self._place}: {problem}. It is safe in {self._folder}; run again "
                "when the place can be reached, or set train.checkpoints=null"
            )

    def _run(self) -> None:
        pause = _SECONDS_BETWEEN_LOOKS
        while not self._ended.wait(pause):
            pause = _SECONDS_BETWEEN_LOOKS if self._copy_newest() is None else _SECONDS_AFTER_FAILURE

    def _copy_newest(self) -> Exception | None:
        """Copy the best and the newest checkpoint where they are not there yet; return what went wrong, after a warning."""
        path = max(self._folder.glob("step-*"), default=None)
        if path is None or path.name == self._copied:
            return None
        try:
            best = best_epoch(checkpoint.read_history(self._folder))
            best_path = checkpoint.checkpoint_path(self._folder, best.step) if best else path
            for wanted in dict.fromkeys([best_path, path]):
                manifest = upload(wanted, self._place)
            self._copied = path.name
            prune(self._place, manifest)
        except (OSError, DataError) as error:
            if not path.exists():  # pruned before its files were open: there is a newer one
                return None
            _log.warning("checkpoint %s could not be copied to %s: %s; it is tried again", path.name, self._place, error)
            return error
        return None


def upload(path: Path, place: Folder) -> Mapping[str, Any]:
    """Copy one checkpoint, its manifest last, unless it is there already; return its manifest.

    Raises:
        DataError: if the local files are not those that the manifest describes.
        OSError: if they are gone, or the place cannot be written.
    """
    target = place / path.name
    with ExitStack() as stack:
        data = (path / MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(data)
        files = {name: stack.enter_context((path / name).open("rb")) for name in manifest["files"]}
        if target.size(MANIFEST) == len(data) and target.read_bytes(MANIFEST) == data:
            return manifest
        target.make()
        target.delete(MANIFEST)  # of an earlier run that got as far
        for name, file in files.items():
            _upload_file(file, target, name, manifest["files"][name]["sha256"])
        target.write_bytes(MANIFEST, data)
    return manifest


def prune(place: Folder, manifest: Mapping[str, Any]) -> None:
    """Remove all copies but the two newest and the best so far, and what broken uploads have left.

    Raises:
        OSError: if the place cannot be read or written.
    """
    whole = _steps_at(place)
    best = best_epoch([EpochMetrics(**epoch) for epoch in manifest["history"]])
    kept = {*whole[-_NUM_LATEST_KEPT:], *([checkpoint.checkpoint_path(Path(), best.step).name] if best else [])}
    for entry in place.entries():
        if entry.name.startswith("step-") and entry.name not in kept:
            doomed = place / entry.name
            for name in sorted(doomed.list(), key=lambda name: name != MANIFEST):  # first, so that it never describes a part
                doomed.delete(name)
            if doomed.local is not None:
                with suppress(OSError):  # somebody else's folder in it
                    doomed.local.rmdir()


def fetch(place: Folder, folder: Path) -> None:
    """Bring the newest good copy, and the best of its epochs, to the local folder, unless that has the newer checkpoint.

    A copy that is damaged is left where it is, with a warning, and the one before is taken.

    Raises:
        PipelineError: if there is no local checkpoint, and the place cannot be read or all copies are damaged.
    """
    here = max((path.name for path in folder.glob("step-*")), default="")
    try:
        names = [name for name in reversed(_steps_at(place)) if name > here]
        for name in names:
            try:
                _fetch_with_best(place, name, folder)
            except DataError as error:
                _log.warning("the copy %s/%s cannot be used: %s; the one before is tried", place, name, error)
            else:
                return
    except OSError as error:
        if not here:
            raise PipelineError(
                f"cannot look for checkpoints at {place}: {error}; check train.checkpoints and the network, then run again"
            ) from error
        _log.warning("cannot look for newer checkpoints at %s: %s; training goes on from %s", place, error, folder / here)
        return
    if names and not here:
        raise PipelineError(f"all {len(names)} checkpoints at {place} are damaged; delete them to train anew")


def _steps_at(place: Folder) -> list[str]:
    """The names of all whole checkpoints there, the oldest first."""
    try:
        entries = place.entries()
    except FileNotFoundError:
        return []
    names = [entry.name for entry in entries if entry.is_folder and entry.name.startswith("step-")]
    return [name for name in names if (place / name).size(MANIFEST) is not None]


def _upload_file(file: IO[bytes], target: Folder, name: str, sha256: str) -> None:
    digest = hashlib.sha256()
    with target.create(name) as path, path.open("wb") as copy:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
        if digest.hexdigest() != sha256:
            raise DataError(f"{file.name} is damaged: its content has changed since it was written")


def _fetch_with_best(place: Folder, name: str, folder: Path) -> None:
    path = _fetch_one(place, name, folder)
    best = best_epoch(checkpoint.read_history(folder))
    best_path = checkpoint.checkpoint_path(folder, best.step) if best else path
    if not best_path.exists():
        try:
            _fetch_one(place, best_path.name, folder)
        except DataError:
            shutil.rmtree(path)
            raise


def _fetch_one(place: Folder, name: str, folder: Path) -> Path:
    """Copy a checkpoint to the local disk; it appears there when its hashes have been checked."""
    temporary = folder / f".tmp-{uuid.uuid4().hex[:8]}-{name}"
    temporary.mkdir(parents=True)
    try:
        for file in (place / name).list():
            with (place / name).fetch(file) as source:
                shutil.copyfile(source, temporary / file)
            fsync_file(temporary / file)
        checkpoint.verify(temporary)
        temporary.rename(folder / name)
        fsync_dir(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / name
