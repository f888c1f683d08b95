"""The index, the ledger and dataset.json: what makes a folder of tars a shard set. FORMAT.md describes the files."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from infra.errors import DataError, PipelineError
from infra.settings import Settings, explain_validation_error
from infra.storage import sha256_file, write_bytes, write_json
from preprocessing.datasets import VideoIndex
from preprocessing.decode import ffmpeg_version
from preprocessing.labels import label_passport
from preprocessing.planning import ShardPlan
from preprocessing.shards import FORMAT_VERSION, SIDECAR_SCHEMA, ShardSettings, read_sidecar, read_tar

_INDEX_COLUMNS = ["key", "shard", "split", "label", "num_frames", "fps", "height", "width"]
_INDEX_COLUMNS += ["sample_offset", "sample_bytes", "sample_crc32", "frame_offsets", "frame_sizes", "frame_crc32"]
_LEDGER_COLUMNS = [
    "video_id",
    "key",
    "split",
    "label",
    "status",
    "reason",
    "detail",
    "num_frames",
    "num_bytes",
    "source_bytes",
    "content_sha256",
    "seconds",
    "shard",
]
INDEX_SCHEMA = pa.schema([SIDECAR_SCHEMA.field(name) for name in _INDEX_COLUMNS])
LEDGER_SCHEMA = pa.schema([SIDECAR_SCHEMA.field(name) for name in _LEDGER_COLUMNS])

_VIDEOS_SHOWN = 5


class ShardInfo(Settings):
    """One tar of a shard set: its hash, its size in bytes, its number of samples and its split."""

    sha256: str
    bytes: int
    samples: int
    split: str


class DatasetInfo(Settings):
    """The content of dataset.json.

    `label_passport` is the hash of `label_names`; `settings` are the `ShardSettings` as plain data; `counts` holds numbers of
    videos, kept, rejected, frames and bytes, and `by_split` and `by_reason`.
    """

    format_version: int
    dataset: str
    label_names: list[str]
    label_passport: str
    settings: dict[str, Any]
    ffmpeg_version: str
    counts: dict[str, Any]
    shards: dict[str, ShardInfo]


def finish_shard_set(
    output_dir: Path, index: VideoIndex, plans: Sequence[ShardPlan], settings: ShardSettings, dataset_name: str
) -> dict[str, Any]:
    """Gather the sidecars into index.parquet and ledger.parquet, then write dataset.json, the commit of the whole set.

    Returns:
        The `counts` of dataset.json, with `shards`, the number of tars.

    Raises:
        DataError: if a sidecar is missing or unreadable.
        PipelineError: if the ledger does not hold each source video exactly once, or more than `settings.max_bad_fraction` of
            the videos were rejected (the ledger is written then, for a look at the reasons).
    """
    tables, shards = [], {}
    for plan in plans:
        table, commit = read_sidecar(output_dir, plan.sidecar_name)
        num_samples = table["status"].to_pylist().count("kept")
        shards[plan.name] = ShardInfo(sha256=commit.tar_sha256, bytes=commit.tar_bytes, samples=num_samples, split=plan.split)
        tables.append(table)
    rows = pa.concat_tables(tables).replace_schema_metadata(None)
    _require_each_video_once(rows["video_id"].to_pylist(), index.videos["video_id"].to_pylist())
    _write_parquet(rows.select(_LEDGER_COLUMNS), output_dir / "ledger.parquet")
    counts = _count(rows)
    _require_few_rejected(rows, counts, settings, output_dir)
    kept = rows.filter(pc.equal(rows["status"], "kept"))
    _write_parquet(kept.select(_INDEX_COLUMNS), output_dir / "index.parquet")
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        dataset=dataset_name,
        label_names=index.label_names,
        label_passport=label_passport(index.label_names),
        settings=settings.model_dump(mode="json"),
        ffmpeg_version=ffmpeg_version(),
        counts=counts,
        shards=shards,
    )
    write_json(output_dir / "dataset.json", info.model_dump(mode="json"))
    return counts | {"shards": len(shards)}


def read_dataset_info(path: Path) -> DatasetInfo:
    """Read the dataset.json of the shard set in folder `path`.

    Raises:
        DataError: if it is missing, of another format version, or its label names do not fit their passport.
    """
    file = path / "dataset.json"
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is no finished shard set: it has no dataset.json; run the shards stage, or give another folder"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}; run the shards stage again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file} has format version {version!r}, this program reads {FORMAT_VERSION}; run the shards stage again"
        )
    try:
        info = DatasetInfo.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{file} is damaged: {explain_validation_error(error)}; run the shards stage again") from error
    passport = label_passport(info.label_names)
    if passport != info.label_passport:
        raise DataError(
            f"{file} says label passport {info.label_passport}, its names have {passport}; run the shards stage again"
        )
    return info


def read_index(path: Path, split: str | None = None) -> pa.Table:
    """Read index.parquet (`INDEX_SCHEMA`) of the shard set in folder `path`, all of it or the rows of one split.

    Raises:
        DataError: if it is missing, damaged or has other columns, or the split has no sample.
    """
    table = _read_parquet(path / "index.parquet", INDEX_SCHEMA)
    if split is None:
        return table
    rows = table.filter(pc.equal(table["split"], split))
    if rows.num_rows == 0:
        known = sorted(set(table["split"].to_pylist()))
        raise DataError(f"{path} has no sample of split {split!r}; it has {', '.join(known) or 'none at all'}")
    return rows


def read_ledger(path: Path) -> pa.Table:
    """Read ledger.parquet (`LEDGER_SCHEMA`) of the shard set in folder `path`: a row for every source video.

    Raises:
        DataError: if it is missing, damaged or has other columns.
    """
    return _read_parquet(path / "ledger.parquet", LEDGER_SCHEMA)


def verify_shards(path: Path) -> list[str]:
    """Check a shard set against its own books: every byte by its hash, every header, every frame's place, every video's row.

    Returns:
        One sentence for each problem; none if all is well.

    Raises:
        DataError: if dataset.json, the index or the ledger cannot be read at all.
    """
    info = read_dataset_info(path)
    index = read_index(path)
    ledger = read_ledger(path)
    problems = _check_ledger(index, ledger, info)
    unlisted = {file.name for file in path.glob("*.tar")} - set(info.shards)
    problems += [f"{name} is not listed in dataset.json" for name in sorted(unlisted)]
    rows_by_shard: dict[str, list[dict[str, Any]]] = {}
    for row in index.to_pylist():
        rows_by_shard.setdefault(row["shard"], []).append(row)
    problems += [f"the index names {name}, dataset.json does not" for name in sorted(set(rows_by_shard) - set(info.shards))]
    for name, shard in info.shards.items():
        problems += _check_shard(path / name, shard, rows_by_shard.get(name, []))
    return problems


def _check_shard(file: Path, shard: ShardInfo, rows: list[dict[str, Any]]) -> list[str]:
    if not file.is_file():
        return [f"{file.name} is missing"]
    num_bytes = file.stat().st_size
    if num_bytes != shard.bytes:
        return [f"{file.name} has {num_bytes} bytes, dataset.json says {shard.bytes}"]
    problems = []
    if sha256_file(file) != shard.sha256:
        problems.append(f"{file.name} has another SHA-256 than dataset.json says")
    if len(rows) != shard.samples:
        problems.append(f"{file.name} holds {shard.samples} samples by dataset.json, the index has {len(rows)}")
    try:
        members = {member.name: member for member in read_tar(file)}
    except DataError as error:
        return [*problems, str(error)]
    for row in rows:
        members.pop(f"{row['key']}.json", None)
        for number, place in enumerate(zip(row["frame_offsets"], row["frame_sizes"], strict=True)):
            member = members.pop(f"{row['key']}.{number:06d}.jpg", None)
            if member is None or (member.offset, member.size) != place:
                problems.append(f"{file.name}: frame {number} of {row['key']} is not where the index says")
                break
        if row["split"] != shard.split or len(row["frame_offsets"]) != row["num_frames"]:
            problems.append(f"{file.name}: the index row of {row['key']} contradicts itself or dataset.json")
    if members and not problems:
        problems.append(f"{file.name} holds {len(members)} files that the index does not know, for example {min(members)}")
    return problems


def _check_ledger(index: pa.Table, ledger: pa.Table, info: DatasetInfo) -> list[str]:
    problems = []
    if len(set(ledger["video_id"].to_pylist())) != ledger.num_rows:
        problems.append("the ledger lists a video twice")
    if ledger.num_rows != info.counts.get("videos"):
        problems.append(f"the ledger has {ledger.num_rows} rows, dataset.json counts {info.counts.get('videos')} videos")
    kept = ledger.filter(pc.equal(ledger["status"], "kept"))
    if sorted(kept["key"].to_pylist()) != sorted(index["key"].to_pylist()):
        problems.append(f"the ledger keeps {kept.num_rows} videos, the index holds {index.num_rows}, and their keys differ")
    return problems


def _require_each_video_once(found: list[str], expected: list[str]) -> None:
    if sorted(found) == sorted(expected):
        return
    missing = sorted(set(expected) - set(found))[:_VIDEOS_SHOWN]
    surplus = sorted(set(found) - set(expected))[:_VIDEOS_SHOWN]
    raise PipelineError(
        f"the shards account for {len(found)} videos, the index lists {len(expected)}, "
        f"expected each exactly once (missing: {missing}, surplus: {surplus}); remove the folder of the shards and run again"
    )


def _require_few_rejected(rows: pa.Table, counts: dict[str, Any], settings: ShardSettings, output_dir: Path) -> None:
    fraction = counts["rejected"] / counts["videos"]
    if fraction <= settings.max_bad_fraction:
        return
    bad = rows.filter(pc.equal(rows["status"], "rejected")).slice(0, _VIDEOS_SHOWN).to_pylist()
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts["by_reason"].items())
    examples = "; ".join(f"{row['video_id']} ({row['reason']}: {row['detail'][:100]})" for row in bad)
    raise PipelineError(
        f"{counts['rejected']} of {counts['videos']} videos ({fraction:.1%}) cannot be used: {reasons}; expected at most "
        f"{settings.max_bad_fraction:.1%}. First: {examples}. All are in {output_dir / 'ledger.parquet'}. Repair or replace "
        f"those files, or accept them with --set shards.max_bad_fraction={min(1.0, fraction + 0.001):.3f}"
    )


def _count(rows: pa.Table) -> dict[str, Any]:
    status, splits = rows["status"].to_pylist(), rows["split"].to_pylist()
    reasons = Counter(reason for reason in rows["reason"].to_pylist() if reason)
    by_split = {
        split: {word: sum(pair == (split, word) for pair in zip(splits, status, strict=True)) for word in ("kept", "rejected")}
        for split in sorted(set(splits))
    }
    return {
        "videos": rows.num_rows,
        "kept": status.count("kept"),
        "rejected": status.count("rejected"),
        "frames": sum(rows["num_frames"].to_pylist()),
        "bytes": sum(rows["num_bytes"].to_pylist()),
        "by_split": by_split,
        "by_reason": dict(reasons.most_common()),
    }


def _write_parquet(table: pa.Table, path: Path) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_bytes(path, buffer.getvalue().to_pybytes())


def _read_parquet(path: Path, schema: pa.Schema) -> pa.Table:
    """Check the columns before any row is read."""
    again = "run the shards stage again"
    try:
        found = pq.read_schema(path)
        if not found.equals(schema):
            raise DataError(f"{path} has columns {found.names}; expected {schema.names} with their types; {again}")
        return pq.read_table(path, partitioning=None)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {again}, or give another folder") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; {again}") from error
