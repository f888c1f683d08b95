"""Shards: which video goes into which tar, and writing one tar so that it is whole or absent.

`plan_shards` is a pure function of the videos and the settings; `write_shard` writes `<name>.tar` and then, as its commit, the
sidecar `<name>.parquet`. FORMAT.md describes the files. Nothing here knows of Ray: `tasks.py` runs `write_shard` in many
processes.
"""

import errno
import hashlib
import json
import re
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from infra.errors import DataError, PipelineError
from infra.storage import atomic_path, canonical_json, sha256_file, sha256_json, write_bytes
from preprocessing.decode import (
    DecodedVideo,
    DecodeSettings,
    VideoRejectedError,
    decode_video,
    ffmpeg_version,
    read_frame_folder,
)

FORMAT_VERSION = 1
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
        ("seconds", pa.float32()),
        ("fps", pa.float32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("frame_offsets", pa.list_(pa.int64())),
        ("frame_sizes", pa.list_(pa.int32())),
    ]
)

_OWNER = "sagsm"
_MODE = 0o444
_BLOCK_BYTES = 512
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
class PlannedVideo:
    """One source video of a shard; `path` is relative to the dataset's root, `kind` is "frames" or "video"."""

    video_id: str
    key: str
    path: str
    kind: str
    label: int | None


@dataclass(frozen=True)
class ShardPlan:
    """The videos of one shard, in order; `name` is the tar's file name, for example "train-000003.tar"."""

    name: str
    split: str
    videos: tuple[PlannedVideo, ...]

    @property
    def sidecar_name(self) -> str:
        """The file name of the sidecar, for example "train-000003.parquet"."""
        return Path(self.name).with_suffix(".parquet").name


@dataclass(frozen=True)
class ShardReport:
    """What came of one shard. `num_bytes` and `sha256` are of the tar; `skipped` says that it was there already."""

    name: str
    num_kept: int
    num_rejected: int
    num_frames: int
    num_bytes: int
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


def sample_key(video_id: str) -> str:
    """The key of a video's sample: safe as a file name, without dots, never beginning with "-", unique for the video id.

    Example:
        >>> sample_key("-1c8.mp4")
        '_1c8_mp4-9986e3fb5f9f3201'
    """
    readable = re.sub(r"[^A-Za-z0-9]", "_", video_id)[:40]
    return f"{readable}-{hashlib.sha256(video_id.encode()).hexdigest()[:16]}"


def plan_shards(videos: pa.Table, settings: ShardSettings) -> list[ShardPlan]:
    """Distribute videos over shards: a pure function of the set of videos and the settings, whatever the order of the rows.

    Within a split the videos are ordered by a hash of the seed and their ids, which is a fair shuffle, and cut into as few
    shards of nearly equal size as `videos_per_shard` allows.

    Args:
        videos: columns video_id, path, kind, split and label (null if unlabelled), as `datasets.index_videos` makes them.
        settings: `videos_per_shard` and `seed` count here.

    Raises:
        DataError: if there is no video, or two have the same id.
    """
    by_split: dict[str, list[PlannedVideo]] = {}
    seen: set[str] = set()
    for row in videos.to_pylist():
        key = sample_key(row["video_id"])
        if key in seen:
            raise DataError(f"video {row['video_id']!r} is listed twice; expected each id once, check the annotation files")
        seen.add(key)
        video = PlannedVideo(row["video_id"], key, row["path"], row["kind"], row["label"])
        by_split.setdefault(row["split"], []).append(video)
    if not by_split:
        raise DataError("there is no video to write into shards; check the dataset's annotation files")
    plans = []
    for split, members in sorted(by_split.items()):
        members.sort(key=lambda video: hashlib.sha256(f"{settings.seed}/{split}/{video.video_id}".encode()).digest())
        num_shards = -(-len(members) // settings.videos_per_shard)
        cuts = [len(members) * index // num_shards for index in range(num_shards + 1)]
        for index in range(num_shards):
            plans.append(ShardPlan(f"{split}-{index:06d}.tar", split, tuple(members[cuts[index] : cuts[index + 1]])))
    return plans


def write_shard(plan: ShardPlan, root: Path, output_dir: Path, settings: ShardSettings) -> ShardReport:
    """Write one shard, or keep it if it is complete already (same plan and settings, same size and hash).

    The tar's bytes depend on the plan, the raw videos, the settings and ffmpeg only. Videos that cannot be used get a row in
    the sidecar and no sample; a shard without any sample is a tar without members. One video at a time is held in memory.

    Args:
        plan: from `plan_shards`.
        root: the dataset's folder, to which the plan's paths are relative.
        output_dir: an existing folder.
        settings: the same for all shards of a set.

    Raises:
        PipelineError: if the disk is full or ffmpeg is missing.
        OSError: if the machine fails otherwise; writing again may help.
    """
    report = _report_if_complete(plan, output_dir, settings)
    if report is not None:
        return report
    for leftover in output_dir.glob(f".tmp-*-{Path(plan.name).stem}.*"):
        leftover.unlink(missing_ok=True)
    try:
        (output_dir / plan.sidecar_name).unlink(missing_ok=True)
        with atomic_path(output_dir / plan.name) as temporary:
            rows = _write_tar(plan, root, temporary, settings)
            _add_offsets(rows, read_tar(temporary))
            commit = ShardCommit(_plan_sha256(plan, settings), temporary.stat().st_size, sha256_file(temporary))
        _write_sidecar(output_dir / plan.sidecar_name, rows, commit)
    except OSError as error:
        if error.errno in _NO_SPACE:
            message = f"no space left for shard {plan.name} in {output_dir}: {error}"
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


def read_sidecar(path: Path) -> tuple[pa.Table, ShardCommit]:
    """Read a sidecar: the rows (`SIDECAR_SCHEMA`) and what it says of its tar.

    Raises:
        DataError: if it is missing, unreadable or of another format.
    """
    try:
        table = pq.read_table(path, partitioning=None)
        commit = ShardCommit(**json.loads((table.schema.metadata or {})[_COMMIT_KEY]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no readable shard sidecar: {error!r}; run the shards stage again") from error
    if commit.format_version != FORMAT_VERSION or not table.schema.equals(SIDECAR_SCHEMA):
        raise DataError(
            f"{path} has format {commit.format_version} or other columns; expected format {FORMAT_VERSION}; write it again"
        )
    return table, commit


def _write_tar(plan: ShardPlan, root: Path, path: Path, settings: ShardSettings) -> list[dict[str, Any]]:
    """Decode the videos one after the other into a tar; returns their rows, still without offsets."""
    from webdataset import TarWriter

    rows = []
    with path.open("wb") as file, TarWriter(file, user=_OWNER, group=_OWNER, mode=_MODE, mtime=0, encoder=False) as writer:
        for video in plan.videos:
            started = time.perf_counter()
            row: dict[str, Any] = {"video_id": video.video_id, "key": video.key, "shard": plan.name, "split": plan.split}
            row |= {"label": video.label, "status": "kept", "reason": "", "detail": "", "num_frames": 0, "num_bytes": 0}
            try:
                decoded = _decode(video, root, settings)
            except VideoRejectedError as error:
                row |= {"status": "rejected", "reason": error.reason, "detail": error.detail}
            else:
                writer.write(_sample(video, plan.split, decoded))
                row |= {"detail": decoded.detail, "num_frames": len(decoded.frames), "num_bytes": sum(map(len, decoded.frames))}
                row |= {"fps": decoded.fps, "height": decoded.height, "width": decoded.width}
            row["seconds"] = time.perf_counter() - started
            rows.append(row)
    return rows


def _decode(video: PlannedVideo, root: Path, settings: ShardSettings) -> DecodedVideo:
    read = read_frame_folder if video.kind == "frames" else decode_video
    try:
        decoded = read(root / video.path, settings)
    except PermissionError as error:
        raise VideoRejectedError("unreadable", error.strerror or "permission denied") from error
    if len(decoded.frames) > MAX_FRAMES:
        raise VideoRejectedError("too_large", f"{len(decoded.frames)} frames; expected at most {MAX_FRAMES}")
    return decoded


def _sample(video: PlannedVideo, split: str, decoded: DecodedVideo) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "video_id": video.video_id,
        "split": split,
        "label": video.label,
        "num_frames": len(decoded.frames),
    }
    facts |= {"fps": decoded.fps, "height": decoded.height, "width": decoded.width}
    frames = {f"{index:06d}.jpg": frame for index, frame in enumerate(decoded.frames)}
    return {"__key__": video.key, "json": canonical_json(facts).encode(), **frames}


def _add_offsets(rows: list[dict[str, Any]], members: list[TarMember]) -> None:
    """Fill in the offset and size of every frame; the tar must hold exactly the frames and JSON files of the kept videos."""
    remaining: Iterator[TarMember] = iter(members)
    for row in rows:
        row |= {"frame_offsets": [], "frame_sizes": []}
        if row["status"] != "kept":
            continue
        for index in range(row["num_frames"]):
            member = next(remaining)
            assert member.name == f"{row['key']}.{index:06d}.jpg", (member, row["key"], index)
            row["frame_offsets"].append(member.offset)
            row["frame_sizes"].append(member.size)
        assert next(remaining).name == f"{row['key']}.json"
    assert next(remaining, None) is None


def _write_sidecar(path: Path, rows: list[dict[str, Any]], commit: ShardCommit) -> None:
    schema = SIDECAR_SCHEMA.with_metadata({_COMMIT_KEY: canonical_json(asdict(commit))})
    # In memory first: Python's own write names the reason of a failure (no space), pyarrow's does not.
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    write_bytes(path, buffer.getvalue().to_pybytes())


def _plan_sha256(plan: ShardPlan, settings: ShardSettings) -> str:
    """The digest of all that the tar depends on, but for the raw videos (the stage's fingerprint watches those)."""
    decoding = {name: getattr(settings, name) for name in DecodeSettings.model_fields}
    return sha256_json({"format": FORMAT_VERSION, "plan": asdict(plan), "decoding": decoding, "ffmpeg": ffmpeg_version()})


def _report_if_complete(plan: ShardPlan, output_dir: Path, settings: ShardSettings) -> ShardReport | None:
    try:
        table, commit = read_sidecar(output_dir / plan.sidecar_name)
    except DataError:
        return None
    tar_path = output_dir / plan.name
    if commit.plan_sha256 != _plan_sha256(plan, settings) or not tar_path.is_file():
        return None
    if tar_path.stat().st_size != commit.tar_bytes or sha256_file(tar_path) != commit.tar_sha256:
        return None
    return _report(plan, table.select(["status", "num_frames"]).to_pylist(), commit, skipped=True)


def _report(plan: ShardPlan, rows: list[dict[str, Any]], commit: ShardCommit, *, skipped: bool) -> ShardReport:
    num_kept = sum(row["status"] == "kept" for row in rows)
    num_frames = sum(row["num_frames"] for row in rows)
    return ShardReport(plan.name, num_kept, len(rows) - num_kept, num_frames, commit.tar_bytes, commit.tar_sha256, skipped)


def _parse_header(header: bytes, path: Path, position: int) -> TarMember:
    """Read name and size, write the header that they should have given, and compare all 512 bytes."""
    try:
        name = header[:100].rstrip(b"\0").decode("ascii")
        info = tarfile.TarInfo(name)
        info.size = int(header[124:135], 8)
        info.mode, info.uname, info.gname = _MODE, _OWNER, _OWNER
        if header == info.tobuf(tarfile.USTAR_FORMAT) and _MEMBER_NAME.fullmatch(name):
            return TarMember(name, position + _BLOCK_BYTES, info.size)
    except ValueError:
        pass
    what = f"only {len(header)} bytes" if len(header) < _BLOCK_BYTES else "no valid member header"
    raise DataError(
        f"{path}: {what} at byte {position}; expected a member or the end of the archive; the file is damaged, write it again"
    )


def _require_end(rest: bytes, path: Path, position: int) -> None:
    if len(rest) < _BLOCK_BYTES or len(rest) % _BLOCK_BYTES or rest.strip(b"\0"):
        raise DataError(f"{path}: the archive does not end cleanly after byte {position}; the file is damaged, write it again")
