"""Pictures of a data set for its audit page: sharp on dense screens, and legible on light and dark paper alike.

Charts have no background and grey letters. Names from data are never drawn: the page writes them as text.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from infra.storage import atomic_path

_WIDTH_INCHES = 9.0
_DPI = 200
_GREY, _PALE, _BLUE, _LIGHT_BLUE = "#77808a", "#a9b2bb", "#2f7dc8", "#7db4e6"
_SPLIT_COLOURS = (_BLUE, "#d9822b", "#4f9d69", "#8a6fc0")
_MAX_BINS = 48
_MAX_BARS = 400
_TOP, _NEXT = 10, 30
_MIN_TOP_LABELS = 12  # with fewer, the ten commonest are nearly all
# Eight of them side by side fill the page's column on a screen of double density.
_PICTURE_SIZE = (220, 330)
_JPEG_QUALITY = 85


def draw_label_counts(path: Path, counts: npt.NDArray[np.int64]) -> Path:
    """Draw the videos of each label as bars, the commonest first, with the ten and thirty commonest marked.

    Labels without any video are counted and not drawn: of a part of a dataset they would leave a nearly empty picture.

    Args:
        path: of the PNG.
        counts: videos of each label. Shape: [number of labels].
    """
    ordered = np.sort(counts[counts > 0])[::-1]
    num_empty = len(counts) - len(ordered)
    figure = _new_figure(2.9)
    axes = figure.subplots()
    total = max(1, int(ordered.sum()))
    if len(ordered) >= _MIN_TOP_LABELS:
        parts = [(0, _TOP, _BLUE), (_TOP, _NEXT, _LIGHT_BLUE), (_NEXT, len(ordered), _PALE)]
    else:
        parts = [(0, len(ordered), _BLUE)]
    for begin, end, colour in parts:
        bars = ordered[begin:end]
        share = ordered[:end].sum() / total
        label = f"{min(end, len(ordered))} commonest: {share:.1%}" if 0 < end < len(ordered) else None
        if len(ordered) <= _MAX_BARS:
            axes.bar(np.arange(begin, begin + len(bars)) + 1, bars, width=0.84, color=colour, linewidth=0, label=label)
        else:  # too thin for gaps, and a second for each thousand
            axes.stairs(bars, np.arange(begin, begin + len(bars) + 1) + 0.5, fill=True, color=colour, label=label)
    axes.set_xlim(0.3, max(1, len(ordered)) + 0.7)
    axes.set_xlabel("labels, the commonest first" + (f" ({num_empty:,} more have no video)" if num_empty else ""))
    axes.set_ylabel("videos")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(parts) > 1:
        axes.legend(frameon=False, labelcolor=_GREY, loc="upper right", title=None)
    return _save(figure, path)


def draw_spread(path: Path, values: Mapping[str, npt.NDArray[np.float64]], unit: str, *, whole: bool) -> Path:
    """Draw how values spread in each split: a histogram a split, one below the other, on a common axis.

    Args:
        path: of the PNG.
        values: finite numbers by split; a split without any is left out.
        unit: below the axis, such as "frames a video".
        whole: the values are whole numbers, so that bars must not split them.
    """
    shown = {split: numbers for split, numbers in values.items() if len(numbers)}
    figure = _new_figure(0.9 + 1.05 * max(1, len(shown)))
    rows = figure.subplots(max(1, len(shown)), 1, sharex=True, squeeze=False)[:, 0]
    edges = _edges(list(shown.values()), whole=whole)
    for number, (axes, (split, numbers)) in enumerate(zip(rows, shown.items(), strict=False)):
        heights, _ = np.histogram(numbers, edges)
        colour = _SPLIT_COLOURS[number % len(_SPLIT_COLOURS)]
        axes.bar(edges[:-1], heights, np.diff(edges) * 0.92, align="edge", color=colour, linewidth=0)
        median = float(np.median(numbers))
        axes.axvline(median, color=_GREY, linewidth=1, linestyle=(0, (3, 3)))
        name = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in split)
        axes.set_title(
            f"{name}: median {median:,.1f}".removesuffix(".0"),
            loc="left",
            fontsize=10,
            color=_GREY,
            parse_math=False,
        )
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    if whole:
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    rows[-1].set_xlabel(unit)
    rows[0].set_ylabel("videos")
    return _save(figure, path)


def picture_uri(frame: npt.NDArray[np.uint8]) -> str:
    """A frame as a part of the page: a JPEG of at most 220 x 330 pixels, its aspect kept.

    Args:
        frame: RGB pixels. Shape: [H, W, 3].
    """
    picture = Image.fromarray(frame)
    picture.thumbnail(_PICTURE_SIZE, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _edges(values: Sequence[npt.NDArray[np.float64]], *, whole: bool) -> npt.NDArray[np.float64]:
    low = min((float(numbers.min()) for numbers in values), default=0.0)
    high = max((float(numbers.max()) for numbers in values), default=0.0)
    if whole:
        width = -(-(int(high) - int(low) + 1) // _MAX_BINS)
        return np.arange(low, high + width + 1, width) - 0.5
    return np.linspace(low, high if high > low else low + 1, _MAX_BINS + 1)


def _new_figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH_INCHES, height), dpi=_DPI, layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_PALE)
        axes.tick_params(colors=_GREY, labelsize=9, length=0)
        axes.grid(axis="y", color=_PALE, alpha=0.35, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.label.set_color(_GREY)
        axes.yaxis.label.set_color(_GREY)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", transparent=True, metadata={"Software": None})
    return path
