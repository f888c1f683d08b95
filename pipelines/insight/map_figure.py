"""The map of features as a picture: a dot a clip, in the colour and form of its class, and the class's number in its midst."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from pipelines.evaluation.figures import new_figure, plain_name, save_figure

# Okabe and Ito's colours, which people of all kinds of sight can tell apart. Seven colours and eight forms have no common
# divisor: 56 classes differ in the pair, and classes that follow each other in both. Beyond that the number tells.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")
_FORMS = ("o", "s", "^", "D", "v", "P", "X", "*")
_INK, _LINE = "#24292f", "#d0d5da"
_MAP_SHAPE = (9.0, 7.4)
_MANY_CLASSES = 24
_STAR_SIZE = 1.5  # a star of the same size looks smaller
_NUMBER_ROOM = 0.035  # of the map's width, that a number takes


Places = npt.NDArray[np.floating[Any]]


def draw_map(path: Path, places: Places, labels: npt.NDArray[np.int64], names: Sequence[str]) -> Path:
    """Draw clips at their places.

    Args:
        path: of the PNG.
        places: of the clips. Shape: [N, 2].
        labels: class ids. Shape: [N].
        names: of all classes; the legend has those that occur, with their numbers. Numbers in the picture stand on the classes
            that lie together, as far as there is room.
    """
    present = np.unique(labels)
    is_crowded = len(present) > _MANY_CLASSES
    columns, size, characters, row_inches = (3, 7, 46, 0.125) if is_crowded else (2, 9, 54, 0.185)
    figure = new_figure(height=_MAP_SHAPE[1] + 0.25 + row_inches * -(-len(present) // columns))
    axes = figure.subplots()
    dot = float(np.clip(220 / np.sqrt(len(labels)), 3.5, 9))
    for number, label in enumerate(present):
        style = _style(number)
        style["markersize"] = dot * (_STAR_SIZE if style["marker"] == "*" else 1)
        axes.plot(*places[labels == label].T, **style, markeredgecolor="white", markeredgewidth=0.5)
    _frame(axes, places)
    for label, (x, y) in _number_places(places, labels).items():
        text = axes.text(x, y, str(label), ha="center", va="center", fontsize=8 if is_crowded else 11, color=_INK)
        text.set(fontweight="bold", path_effects=[withStroke(linewidth=2.5, foreground="white")], in_layout=False)
    _draw_legend(figure, present, names, columns, size, characters)
    return save_figure(figure, path)


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _FORMS[number % len(_FORMS)], "linestyle": ""}


def _frame(axes: Axes, places: Places) -> None:
    """All clips with a margin, as wide for its height as the map; its axes have no units, so that no scale is shown."""
    low, high = places.min(axis=0), places.max(axis=0)
    half = 0.53 * max(((high - low) / _MAP_SHAPE).max(), 1e-6)
    (x, y), (width, height) = (low + high) / 2, _MAP_SHAPE
    axes.set_xlim(x - half * width, x + half * width)
    axes.set_ylim(y - half * height, y + half * height)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(_LINE)


def _number_places(places: Places, labels: npt.NDArray[np.int64]) -> dict[int, Places]:
    """Where numbers of classes stand: on that clip of a class which is nearest to their median, which may lie among others.

    The classes that lie together most go first; a class whose number would cover another one gets none.
    """
    room = _NUMBER_ROOM * float(np.ptp(places, axis=0).max())
    found = []
    for label in np.unique(labels):
        own = places[labels == label]
        distances = np.linalg.norm(own - np.median(own, axis=0), axis=1)
        found.append((float(np.median(distances)), int(label), own[distances.argmin()]))
    taken: dict[int, Places] = {}
    for _, label, place in sorted(found, key=lambda item: item[:2]):
        if all(np.linalg.norm(place - other) > room for other in taken.values()):
            taken[label] = place
    return taken


def _draw_legend(
    figure: Figure, present: npt.NDArray[np.int64], names: Sequence[str], columns: int, size: int, characters: int
) -> None:
    legend = figure.legend(
        [Line2D([], [], **_style(number)) for number in range(len(present))],
        [f"{label}  {plain_name(names[label], characters)}" for label in present],
        loc="outside lower left",
        ncols=columns,
        fontsize=size,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.2,
        labelspacing=0.25,
        markerscale=0.7 if size < 9 else 0.9,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
