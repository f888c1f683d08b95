"""Pictures of a training, a search and a data set: PNG, 900 pixels wide, the same bytes for the same numbers.

Matplotlib is used through its objects, not through pyplot, whose list of open figures is shared by all threads. Names come from
data: they are drawn as plain text, never as formulas.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from infra.storage import atomic_path
from models.placement import SLOTS, parse_placement

WIDTH_PIXELS = 900
_DPI = 100
_INK, _GREY, _BLUE, _ORANGE, _RED = "#24292f", "#8c959f", "#2a6fbb", "#d9822b", "#c0392b"
_STATE_COLOURS = {"completed": _BLUE, "stopped": _GREY, "failed": _RED}
_NAME_CHARACTERS = 30
_MAX_NAMED_CLASSES = 50
_MAX_COUNTED_CLASSES = 16
_MAX_BARS = 40
_MIN_TRIAL_ROWS, _MAX_TRIAL_ROWS = 8, 24


def draw_confusion(path: Path, confusion: Sequence[Sequence[int]], label_names: Sequence[str]) -> Path:
    """Draw a confusion matrix: colour is the share of a true class; counts and names where there is room for them.

    Args:
        path: of the PNG.
        confusion: counts; rows are true classes, columns answers. Shape: [K, K].
        label_names: K names.
    """
    counts = np.asarray(confusion)
    num_classes = len(label_names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = new_figure(height=8.4)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the true class")
    axes.set_xlabel("answer")
    axes.set_ylabel("true class")
    if num_classes <= _MAX_NAMED_CLASSES:
        size = 9 if num_classes <= 20 else 6
        names = [plain_name(name) for name in label_names]
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(num_classes), names, fontsize=size, parse_math=False)
    if num_classes <= _MAX_COUNTED_CLASSES:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else _INK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=9, color=colour)
    return save_figure(figure, path)


def draw_curves(path: Path, history: Sequence[Mapping[str, Any]], chance: float | None = None) -> Path:
    """Draw loss, top-1, learning rate and the attention's gammas by epoch.

    Args:
        path: of the PNG.
        history: epochs as `EpochMetrics.to_json` gives them.
        chance: top-1 of guessing, drawn as a line.
    """
    figure = new_figure(height=6.4)
    (loss, top1), (learning_rate, gamma) = figure.subplots(2, 2)
    for axes, title, name in ((loss, "loss", "loss"), (top1, "top-1, %", "top1")):
        scale = 100 if name == "top1" else 1
        for split, colour, label in (("train", _GREY, "training"), ("val", _BLUE, "validation")):
            points = [
                (row["epoch"] + 1, scale * row[f"{split}_{name}"]) for row in history if row[f"{split}_{name}"] is not None
            ]
            _draw_line(axes, points, colour, label)
        axes.set_title(title)
    if chance is not None:
        top1.axhline(100 * chance, color=_ORANGE, linewidth=1, linestyle="--", label="chance")
    top1.set_ylim(0, 100)
    _draw_line(learning_rate, [(row["epoch"] + 1, row["learning_rate"]) for row in history], _BLUE, "")
    learning_rate.set_title("learning rate at the epoch's end")
    _draw_gammas(gamma, history)
    for axes in (loss, top1, learning_rate, gamma):
        axes.set_xlabel("epoch")
        _tick_whole_numbers(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, ncols=2 if axes is gamma else 1)
    return save_figure(figure, path)


def draw_search(path: Path, trials: Sequence[Mapping[str, Any]]) -> Path:
    """Draw what a search tried: top-1 by trial, and the slots of the best trials.

    Args:
        path: of the PNG.
        trials: rows of `tuning.leaderboard`, best first.
    """
    figure = new_figure(height=max(3.8, 1.4 + 0.26 * min(len(trials), _MAX_TRIAL_ROWS)))
    scatter, grid = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for state, colour in _STATE_COLOURS.items():
        points = [(row["trial"], 100 * row["top1"]) for row in trials if row["state"] == state and row["top1"] is not None]
        if points:
            scatter.plot(*zip(*points, strict=True), "o", color=colour, label=state)
    if scatter.get_legend_handles_labels()[0]:
        scatter.legend(frameon=False, fontsize=8, loc="lower right")
    scatter.set_title("top-1 of each trial, %")
    scatter.set_xlabel("trial")
    _tick_whole_numbers(scatter)
    scatter.set_xlim(-0.5, max((row["trial"] for row in trials), default=0) + 0.5)
    scatter.set_ylim(0, 100)
    shown = trials[:_MAX_TRIAL_ROWS]
    cells = np.array([_slot_mask(row["placement"]) for row in shown], dtype=float).reshape(-1, len(SLOTS))
    colours = [_STATE_COLOURS.get(row["state"], _GREY) for row in shown]
    for rank, mask in enumerate(cells):
        for slot, chosen in enumerate(mask):
            face = colours[rank] if chosen else "#eef0f2"
            grid.add_patch(_square(slot, rank, face))
    grid.set_xlim(-0.5, len(SLOTS) - 0.5)
    grid.set_ylim(max(len(shown), _MIN_TRIAL_ROWS) - 0.5, -0.5)
    grid.set_xticks(range(len(SLOTS)), SLOTS)
    grid.set_yticks(range(len(shown)), [_trial_label(row) for row in shown], fontsize=8)
    grid.tick_params(length=0)
    grid.set_title("slots with attention, best trial on top")
    grid.spines[:].set_visible(False)
    return save_figure(figure, path)


def draw_histogram(path: Path, values: Sequence[int], title: str) -> Path:
    """Draw how often which whole number occurs; bars are a number wide, or wider where there are many."""
    figure = new_figure(height=2.8)
    axes = figure.subplots()
    low, high = min(values, default=0), max(values, default=0)
    width = -(-(high - low + 1) // _MAX_BARS)
    axes.hist(values, bins=[edge - 0.5 for edge in range(low, high + width + 1, width)], color=_BLUE, edgecolor="white")
    _tick_whole_numbers(axes)
    axes.set_title(title)
    axes.set_ylabel("videos")
    return save_figure(figure, path)


def draw_contact_sheet(path: Path, rows: Sequence[tuple[str, Sequence[npt.NDArray[np.uint8]]]]) -> Path:
    """Draw frames of some videos, a row a video under its title.

    Args:
        path: of the PNG.
        rows: title and RGB frames [H, W, 3] of each video; sizes may differ.
    """
    title_height, gap = 20, 3
    columns = max((len(frames) for _, frames in rows), default=1)
    width = (WIDTH_PIXELS - gap * (columns - 1)) // columns
    height = round(width * 0.75)
    sheet = Image.new("RGB", (WIDTH_PIXELS, max(1, len(rows)) * (title_height + height + 2 * gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for number, (title, frames) in enumerate(rows):
        top = number * (title_height + height + 2 * gap)
        draw.text((2, top + 2), plain_name(title, 110), fill=_INK, font=font)
        for column, frame in enumerate(frames):
            picture = ImageOps.contain(Image.fromarray(frame), (width, height))
            left = column * (width + gap) + (width - picture.width) // 2
            sheet.paste(picture, (left, top + title_height + (height - picture.height) // 2))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def new_figure(height: float) -> Figure:
    """A white figure as wide as all pictures of a page; height in inches of 100 pixels."""
    return Figure(figsize=(WIDTH_PIXELS / _DPI, height), dpi=_DPI, layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically; charts with a title get no frame."""
    for axes in figure.axes:
        if axes.get_title():
            axes.spines[["top", "right"]].set_visible(False)
            axes.title.set_fontsize(10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path


def plain_name(name: str, limit: int = _NAME_CHARACTERS) -> str:
    """A name on one line, in letters that the fonts have; a long one keeps both ends, since "left to right" stands last."""
    text = "".join(letter if letter.isprintable() and ord(letter) < 0x250 else "?" for letter in name)
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half].rstrip()}...{text[-half:].lstrip()}"


def _tick_whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_line(axes: Axes, points: Sequence[tuple[float, float]], colour: str, label: str) -> None:
    """A line; a single epoch would leave none, so that few points are marked."""
    if points:
        marker = "o" if len(points) <= 40 else ""
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=3, linewidth=1.5)


def _draw_gammas(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    slots = sorted({slot for row in history for slot in row["gammas"]})
    for slot, colour in zip(slots, colormaps["viridis"](np.linspace(0, 0.92, len(slots))), strict=True):
        points = [(row["epoch"] + 1, row["gammas"][slot]) for row in history if slot in row["gammas"]]
        _draw_line(axes, points, colour, plain_name(slot))
    axes.set_title("gamma: strength of attention by slot" if slots else "no attention in this network")
    if not slots:
        axes.set_axis_off()


def _square(slot: int, rank: int, colour: str) -> Any:
    return Rectangle((slot - 0.44, rank - 0.42), 0.88, 0.84, facecolor=colour, edgecolor="none")


def _slot_mask(placement: str) -> list[bool]:
    chosen = parse_placement(placement or "none")
    return [slot in chosen for slot in SLOTS]


def _trial_label(row: Mapping[str, Any]) -> str:
    top1 = "failed" if row["top1"] is None else f"{100 * row['top1']:.1f} %"
    rate = "" if row["learning_rate"] is None else f"  lr {row['learning_rate']:.2g}"
    return f"trial {row['trial']}{rate}  {top1}"
