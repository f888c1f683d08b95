"""One shard: writing a tar so that it is whole or absent, and reading it with suspicion.

`write_shard` writes `<name>.tar` and then, as its commit, the sidecar `<name>.parquet`. FORMAT.md describes the files. Nothing
here knows of Ray: `tasks.py` runs `write_shard` in many processes.
"""

import errno
import hashlib
import json
import re
import tarfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from infra.errors import DataError, PipelineError
from infra.filesystems import Folder
from infra.storage import canonical_json, sha256_json
from preprocessing.decode import DecodedVideo, DecodeSettings, VideoRejectedError, ffmpeg_version
from preprocessing.planning import PlannedVideo, ShardPlan
from preprocessing.sources import Source

FORMAT_VERSION = 2
MAX_FRAMES = 1_000_000

# One row for each source video of the shard; index.parquet and ledger.parquet are columns of these.
SIDECAR_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("split", pa.string()),
        ("label", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("num_frames", pa.int32()),
        ("num_bytes", pa.int64()),
        ("source_bytes", pa.int64()),
        ("content_sha256", pa.string()),
        ("seconds", pa.float32()),
        ("fps", pa.float32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("sample_offset", pa.int64()),
        ("sample_bytes", pa.int64()),
        ("sample_crc32", pa.uint32()),
        ("frame_offsets", pa.list_(pa.int64())),
        ("frame_sizes", pa.list_(pa.int32())),
        ("frame_crc32", pa.list_(pa.uint32())),
    ]
)

_OWNER = "sagsm"
_MODE = 0o444
_BLOCK_BYTES = 512
_BUFFER_BYTES = 1 << 20
_MEMBER_NAME = re.compile(r"[A-Za-z0-9_-]+\.(json|[0-9]{6}\.jpg)", re.ASCII)
_COMMIT_KEY = b"sagsm.shard"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ShardSettings(DecodeSettings):
    """How videos become shards.

    Shards hold at most `videos_per_shard` videos, of one split each, in an order drawn from `seed`. If more than
    `max_bad_fraction` (0 to 1) of all videos are rejected, the shard set is refused.
    """

    videos_per_shard: int = Field(default=256, ge=1)
    seed: int = 0
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)


@dataclass(frozen=True)
class ShardReport:
    """What came of one shard: `num_bytes` and `sha256` of the tar, `source_bytes` of the raw videos; `skipped`: was there."""

    name: str
    num_kept: int
    num_rejected: int
    num_frames: int
    num_bytes: int
    source_bytes: int
    sha256: str
    skipped: bool


@dataclass(frozen=True)
class ShardCommit:
    """What a sidecar says of its tar: size and hash, and the digest of the plan and settings that it was written for."""

    plan_sha256: str
    tar_bytes: int
    tar_sha256: str
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class TarMember:
    """A file in a tar: `offset` and `size` of its data in bytes."""

    name: str
    offset: int
    size: int


def write_shard(plan: ShardPlan, source: Source, output: Folder | Path, settings: ShardSettings) -> ShardReport:
    """Write one shard, or keep it if it is complete already (same plan and settings, same size and hash).

    The tar's bytes depend on the plan, the raw videos, the settings and ffmpeg only. Videos that cannot be used get a row in
    the sidecar and no sample; a shard without any sample is a tar without members. One video at a time is held in memory.

    Args:
        plan: from `plan_shards`.
        source: gives the frames.
        output: an existing folder.
        settings: the same for all shards of a set.

    Raises:
        PipelineError: if the disk is full or ffmpeg is missing.
        OSError: if the machine fails otherwise; writing again may help.
    """
    output = Folder(output)
    report = _report_if_complete(plan, output, settings)
    if report is not None:
        return report
    if output.local is not None:
        for leftover in output.local.glob(f".tmp-*-{Path(plan.name).stem}.*"):
            leftover.unlink(missing_ok=True)
    try:
        output.delete(plan.sidecar_name)
        with output.create(plan.name) as path:
            rows, sha256 = _write_tar(plan, source, path, settings)
            commit = ShardCommit(_plan_sha256(plan, settings), path.stat().st_size, sha256)
        output.write_bytes(plan.sidecar_name, _sidecar_bytes(rows, commit))
    except OSError as error:
        if error.errno in _NO_SPACE:
            message = f"no space left for shard {plan.name} in {output}: {error}"
            raise PipelineError(f"{message}; free some space and run again, shards that are complete are kept") from error
        raise
    return _report(plan, rows, commit, skipped=False)


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


def read_sidecar(folder: Folder | Path, name: str) -> tuple[pa.Table, ShardCommit]:
    """Read a sidecar: the rows (`SIDECAR_SCHEMA`) and what it says of its tar.

    Raises:
        DataError: if it is missing, unreadable or of another format.
    """
    where = f"{folder}/{name}"
    try:
        data = Folder(folder).read_bytes(name)
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        commit = ShardCommit(**json.loads((table.schema.metadata or {})[_COMMIT_KEY]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is no readable shard sidecar: {error!r}; run the shards stage again") from error
    if commit.format_version != FORMAT_VERSION or not table.schema.equals(SIDECAR_SCHEMA):
        raise DataError(
            f"{where} has format {commit.format_version} or other columns; expected format {FORMAT_VERSION}; write it again"
        )
    return table, commit


def _write_tar(plan: ShardPlan, source: Source, path: Path, settings: ShardSettings) -> tuple[list[dict[str, Any]], str]:
    """Decode the videos one after the other into a tar; returns their rows and the tar's SHA-256."""
    rows = []
    with path.open("wb", buffering=_BUFFER_BYTES) as file:
        tar = _TarWriter(file)
        for video in plan.videos:
            started = time.perf_counter()
            row: dict[str, Any] = {"video_id": video.video_id, "key": video.key, "shard": plan.name, "split": plan.split}
            row |= {"label": video.label, "status": "kept", "reason": "", "detail": "", "num_frames": 0, "num_bytes": 0}
            row |= {"source_bytes": 0, "content_sha256": ""}
            try:
                decoded = source.read(video, plan.name, settings)
                _require_few_frames(decoded)
            except VideoRejectedError as error:
                row |= {"status": "rejected", "reason": error.reason, "detail": error.detail}
            else:
                row |= {"detail": decoded.detail, "num_frames": len(decoded.frames), "num_bytes": sum(map(len, decoded.frames))}
                row |= {"source_bytes": decoded.source_bytes, "content_sha256": _content_sha256(decoded.frames)}
                row |= {"fps": decoded.fps, "height": decoded.height, "width": decoded.width}
                row |= tar.add_sample(video, plan.split, decoded)
            row["seconds"] = time.perf_counter() - started
            rows.append(row)
        return rows, tar.close()


class _TarWriter:
    """Writes a shard's members and hashes them on the way.

    Own code, since `tarfile` and with it `webdataset.TarWriter` spend more time on a header than on all the rest; the bytes are
    those of `tarfile.TarInfo.tobuf`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._sample_crc32 = 0

    def add_sample(self, video: PlannedVideo, split: str, decoded: DecodedVideo) -> dict[str, Any]:
        """Append the frames and the JSON file of a video; returns where they lie."""
        begin, self._sample_crc32 = self._position, 0
        places = [self._add(f"{video.key}.{index:06d}.jpg", frame) for index, frame in enumerate(decoded.frames)]
        self._add(f"{video.key}.json", _facts(video, split, decoded))
        return {
            "sample_offset": begin,
            "sample_bytes": self._position - begin,
            "sample_crc32": self._sample_crc32,
            "frame_offsets": places,
            "frame_sizes": [len(frame) for frame in decoded.frames],
            "frame_crc32": [zlib.crc32(frame) for frame in decoded.frames],
        }

    def close(self) -> str:
        """End the archive as GNU tar does; returns its SHA-256."""
        end = bytes(2 * _BLOCK_BYTES)
        self._append(end + bytes(-(self._position + len(end)) % tarfile.RECORDSIZE))
        return self._sha256.hexdigest()

    def _add(self, name: str, data: bytes) -> int:
        self._append(tar_header(name, len(data)))
        offset = self._position
        self._append(data)
        self._append(bytes(-len(data) % _BLOCK_BYTES))
        return offset

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._sample_crc32 = zlib.crc32(data, self._sample_crc32)
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


def _require_few_frames(decoded: DecodedVideo) -> None:
    if len(decoded.frames) > MAX_FRAMES:
        raise VideoRejectedError("too_large", f"{len(decoded.frames)} frames; expected at most {MAX_FRAMES}")


def _content_sha256(frames: list[bytes]) -> str:
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(frame)
    return digest.hexdigest()


def _facts(video: PlannedVideo, split: str, decoded: DecodedVideo) -> bytes:
    facts: dict[str, Any] = {
        "video_id": video.video_id,
        "split": split,
        "label": video.label,
        "num_frames": len(decoded.frames),
    }
    facts |= {"fps": decoded.fps, "height": decoded.height, "width": decoded.width}
    return canonical_json(facts).encode()


def _sidecar_bytes(rows: list[dict[str, Any]], commit: ShardCommit) -> bytes:
    schema = SIDECAR_SCHEMA.with_metadata({_COMMIT_KEY: canonical_json(asdict(commit))})
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, write_page_checksum=True)
    return bytes(buffer.getvalue())


def _plan_sha256(plan: ShardPlan, settings: ShardSettings) -> str:
    """The digest of all that the tar depends on, but for the raw videos (the stage's fingerprint watches those)."""
    decoding = {name: getattr(settings, name) for name in DecodeSettings.model_fields}
    return sha256_json({"format": FORMAT_VERSION, "plan": asdict(plan), "decoding": decoding, "ffmpeg": ffmpeg_version()})


def _report_if_complete(plan: ShardPlan, output: Folder, settings: ShardSettings) -> ShardReport | None:
    """The tar was synced before its sidecar was written, so its size is proof enough here; `verify_shards` reads the bytes."""
    try:
        table, commit = read_sidecar(output, plan.sidecar_name)
    except DataError:
        return None
    if commit.plan_sha256 != _plan_sha256(plan, settings) or output.size(plan.name) != commit.tar_bytes:
        return None
    return _report(plan, table.select(["status", "num_frames", "source_bytes"]).to_pylist(), commit, skipped=True)


def _report(plan: ShardPlan, rows: list[dict[str, Any]], commit: ShardCommit, *, skipped: bool) -> ShardReport:
    num_kept = sum(row["status"] == "kept" for row in rows)
    return ShardReport(
        name=plan.name,
        num_kept=num_kept,
        num_rejected=len(rows) - num_kept,
        num_frames=sum(row["num_frames"] for row in rows),
        num_bytes=commit.tar_bytes,
        source_bytes=sum(row["source_bytes"] for row in rows),
        sha256=commit.tar_sha256,
        skipped=skipped,
    )


def _parse_header(header: bytes, path: Path, position: int) -> TarMember:
    """Read name and size, write the header that they should have given, and compare all 512 bytes."""
    try:
        name = header[:100].rstrip(b"\0").decode("ascii")
        size = int(header[124:135], 8)
        if header == tar_header(name, size) and _MEMBER_NAME.fullmatch(name):
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
