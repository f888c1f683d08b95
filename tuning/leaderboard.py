"""What the trials say: a table, best first, in which every row can be run again."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tuning.space import PLACEMENT
from tuning.trials import SearchResult, rank_records


def leaderboard(result: SearchResult, command_prefix: str) -> list[dict[str, Any]]:
    """One row a trial, best first, failed ones last.

    Args:
        result: of a search.
        command_prefix: what starts the experiment, with the options that all trials share: `sagsm run placement`.

    Returns:
        rows with rank (from 1), trial, placement, slots, learning_rate, settings (all dotted ones but the placement; None for
        one that this trial was not asked for), top1 (a fraction, None without a report), cost (None without `search.cost`),
        epochs, state, and command, which trains with the trial's settings and searches no more.
    """
    names = sorted({name for record in result.trials for name in record.overrides} - {PLACEMENT})
    return [
        {
            "rank": rank,
            "trial": record.number,
            "placement": record.placement,
            "slots": record.num_slots,
            "learning_rate": record.learning_rate,
            "settings": {name: record.overrides.get(name) for name in names},
            "top1": record.top1,
            "cost": record.cost,
            "epochs": record.epochs,
            "state": record.state,
            "command": rerun_command(command_prefix, record.overrides),
        }
        for rank, record in enumerate(rank_records(result.trials), start=1)
    ]


def rerun_command(command_prefix: str, overrides: Mapping[str, Any]) -> str:
    """The shell command that runs the experiment with these settings and no search.

    Example:
        >>> rerun_command("sagsm run demo", {"model.placement": "3a,4e", "train.learning_rate": 0.0312})
        'sagsm run demo --set search.num_trials=0 --set model.placement=3a,4e --set train.learning_rate=0.0312'
    """
    settings = {"search.num_trials": 0, **overrides}
    return " ".join([command_prefix, *(f"--set {shlex.quote(f'{name}={_yaml(value)}')}" for name, value in settings.items())])


def leaderboard_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The leaderboard as texts for a terminal, header and rows: a column for each setting that was searched; top-1 in percent.

    It leaves out the commands, which are too long for a column, and the costs where there are none.
    """
    settings = list(rows[0]["settings"]) if rows else []
    costs = ["cost"] if any(row["cost"] is not None for row in rows) else []
    names = ["rank", "trial", "placement", "slots", *settings, "top-1 %", *costs, "epochs", "state"]
    cells = []
    for row in rows:
        top1 = "-" if row["top1"] is None else f"{100 * row['top1']:.1f}"
        place = [row[name] for name in ("rank", "trial", "placement", "slots")]
        rest = [*(row[name] for name in costs), row["epochs"], row["state"]]
        values = [*place, *row["settings"].values(), top1, *rest]
        cells.append([_cell(value) for value in values])
    return [name.rpartition(".")[2].replace("_", " ") for name in names], cells


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _yaml(value: Any) -> str:
    """As `--set` reads it: plain where YAML gives the value back, quoted where it would not."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
