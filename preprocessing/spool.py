"""Spools: for each shard one file with the raw files of its videos, between an archive and the shard's writer.

A spool is records one after the other: kind, lengths, the video's path, the file's name, the content and its CRC-32. Nothing of
it is ever unpacked under a name that came from an archive. `complete.json`, written last, says what the spools hold; without it
they are worthless and are written again.
"""

import errno
import functools
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from infra.errors import PipelineError
from infra.filesystems import file_name
from infra.storage import fsync_file
from preprocessing.decode import DecodedVideo, DecodeSettings, VideoRejectedError, decode_video
from preprocessing.frames import frames_from_files
from preprocessing.planning import PlannedVideo

# Kind, bytes of the path, bytes of the name, bytes of the content.
_RECORD = struct.Struct("<BHHQ")
_CRC = struct.Struct("<I")
_FILE, _FOLDER, _REJECTION = range(3)
_BUFFERED_BYTES = 64 << 20
_COPY_BYTES = 1 << 20


def spool_name(shard: str) -> str:
    """The file name of a shard's spool: "train-000003.spool" for "train-000003.tar"."""
    return Path(shard).with_suffix(".spool").name


class SpoolWriter:
    """Appends records to the spools of many shards in any order; a context manager.

    What is added is held back until 64 MB have come together, so that no more than one file is open at a time.

    Args:
        folder: an existing folder; what it holds is removed.
        shards: the tars' file names; records name them by position.

    Raises:
        PipelineError: if the disk is full.
    """

    def __init__(self, folder: Path, shards: Sequence[str]) -> None:
        self._paths = [folder / spool_name(shard) for shard in shards]
        self._buffers: dict[int, list[bytes]] = {}
        self._buffered_bytes = 0
        shutil.rmtree(folder)
        folder.mkdir()
        for path in self._paths:
            path.touch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
            for path in self._paths:
                fsync_file(path)

    def add_file(self, shards: Sequence[int], path: str, name: str, size: int, pieces: Iterable[bytes]) -> None:
        """Add a file of the video at `path`; the pieces have `size` bytes in all."""
        self._add(shards, _FILE, path, name, size, pieces)

    def add_folder(self, shards: Sequence[int], path: str) -> None:
        """Note that the video at `path` is a folder, perhaps an empty one."""
        self._add(shards, _FOLDER, path, "", 0, ())

    def add_rejection(self, shards: Sequence[int], path: str, reason: str, detail: str) -> None:
        """Note that the video at `path` must be rejected, whatever else is added."""
        data = detail.encode()
        self._add(shards, _REJECTION, path, reason, len(data), (data,))

    def _add(self, shards: Sequence[int], kind: int, path: str, name: str, size: int, pieces: Iterable[bytes]) -> None:
        path_bytes, name_bytes = path.encode(), name.encode()
        crc = 0
        self._append(shards, _RECORD.pack(kind, len(path_bytes), len(name_bytes), size) + path_bytes + name_bytes)
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            self._append(shards, piece)
        self._append(shards, _CRC.pack(crc))

    def _append(self, shards: Sequence[int], data: bytes) -> None:
        for shard in shards:
            self._buffers.setdefault(shard, []).append(data)
            self._buffered_bytes += len(data)
        if self._buffered_bytes >= _BUFFERED_BYTES:
            self._flush()

    def _flush(self) -> None:
        try:
            for shard, data in self._buffers.items():
                with self._paths[shard].open("ab") as file:
                    file.writelines(data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                message = f"no space left for sorting the archive in {self._paths[0].parent}: {error}"
                raise PipelineError(f"{message}; it takes as much as the archive; free some space and run again") from error
            raise
        self._buffers.clear()
        self._buffered_bytes = 0


@dataclass(slots=True)
class _Spooled:
    """What a spool holds of one video: files (name, offset, size, CRC-32) and the reason and detail if it must be rejected."""

    files: list[tuple[str, int, int, int]] = field(default_factory=list)
    rejection: tuple[str, str] | None = None


@dataclass(frozen=True)
class SpoolSource:
    """Videos from the spools that `archives.partition` wrote.

    Args:
        folder: of the spools; all workers must see it under the same path.
    """

    folder: Path

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:
        """See `sources.Source.read`; gives what the unpacked archive would give.

        Raises:
            PipelineError: if the spool is damaged.
        """
        path = self.folder / spool_name(shard)
        status = path.stat()
        found = _read_index(path, status.st_size, status.st_mtime_ns).get(video.path)
        if found is None:
            raise VideoRejectedError("missing", f"the archive holds no file of that name: {Path(video.path).name}")
        if found.rejection is not None:
            raise VideoRejectedError(*found.rejection)
        names = {name for name, _, _, _ in found.files}
        if len(names) < len(found.files):
            raise VideoRejectedError("hostile_member", "a file of the video is in the archive twice")
        with path.open("rb") as file:
            if video.kind == "frames":
                if video.start is not None or video.end is not None:
                    detail = f"a span from {video.start} to {video.end} s is asked for, but a folder of frames knows no times"
                    raise VideoRejectedError("no_times", detail)
                files = [(name, functools.partial(_read_content, file, path, *place)) for name, *place in found.files]
                return frames_from_files(files, settings)
            with tempfile.TemporaryDirectory(prefix="sagsm-") as folder:
                copy = Path(folder) / file_name(video.path)
                _copy_content(file, path, copy, *found.files[0][1:])
                return decode_video(copy, settings, video.start, video.end)


@functools.lru_cache(maxsize=4)
def _read_index(path: Path, num_bytes: int, modified_ns: int) -> dict[str, _Spooled]:  # noqa: ARG001  (part of the key)
    """Where everything lies in a spool, by the video's path; content is skipped."""
    videos: dict[str, _Spooled] = {}
    with path.open("rb") as file:
        position = 0
        while position < num_bytes:
            header = file.read(_RECORD.size)
            if len(header) < _RECORD.size:
                raise _damaged(path)
            kind, path_bytes, name_bytes, size = _RECORD.unpack(header)
            text = file.read(path_bytes + name_bytes)
            offset = position + _RECORD.size + path_bytes + name_bytes
            position = offset + size + _CRC.size
            if position > num_bytes:
                raise _damaged(path)
            video = videos.setdefault(text[:path_bytes].decode(), _Spooled())
            name = text[path_bytes:].decode()
            if kind == _REJECTION:
                video.rejection = video.rejection or (name, file.read(size).decode())
                file.seek(_CRC.size, 1)
                continue
            file.seek(size, 1)
            (crc,) = _CRC.unpack(file.read(_CRC.size))
            if kind == _FILE:
                video.files.append((name, offset, size, crc))
    return videos


def _read_content(file: IO[bytes], path: Path, offset: int, size: int, crc: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if zlib.crc32(data) != crc:
        raise _damaged(path)
    return data


def _copy_content(file: IO[bytes], path: Path, copy: Path, offset: int, size: int, crc: int) -> None:
    file.seek(offset)
    found = 0
    with copy.open("wb") as target:
        while size and (data := file.read(min(size, _COPY_BYTES))):
            found = zlib.crc32(data, found)
            target.write(data)
            size -= len(data)
    if found != crc:
        raise _damaged(path)


def _damaged(path: Path) -> PipelineError:
    return PipelineError(f"{path} is damaged; expected what was sorted from the archive; remove its folder and run again")
