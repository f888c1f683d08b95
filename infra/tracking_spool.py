"""A journal on this machine's disk and a thread that sends it: whoever records something never waits for a network.

    <folder>/<time>-<process>.journal   a line an entry, "crc32 json"; emptied whenever all of it was sent
             files/<id>/<name>          copies of the files that entries name
             refused.txt                entries that the receiver will never take, with its reason

An entry is written and synced before `append` returns, and sent in order, so that a process that is killed loses none: the next
spool of the same folder takes over the journals whose writers are gone (the kernel then gives up their lock). An entry may
arrive twice; it is the receiver's part to make that harmless. Nothing here knows what an entry means. What gets here leaves the
program, so secrets are taken out of entries and files.
"""

import errno
import fcntl
import json
import logging
import os
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from infra.errors import PipelineError
from infra.secrets import redact, redact_file, redact_values
from infra.storage import fsync_dir, locked_folder, write_bytes

Entry = dict[str, Any]
"""JSON; under "file" it may name a file that `Spool.keep` has kept."""

_SUFFIX = ".journal"
_ENTRIES_AT_ONCE = 2000
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0

_log = logging.getLogger(__name__)


class AwayError(Exception):
    """The receiver does not answer, or not now; the same entries can be sent later."""


def encode(entry: Entry) -> bytes:
    r"""The line of an entry.

    Example:
        >>> encode({"a": 1})
        b'561bacaf {"a":1}\n'
    """
    text = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(data: bytes) -> tuple[list[Entry], int]:
    """The entries of a journal, and how many lines were no entries, such as a last one that was cut off by a kill."""
    *lines, rest = data.split(b"\n")
    good = [line for line in lines if line[:9] == b"%08x " % zlib.crc32(line[9:])]
    return [json.loads(line[9:]) for line in good], len(lines) - len(good) + bool(rest)


class Spool:
    """Takes entries at once and sends them when it can.

    Args:
        folder: for the journals of one receiver; made if it is missing. Several processes may share it.
        send: given the oldest entries, sends the first or some of the first and returns how many. It raises `AwayError` if they
            can be sent later, any other exception if the first will never be taken. Called in a thread of the spool.
        receiver: how messages call it.
    """

    def __init__(self, folder: Path, send: Callable[[Sequence[Entry]], int], receiver: str) -> None:
        self.folder = folder
        self._send = send
        self._receiver = receiver
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        self._pending: deque[Entry] = deque()
        self._sent_files: list[Path] = []
        self._num_appended = self._num_sent = 0
        self._away_since: float | None = None
        self._is_silent = False  # somebody has waited in vain since the last answer
        self._is_closed = False
        (folder / "files").mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{time.time_ns()}-{os.getpid()}{_SUFFIX}"
        with locked_folder(folder):
            self._journal = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            fcntl.flock(self._journal, fcntl.LOCK_EX)
            fsync_dir(folder)
            self._take_over_journals()
        threading.Thread(target=self._send_for_ever, name="tracking-spool", daemon=True).start()

    def keep(self, name: str, data: bytes) -> str:
        """Keep a file for an entry that names it as its "file"; it is removed some time after the entry was sent."""
        place = self.folder / "files" / uuid.uuid4().hex
        try:
            place.mkdir()
            write_bytes(place / name, redact_file(data))
        except OSError as error:
            raise self._cannot_write(error) from error
        return str((place / name).relative_to(self.folder))

    def append(self, entry: Entry) -> int:
        """Write an entry to the disk, to be sent soon; its number is for `wait`.

        Raises:
            PipelineError: if the disk does not take it, or all was closed.
        """
        entry = redact_values(entry)
        with self._changed:
            if self._is_closed:
                raise PipelineError(f"nothing more is recorded with {self._receiver}, since everything is being stopped")
            self._write(encode(entry))
            self._pending.append(entry)
            self._num_appended += 1
            self._changed.notify_all()
            return self._num_appended

    def wait(self, number: int, seconds: float) -> bool:
        """Wait until entry `number` was sent, but for a receiver that is away or silent only once; whether it was sent."""

        def is_over() -> bool:
            return self._num_sent >= number or self._is_silent or self._away_since is not None

        with self._changed:
            self._is_silent |= not self._changed.wait_for(is_over, seconds)
            return self._num_sent >= number

    def flush(self, seconds: float) -> bool:
        """Wait as `wait` does until all was sent."""
        return self.wait(self._num_appended, seconds)

    def close(self, seconds: float) -> None:
        """Wait until all was sent, even for a receiver that is away, and remove the journal; or say where the rest is kept."""
        self._hurry.set()
        with self._changed:
            if self._is_closed:
                return
            if self._changed.wait_for(lambda: not self._pending, seconds):
                self._is_closed = True
                self._changed.notify_all()
                self.path.unlink(missing_ok=True)
                os.close(self._journal)
            else:
                _log.warning(
                    "%d records could not be sent to %s; they are kept in %s, and the next run sends them",
                    *(len(self._pending), self._receiver, self.path),
                )

    def _take_over_journals(self) -> None:
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            if path == self.path:
                continue
            with path.open("rb") as journal:
                try:
                    fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # its writer is at work
                entries, num_broken = decode(journal.read())
                if num_broken:
                    _log.warning("left out of %s: %d lines that were cut off or damaged", path, num_broken)
                if entries:
                    self._write(b"".join(map(encode, entries)))
                self._pending.extend(entries)
                self._num_appended += len(entries)
                path.unlink()
        if self._pending:
            _log.warning("sending %d records that an earlier run could not send to %s", len(self._pending), self._receiver)

    def _write(self, lines: bytes) -> None:
        size = os.fstat(self._journal).st_size
        try:
            if os.write(self._journal, lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._journal)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._journal, size)  # or the next entry would continue a broken line
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> PipelineError:
        return PipelineError(
            f"cannot write {self.path}, where is kept what {self._receiver} has not taken yet: {error}; "
            "free some space or choose another place with --workdir"
        )

    def _send_for_ever(self) -> None:
        at_once, pause = _ENTRIES_AT_ONCE, _FIRST_PAUSE_SECONDS
        while batch := self._next_batch(at_once):
            try:
                count, at_once = self._send(batch), _ENTRIES_AT_ONCE
            except AwayError as error:
                self._note_away(error)
                self._hurry.wait(pause)
                self._hurry.clear()
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            except Exception as error:
                if len(batch) > 1:
                    at_once = 1  # it may be one of the later ones
                    continue
                self._set_aside(batch[0], error)
                count = 1
            pause = _FIRST_PAUSE_SECONDS
            self._note_sent(count)

    def _next_batch(self, at_most: int) -> list[Entry]:
        """The oldest entries, waited for; none once all is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._is_closed)
            return list(islice(self._pending, at_most))

    def _note_away(self, error: AwayError) -> None:
        with self._changed:
            if self._away_since is not None:
                return
            self._away_since = time.monotonic()
            self._changed.notify_all()
        _log.warning("%s is away (%s); the work goes on, and %s is sent later", self._receiver, error, self.path)

    def _note_sent(self, count: int) -> None:
        with self._changed:
            sent = [self._pending.popleft() for _ in range(count)]
            self._sent_files += [self.folder / entry["file"] for entry in sent if "file" in entry]
            if self._away_since is not None:
                away = time.monotonic() - self._away_since
                _log.warning("%s is back after %.0f s; %d records follow", self._receiver, away, len(self._pending) + count)
                self._away_since = None
            if not self._pending:
                os.ftruncate(self._journal, 0)
                self._remove_sent_files()
            self._num_sent += count
            self._is_silent = False
            self._changed.notify_all()

    def _remove_sent_files(self) -> None:
        """Once no journal names them: what was sent of a journal that is not empty would be sent again after a kill."""
        for file in self._sent_files:
            with suppress(OSError):
                file.unlink()
                file.parent.rmdir()
        self._sent_files.clear()

    def _set_aside(self, entry: Entry, error: Exception) -> None:
        place = self.folder / "refused.txt"
        _log.warning("%s refused a record, kept in %s: %s: %s", self._receiver, place, type(error).__name__, error)
        with suppress(OSError), place.open("ab") as file:
            file.write(encode({**entry, "refused": redact(str(error))}))
        entry.pop("file", None)  # stays, as refused.txt names it


def read_left(folder: Path) -> dict[str, bytes]:
    """What processes that have ended could not send, as files of a spool: one journal, and the files that its entries name."""
    entries: list[Entry] = []
    with locked_folder(folder):
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            with path.open("rb") as journal, suppress(BlockingIOError):  # its writer is at work
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entries += decode(journal.read())[0]
        files = {entry["file"]: (folder / entry["file"]).read_bytes() for entry in entries if "file" in entry}
    return {f"0{_SUFFIX}": b"".join(map(encode, entries)), **files} if entries else {}


def has_entries(folder: Path) -> bool:
    """Whether there is a journal that is not empty, of a process that has ended or is at work."""
    return any(path.stat().st_size for path in folder.glob(f"*{_SUFFIX}"))
