"""The audit: what is in a shard set, what was left out and why, and pictures of what a network will see."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from infra.errors import DataError
from pipelines.evaluation.figures import draw_contact_sheet, draw_histogram
from pipelines.reports.page import data_uri, write_csv, write_page
from preprocessing.index import DatasetInfo, read_dataset_info, read_index, read_ledger
from preprocessing.reader import FrameReader, open_shards
from preprocessing.verify import verify_shards

FILE_NAME = "page.html"
_REJECTED_COLUMNS = ("video_id", "split", "label_name", "reason", "detail")
_SPLITS = ("train", "validation", "test")
_SHEET_CLASSES, _SHEET_VIDEOS, _SHEET_FRAMES = 6, 2, 8
_REJECTED_SHOWN = 200
_DOUBTS_NAMES = 5


def write_audit(shard_dir: Path, output_dir: Path) -> dict[str, Any]:
    """Check a shard set and write `page.html`, `figures/*.png` and `tables/rejected.csv`.

    Damage does not stop it: it is what the page is for. The caller decides what to do about `problems`.

    Args:
        shard_dir: a finished shard set.
        output_dir: an existing folder.

    Returns:
        a dict of `num_videos`, `num_kept`, `num_rejected`, `num_frames`, `num_bytes`, `num_shards`; `by_split`: a dict a split;
        `reasons`: counts, the commonest first; `absent_classes`: names by split; `problems`: sentences, none if all is well.

    Raises:
        DataError: if the folder is no shard set, or its index or ledger cannot be read.
    """
    info = read_dataset_info(shard_dir)
    ledger = read_ledger(shard_dir).to_pylist()
    summary = _summarise(ledger, info, verify_shards(shard_dir))
    (output_dir / "figures").mkdir(exist_ok=True)
    (output_dir / "tables").mkdir(exist_ok=True)
    rejected = [
        {name: row[name] for name in _REJECTED_COLUMNS if name != "label_name"}
        | {"label_name": _label_name(row["label"], info)}
        for row in ledger
        if row["status"] == "rejected"
    ]
    write_csv(output_dir / "tables" / "rejected.csv", _REJECTED_COLUMNS, rejected)
    frames = read_index(shard_dir)["num_frames"].to_pylist()
    histogram = draw_histogram(output_dir / "figures" / "num_frames.png", frames, "frames a video")
    sheets = {split: _draw_sheet(shard_dir, output_dir, split) for split in summary["by_split"]}
    values = {
        "title": f"Audit of {info.dataset}",
        "verdict": _verdict(summary),
        "doubts": _doubts(summary),
        "summary": summary,
        "label_names": info.label_names,
        "rejected": rejected[:_REJECTED_SHOWN],
        "labels": _label_table(ledger, info, list(summary["by_split"])),
        "histogram": data_uri(histogram),
        "sheets": {split: data_uri(sheet) for split, sheet in sheets.items() if sheet},
        "dataset_name": info.dataset,
        "label_passport": info.label_passport,
        "ffmpeg_version": info.ffmpeg_version,
        "settings": info.settings,
    }
    write_page(output_dir / FILE_NAME, "audit.html", values)
    return summary


def _summarise(ledger: list[dict[str, Any]], info: DatasetInfo, problems: list[str]) -> dict[str, Any]:
    kept = [row for row in ledger if row["status"] == "kept"]
    reasons = Counter(row["reason"] for row in ledger if row["status"] == "rejected")
    by_split, absent = {}, {}
    for split in sorted(
        {row["split"] for row in ledger}, key=lambda name: (_SPLITS.index(name) if name in _SPLITS else 9, name)
    ):
        mine = [row for row in kept if row["split"] == split]
        labels = {row["label"] for row in mine} - {None}
        by_split[split] = {
            "kept": len(mine),
            "rejected": sum(row["split"] == split for row in ledger) - len(mine),
            "unlabelled": sum(row["label"] is None for row in mine),
            "classes": len(labels),
            "frames": sum(row["num_frames"] for row in mine),
            "bytes": sum(shard.bytes for shard in info.shards.values() if shard.split == split),
        }
        absent[split] = [name for label, name in enumerate(info.label_names) if label not in labels] if labels else []
    return {
        "num_videos": len(ledger),
        "num_kept": len(kept),
        "num_rejected": len(ledger) - len(kept),
        "num_frames": sum(row["num_frames"] for row in kept),
        "num_bytes": sum(shard.bytes for shard in info.shards.values()),
        "num_shards": len(info.shards),
        "by_split": by_split,
        "reasons": dict(reasons.most_common()),
        "absent_classes": {split: names for split, names in absent.items() if names},
        "problems": problems,
    }


def _verdict(summary: dict[str, Any]) -> str:
    rejected = f"{summary['num_rejected']} of {summary['num_videos']} videos were rejected"
    if summary["problems"]:
        return f"The shard set is damaged; {rejected}."
    return f"The shard set is whole; {rejected if summary['num_rejected'] else 'every video was kept'}."


def _doubts(summary: dict[str, Any]) -> list[str]:
    """What a reader should look at before training."""
    found = [f"Damage: {problem}" for problem in summary["problems"][:_DOUBTS_NAMES]]
    for split, names in summary["absent_classes"].items():
        more = ", ..." if len(names) > _DOUBTS_NAMES else ""
        found.append(f"Classes without a video in {split}: {len(names)} ({', '.join(names[:_DOUBTS_NAMES])}{more}).")
    for split, row in summary["by_split"].items():
        if row["unlabelled"]:
            found.append(f"{row['unlabelled']} of {row['kept']} videos of {split} have no label; they cannot be scored.")
    return found


def _label_name(label: int | None, info: DatasetInfo) -> str:
    return info.label_names[label] if label is not None and label < len(info.label_names) else ""


def _label_table(ledger: list[dict[str, Any]], info: DatasetInfo, splits: list[str]) -> list[dict[str, Any]]:
    """Kept videos of each label by split, in the order of the labels."""
    counts = Counter((row["label"], row["split"]) for row in ledger if row["status"] == "kept")
    totals = [sum(counts[label, split] for split in splits) for label in range(len(info.label_names))]
    most = max(totals, default=0) or 1
    return [
        {"name": name, "counts": [counts[label, split] for split in splits], "share": totals[label] / most}
        for label, name in enumerate(info.label_names)
    ]


def _draw_sheet(shard_dir: Path, output_dir: Path, split: str) -> Path | None:
    """Two videos of each of six classes; None where the split has no frames to show or they cannot be read."""
    try:
        shards = open_shards(shard_dir, split)
        reader = FrameReader(shard_dir)
        rows = []
        for row in _pick_videos(shards.table["label"]):
            video = shards.video(row)
            name = shards.label_names[video.label] if video.label >= 0 else "no label"
            num_frames = len(video.frame_offsets)
            centres = [(2 * segment + 1) * num_frames // (2 * _SHEET_FRAMES) for segment in range(_SHEET_FRAMES)]
            rows.append((f"{name}   {video.key}   {num_frames} frames", [reader.read(video, index) for index in centres]))
    except DataError:  # the page has the reason among its problems
        return None
    return draw_contact_sheet(output_dir / "figures" / f"clips_{split}.png", rows)


def _pick_videos(labels: pa.ChunkedArray) -> list[int]:
    """Rows of the first videos of the first classes, class by class."""
    rows_of: dict[int, list[int]] = {}
    for row, label in enumerate(labels.to_pylist()):
        rows_of.setdefault(-1 if label is None else label, []).append(row)
    return [row for label in sorted(rows_of)[:_SHEET_CLASSES] for row in rows_of[label][:_SHEET_VIDEOS]]
