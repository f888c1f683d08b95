"""The audit: what is in a shard set, what was left out and why, and pictures of what a network will see."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import DataError
from pipelines.evaluation.figures import draw_contact_sheet
from pipelines.reports.audit_figures import draw_label_counts, draw_spread, picture_uri
from pipelines.reports.audit_tables import (
    SHORT_LENGTHS,
    compare_with_published,
    count_books,
    count_labels,
    count_rates,
    count_sizes,
    find_duplicates,
    find_pairs,
    find_short,
    top_share,
    values_by_split,
)
from pipelines.reports.page import data_uri, percent, write_csv, write_page
from preprocessing.index import DatasetInfo, read_dataset_info, read_index, read_ledger
from preprocessing.reader import FrameReader, open_shards
from preprocessing.verify import verify_shards

FILE_NAME = "page.html"
_INDEX_COLUMNS = ["split", "fps", "height", "width"]
_REJECTED_COLUMNS = ("video_id", "split", "label_name", "reason", "detail")
_DUPLICATE_COLUMNS = ("group", "kind", "video_id", "split", "label_name", "num_frames", "content_sha256")
_SHORT_COLUMNS = ("video_id", "split", "label_name", "num_frames")
_SHEET_CLASSES, _SHEET_VIDEOS, _SHEET_FRAMES = 6, 2, 8
_REJECTED_SHOWN, _LABELS_SHOWN, _GROUPS_SHOWN, _SHORT_SHOWN, _PROBLEMS_SHOWN, _PAIRS_SHOWN = 200, 500, 20, 50, 200, 100
_SIZES_SHOWN = _RATES_SHOWN = 10
_DOUBTS_NAMES = 5

Clip = tuple[str, str, list[npt.NDArray[np.uint8]]]  # label, video id with the number of frames, frames


def write_audit(shards: Path | str, output_dir: Path) -> dict[str, Any]:
    """Check a shard set and write `page.html`, `figures/*.png` and `tables/{labels,rejected,duplicates,short}.csv`.

    Damage does not stop it: it is what the page is for. The caller decides what to do about `problems`.

    Args:
        shards: a finished shard set, a folder or a URL.
        output_dir: an existing folder.

    Returns:
        what `audit_tables.count_books` gives, and `verdict`: a sentence; `problems`: sentences, none if all is well;
        `duplicates`: videos whose frames another one has too, without the first of each group; `leaks`: groups of such videos
        that span splits; `short`: by T, videos with fewer than T frames; `top_shares`: of the 10 and 30 commonest labels, by
        split, None where no video is labelled.

    Raises:
        DataError: if the folder is no shard set, or its index or ledger cannot be read.
    """
    info = read_dataset_info(shards)
    problems = [str(problem) for problem in verify_shards(shards)]
    ledger = read_ledger(shards)
    labels = count_labels(ledger, info)
    duplicates, short = find_duplicates(ledger), find_short(ledger)
    summary = {**count_books(ledger, info), **_summarise(problems, duplicates, short, labels)}
    summary["verdict"] = _verdict(summary)
    published = compare_with_published(ledger, info, labels)
    for folder in ("figures", "tables"):
        (output_dir / folder).mkdir(exist_ok=True)
    _write_tables(output_dir / "tables", ledger, info, labels, duplicates, short)
    values = {
        "title": f"Audit of {info.dataset}",
        "summary": summary,
        "published": published,
        "doubts": _doubts(summary, duplicates),
        "problems_shown": problems[:_PROBLEMS_SHOWN],
        "info": info,
        **_label_values(output_dir / "figures", info, labels),
        **_frame_values(output_dir / "figures", shards, ledger, list(labels)),
        "rejected": list(_named(_rejected(ledger).slice(0, _REJECTED_SHOWN), info)),
        "groups": _group_values(duplicates, info),
        "short": list(_named(short.slice(0, _SHORT_SHOWN), info)),
        "sheets": {split: _draw_sheet(shards, ledger, output_dir / "figures", split) for split in labels},
    }
    write_page(output_dir / FILE_NAME, "audit.html", values)
    return summary


def describe_audit(summary: dict[str, Any], run_id: str) -> str:
    """The text of the audit's MLflow run, in Markdown: the verdict, the labels as a picture, the numbers as a table.

    Args:
        summary: as `write_audit` returns it.
        run_id: of the MLflow run that holds `figures/labels.png` and `page.html`.
    """
    rows = [
        f"| {split} | {row['kept']:,} | {row['rejected']:,} | {row['frames']:,} | {row['classes']:,} |"
        for split, row in summary["by_split"].items()
    ]
    lines = [
        summary["verdict"],
        "",
        f"![labels](get-artifact?path=figures/labels.png&run_uuid={run_id})",
        "",
        "| split | kept | rejected | frames | classes |",
        "|---|---:|---:|---:|---:|",
        *rows,
        "",
        f"{summary['duplicates']:,} duplicates, {summary['leaks']:,} leaks between splits, "
        f"{len(summary['problems']):,} problems. The page with pictures: Artifacts, page.html.",
    ]
    return "\n".join(lines)


def audit_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of an audit that are worth a chart: `audit/problems`, `audit/leaks`, `audit/short_8` and so on."""
    names = ("num_videos", "num_kept", "num_rejected", "duplicates", "leaks")
    metrics = {f"audit/{name.removeprefix('num_')}": float(summary[name]) for name in names}
    metrics["audit/problems"] = float(len(summary["problems"]))
    return metrics | {f"audit/short_{length}": float(count) for length, count in summary["short"].items()}


def _summarise(
    problems: list[str], duplicates: pa.Table, short: pa.Table, labels: dict[str, npt.NDArray[np.int64]]
) -> dict[str, Any]:
    groups = pc.count_distinct(duplicates["group"]).as_py()
    leaks = duplicates.filter(pc.equal(duplicates["kind"], "LEAK"))
    return {
        "problems": problems,
        "duplicates": duplicates.num_rows - groups,
        "leaks": pc.count_distinct(leaks["group"]).as_py(),
        "short": {str(length): pc.sum(pc.less(short["num_frames"], length), min_count=0).as_py() for length in SHORT_LENGTHS},
        "top_shares": {split: [top_share(counts, 10), top_share(counts, 30)] for split, counts in labels.items()},
    }


def _verdict(summary: dict[str, Any]) -> str:
    rejected = f"{summary['num_rejected']:,} of {summary['num_videos']:,} videos were rejected"
    if summary["problems"]:
        return f"The shard set is damaged; {rejected}."
    text = f"The shard set is whole; {rejected if summary['num_rejected'] else 'every video was kept'}."
    return f"{text} {_times(summary['leaks'], 'video')} in more than one split." if summary["leaks"] else text


def _times(count: int, noun: str) -> str:
    return f"{count:,} {noun} is" if count == 1 else f"{count:,} {noun}s are"


def _doubts(summary: dict[str, Any], duplicates: pa.Table) -> list[str]:
    """What a reader should look at before training."""
    found = [f"Damage: {problem}" for problem in summary["problems"][:_DOUBTS_NAMES]]
    if summary["leaks"]:
        first = duplicates.filter(pc.equal(duplicates["group"], 1)).slice(0, 2).to_pylist()
        example = " and ".join(f"{row['video_id']} of {row['split']}" for row in first)
        found.append(
            f"LEAK: {_times(summary['leaks'], 'video')} in more than one split, byte by byte, for example {example}; "
            "scores on these clips are worth nothing."
        )
    if copies := summary["duplicates"]:
        found.append(f"{_times(copies, 'video')} a copy of another one, byte by byte; tables/duplicates.csv names them.")
    for split, names in summary["absent_classes"].items():
        more = ", ..." if len(names) > _DOUBTS_NAMES else ""
        found.append(f"Classes without a video in {split}: {len(names)} ({', '.join(names[:_DOUBTS_NAMES])}{more}).")
    for split, row in summary["by_split"].items():
        if row["unlabelled"]:
            found.append(f"{row['unlabelled']:,} of {row['kept']:,} videos of {split} have no label; they cannot be scored.")
    for length, count in summary["short"].items():
        if count:
            found.append(
                f"{count:,} of {summary['num_kept']:,} videos have fewer than {length} frames: their segments repeat some."
            )
    return found


def _write_tables(
    folder: Path,
    ledger: pa.Table,
    info: DatasetInfo,
    labels: dict[str, npt.NDArray[np.int64]],
    duplicates: pa.Table,
    short: pa.Table,
) -> None:
    write_csv(folder / "rejected.csv", _REJECTED_COLUMNS, _named(_rejected(ledger), info))
    write_csv(folder / "duplicates.csv", _DUPLICATE_COLUMNS, _named(duplicates, info))
    write_csv(folder / "short.csv", _SHORT_COLUMNS, _named(short, info))
    rows = (
        {"label": label, "label_name": name, **{split: int(counts[label]) for split, counts in labels.items()}}
        for label, name in enumerate(info.label_names)
    )
    write_csv(folder / "labels.csv", ("label", "label_name", *labels), rows)


def _rejected(ledger: pa.Table) -> pa.Table:
    rows = ledger.filter(pc.not_equal(ledger["status"], "kept"))
    return rows.select(["video_id", "split", "label", "reason", "detail"])


def _named(table: pa.Table, info: DatasetInfo) -> Iterator[dict[str, Any]]:
    """The rows, each with the name of its label; a batch at a time, since a table may hold millions."""
    for batch in table.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            yield row | {"label_name": _label_name(row["label"], info)}


def _label_name(label: int | None, info: DatasetInfo) -> str:
    return info.label_names[label] if label is not None and 0 <= label < len(info.label_names) else ""


def _label_values(figures: Path, info: DatasetInfo, labels: dict[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
    """The labels in the order of their videos, the shares of the commonest, and the pairs that a flip swaps."""
    totals = np.sum(list(labels.values()), axis=0)
    order = np.argsort(-totals, kind="stable")
    most = max(1, int(totals.max(initial=0)))
    pairs, alone = find_pairs(info, labels)
    shares = [("all", totals), *((split, counts) for split, counts in labels.items() if counts.any())]
    return {
        "label_figure": data_uri(draw_label_counts(figures / "labels.png", totals)),
        "label_rows": [
            {
                "name": info.label_names[label],
                "counts": [int(counts[label]) for counts in labels.values()],
                "share": totals[label] / most,
            }
            for label in order[:_LABELS_SHOWN]
        ],
        "label_shares": [
            {
                "split": split,
                "videos": int(counts.sum()),
                "top_10": percent(top_share(counts, 10)),
                "top_30": percent(top_share(counts, 30)),
                "most": int(counts.max()),
                "least": int(counts.min()),
            }
            for split, counts in shares
        ],
        "pairs": pairs[:_PAIRS_SHOWN],
        "num_pairs": len(pairs),
        "alone": alone[:_PAIRS_SHOWN],
    }


def _frame_values(figures: Path, shards: Path | str, ledger: pa.Table, splits: list[str]) -> dict[str, Any]:
    """Lengths, sizes, rates and bytes of the kept videos."""
    index = read_index(shards, columns=_INDEX_COLUMNS)
    kept = ledger.filter(pc.equal(ledger["status"], "kept"))
    frames = values_by_split(kept, splits, kept["num_frames"])
    # fill_null: the ledger of a damaged set may hold a video without frames.
    each = pc.fill_null(pc.divide(kept["num_bytes"].cast(pa.float64()), pc.max_element_wise(kept["num_frames"], 1)), 0.0)
    kilobytes = values_by_split(kept, splits, pc.divide(each, 1000.0))
    sizes, rates = count_sizes(index), count_rates(index, splits)
    return {
        "frames_figure": data_uri(draw_spread(figures / "num_frames.png", frames, "frames a video", whole=True)),
        "bytes_figure": data_uri(draw_spread(figures / "frame_bytes.png", kilobytes, "kB a frame (JPEG)", whole=False)),
        "sizes": sizes[:_SIZES_SHOWN],
        "num_sizes": len(sizes),
        "rates": rates[:_RATES_SHOWN],
        "num_rates": len(rates),
    }


def _group_values(duplicates: pa.Table, info: DatasetInfo) -> list[list[dict[str, Any]]]:
    """The first groups of duplicates, each capped."""
    shown = duplicates.filter(pc.less_equal(duplicates["group"], _GROUPS_SHOWN))
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in _named(shown, info):
        groups.setdefault(row["group"], []).append(row)
    return list(groups.values())


def _draw_sheet(place: Path | str, ledger: pa.Table, figures: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    """Videos by label, for the page and as `clips_<split>.png`; none where they cannot be read."""
    try:
        clips = list(_read_clips(place, ledger, split))
    except DataError:  # the page has the reason among its problems
        return {}
    draw_contact_sheet(figures / f"clips_{split}.png", [(f"{label}   {text}", frames) for label, text, frames in clips])
    by_label: dict[str, list[dict[str, Any]]] = {}
    for label, text, frames in clips:
        by_label.setdefault(label, []).append({"text": text, "pictures": [picture_uri(frame) for frame in frames]})
    return by_label


def _read_clips(place: Path | str, ledger: pa.Table, split: str) -> Iterator[Clip]:
    shards = open_shards(place, split)
    reader = FrameReader(shards)
    for row in _pick_videos(shards.table["label"]):
        video = shards.video(row)
        name = shards.label_names[video.label] if video.label >= 0 else "no label"
        num_frames = len(video.frame_offsets)
        centres = [(2 * segment + 1) * num_frames // (2 * _SHEET_FRAMES) for segment in range(_SHEET_FRAMES)]
        rows = ledger.filter(pc.equal(ledger["key"], video.key))["video_id"].to_pylist()
        video_id = rows[0] if rows else video.key  # the ledger of a damaged set may lack it
        yield name, f"{video_id}, {num_frames} frames", [reader.read(video, index) for index in centres]


def _pick_videos(labels: pa.ChunkedArray) -> list[int]:
    """Rows of the first videos of classes that lie evenly spread over the list; more of each where classes are few."""
    filled = pc.fill_null(labels, -1).combine_chunks().to_numpy(zero_copy_only=False)
    present = np.unique(filled)
    places = np.unique(np.linspace(0, len(present) - 1, min(_SHEET_CLASSES, len(present))).round().astype(int))
    each = max(_SHEET_VIDEOS, _SHEET_CLASSES // len(places))
    return [int(row) for label in present[places] for row in np.flatnonzero(filled == label)[:each]]
