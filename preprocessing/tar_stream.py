"""The members of a tar that is plain or gzip, whole or cut into parts, read forwards once and with suspicion.

The standard `tarfile` in stream mode takes a damaged header for the end of the archive and keeps every header in memory; here
it parses single headers only.
"""

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain

from infra.errors import DataError, PipelineError
from infra.filesystems import Entry, Folder
from infra.progress import OnProgress

_BLOCK_BYTES = 512
_PIECE_BYTES = 1 << 20
_PROGRESS_BYTES = 64 << 20
# JPEG and mp4 hardly shrink, tar headers shrink twentyfold at most.
_MAX_RATIO = 200
_RATIO_FREE_BYTES = 16 << 20
_MAX_HEADER_BYTES = 1 << 20


class ArchiveStream:
    """The bytes inside the parts of an archive, inflated if they are gzip; reads forwards only.

    Args:
        root: the folder of the parts.
        parts: in the order in which they are put together.
        on_progress: called with bytes read and in all, of the parts.
    """

    def __init__(self, root: Folder, parts: Sequence[Entry], on_progress: OnProgress | None = None) -> None:
        self._root = root
        self._parts = parts
        self._on_progress = on_progress
        self._total = sum(part.size for part in parts)
        self._num_read = self._reported = 0
        self._part, self._part_bytes = parts[0].name, 0
        self._pieces = self._inflated()
        self._buffer = b""
        self._offset = 0
        self.position = 0

    @property
    def place(self) -> str:
        """Where in the parts the reader is, for messages; it reads ahead by a megabyte at most."""
        return f"{self._root}/{self._part}, before byte {self._part_bytes}"

    def read(self, size: int) -> bytes:
        """The next `size` bytes.

        Raises:
            DataError: if the archive ends before, or is damaged.
        """
        end = self._offset + size
        if end <= len(self._buffer):
            data = self._buffer[self._offset : end]
            self._offset = end
            self.position += size
            return data
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes in pieces of a megabyte at most; raises as `read` does."""
        while size:
            if self._offset == len(self._buffer):
                self._next_piece()
            if not self._buffer:
                raise DataError(
                    f"the archive ends too early in {self.place}: a member goes on; expected the end of a tar; fetch the parts "
                    "again and check that none is missing"
                )
            data = self._buffer[self._offset : self._offset + size]
            self._offset += len(data)
            self.position += len(data)
            size -= len(data)
            yield data

    def rest(self) -> Iterator[bytes]:
        """All that follows, in pieces; raises as `read` does."""
        while True:
            data = self._buffer[self._offset :]
            self.position += len(data)
            yield data
            self._next_piece()
            if not self._buffer:
                return

    def _next_piece(self) -> None:
        self._buffer, self._offset = next(self._pieces, b""), 0
        inflated = self.position + len(self._buffer)
        if inflated > _MAX_RATIO * self._num_read + _RATIO_FREE_BYTES:
            raise DataError(
                f"{self.place}: {self._num_read} bytes of the archive inflate to more than {inflated}; expected at most "
                f"{_MAX_RATIO} times as many; this is no archive of videos"
            )

    def _inflated(self) -> Iterator[bytes]:
        pieces = self._raw_pieces()
        begin = next(pieces, b"")
        while len(begin) < 2 and (more := next(pieces, b"")):
            begin += more
        if begin[:2] != b"\x1f\x8b":
            yield from chain([begin], pieces)
            return
        inflater = zlib.decompressobj(31)
        try:
            for piece in chain([begin], pieces):
                waiting = piece
                while waiting:
                    if inflater.eof:  # zeros may pad a gzip stream, and another one may follow
                        waiting = waiting.lstrip(b"\0")
                        inflater = zlib.decompressobj(31) if waiting else inflater
                        continue
                    if data := inflater.decompress(waiting, _PIECE_BYTES):
                        yield data
                    waiting = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
            if not inflater.eof and (data := inflater.flush()):
                yield data
        except zlib.error as error:
            raise DataError(f"{self.place}: the gzip stream is damaged ({error}); fetch the parts again") from error
        if not inflater.eof:
            raise DataError(
                f"{self.place}: the gzip stream is cut; expected its end; fetch the parts again and check that none is missing"
            )

    def _raw_pieces(self) -> Iterator[bytes]:
        for part in self._parts:
            self._part, self._part_bytes = part.name, 0
            try:
                with self._root.open(part.name) as file:
                    while piece := file.read(_PIECE_BYTES):
                        self._part_bytes += len(piece)
                        self._num_read += len(piece)
                        self._report()
                        yield piece
            except OSError as error:
                raise PipelineError(f"{self.place} cannot be read: {error}; check the place and run again") from error

    def _report(self) -> None:
        if self._on_progress is not None and (self._num_read - self._reported > _PROGRESS_BYTES or not self._reported):
            self._reported = self._num_read
            megabytes = f"{self._num_read / 1e6:,.0f} of {self._total / 1e6:,.0f} MB of the archive sorted by shard"
            self._on_progress(self._num_read, self._total, megabytes)


def read_members(stream: ArchiveStream) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, in order; the caller reads each one's data (`data_bytes`) with its padding before the next.

    Names of any length are understood (GNU and pax). A sparse file has the type `GNUTYPE_SPARSE`.

    Raises:
        DataError: if a header is damaged, the archive is cut, or anything but zeros follows its end.
    """
    name: str | None = None
    size: int | None = None
    is_sparse = False
    while True:
        begin = stream.position
        block = stream.read(_BLOCK_BYTES)
        if not block.strip(b"\0"):
            if any(data.strip(b"\0") for data in stream.rest()):
                raise DataError(f"{stream.place}: data follow the end of the tar at byte {begin} of it; fetch the parts again")
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise DataError(
                f"{stream.place}: no valid member header at byte {begin} of the tar ({error}); fetch the parts again"
            ) from error
        if member.size < 0:
            raise DataError(f"{stream.place}: the member at byte {begin} of the tar has a negative size; fetch the parts again")
        if member.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            data = _header_data(stream, member)
            if member.type == tarfile.GNUTYPE_LONGNAME:
                name = tarfile.nts(data, "utf-8", "surrogateescape")  # type: ignore[attr-defined]
            else:
                name, size, is_sparse = _read_pax(stream, data)
            continue
        if member.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            _header_data(stream, member)
            continue
        member.name = (name if name is not None else member.name).rstrip("/")
        member.size = size if size is not None else member.size
        if member.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]
            while more:
                more = stream.read(_BLOCK_BYTES)[504]
        if is_sparse:
            member.type = tarfile.GNUTYPE_SPARSE
        name, size, is_sparse = None, None, False
        yield member


def data_bytes(member: tarfile.TarInfo) -> int:
    """The number of data bytes that follow a member's header; links, folders and devices have none."""
    return member.size if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES else 0


def _header_data(stream: ArchiveStream, member: tarfile.TarInfo) -> bytes:
    if member.size > _MAX_HEADER_BYTES:
        raise DataError(f"{stream.place}: a header of {member.size} bytes in the tar; expected at most {_MAX_HEADER_BYTES}")
    return stream.read(member.size + -member.size % _BLOCK_BYTES)[: member.size]


def _read_pax(stream: ArchiveStream, data: bytes) -> tuple[str | None, int | None, bool]:
    """The records `length key=value` of a pax header: path, size, whether the file is sparse."""
    name, size, is_sparse = None, None, False
    position = 0
    try:
        while position < len(data):
            length = int(data[position : data.index(b" ", position)])
            record = data[position : position + length]
            if length < 5 or len(record) != length or record[-1:] != b"\n":
                raise ValueError("a record without an end")
            key, _, value = record[record.index(b" ") + 1 : -1].partition(b"=")
            if key == b"path":
                name = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                size = int(value)
                if size < 0:
                    raise ValueError("a negative size")
            is_sparse = is_sparse or key.startswith(b"GNU.sparse.")
            position += length
    except ValueError as error:
        raise DataError(f"{stream.place}: a pax header in the tar is damaged ({error}); fetch the parts again") from error
    return name, size, is_sparse
