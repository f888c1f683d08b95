"""The picture of how far the gates of a network open, by slot and segment."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.evaluation.figures import new_figure, plain_name, save_figure

_MAX_NUMBERS = 200
_INK = "#24292f"


def draw_gates(path: Path, activity: Mapping[str, Sequence[float]], num_clips: int) -> Path:
    """Draw a heat map: a row a slot, the first on top, a column a segment; the colours begin at 0, a gate that is closed.

    Args:
        path: of the PNG.
        activity: by slot the mean of |tanh gate| at each segment, in [0, 1). Shape: [T] each.
        num_clips: over how many clips it was taken.
    """
    cells = np.array(list(activity.values()), dtype=float)
    figure = new_figure(height=1.5 + 0.3 * len(cells))
    axes = figure.subplots()
    highest = float(cells.max()) or 1.0
    image = axes.imshow(cells, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
    figure.colorbar(image, ax=axes, label="mean of |tanh gate|")
    axes.set_xticks(range(cells.shape[1]), [str(segment + 1) for segment in range(cells.shape[1])])
    axes.set_yticks(range(len(cells)), [plain_name(slot) for slot in activity], parse_math=False)
    axes.set_xlabel("segment")
    axes.set_ylabel("slot")
    axes.set_title(f"how far gates open, mean over {num_clips} clips: 0 moves nothing between segments")
    if cells.size <= _MAX_NUMBERS:
        for (row, column), value in np.ndenumerate(cells):
            colour = _INK if value > 0.6 * highest else "white"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=8, color=colour)
    return save_figure(figure, path)
