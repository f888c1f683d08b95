"""The picture of the accuracy gap: a waterfall, in which each step begins where the one before ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluation.figures import new_figure, save_figure

# Okabe and Ito's blue and vermilion, which people of all kinds of sight can tell apart; the sign stands beside the bar as well.
_TOTAL, _UP, _DOWN, _INK = "#77808a", "#0072b2", "#d55e00", "#24292f"


def draw_waterfall(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Draw top-1 by step: the first and the last as whole bars, between them what each step adds or takes, with its interval.

    Args:
        path: of the PNG.
        rows: as `measure_gap` gives them.
    """
    figure = new_figure(height=1.4 + 0.5 * (len(rows) + 1))
    axes = figure.subplots()
    axes.barh(0, 100 * rows[0]["top1"], height=0.6, color=_TOTAL)
    for place, row in enumerate(rows[1:], start=1):
        gain, low, high = (100 * value for value in (row["gain"]["top1"], *row["gain"]["interval"]))
        start = 100 * row["top1"] - gain
        axes.barh(place, gain, left=start, height=0.6, color=_UP if gain >= 0 else _DOWN)
        axes.plot([start + low, start + high], [place, place], color=_INK, linewidth=1.2)
        axes.plot([start, start], [place - 1, place], color=_TOTAL, linewidth=0.8)
        axes.text(101, place, f"{gain:+.1f}", va="center", fontsize=9)
    axes.barh(len(rows), 100 * rows[-1]["top1"], height=0.6, color=_TOTAL)
    for place, top1 in ((0, rows[0]["top1"]), (len(rows), rows[-1]["top1"])):
        axes.text(101, place, f"{100 * top1:.1f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows) + 1), [*(row["name"] for row in rows), "all steps"], parse_math=False)
    axes.set_ylim(len(rows) + 0.6, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("top-1, %")
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)
