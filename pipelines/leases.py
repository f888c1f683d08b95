"""Who uses which artifacts right now, so that `sagsm store gc` leaves them alone.

    store/.use/<id>.json    what one process needs of the store; locked by it, and the kernel gives the lock up when it ends

A process takes a lease before it relies on what it has found, and then looks again; whoever removes artifacts reads the leases
and takes artifacts away in one step, in which nobody gets a lease.
"""

import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from infra.errors import PipelineError
from infra.provenance import this_process
from infra.storage import canonical_json, locked_folder
from pipelines.artifacts import is_artifact

Key = tuple[str, str]
"""A stage and a fingerprint."""

_FOLDER = ".use"
_LEASES = "*.json"
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def lease(root: Path, uses: Iterable[Key], by: str) -> Iterator[None]:
    """Keep artifacts from being removed while the block runs; of a store that we may not write to, it keeps nothing.

    Args:
        root: of the store; made if it is missing.
        uses: the artifacts, those that have yet to be made as well. What they need is kept with them.
        by: what is going on, for people.

    Raises:
        PipelineError: if the disk does not take it.
    """
    with ExitStack() as stack:
        try:
            descriptor, path = _write(root / _FOLDER, {"by": by, "process": this_process(), "uses": sorted(set(uses))})
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise PipelineError(
                    f"cannot write into {root} which of its artifacts are in use: {error}; free some space or choose another "
                    "place with --workdir"
                ) from error
        else:
            stack.callback(os.close, descriptor)
            stack.callback(path.unlink, missing_ok=True)
        yield


@contextmanager
def in_use(artifacts: Iterable[Path], by: str) -> Iterator[None]:
    """Keep finished artifacts from being removed while the block runs.

    Args:
        artifacts: their folders, in whichever stores.
        by: as for `lease`.

    Raises:
        PipelineError: as `lease`, and if one was removed a moment ago.
    """
    found = list(artifacts)
    with ExitStack() as stack:
        for artifact in found:
            stack.enter_context(lease(artifact.parents[1], [(artifact.parent.name, artifact.name)], by))
        for artifact in found:
            if not is_artifact(artifact):
                raise PipelineError(f"{artifact} was removed a moment ago; expected it to stay; run its experiment again")
        yield


@contextmanager
def nobody_leases(root: Path) -> Iterator[dict[Key, str]]:
    """While the block runs nobody gets a lease; it is given what is leased already, each with who uses it.

    Leases of processes that have ended are removed.
    """
    folder = root / _FOLDER
    folder.mkdir(exist_ok=True)
    with locked_folder(folder):
        yield {key: by for path in sorted(folder.glob(_LEASES)) for key, by in _read(path, remove_dead=True).items()}


def leased(root: Path) -> dict[Key, str]:
    """What is leased at this moment, each with who uses it; changes nothing."""
    return {key: by for path in sorted((root / _FOLDER).glob(_LEASES)) for key, by in _read(path, remove_dead=False).items()}


def is_being_made(folder: Path) -> bool:
    """Whether a process holds the lock of an artifact: it is writing it."""
    path = folder.with_suffix(".lock")
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _read(path: Path, *, remove_dead: bool) -> dict[Key, str]:
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                content = json.loads(file.read() or b'{"uses": [], "by": "", "process": ""}')  # made a moment ago
                return dict.fromkeys(
                    [(stage, name) for stage, name in content["uses"]], f"{content['by']} ({content['process']})"
                )
            if remove_dead:
                path.unlink(missing_ok=True)
    except FileNotFoundError:  # its process has ended a moment ago
        pass
    return {}


def _write(folder: Path, content: dict[str, object]) -> tuple[int, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{uuid.uuid4().hex}.json"
    with locked_folder(folder):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, canonical_json(content).encode())
        except BaseException:
            path.unlink()
            os.close(descriptor)
            raise
    return descriptor, path
