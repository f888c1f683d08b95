"""The end of writing a shard set: the sidecars become index.parquet and ledger.parquet, then dataset.json commits them."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import PipelineError
from infra.storage import write_bytes
from preprocessing.datasets import VideoIndex
from preprocessing.decode import ffmpeg_version
from preprocessing.index import INDEX_SCHEMA, LEDGER_SCHEMA, DatasetInfo, FileInfo, ShardInfo, dataset_json
from preprocessing.labels import label_passport
from preprocessing.planning import ShardPlan
from preprocessing.shards import FORMAT_VERSION, ShardSettings, read_sidecar

_VIDEOS_SHOWN = 5


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
    files = {"ledger.parquet": _write_parquet(rows.select(LEDGER_SCHEMA.names), output_dir / "ledger.parquet")}
    counts = _count(rows)
    _require_few_rejected(rows, counts, settings, output_dir)
    kept = rows.filter(pc.equal(rows["status"], "kept"))
    files["index.parquet"] = _write_parquet(kept.select(INDEX_SCHEMA.names), output_dir / "index.parquet")
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        dataset=dataset_name,
        label_names=index.label_names,
        label_passport=label_passport(index.label_names),
        settings=settings.model_dump(mode="json"),
        ffmpeg_version=ffmpeg_version(),
        counts=counts,
        files=files,
        shards=shards,
    )
    write_bytes(output_dir / "dataset.json", dataset_json(info))
    return counts | {"shards": len(shards)}


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


def _write_parquet(table: pa.Table, path: Path) -> FileInfo:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    data = bytes(buffer.getvalue())
    write_bytes(path, data)
    return FileInfo(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
