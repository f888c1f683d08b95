"""`sagsm ensemble`: averages scores of clips and judges the mean, from the files of evaluations alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import ConfigError
from pipelines.printing import print_json, print_table

ScoresArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SCORES...",
        help="Files scores.parquet, folders that hold one, or evaluations: fingerprint, or name or id of an MLflow run.",
    ),
]


def ensemble(
    scores: ScoresArgument,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W,...", help="A number above 0 for each; equal if left out.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Keep the mean scores, as parquet; they may be averaged again."),
    ] = None,
    workdir: Annotated[
        Path, typer.Option("--workdir", metavar="DIR", help="Its store is where evaluations are looked up.")
    ] = Path("work"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Average the scores of any evaluations of the same clips, and judge each and the mean; needs no network and no cluster.

    Example: sagsm ensemble work/store/evaluate/0123456789abcdef fedcba9876543210 --weights 2,1
    """
    from pipelines.evaluation.ensemble import HEADLINES, average_scores, describe_ensemble, read_members

    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it first")
    members = read_members(scores, _numbers(weights), workdir)
    together = average_scores(members)
    found = describe_ensemble(members, together)
    if output is not None:
        together.save(output)
    if as_json:
        print_json(found)
        return
    whole = found["ensemble"]
    print(
        f"{whole['num_clips']:,} {whole['split']} clips of {whole['num_classes']} classes (label passport "
        f"{whole['label_passport']}); with 95 % intervals over clips\n"
    )
    rows = [*found["members"], {**whole, "name": "ensemble", "weight": None}]
    print_table(
        ("scores", "protocol", "weight", "top-1", "top-5", "mean class accuracy"), [_row(row, HEADLINES) for row in rows]
    )
    if output is not None:
        print(f"\nscores:    {output}")


def _row(row: dict[str, Any], headlines: Sequence[str]) -> tuple[str, ...]:
    weight = "" if row["weight"] is None else f"{row['weight']:g}"
    return row["name"], row["protocol"], weight, *(_accuracy(row, name) for name in headlines)


def _accuracy(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _numbers(weights: str | None) -> list[float] | None:
    if weights is None:
        return None
    try:
        return [float(weight) for weight in weights.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights got {weights!r}; expected numbers with commas between them, such as 2,1,1") from error
