"""What a shard set holds, in numbers: from its index, ledger and dataset.json alone, column by column."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.filesystems import Folder
from preprocessing.index import DatasetInfo, read_dataset_info, read_index, read_ledger

_TOP = 5
_SPLITS = ("train", "validation", "test")


def shard_stats(place: Folder | Path | str) -> dict[str, Any]:
    """Count and measure the shard set in a folder, local or remote, without reading a tar; ready for JSON.

    Returns:
        `dataset`, `label_passport`, `ffmpeg_version`, `num_classes`;
        `splits`: for each split `kept`, `rejected`, `unlabelled` (of the kept), `frames`, `jpeg_bytes`, `source_bytes`,
        `bytes_per_frame` (JPEG), `frames_per_video` and `videos_per_class`, both with `min`, `mean`, `median` and `max` (None
        if the split keeps no video, or has no label), the latter with `smallest` and `largest`, five class names each with
        their numbers of videos, classes without any video included;
        `sizes` and `fps`: the five most frequent frame sizes ("HxW") and rates (None if unknown) with their numbers of videos;
        `reasons` of rejection with their numbers; `shards`: `count` and `bytes`, `min_bytes`, `mean_bytes`, `max_bytes` of the
        tars; `decoding_seconds`, the sum over all videos and workers.

    Raises:
        DataError: if the folder is no finished shard set, or a table is missing, damaged or has other columns.
    """
    info = read_dataset_info(place)
    columns = ["split", "label", "status", "reason", "num_frames", "num_bytes", "source_bytes", "seconds"]
    ledger = read_ledger(place, columns)
    index = read_index(place, columns=["height", "width", "fps"])
    found = pc.unique(ledger["split"]).to_pylist()
    order = sorted(found, key=lambda split: (_SPLITS.index(split) if split in _SPLITS else len(_SPLITS), split))
    rejected = ledger.filter(pc.field("status") == "rejected")
    return {
        "dataset": info.dataset,
        "label_passport": info.label_passport,
        "ffmpeg_version": info.ffmpeg_version,
        "num_classes": len(info.label_names),
        "splits": {split: _split_stats(ledger.filter(pc.field("split") == split), info) for split in order},
        "sizes": {f"{height}x{width}": count for height, width, count in _most_frequent(index.select(["height", "width"]))},
        "fps": [{"fps": fps, "videos": count} for fps, count in _most_frequent(_rounded(index.select(["fps"])))],
        "reasons": dict(_most_frequent(rejected.select(["reason"]), limit=None)),
        "shards": _tar_sizes(info),
        "decoding_seconds": _sum(ledger["seconds"]),
    }


def _split_stats(rows: pa.Table, info: DatasetInfo) -> dict[str, Any]:
    kept = rows.filter(pc.field("status") == "kept")
    frames, jpeg_bytes = _sum(kept["num_frames"]), _sum(kept["num_bytes"])
    return {
        "kept": kept.num_rows,
        "rejected": rows.num_rows - kept.num_rows,
        "unlabelled": kept["label"].null_count,
        "frames": frames,
        "jpeg_bytes": jpeg_bytes,
        "source_bytes": _sum(kept["source_bytes"]),
        "bytes_per_frame": jpeg_bytes / frames if frames else None,
        "frames_per_video": _spread(kept["num_frames"]),
        "videos_per_class": _class_sizes(kept["label"], info.label_names),
    }


def _class_sizes(labels: pa.ChunkedArray, names: list[str]) -> dict[str, Any] | None:
    """None if no video has a label."""
    known = pc.drop_null(labels)
    if not len(known) or not names:
        return None
    present = known.value_counts()
    every = pa.table({"label": pa.array(range(len(names)), pa.int32()), "name": names})
    counted = pa.table({"label": present.field("values"), "videos": present.field("counts")})
    joined = every.join(counted, "label", join_type="left outer").sort_by("label")
    sizes = joined.set_column(2, "videos", pc.fill_null(joined["videos"], 0))
    ranks = {word: [("videos", order), ("label", "ascending")] for word, order in _ENDS.items()}
    ends = {word: sizes.take(pc.select_k_unstable(sizes, min(_TOP, len(names)), keys)) for word, keys in ranks.items()}
    named = {word: [[row["name"], row["videos"]] for row in table.to_pylist()] for word, table in ends.items()}
    return (_spread(sizes["videos"]) or {}) | named


def _most_frequent(table: pa.Table, limit: int | None = _TOP) -> list[tuple[Any, ...]]:
    """The rows that occur most, each with its count at the end."""
    counted = table.group_by(table.column_names).aggregate([([], "count_all")])
    keys = [("count_all", "descending")] + [(name, "ascending") for name in table.column_names]
    top = counted.select([*table.column_names, "count_all"]).sort_by(keys).slice(0, limit)
    return [tuple(row.values()) for row in top.to_pylist()]


def _rounded(table: pa.Table) -> pa.Table:
    """Rates to a thousandth, so that 29.97 is one rate."""
    return pa.table({"fps": pc.round(pc.cast(table["fps"], pa.float64()), 3)})


def _spread(values: pa.ChunkedArray) -> dict[str, Any] | None:
    if not len(values):
        return None
    ends = pc.min_max(values).as_py()
    median = pc.quantile(values, q=0.5)[0].as_py()
    return {"min": ends["min"], "mean": pc.mean(values).as_py(), "median": median, "max": ends["max"]}


def _sum(values: pa.ChunkedArray) -> Any:
    return pc.sum(values).as_py() or 0


def _tar_sizes(info: DatasetInfo) -> dict[str, Any]:
    sizes = [shard.bytes for shard in info.shards.values()]
    total = sum(sizes)
    mean = total / len(sizes) if sizes else 0
    return {
        "count": len(sizes),
        "bytes": total,
        "min_bytes": min(sizes, default=0),
        "mean_bytes": mean,
        "max_bytes": max(sizes, default=0),
    }


_ENDS = {"smallest": "ascending", "largest": "descending"}
