from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.figures import (
    WIDTH_PIXELS,
    draw_confusion,
    draw_contact_sheet,
    draw_curves,
    draw_histogram,
    draw_search,
)

# Formula text, a line break, letters that the font lacks, half a character, markup.
NAMES = ["$\\frac{1$", "a\nb", "\u6f22\u5b57 \U0001f3ac", "\ud800", "<b>", "x" * 200, "", "plain"]


def row(trial: int, placement: str, top1: float | None, state: str) -> dict[str, object]:
    return {"trial": trial, "placement": placement, "top1": top1, "state": state, "learning_rate": 0.01 if trial else None}


def epoch(number: int, validated: bool, gammas: dict[str, float]) -> dict[str, object]:
    val = 0.5 if validated else None
    return {
        "epoch": number,
        "train_loss": 1.0,
        "train_top1": 0.5,
        "val_loss": val,
        "val_top1": val,
        "learning_rate": 0.1,
        "gammas": gammas,
    }


FRAME = np.zeros((40, 60, 3), np.uint8)
DRAWINGS: dict[str, Callable[[Path], Path]] = {
    "confusion": lambda path: draw_confusion(path, np.eye(8, dtype=int).tolist(), NAMES),
    "confusion of many classes": lambda path: draw_confusion(path, np.eye(174, dtype=int).tolist(), ["x"] * 174),
    "confusion without clips": lambda path: draw_confusion(path, [[0, 0], [0, 0]], ["a", "b"]),
    "curves": lambda path: draw_curves(path, [epoch(0, True, {"3a": 0.1}), epoch(1, False, {"3a": 0.2})], 0.1),
    "curves of one epoch": lambda path: draw_curves(path, [epoch(0, False, {})]),
    "curves of nothing": lambda path: draw_curves(path, []),
    "search": lambda path: draw_search(path, [row(1, "3a,4e", 0.5, "completed"), row(0, "", None, "failed")]),
    "search of many": lambda path: draw_search(path, [row(index, "all", 0.5, "stopped") for index in range(60)]),
    "search of nothing": lambda path: draw_search(path, []),
    "histogram": lambda path: draw_histogram(path, [1, 2, 2], "frames"),
    "contact sheet": lambda path: draw_contact_sheet(path, [(name, [FRAME] * 8) for name in NAMES]),
    "contact sheet of nothing": lambda path: draw_contact_sheet(path, []),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_as_wide_as_the_page(tmp_path: Path, name: str) -> None:
    with Image.open(DRAWINGS[name](tmp_path / "figure.png")) as image:
        assert image.width == WIDTH_PIXELS
        assert image.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("name", ["confusion", "curves", "search", "contact sheet"])
def test_the_same_numbers_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    first, second = (DRAWINGS[name](tmp_path / f"{number}.png").read_bytes() for number in (1, 2))
    assert first == second


def test_frames_are_drawn_as_they_are(tmp_path: Path) -> None:
    frames = [np.full((30, 40, 3), (200, 10, 10), np.uint8), np.full((40, 30, 3), (10, 10, 200), np.uint8)]
    with Image.open(draw_contact_sheet(tmp_path / "sheet.png", [("two", frames)])) as image:
        pixels = np.asarray(image.convert("RGB"))
    for colour in ((200, 10, 10), (10, 10, 200)):
        assert (pixels == colour).all(axis=2).sum() > 1000
