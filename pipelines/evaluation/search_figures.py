"""Pictures of a search: the network with the effect of attention in each slot, its history, and what accuracy costs.

PNG in the style of `figures`; colours are blue for good and orange for bad, which people of all kinds of sight can tell apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from models.placement import parse_placement
from pipelines.evaluation.figures import new_figure, save_figure

_INK, _GREY, _PALE, _BLUE, _ORANGE, _RED = "#24292f", "#8c959f", "#eef0f2", "#2a6fbb", "#d9822b", "#c0392b"
_STATE_COLOURS = {"completed": _BLUE, "stopped": _GREY, "failed": _RED}
_DIVERGING = "PuOr"
_MAX_LINES = 300
_NUM_NAMED = 5
_MAX_NAMED_PARETO = 12


def draw_strip(path: Path, effects: Sequence[Mapping[str, Any]], winner: str) -> Path:
    """Draw the backbone as a row of its slots: colour is what attention there adds, a frame marks the winner's slots.

    Args:
        path: of the PNG.
        effects: as `tuning.importance.SlotEffect`, in the order of the network.
        winner: its placement.
    """
    slots = [row["slot"] for row in effects]
    chosen = parse_placement(winner or "none", slots)
    known = [abs(row["effect"]) for row in effects if row["effect"] is not None]
    largest = max(known, default=0.0) or 0.01
    scale = Normalize(-largest, largest)
    figure = new_figure(height=2.1)
    axes = figure.subplots()
    axes.plot([-1.1, len(slots) + 0.1], [0, 0], color=_GREY, linewidth=3, zorder=0)
    for at, row in enumerate(effects):
        effect = row["effect"]
        face = _PALE if effect is None else colormaps[_DIVERGING](scale(effect))
        edge, width = (_INK, 3.0) if row["slot"] in chosen else (_GREY, 0.8)
        box = FancyBboxPatch(
            (at - 0.36, -0.5), 0.72, 1.0, boxstyle="round,pad=0.04", facecolor=face, edgecolor=edge, linewidth=width
        )
        axes.add_patch(box)
        dark = effect is not None and abs(effect) > 0.62 * largest
        axes.text(at, 0.14, row["slot"].removeprefix("layer"), ha="center", fontsize=12, color="white" if dark else _INK)
        number = "-" if effect is None else f"{100 * effect:+.1f}"
        axes.text(at, -0.3, number, ha="center", fontsize=9, color="white" if dark else _INK)
    axes.text(-1.15, 0, "frames", ha="right", va="center", fontsize=9, color=_GREY)
    axes.text(len(slots) + 0.15, 0, "classes", ha="left", va="center", fontsize=9, color=_GREY)
    axes.set_xlim(-2.0, len(slots) + 1.0)
    axes.set_ylim(-0.75, 0.75)
    axes.set_axis_off()
    return save_figure(figure, path)


def draw_history(path: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> Path:
    """Draw what each trial reached, in the order in which they were tried, and the best so far.

    Args:
        path: of the PNG.
        rows: of the leaderboard, in any order.
        metric: its name; top-1 is shown in percent.
    """
    scale, label = _scale(metric)
    figure = new_figure(height=3.6)
    axes = figure.subplots()
    tried = sorted((row for row in rows if row["top1"] is not None), key=lambda row: row["trial"])
    for state, colour in _STATE_COLOURS.items():
        points = [(row["trial"], scale * row["top1"]) for row in tried if row["state"] == state]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=5 if len(rows) < 200 else 2.5, label=state)
    lasting = [row for row in tried if row["state"] != "failed"]
    if lasting:
        best = np.maximum.accumulate([scale * row["top1"] for row in lasting])
        axes.step([row["trial"] for row in lasting], best, where="post", color=_ORANGE, linewidth=1.5, label="best so far")
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.16))
    axes.set_title(label)
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return save_figure(figure, path)


def draw_coordinates(path: Path, rows: Sequence[Mapping[str, Any]], slots: Sequence[str], metric: str) -> Path:
    """Draw parallel coordinates: a line a trial through its slots (off, on), its other settings and what it reached.

    Args:
        path: of the PNG.
        rows: of the leaderboard, best first; the best 300 are drawn, those above all others.
        slots: of the backbone, in the order of the network.
        metric: its name.
    """
    scale, label = _scale(metric)
    drawn = [row for row in rows if row["top1"] is not None][:_MAX_LINES]
    columns = [(slot, [float(slot in parse_placement(row["placement"] or "none", slots)) for row in drawn]) for slot in slots]
    ticks: dict[str, list[str]] = {slot: ["off", "on"] for slot in slots}
    names = dict.fromkeys(name for row in drawn for name in row["overrides"] if name != "model.placement")
    for name in names:
        values = [row["overrides"].get(name) for row in drawn]
        places, ticks[name] = _places(values)
        columns.append((name, places))
    top1 = [scale * row["top1"] for row in drawn]
    places, ticks[label] = _places(top1)
    columns.append((label, places))
    figure = new_figure(height=4.2)
    axes = figure.subplots()
    colour = Normalize(min(top1, default=0.0), max(top1, default=1.0) + 1e-9)
    for rank, value in reversed(list(enumerate(top1))):
        jitter = 0.03 * (rank % 7 - 3) / 3  # switches would lie on one another
        line = [numbers[rank] + jitter for _, numbers in columns]
        axes.plot(line, color=colormaps["viridis"](colour(value)), linewidth=1.8 if rank < _NUM_NAMED else 0.8, alpha=0.8)
    for at, (name, _) in enumerate(columns):
        axes.axvline(at, color=_GREY, linewidth=0.6, zorder=0)
        for place, text in zip(np.linspace(0, 1, len(ticks[name])), ticks[name], strict=True):
            axes.text(at, 1.07 if place == 1 else -0.11 if place == 0 else place, text, ha="center", fontsize=7.5, color=_INK)
    axes.set_xticks(range(len(columns)), [name.rpartition(".")[2] if name not in slots else name for name, _ in columns])
    axes.tick_params(length=0, labelsize=7.5, pad=10)
    axes.set_yticks([])
    axes.set_ylim(-0.14, 1.14)
    axes.spines[:].set_visible(False)
    return save_figure(figure, path)


def draw_pareto(path: Path, rows: Sequence[Mapping[str, Any]], metric: str, cost: str) -> Path:
    """Draw what each trial reached against what its network costs; a line joins those that no other beats in both.

    Args:
        path: of the PNG.
        rows: of the page, with `cost` and `is_pareto`.
        metric: its name.
        cost: name and unit of the cost.
    """
    scale, label = _scale(metric)
    figure = new_figure(height=3.8)
    axes = figure.subplots()
    shown = [row for row in rows if row["top1"] is not None and row["state"] != "failed" and row["cost"] is not None]
    for state in ("stopped", "completed"):
        points = [(row["cost"], scale * row["top1"]) for row in shown if row["state"] == state]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=_STATE_COLOURS[state], markersize=5, label=state)
    front = sorted((row for row in shown if row["is_pareto"]), key=lambda row: row["cost"])
    if front:
        points = [(row["cost"], scale * row["top1"]) for row in front]
        axes.plot(*zip(*points, strict=True), color=_ORANGE, linewidth=1.5, drawstyle="steps-post", label="best at its cost")
        for row in front[:_MAX_NAMED_PARETO]:
            _annotate(axes, row["placement"], row["cost"], scale * row["top1"])
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_title(label)
    axes.set_xlabel(cost)
    axes.margins(x=0.12, y=0.15)
    return save_figure(figure, path)


def draw_supernet(
    path: Path, scores: Mapping[str, float], trained: Sequence[tuple[str, float, float]], top: Sequence[str]
) -> Path:
    """Draw what the supernet says of all placements, and how far that agrees with those that were trained.

    Args:
        path: of the PNG.
        scores: top-1 with the supernet's weights by placement.
        trained: placement, that score, and top-1 after training, of each that was trained.
        top: the best placements by score, the best first.
    """
    figure = new_figure(height=3.8)
    scatter, histogram = figure.subplots(1, 2)
    if trained:
        scatter.plot([100 * score for _, score, _ in trained], [100 * top1 for *_, top1 in trained], "o", color=_BLUE)
        for placement, score, top1 in trained:
            if placement in ("none", "all", *top[:1]):  # names of all would lie on one another; the table has them
                _annotate(scatter, placement, 100 * score, 100 * top1)
    scatter.set_title("top-1 when trained by itself, %")
    scatter.set_xlabel("top-1 with the supernet's weights, %")
    scatter.margins(x=0.18, y=0.15)
    counts, *_ = histogram.hist([100 * score for score in scores.values()], bins=40, color=_BLUE)
    histogram.set_ylim(0, 1.6 * max(counts))  # room for the names
    for placement in ("none", "all"):
        if placement in scores:
            histogram.axvline(100 * scores[placement], ymax=0.66, color=_ORANGE, linewidth=1.2)
            place = (100 * scores[placement], 0.67)
            histogram.annotate(placement, place, xycoords=("data", "axes fraction"), fontsize=8, color=_INK)
    text = "\n".join(f"{placement}  {100 * scores[placement]:.1f}" for placement in top[:_NUM_NAMED] if placement in scores)
    histogram.text(0.02, 0.96, f"best\n{text}", transform=histogram.transAxes, va="top", fontsize=8, color=_INK)
    histogram.set_title(f"placements, of {len(scores):,}")
    histogram.set_xlabel("top-1 with the supernet's weights, %")
    return save_figure(figure, path)


def _scale(metric: str) -> tuple[float, str]:
    return (100.0, f"{metric}, %") if metric.endswith(("top1", "accuracy")) else (1.0, metric)


def _places(values: Sequence[Any]) -> tuple[list[float], list[str]]:
    """Where values lie on an axis from 0 to 1, and the texts of its ticks, from below; None lies at the bottom."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        is_log = min(known) > 0 and max(known) / min(known) > 5
        numbers = np.log(known) if is_log else np.asarray(known, dtype=float)
        low, high = float(numbers.min()), float(numbers.max())
        places = [
            0.0 if value is None else (float(np.log(value) if is_log else value) - low) / (high - low or 1) for value in values
        ]
        return places, [f"{min(known):.3g}", f"{max(known):.3g}"]
    names = sorted({"-" if value is None else str(value) for value in values})
    return [names.index("-" if value is None else str(value)) / max(len(names) - 1, 1) for value in values], names


def _annotate(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text or "-", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7.5, color=_INK)
