"""The page of a search: the verdict, what to distrust in it, and all trials, slots and costs that it rests on."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.storage import write_json
from models import model_options, parse_placement, slot_macs
from pipelines.evaluation.figures import draw_search
from pipelines.evaluation.metrics import wilson_interval
from pipelines.evaluation.search_figures import draw_coordinates, draw_history, draw_pareto, draw_strip, draw_supernet
from pipelines.reports.page import data_uri, percent, write_page
from tuning.importance import weigh
from tuning.plots import interactive_plots, plotly_script
from tuning.trials import TrialRecord, pareto_front

if TYPE_CHECKING:
    from pipelines.searching import Searched, SearchTask

FILE_NAME = "index.html"
INTERACTIVE = "interactive.html"
_MAX_ROWS = 100
_MAX_NAMED = 10
_FEW_SEEDS = 5
_COSTS = {"mmacs": "MMACs a clip", "memory": "peak bytes", "latency": "seconds a clip"}


def write_search(output_dir: Path, title: str, searched: "Searched", study_dir: Path) -> dict[str, Any]:
    """Write `index.html`, which has no scripts and loads nothing, `interactive.html` (Optuna's plots, scripts inlined),
    `search.json` (all numbers) and the pictures in `figures/`.

    Args:
        output_dir: an existing folder.
        title: of the page.
        searched: what came of the search.
        study_dir: with Optuna's `study.db`.

    Returns:
        what `search.json` holds; see `summarise_search`.
    """
    results = summarise_search(searched)
    write_json(output_dir / "search.json", results)
    figures = _draw(output_dir / "figures", searched, results)
    plots = interactive_plots(study_dir, searched.task.search.metric)
    shown = {"title": f"{title}, interactive", "plots": plots, "script": plotly_script()}
    write_page(output_dir / INTERACTIVE, "interactive.html", shown)
    values = {
        "title": title,
        "results": results,
        "doubts": doubts(results),
        "rows": results["rows"][:_MAX_ROWS],
        "figures": {name: data_uri(path) for name, path in figures.items()},
        "interactive": INTERACTIVE,
        "max_named": _MAX_NAMED,
    }
    write_page(output_dir / FILE_NAME, "search.html", values)
    return results


def summarise_search(searched: "Searched") -> dict[str, Any]:
    """Everything that the page says, as plain data for JSON.

    Returns:
        `verdict` (see `pipelines.verdict`); `metric`, `cost`, `num_clips`, `winner`; `rows`: the leaderboard with `overrides`,
        `error`, `interval` (Wilson, by the number of clips; None where the metric is no share of clips), `mmacs`, `cost`,
        `is_pareto`; `states`: number of trials by state; `importance`: as `tuning.importance.Importance`; `supernet`: None, or
        `scores`, `top`, `trained` (placement, score, top-1), `agreement` (Spearman's rho and its interval) and seconds.
    """
    task, records = searched.task, {record.number: record for record in searched.result.trials}
    search = task.search
    counts_clips = search.metric.endswith("top1")
    rows = []
    for row in searched.rows:
        record = records[row["trial"]]
        mmacs = _mmacs(task, record)
        interval = None
        if counts_clips and record.top1 is not None:
            interval = list(wilson_interval(round(record.top1 * task.num_val_clips), task.num_val_clips))
        cost = mmacs if search.cost is None else record.cost
        facts = {"overrides": record.overrides, "error": record.error, "seconds": record.seconds}
        rows.append({**row, **facts, "interval": interval, "mmacs": mmacs, "cost": cost})
    front = pareto_front([replace(records[row["trial"]], cost=row["cost"]) for row in rows])
    unbeaten = {(record.top1, record.cost) for record in front}
    for row in rows:
        row["is_pareto"] = row["state"] != "failed" and (row["top1"], row["cost"]) in unbeaten
    states = [record.state for record in records.values()]
    importance = weigh(searched.result.trials, search.space, task.slots, grace_epochs=search.grace_epochs)
    return {
        "verdict": searched.verdict,
        "metric": search.metric,
        "cost": _COSTS[search.cost or "mmacs"],
        "num_clips": task.num_val_clips,
        "winner": rows[0],
        "rows": rows,
        "states": {state: states.count(state) for state in ("completed", "stopped", "failed")},
        "importance": asdict(importance),
        "supernet": _summarise_supernet(searched),
        "settings": search.model_dump(mode="json"),
    }


def doubts(results: Mapping[str, Any]) -> list[str]:
    """Sentences on what the numbers do not show, the gravest first."""
    return list(_doubts(results))


def search_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of the search for MLflow, beside the winner's value and the verdict."""
    metrics = {f"trials/{state}": float(count) for state, count in results["states"].items()}
    if results["supernet"]:
        found = results["supernet"]["agreement"]
        names = {"rho": "supernet/spearman", "low": "supernet/spearman_low", "high": "supernet/spearman_high"}
        metrics |= {ours: found[theirs] for theirs, ours in names.items() if found}
        metrics |= {f"supernet/{name}": results["supernet"][name] for name in ("seconds_training", "seconds_scoring")}
    return metrics


def describe_search(results: Mapping[str, Any], run_id: str) -> str:
    """The description of the MLflow run: the verdict first, since only three lines show."""
    parts = [results["verdict"]["sentence"]]
    if command := results["verdict"].get("command"):
        parts.append(f"Test it: `{command}`")
    parts += [
        f"![{name}](get-artifact?path=figures/{name}.png&run_uuid={run_id})"
        for name in ("strip", "history", "pareto", *(["supernet"] if results["supernet"] else []))
    ]
    lines = ["| trial | placement | value | state |", "|---|---|---|---|"]
    for row in results["rows"][:_MAX_NAMED]:
        value = "-" if row["top1"] is None else f"{row['top1']:.4g}"
        lines.append(f"| {row['trial']} | {row['placement'] or '-'} | {value} | {row['state']} |")
    parts.append("\n".join(lines))
    parts.append(
        "The page: Artifacts, report/index.html; Optuna's plots: report/interactive.html; all trials: tables/search.json."
    )
    return "\n\n".join(parts)


def _draw(folder: Path, searched: "Searched", results: Mapping[str, Any]) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    rows, metric, slots = results["rows"], results["metric"], searched.task.slots
    figures = {}
    if slots:
        figures["strip"] = draw_strip(folder / "strip.png", results["importance"]["slots"], results["winner"]["placement"])
    if results["supernet"]:
        found = results["supernet"]
        figures["supernet"] = draw_supernet(folder / "supernet.png", found["scores"], found["trained"], found["top"])
    figures["pareto"] = draw_pareto(folder / "pareto.png", rows, metric, results["cost"])
    figures["history"] = draw_history(folder / "history.png", rows, metric)
    figures["coordinates"] = draw_coordinates(folder / "coordinates.png", rows, slots, metric)
    draw_search(folder / "search.png", rows)  # for the report of the whole experiment
    return figures


def _mmacs(task: "SearchTask", record: TrialRecord) -> float | None:
    """Millions of multiply-accumulates of a clip at the size that the trial trains on: reckoned, not measured."""
    job = task.job.with_overrides(record.overrides)
    options = {name: getattr(job.model, name) for name in model_options(job.model.name)}
    placement = options.pop("placement", None)
    if placement is None:
        return None
    base, added = _slot_macs(
        job.model.name, task.num_classes, job.train.num_segments, job.train.pixels, tuple(sorted(options.items()))
    )
    return round((base + sum(added[slot] for slot in parse_placement(placement, tuple(added)))) / 1e6, 1)


@cache
def _slot_macs(
    name: str, num_classes: int, num_segments: int, pixels: int, options: tuple[tuple[str, Any], ...]
) -> tuple[int, dict[str, int]]:
    return slot_macs(name, num_classes, num_segments, pixels=pixels, **dict(options))


def _summarise_supernet(searched: "Searched") -> dict[str, Any] | None:
    if searched.supernet is None:
        return None
    from tuning.agreement import spearman

    found = searched.supernet
    trained = [
        (record.placement, found.scores[record.placement], record.top1)
        for record in searched.result.trials
        if record.state == "completed" and record.top1 is not None and record.placement in found.scores
    ]
    agreement = None
    if len(trained) > 2:
        found_agreement = spearman([score for _, score, _ in trained], [top1 for *_, top1 in trained])
        agreement = None if math.isnan(found_agreement.rho) else asdict(found_agreement)
    return {
        "scores": dict(sorted(found.scores.items(), key=lambda item: -item[1])),
        "top": list(found.top),
        "trained": trained,
        "agreement": agreement,
        "seconds_training": found.seconds_training,
        "seconds_scoring": found.seconds_scoring,
    }


def _doubts(results: Mapping[str, Any]) -> Iterator[str]:
    verdict, states, num_trials = results["verdict"], results["states"], len(results["rows"])
    if not verdict["tested"]:
        yield (
            f"The winner is the best of {num_trials} trials on the clips that chose it: its number is too high, and by how "
            "much was not tested."
        )
    else:
        num_seeds = len(verdict["seeds"])
        yield (
            "The verdict trained with fresh seeds, but on the clips that chose the winner and the best epoch: a test split may "
            "say less."
        )
        if num_seeds < _FEW_SEEDS:
            yield f"{num_seeds} seeds each: the spread between seeds is itself hardly known, which is why the interval is wide."
        yield f"Trained for {results['settings']['max_epochs']} epochs, as the trials were: a long training may end otherwise."
    if verdict["num_failed"]:
        yield f"{verdict['num_failed']} trainings of the verdict failed and are left out."
    if states["stopped"]:
        yield f"{states['stopped']} of {num_trials} trials were stopped early; what they would have reached is not known."
    if states["failed"]:
        yield f"{states['failed']} of {num_trials} trials failed; the table says why."
    low, high = results["winner"]["interval"] or (0.0, 0.0)
    better = [row for row in results["rows"][1:] if row["top1"] is not None and row["top1"] >= low and row["state"] != "failed"]
    if high and better:
        yield (
            f"{len(better)} other trials lie inside the winner's interval ({percent(low)} to {percent(high)} on "
            f"{results['num_clips']} clips)."
        )
    supernet = results["supernet"]
    if supernet and (not supernet["agreement"] or supernet["agreement"]["low"] <= 0):
        yield "The supernet's ranking is not shown to agree with trained networks: its interval includes no agreement at all."
    yield from results["importance"]["notes"]
