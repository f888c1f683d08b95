"""The tars of shards: written as `tarfile` would, and read with suspicion. FORMAT.md describes them."""

import hashlib
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from infra.errors import DataError

_OWNER = "sagsm"
_MODE = 0o444
_BLOCK_BYTES = 512
_MEMBERS_JOINED = 32
_MEMBER_NAME = re.compile(r"[A-Za-z0-9_-]+\.(json|[0-9]{6}\.jpg)", re.ASCII)


@dataclass(frozen=True)
class TarMember:
    """A file in a tar: `offset` and `size` of its data in bytes."""

    name: str
    offset: int
    size: int


def read_tar(path: Path) -> list[TarMember]:
    """List a shard's members and check each header bit by bit, the padding and the end of the archive.

    The standard `tarfile` takes a damaged header for the end and says nothing; this reader accepts only what `write_shard`
    writes.

    Raises:
        DataError: if anything else is found, with the byte where.
        OSError: if the file cannot be read.
    """
    members: list[TarMember] = []
    tar_bytes = path.stat().st_size
    with path.open("rb") as file:
        while True:
            position = file.tell()
            header = file.read(_BLOCK_BYTES)
            if header == bytes(_BLOCK_BYTES):
                _require_end(file.read(), path, position)
                return members
            member = _parse_header(header, path, position)
            padding = -member.size % _BLOCK_BYTES
            if member.offset + member.size + padding > tar_bytes:
                raise DataError(
                    f"{path}: member {member.name} ends beyond the file's {tar_bytes} bytes; the file was cut, write it again"
                )
            file.seek(member.offset + member.size)
            if file.read(padding) != bytes(padding):
                raise DataError(
                    f"{path}: the padding after member {member.name} is not zero; the file is damaged, write it again"
                )
            members.append(member)


class TarWriter:
    """Writes a shard's members and hashes them on the way.

    Own code, since `tarfile` and with it `webdataset.TarWriter` spend more time on a header than on all the rest; the bytes are
    those of `tarfile.TarInfo.tobuf`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._position = 0

    def add_sample(self, key: str, frames: list[bytes], facts: bytes) -> dict[str, Any]:
        """Append the frames (JPEG) and the JSON file of a video; returns what its sidecar row says of where they lie."""
        begin, crc32, offset = self._position, 0, self._position
        offsets: list[int] = []
        members = [(f"{key}.{index:06d}.jpg", frame) for index, frame in enumerate(frames)] + [(f"{key}.json", facts)]
        # Some members are joined before they are written and hashed, since the calls cost more than the copy.
        for first in range(0, len(members), _MEMBERS_JOINED):
            parts: list[bytes] = []
            for name, data in members[first : first + _MEMBERS_JOINED]:
                parts += (tar_header(name, len(data)), data, bytes(-len(data) % _BLOCK_BYTES))
                offsets.append(offset + _BLOCK_BYTES)
                offset += _BLOCK_BYTES + len(data) + len(parts[-1])
            joined = b"".join(parts)
            self._append(joined)
            crc32 = zlib.crc32(joined, crc32)
        return {
            "sample_offset": begin,
            "sample_bytes": self._position - begin,
            "sample_crc32": crc32,
            "frame_offsets": offsets[:-1],
            "frame_sizes": [len(frame) for frame in frames],
            "frame_crc32": [zlib.crc32(frame) for frame in frames],
        }

    def close(self) -> str:
        """End the archive as GNU tar does; returns its SHA-256."""
        end = bytes(2 * _BLOCK_BYTES)
        self._append(end + bytes(-(self._position + len(end)) % tarfile.RECORDSIZE))
        return self._sha256.hexdigest()

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._position += len(data)


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member of a shard: a USTAR header with our owner and mode, and modification time 0."""
    before, after = _HEADER_TEMPLATE
    variable = name.encode("ascii").ljust(100, b"\0"), b"%011o" % size
    checksum = _HEADER_SUM + sum(variable[0]) + sum(variable[1])
    return b"".join([variable[0], before, variable[1], b"\0" + b"0" * 11 + b"\0%06o\0 " % checksum, after])


def _header_template() -> tuple[tuple[bytes, bytes], int]:
    """The constant parts of a header, before the size and after the checksum, and the sum of all constant bytes."""
    info = tarfile.TarInfo("")
    info.mode, info.uname, info.gname = _MODE, _OWNER, _OWNER
    header = info.tobuf(tarfile.USTAR_FORMAT)
    before, after = header[100:124], header[156:]
    return (before, after), sum(before) + sum(after) + sum(header[135:148]) + 8 * ord(" ")


def _parse_header(header: bytes, path: Path, position: int) -> TarMember:
    """Read name and size, write the header that they should have given, and compare all 512 bytes."""
    try:
        name = header[:100].rstrip(b"\0").decode("ascii")
        size = int(header[124:135], 8)
        if size >= 0 and header == tar_header(name, size) and _MEMBER_NAME.fullmatch(name):
            return TarMember(name, position + _BLOCK_BYTES, size)
    except ValueError:
        pass
    what = f"only {len(header)} bytes" if len(header) < _BLOCK_BYTES else "no valid member header"
    raise DataError(
        f"{path}: {what} at byte {position}; expected a member or the end of the archive; the file is damaged, write it again"
    )


def _require_end(rest: bytes, path: Path, position: int) -> None:
    if len(rest) < _BLOCK_BYTES or len(rest) % _BLOCK_BYTES or rest.strip(b"\0"):
        raise DataError(f"{path}: the archive does not end cleanly after byte {position}; the file is damaged, write it again")


_HEADER_TEMPLATE, _HEADER_SUM = _header_template()
