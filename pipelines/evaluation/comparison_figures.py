"""Pictures of a comparison: what each variant reached with each seed, and the raw curves of all trainings in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from infra.storage import atomic_path

_INCHES, _DPI = 9.0, 100
_GREY, _PALE = "#77808a", "#e3f0e3"
# Okabe and Ito's colours, which people of all kinds of sight can tell apart; more variants than these share a colour map.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")

Curves = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
"""By variant and seed, the epochs as `EpochMetrics.to_json` gives them."""


def draw_top1(path: Path, variants: Mapping[str, Mapping[str, Any]], chance: float) -> Path:
    """Draw a row a variant: a dot for each seed, the mean with its interval, and what was expected or published.

    Args:
        path: of the PNG.
        variants: as `compare_trained` gives them.
        chance: top-1 of guessing.
    """
    figure = _new_figure(1.1 + 0.45 * len(variants))
    axes = figure.subplots()
    for row, (colour, facts) in enumerate(zip(_colours(len(variants)), variants.values(), strict=True)):
        if facts["expected_top1"] is not None:
            low, high = facts["expected_top1"]
            axes.barh(row, 100 * (high - low), left=100 * low, height=0.8, color=_PALE, zorder=0)
        low, high = (100 * end for end in facts["top1_interval"])
        axes.plot([low, high], [row, row], color=colour, linewidth=2, alpha=0.6, solid_capstyle="butt")
        axes.plot(100 * facts["top1"], row, "|", color=colour, markersize=16, markeredgewidth=2)
        points = [100 * metrics["top1"] for metrics in facts["seeds"].values()]
        axes.plot(points, [row] * len(points), "o", color=colour, markersize=5)
        if facts["published_top1"] is not None:
            axes.plot(100 * facts["published_top1"], row, "D", color=_GREY, markerfacecolor="none", markersize=7)
    axes.axvline(100 * chance, color=_GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(variants)), list(variants))
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("top-1, %")
    return _save(figure, path)


def draw_variant_curves(path: Path, curves: Curves) -> Path:
    """Draw training loss, validation loss and validation top-1 of every training by epoch: raw, not smoothed.

    Args:
        path: of the PNG.
        curves: colours are variants; the seeds of a variant share one.
    """
    figure = _new_figure(6.4)
    panels = figure.subplot_mosaic([["train_loss", "val_loss"], ["val_top1", "val_top1"]])
    titles = {"train_loss": "training loss", "val_loss": "validation loss", "val_top1": "validation top-1, %"}
    for name, title in titles.items():
        axes, scale = panels[name], 100 if name == "val_top1" else 1
        for colour, (variant, histories) in zip(_colours(len(curves)), curves.items(), strict=True):
            for number, history in enumerate(histories):
                points = [(row["epoch"] + 1, scale * row[name]) for row in history if row[name] is not None]
                _draw_curve(axes, points, colour, "" if number else variant)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    panels["val_top1"].set_ylim(0, 100)
    panels["val_top1"].legend(frameon=False, fontsize=9, loc="upper left")
    return _save(figure, path)


def _draw_curve(axes: Axes, points: Sequence[tuple[float, float]], colour: Any, label: str) -> None:
    if points:
        axes.plot(
            *zip(*points, strict=True), color=colour, label=label or "_unlisted", marker="o", markersize=2.5, linewidth=1.2
        )


def _colours(num_variants: int) -> list[Any]:
    if num_variants <= len(_COLOURS):
        return list(_COLOURS[:num_variants])
    return [colormaps["turbo"](0.05 + 0.9 * number / (num_variants - 1)) for number in range(num_variants)]


def _new_figure(height: float) -> Figure:
    return Figure(figsize=(_INCHES, height), dpi=_DPI, layout="constrained", facecolor="white")


def _save(figure: Figure, path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path
