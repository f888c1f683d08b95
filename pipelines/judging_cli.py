"""`sagsm compare | gap`: judging what is in the store. They start no cluster and change nothing in the store or in MLflow."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.printing import print_json, print_table

judging_app = typer.Typer(rich_markup_mode=None)

_HEADER = (
    *("variant", "top-1", "95 % interval", "by seed", "published", "points", "from noise"),
    *("parameters", "GMACs", "training clips", "hash", "videos/s"),
)

_HANDLES = (
    "the fingerprint of a stage evaluate, the name or id of its MLflow run or of the pipeline's ('p01 demo'), or the beginning "
    "of any of these; or its folder in a store"
)

OutputOption = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Write the page there; else into the work directory.")
]
WorkdirOption = Annotated[Path, typer.Option("--workdir", metavar="DIR", help="Holds the store.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


@judging_app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help=f"Evaluations: {_HANDLES}. The first is the baseline.",
        ),
    ],
    workdir: WorkdirOption = Path("work"),
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare finished evaluations, of whichever experiments: published number beside ours, costs, settings, and is it noise?

    Seeds of one configuration are taken together. Evaluations on other clips, labels, splits or dataset versions are refused.

    Example: sagsm compare 'p01 demo' 'p02 demo'
    """
    from pipelines.stored_comparison import compare_runs

    results, page = compare_runs(workdir, runs, output)
    if as_json:
        print_json({**results, "page": str(page)})
        return
    print_comparison(results)
    print(f"report:    {page}")


@judging_app.command()
def gap(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help=f"An evaluation: {_HANDLES}.",
        ),
    ],
    workdir: WorkdirOption = Path("work"),
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge one trained network step by step, from the published code's validation to two clips with three crops.

    It scores the split of that evaluation six times, in this process; the page has a waterfall. The paper's 14 % and 32 % top-1
    are two of these ways of judging.

    Example: sagsm gap 3f2a
    """
    from infra.progress import StageProgress
    from pipelines.artifacts import shards_place
    from pipelines.evaluation.gap import measure_gap
    from pipelines.evaluations import find_evaluation, make_page_folder
    from pipelines.leases import in_use
    from pipelines.reports.gap import gap_verdict, write_gap

    found = find_evaluation(workdir, run)
    folder = make_page_folder(output or workdir.absolute() / "gaps" / found.evaluate.fingerprint)
    with in_use([found.evaluate.path], "sagsm gap"), StageProgress() as progress:
        place, settings = shards_place(found.shards), found.config.evaluate
        rows = measure_gap(found.train.path / "model", place, settings, progress.for_stage("gap"))
    about = {"network": found.config.model.name, "train": found.train.fingerprint, "evaluate": found.evaluate.fingerprint}
    about |= {"dataset": found.shards.summary["dataset"], "split": settings.split}
    page = write_gap(folder, f"sagsm: accuracy gap of {found.evaluate.manifest['experiment']}", rows, about)
    if as_json:
        print_json({"verdict": gap_verdict(rows), "steps": rows, "page": str(page)})
        return
    print(f"\n{gap_verdict(rows)}\n")
    print_table(("step", "top-1", "points", "top-5", "mean class", "what it changes"), [_gap_row(row) for row in rows])
    print(f"\nreport:    {page}")


def print_comparison(results: dict[str, Any]) -> None:
    """Print what `compare_trained` gives: the verdict, a table of the variants, the data, and the settings that differ."""
    print(f"\n{results['verdict']}\n")
    print_table(_HEADER, [_row(name, facts, results["differences"].get(name)) for name, facts in results["variants"].items()])
    data = results["data"]
    print(
        f"\ndata: {data['dataset']}, {data['split']}, {data['num_clips']:,} clips (hash {data['clips_hash']}), label passport "
        f"{data['label_passport']}"
    )
    for name, facts in results["variants"].items():
        if facts["settings"]:
            print(f"{name}: {', '.join(f'{setting}={value}' for setting, value in facts['settings'].items())}")
    print()


def _row(name: str, facts: dict[str, Any], difference: dict[str, Any] | None) -> tuple[str, ...]:
    low, high = facts["top1_interval"]
    training, speed, published = facts["training"], facts["videos_per_second"], facts["published_top1"]
    apart = "" if difference is None else "separable" if difference["separable"] else "not separable"
    return (
        name,
        f"{facts['top1']:.1%}",
        f"{low:.1%} to {high:.1%}",
        " ".join(f"{100 * metrics['top1']:.1f}" for metrics in facts["seeds"].values()),
        "-" if published is None else f"{published:.2%}",
        "baseline" if difference is None else f"{100 * difference['top1']:+.1f}",
        apart,
        f"{facts['parameters']:,}",
        f"{facts['macs_per_clip'] / 1e9:.2f}",
        f"{training['num_clips']:,} ({training['fraction']:.1%})",
        training["clips_hash"] or "-",
        "-" if speed is None else f"{speed:.1f}",
    )


def _gap_row(row: dict[str, Any]) -> tuple[str, ...]:
    gain = "-" if row["gain"] is None else f"{100 * row['gain']['top1']:+.1f}"
    return row["name"], f"{row['top1']:.1%}", gain, f"{row['top5']:.1%}", f"{row['mean_class_accuracy']:.1%}", row["change"]
