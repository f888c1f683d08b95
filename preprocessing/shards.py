"""One shard: writing a tar so that it is whole or absent, and its sidecar, which says so.

`write_shard` writes `<name>.tar` and then, as its commit, the sidecar `<name>.parquet`. FORMAT.md describes the files. Nothing
here knows of Ray: `tasks.py` runs `write_shard` in many processes.
"""

import errno
import hashlib
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter, field_validator

from infra.errors import DataError, PipelineError
from infra.filesystems import Folder
from infra.storage import canonical_json, sha256_json
from preprocessing.decode import MAX_FRAMES, DecodedVideo, DecodeSettings, VideoRejectedError, ffmpeg_version
from preprocessing.planning import PlannedVideo, ShardPlan, plan_digest, sidecar_name
from preprocessing.sources import Source
from preprocessing.tars import TarWriter

FORMAT_VERSION = 2

# One row for each source video of the shard; index.parquet and ledger.parquet are columns of these.
SIDECAR_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("split", pa.string()),
        ("label", pa.int32()),
        ("path", pa.string()),
        ("kind", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
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

_BUFFER_BYTES = 1 << 20
_COMMIT_KEY = b"sagsm.shard"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ShardSettings(DecodeSettings):
    """How videos become shards.

    Shards hold at most `videos_per_shard` videos, of one split each, in an order drawn from `seed`. If more than
    `max_bad_fraction` (0 to 1) of all videos are rejected, the shard set is refused. `output` is a folder or an `s3://` or
    `gs://` URL under which the set gets a folder of its own; None keeps it in the store.
    """

    videos_per_shard: int = Field(default=256, ge=1)
    seed: int = 0
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)
    output: str | None = None

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: str | None) -> str | None:
        try:
            return output if output is None else Folder(output).url
        except PipelineError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What came of one shard: `num_bytes` and `sha256` of the tar, `source_bytes` of the raw videos; `skipped`: was there.

    `reasons` are the numbers of rejected videos by reason.
    """

    name: str
    num_kept: int
    num_rejected: int
    num_frames: int
    num_bytes: int
    source_bytes: int
    sha256: str
    skipped: bool
    reasons: dict[str, int]


@dataclass(frozen=True)
class ShardCommit:
    """What a sidecar says of its tar: size and hash, what went in, and the digest of the plan and settings behind it.

    `reasons` are the numbers of rejected videos by reason.
    """

    plan_sha256: str
    tar_bytes: int
    tar_sha256: str
    num_kept: int
    num_frames: int
    source_bytes: int
    reasons: dict[str, int]
    format_version: int = FORMAT_VERSION


_COMMIT = TypeAdapter(ShardCommit)


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
            commit = _commit(plan_sha256(plan_digest(plan), settings), path.stat().st_size, sha256, rows)
        output.write_bytes(plan.sidecar_name, _sidecar_bytes(rows, commit))
    except OSError as error:
        if error.errno in _NO_SPACE:
            message = f"no space left for shard {plan.name} in {output}: {error}"
            raise PipelineError(f"{message}; free some space and run again, shards that are complete are kept") from error
        raise
    return _report(plan.name, commit, skipped=False)


def plan_sha256(digest: str, settings: ShardSettings) -> str:
    """Hex SHA-256 of all that a tar depends on, but for the raw videos (the stage's fingerprint watches those).

    Args:
        digest: of the plan; see `plan_digest`.
        settings: of decoding.

    Raises:
        PipelineError: if ffmpeg is missing.
    """
    decoding = {name: getattr(settings, name) for name in DecodeSettings.model_fields}
    return sha256_json({"format": FORMAT_VERSION, "plan": digest, "decoding": decoding, "ffmpeg": ffmpeg_version()})


def finished_report(output: Folder | Path, name: str, digest: str, tar_bytes: int | None) -> ShardReport | None:
    """The report of a shard that is complete; None if it has to be written. Reads the sidecar's footer, not its rows.

    The tar was synced before its sidecar was written, so its size is proof enough here; `verify_shards` reads the bytes.

    Args:
        output: the folder of the shard set.
        name: of the tar.
        digest: what `plan_sha256` gives now.
        tar_bytes: the tar's size; None if there is none.
    """
    try:
        with Folder(output).open(sidecar_name(name)) as file:
            commit = _read_commit(pq.read_schema(file).metadata)
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    if commit.plan_sha256 != digest or tar_bytes != commit.tar_bytes:
        return None
    return _report(name, commit, skipped=True)


def read_sidecar(folder: Folder | Path, name: str) -> tuple[pa.Table, ShardCommit]:
    """Read a sidecar: the rows (`SIDECAR_SCHEMA`) and what it says of its tar.

    Raises:
        DataError: if it is missing, unreadable or of another format.
    """
    where = f"{folder}/{name}"
    try:
        data = Folder(folder).read_bytes(name)
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        commit = _read_commit(table.schema.metadata)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
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
        tar = TarWriter(file)
        for video in plan.videos:
            started = time.perf_counter()
            row: dict[str, Any] = {"video_id": video.video_id, "key": video.key, "shard": plan.name, "split": plan.split}
            row |= {"label": video.label, "status": "kept", "reason": "", "detail": "", "num_frames": 0, "num_bytes": 0}
            row |= {"source_bytes": 0, "content_sha256": ""}
            row |= {"path": video.path, "kind": video.kind, "start": video.start, "end": video.end}
            try:
                decoded = source.read(video, plan.name, settings)
                _require_few_frames(decoded)
            except VideoRejectedError as error:
                row |= {"status": "rejected", "reason": error.reason, "detail": error.detail}
            else:
                row |= {"detail": decoded.detail, "num_frames": len(decoded.frames), "num_bytes": sum(map(len, decoded.frames))}
                row |= {"source_bytes": decoded.source_bytes, "content_sha256": _content_sha256(decoded.frames)}
                row |= {"fps": decoded.fps, "height": decoded.height, "width": decoded.width}
                row |= tar.add_sample(video.key, decoded.frames, _facts(video, plan.split, decoded))
            row["seconds"] = time.perf_counter() - started
            rows.append(row)
        return rows, tar.close()


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


def _read_commit(metadata: dict[bytes, bytes] | None) -> ShardCommit:
    """Raises KeyError or ValueError if there is none or it is damaged."""
    return _COMMIT.validate_json((metadata or {})[_COMMIT_KEY])


def _commit(digest: str, tar_bytes: int, tar_sha256: str, rows: list[dict[str, Any]]) -> ShardCommit:
    return ShardCommit(
        plan_sha256=digest,
        tar_bytes=tar_bytes,
        tar_sha256=tar_sha256,
        num_kept=sum(row["status"] == "kept" for row in rows),
        num_frames=sum(row["num_frames"] for row in rows),
        source_bytes=sum(row["source_bytes"] for row in rows),
        reasons=dict(Counter(row["reason"] for row in rows if row["status"] == "rejected")),
    )


def _report_if_complete(plan: ShardPlan, output: Folder, settings: ShardSettings) -> ShardReport | None:
    """As `finished_report`, but the sidecar's rows are read too, so that a damaged one is written again."""
    try:
        read_sidecar(output, plan.sidecar_name)
    except DataError:
        return None
    return finished_report(output, plan.name, plan_sha256(plan_digest(plan), settings), output.size(plan.name))


def _report(name: str, commit: ShardCommit, *, skipped: bool) -> ShardReport:
    return ShardReport(
        name=name,
        num_kept=commit.num_kept,
        num_rejected=sum(commit.reasons.values()),
        num_frames=commit.num_frames,
        num_bytes=commit.tar_bytes,
        source_bytes=commit.source_bytes,
        sha256=commit.tar_sha256,
        skipped=skipped,
        reasons=commit.reasons,
    )
