"""`sagsm shards verify | stats | heal | index`: looking at a shard set, mending it, making one out of tars made elsewhere."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import ConfigError, DataError
from pipelines.printing import megabytes, print_json, print_table, system_errors_explained

shards_app = typer.Typer(
    help="Look at a shard set (a folder with dataset.json), mend it, or make one out of tars made elsewhere.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

FolderArgument = Annotated[str, typer.Argument(metavar="FOLDER", help="Holds dataset.json.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]

_SHOWN = 10


@shards_app.command("verify")
def shards_verify(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Read every shard, compare it with its hashes and the index, decode every frame; exit code 2 when something is wrong.

    Example: sagsm shards verify work/store/shards/0123456789abcdef
    """
    from infra.progress import StageProgress
    from preprocessing.verify import verify_shards

    with system_errors_explained(), StageProgress() as progress:
        problems = [str(problem) for problem in verify_shards(_place(folder), progress.for_stage("verify"))]
    if as_json:
        print_json({"problems": problems})
    if problems:
        raise DataError(f"{len(problems)} problems in {folder}: " + "; ".join(problems[:_SHOWN]))
    if not as_json:
        print(f"{folder}: every shard has the bytes that were written")


@shards_app.command("stats")
def shards_stats(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Show what a shard set holds: videos, frames, sizes, rates, classes, rejected ones. Reads no tar.

    Example: sagsm shards stats work/store/shards/0123456789abcdef
    """
    from preprocessing.stats import shard_stats

    stats = shard_stats(_place(folder))
    if as_json:
        print_json(stats)
    else:
        _print_stats(stats)


@shards_app.command("heal")
def shards_heal(
    folder: FolderArgument,
    root: Annotated[
        str, typer.Option("--root", metavar="RAW", help="Folder of the raw videos that the set was made from, not an archive.")
    ],
    output: Annotated[
        str | None, typer.Option("--output", metavar="NEW", help="The new shard set; FOLDER-healed if left out.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="ADDR", help="A running Ray cluster; otherwise one starts on this machine."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try rejected videos again and write damaged shards again, into a new set; the others are linked, not copied.

    Repair or replace the raw videos first; `sagsm shards stats` counts the reasons, ledger.parquet names each video. A shard
    set that is finished is never changed. Interrupted, the same command goes on. Raw data in archives must be unpacked.

    Example: sagsm shards heal work/store/shards/0123456789abcdef --root /data/something_v1
    """
    from infra.progress import StageProgress
    from preprocessing.heal import heal_shards

    _require_root(root)
    target = output or _healed_beside(folder)
    with system_errors_explained(), StageProgress() as progress:
        on_progress = progress.for_stage("heal")
        report = heal_shards(_place(folder), _place(target), _writer(root, address, on_progress), on_progress)
    if as_json:
        print_json(asdict(report))
    else:
        _print_healed(report)


@shards_app.command("index")
def shards_index(
    tars: Annotated[Path, typer.Argument(metavar="FOLDER", help="Holds WebDataset tars (*.tar) of JPEG frames.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="Make the shard set there, with links to the tars; else beside the tars."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="FILE", help="Names of the class ids: a .json list, or a text file, a name a row."),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="SPLIT=PATTERN", help="Which tars are train, validation or test; may be repeated."),
    ] = None,
    max_bad_fraction: Annotated[
        float, typer.Option("--max-bad-fraction", min=0, max=1, help="Refuse the set if more samples are rejected.")
    ] = 0.02,
    as_json: JsonOption = False,
) -> None:
    """Make tars of other programs (video2dataset, img2dataset, webdataset) a shard set; the tars stay as they are.

    A sample is KEY.jpg, or KEY.000000.jpg, KEY.000001.jpg, ..., with its class id in KEY.cls, or in KEY.json as "label" (a
    number or a name), "label_name" or "caption". Without --split, tars named val* and test* are those splits, all others train.

    Example: sagsm shards index /data/tars --labels labels.txt --split 'train=0*.tar' --split 'validation=1*.tar'
    """
    from infra.progress import StageProgress
    from preprocessing.foreign import index_foreign_tars, read_label_names

    names = read_label_names(labels) if labels else None
    with system_errors_explained(), StageProgress() as progress:
        counts = index_foreign_tars(
            tars,
            output,
            label_names=names,
            split_patterns=_patterns(split or []),
            max_bad_fraction=max_bad_fraction,
            on_progress=progress.for_stage("index"),
        )
    where = output or tars
    if as_json:
        print_json({"output": str(where), **counts})
        return
    print(f"{where}: {counts['kept']:,} samples kept, {counts['rejected']:,} rejected, {counts['frames']:,} frames in "
          f"{counts['shards']} tars")  # fmt: skip
    _print_reasons(counts["by_reason"])
    if counts["ignored_files"]:
        print(f"{counts['ignored_files']:,} files belong to no sample (names without a dot, or hidden) and were left out")
    print(f"next: sagsm shards stats {where}")


def _healed_beside(folder: str) -> str:
    """The default place of the new set: beside the old one, never inside it and never in another bucket."""
    if "://" not in folder:
        path = Path(folder).resolve()
        return str(path.with_name(f"{path.name}-healed"))
    place = folder.rstrip("/")
    if "/" not in place.partition("://")[2]:
        raise ConfigError(f"{folder} is a whole bucket; say with --output where the new set goes")
    return f"{place}-healed"


def _place(folder: str) -> Any:
    """A path, or the URL of an object store as it is: `Path` would make one slash out of two."""
    return folder if "://" in folder else Path(folder)


def _require_root(root: str) -> None:
    if "://" not in root and not Path(root).is_dir():
        what = "is a file; archives must be unpacked first" if Path(root).exists() else "does not exist"
        raise DataError(f"--root {root} {what}; expected the folder of raw videos that the shard set was made from")


def _writer(root: str, address: str | None, on_progress: Any) -> Any:
    """What writes the shards that need it: Ray tasks, on a cluster that is started only then."""

    def write(plans: Any, output: Any, settings: Any) -> Any:
        from infra import cluster
        from preprocessing.sources import FolderSource
        from preprocessing.tasks import write_shards

        with cluster.session(address):
            return write_shards(plans, FolderSource(_place(root)), output, settings, on_progress)

    return write


def _patterns(assignments: Sequence[str]) -> dict[str, list[str]] | None:
    patterns: dict[str, list[str]] = {}
    for assignment in assignments:
        split, equals, pattern = assignment.partition("=")
        if not equals or not pattern:
            raise ConfigError(f"--split got {assignment!r}; expected SPLIT=PATTERN, for example --split 'train=train-*.tar'")
        patterns.setdefault(split, []).append(pattern)
    return patterns or None


def _print_healed(report: Any) -> None:
    if not report.rewritten:
        print(f"{report.output}: no video was rejected and no shard is damaged; all {report.num_shards} shards were taken over")
        return
    print(
        f"{report.output}: {len(report.healed)} videos healed, {len(report.rejected)} still rejected; "
        f"{len(report.rewritten)} of {report.num_shards} shards written again"
    )
    print_table(("shard", "why it was written again"), list(report.rewritten.items()))
    for title, videos in (("healed", report.healed), ("still rejected", report.rejected)):
        if videos:
            print()
            rows = [(video.video_id, video.shard, video.reason, video.detail[:100]) for video in videos[:_SHOWN]]
            was = "reason before" if title == "healed" else "reason"
            print_table((title, "shard", was, "what was found"), rows)
            if len(videos) > _SHOWN:
                print(f"... and {len(videos) - _SHOWN} more; ledger.parquet has all")
    for note in report.notes:
        print(f"note: {note}")
    print(f"next: sagsm shards verify {report.output}")


def _print_stats(stats: dict[str, Any]) -> None:
    shards = stats["shards"]
    print(
        f"{stats['dataset']}: {stats['num_classes']} classes (passport {stats['label_passport']}), {shards['count']:,} shards "
        f"of {megabytes(shards['min_bytes'])} to {megabytes(shards['max_bytes'])}, {megabytes(shards['bytes'])} in all"
        + (f"; decoding took {stats['decoding_seconds']:,.0f} s, all workers together" if stats["decoding_seconds"] else "")
    )
    print_table(("", *stats["splits"]), _split_rows(stats["splits"]), numbers_from=1)
    for split, row in stats["splits"].items():
        if spread := row["videos_per_class"]:
            print(f"\nvideos a class, {split}: {spread['min']:,} to {spread['max']:,}, median {spread['median']:,.4g}")
            for word in ("smallest", "largest"):
                print(f"  {word}: {', '.join(f'{name} ({count:,})' for name, count in spread[word][:3])}")
    print()
    rates = {"unknown" if row["fps"] is None else f"{row['fps']:g}": row["videos"] for row in stats["fps"]}
    for title, counts in (("sizes, height x width", stats["sizes"]), ("frames/s", rates)):
        print(f"{title}: {', '.join(f'{name} ({count:,})' for name, count in counts.items()) or 'none'}")
    _print_reasons(stats["reasons"])


def _split_rows(splits: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a number and a column a split, which fits a narrow terminal."""
    rows = [(word, *(f"{split[word]:,}" for split in splits.values())) for word in ("kept", "rejected", "unlabelled", "frames")]
    for word in ("min", "median", "mean", "max"):
        spreads = [split["frames_per_video"] for split in splits.values()]
        rows.append((f"frames a video, {word}", *(f"{spread[word]:,.4g}" if spread else "-" for spread in spreads)))
    rows.append(("JPEG data", *(megabytes(split["jpeg_bytes"]) for split in splits.values())))
    each = [split["bytes_per_frame"] for split in splits.values()]
    rows.append(("JPEG data a frame", *(f"{number / 1e3:,.1f} kB" if number else "-" for number in each)))
    return rows


def _print_reasons(reasons: dict[str, int]) -> None:
    if reasons:
        print(f"rejected: {', '.join(f'{count:,} {reason}' for reason, count in reasons.items())}; see ledger.parquet")
