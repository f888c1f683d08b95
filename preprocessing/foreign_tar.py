"""Listing a tar that another program made: every member, or an error; never a part of the archive taken for the whole.

Python's `tarfile` knows the formats (USTAR, GNU, PAX) but takes a damaged header for the end of the archive and says nothing,
so this module looks at where it stopped: there the archive must end as archives do.
"""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from infra.errors import DataError

_BLOCK_BYTES = 512
# Long names and PAX records; `tarfile` reads them at once, whatever size they state.
_MAX_HEADER_BYTES = 1 << 20
_END_BYTES = 2 * _BLOCK_BYTES
_MAX_NAME_CHARS = 1024
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


@dataclass(frozen=True, slots=True)
class ForeignMember:
    """A member of a tar that is no folder.

    Attributes:
        name: as stored; hostile until `problem` is "".
        begin: byte where its first header begins, extended headers included.
        offset: byte where its data begins.
        size: of its data in bytes.
        end: byte after its padding.
        problem: why it must not be used, "" if it is a regular file with a harmless name.
        odd_name: the problem is its name.
    """

    name: str
    begin: int
    offset: int
    size: int
    end: int
    problem: str
    odd_name: bool


def foreign_members(path: Path) -> Iterator[ForeignMember]:
    """List the members of a tar made elsewhere, in order; folders are left out. Reads headers only.

    Raises:
        DataError: if the file is no uncompressed tar, was cut, or holds a damaged header; says at which byte. That is known at
            the end only, so nothing that was listed counts before.
        OSError: if the file cannot be read.
    """
    tar_bytes = path.stat().st_size
    with path.open("rb") as file:
        position = 0
        with _explained(path):
            tar = _open(_HeaderReader(file, tar_bytes))
        while True:
            with _explained(path):
                info = tar.next()
            if info is None:
                break
            tar.members.clear()  # type: ignore[attr-defined]  # not in the stubs; it would hold them all; webdataset clears it as well
            end = tar.offset
            stored = 0 if info.issparse() else info.size  # a sparse file is larger than what is stored of it
            if not position <= info.offset < info.offset_data <= info.offset_data + stored <= end:
                raise DataError(f"{path}: the header at byte {position} contradicts itself; {_ADVICE}")
            if end > tar_bytes:
                raise DataError(f"{path}: member {info.name!r} ends beyond the file's {tar_bytes} bytes; {_ADVICE}")
            position = end
            if not info.isdir():
                name_problem = _name_problem(info.name)
                problem = name_problem or _type_problem(info)
                yield ForeignMember(info.name, info.offset, info.offset_data, info.size, end, problem, bool(name_problem))
        _require_end(file, path, tar.offset, tar_bytes)


class _HeaderReader:
    """The file as `tarfile` sees it: it may read headers, not gigabytes that a header asks for, nor seek out of the file."""

    def __init__(self, file: IO[bytes], num_bytes: int) -> None:
        self._file = file
        self._num_bytes = num_bytes

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes; expected at most {_MAX_HEADER_BYTES}")
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        if not 0 <= offset < self._num_bytes:
            raise tarfile.ReadError(f"a member ends at byte {offset + 1} of {self._num_bytes}: the file was cut")
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


def _open(reader: _HeaderReader) -> tarfile.TarFile:
    view: Any = reader  # it has what an open for reading calls, which is less than the stubs ask for
    return tarfile.open(fileobj=view, mode="r:", errorlevel=2)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever `tarfile` raises about the content becomes a DataError; it has no complete list."""
    try:
        yield
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, TypeError, EOFError, RecursionError) as error:
        raise DataError(f"{path} is no whole uncompressed tar: {error}; {_ADVICE}") from error


def _require_end(file: IO[bytes], path: Path, position: int, tar_bytes: int) -> None:
    """Two blocks of zeros, then at most zeros up to a multiple of 20 blocks: what GNU tar, Python and with it webdataset write.

    Fewer are the sign of a cut between two members, more that of a tail that became zeros when a machine lost power.
    """
    file.seek(position)
    rest = file.read(_END_BYTES + tarfile.RECORDSIZE)
    if rest.strip(b"\0"):
        what = "no valid member header, although the file goes on"
    elif len(rest) < _END_BYTES:
        what = f"only {len(rest)} bytes instead of the two blocks of zeros that end an archive: the file was cut"
    elif tar_bytes > -(-(position + _END_BYTES) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE:
        what = f"{tar_bytes - position} bytes without a member, more than a tar program writes: the tail was lost"
    else:
        return
    raise DataError(f"{path}: {what}, at byte {position}; {_ADVICE}")


def _name_problem(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "its name leads out of the archive"
    if not name or len(name) > _MAX_NAME_CHARS:
        return f"its name has {len(name)} characters; expected 1 to {_MAX_NAME_CHARS}"
    return "" if name.isprintable() and "\\" not in name else "its name holds control characters, backslashes or invalid UTF-8"


def _type_problem(info: tarfile.TarInfo) -> str:
    if info.type in _REGULAR and not info.issparse():
        return ""
    kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.FIFOTYPE: "a pipe"}
    kinds |= {tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device"}
    return f"it is {kinds.get(info.type, 'a sparse file' if info.issparse() else 'of an unknown type')}, no regular file"


_ADVICE = "fetch or write the tar again"
