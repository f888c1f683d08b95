"""Whole copies of remote shards on a local disk, bounded in bytes, shared by the processes of a machine.

FOLDER/<hash of the shard set's URL>-<shard>.copy   a shard; its time of change says when it was last used
                                            .part   one that is being fetched: its full size is reserved, so it counts
                                            .lock   held by the process that fetches it; empty, and stays

A copy appears by a rename, so it is whole unless something outside cuts it. Room is made under one lock of the folder by
removing the copies that were used longest ago. Who reads one that is removed keeps it open to the end of his clip.

The cache trusts nobody: a copy of another size is fetched again here, one with other bytes by the reader, which checks every
frame.
"""

import errno
import hashlib
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from infra.errors import ConfigError
from infra.filesystems import FileRanges, Folder

# A request of an object store brings about 50 to 100 MB a second after 10 to 100 ms; memory holds one piece a thread.
_PIECE_BYTES = 16 << 20
_WAIT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class ShardCache:
    """A folder of copies; small and picklable, any number of processes may have one of the same folder.

    Attributes:
        folder: on a local disk; made when it is first needed.
        max_bytes: of all copies together, those under way included.
    """

    folder: Path
    max_bytes: int

    def open(self, shards: Folder, name: str, num_bytes: int) -> FileRanges:
        """A shard as a local file, fetched if it is not there; waits if another thread or process fetches it already.

        Args:
            shards: the remote shard set.
            name: of the shard.
            num_bytes: its size.

        Raises:
            ConfigError: if it is larger than the whole cache.
            ValueError: if the remote shard has another size.
            OSError: if it cannot be fetched or stored.
        """
        if num_bytes > self.max_bytes:
            raise ConfigError(
                f"shard {shards}/{name} has {num_bytes} bytes, the shard cache in {self.folder} at most {self.max_bytes}; "
                "enlarge it, or use none"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        copy = self._path(shards, name)
        found = self._open_copy(copy, num_bytes)
        if found is not None:
            return found
        with FileLock(copy.with_suffix(".lock")):
            # Another thread may have fetched it while this one waited.
            return self._open_copy(copy, num_bytes) or self._fetch(shards, name, num_bytes, copy)

    def discard(self, shards: Folder, name: str) -> None:
        """Remove the copy of a shard if there is one, because its bytes are wrong."""
        self._path(shards, name).unlink(missing_ok=True)

    def _path(self, shards: Folder, name: str) -> Path:
        return self.folder / f"{hashlib.blake2b(shards.url.encode(), digest_size=8).hexdigest()}-{name}.copy"

    def _open_copy(self, copy: Path, num_bytes: int) -> FileRanges | None:
        with suppress(FileNotFoundError):
            ranges = Folder(self.folder).open_ranges(copy.name)
            if ranges.size == num_bytes:
                os.utime(copy)
                return ranges
        return None

    def _fetch(self, shards: Folder, name: str, num_bytes: int, copy: Path) -> FileRanges:
        part = copy.with_suffix(".part")
        try:
            self._reserve(part, num_bytes)
            with part.open("r+b") as file:
                remote = shards.open_ranges(name)
                if remote.size != num_bytes:
                    raise ValueError(f"found a shard of {remote.size} bytes, expected {num_bytes}")
                for start in range(0, num_bytes, _PIECE_BYTES):
                    file.write(remote.read(start, min(_PIECE_BYTES, num_bytes - start)))
            ranges = Folder(self.folder).open_ranges(part.name)  # before others can see and remove it
            with self._lock():  # who counts sees one of the two names, never none
                part.replace(copy)
        except OSError as error:
            part.unlink(missing_ok=True)
            if error.errno == errno.ENOSPC:
                raise OSError(errno.ENOSPC, "the disk of the shard cache is full; make it smaller", str(self.folder)) from error
            raise
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return ranges

    def _reserve(self, part: Path, num_bytes: int) -> None:
        """Make a file of the full size once there is room for it; waits for other fetches if they hold all the room."""
        while True:
            with self._lock():
                if self._make_room(part, num_bytes):
                    with part.open("wb") as file:
                        file.truncate(num_bytes)
                    return
            time.sleep(_WAIT_SECONDS)

    def _lock(self) -> FileLock:
        """Held while files are counted, reserved, renamed and removed to make room."""
        return FileLock(self.folder / "cache.lock")

    def _make_room(self, part: Path, num_bytes: int) -> bool:
        """Remove what dead processes left and copies, longest unused first, until `num_bytes` fit.

        False if what others fetch leaves too little room.
        """
        sizes, used = {}, {}
        for path in [*self.folder.glob("*.copy"), *self.folder.glob("*.part")]:
            with suppress(FileNotFoundError):  # discarded right now, or its fetch failed
                status = path.stat()
                sizes[path], used[path] = status.st_size, status.st_mtime_ns
        sizes.pop(part, None)  # left by a process that died; it will be overwritten
        num_free = self.max_bytes - sum(sizes.values())
        for path in sorted(sizes, key=lambda path: (path.suffix == ".copy", used[path])):
            if num_free >= num_bytes:
                break
            if path.suffix == ".copy":
                path.unlink(missing_ok=True)
                num_free += sizes[path]
            elif _remove_if_orphaned(path):
                num_free += sizes[path]
        return num_free >= num_bytes


def _remove_if_orphaned(part: Path) -> bool:
    """Remove what a process that died has left: nobody holds its lock."""
    try:
        with FileLock(part.with_suffix(".lock"), timeout=0):
            part.unlink(missing_ok=True)
            return True
    except Timeout:
        return False
