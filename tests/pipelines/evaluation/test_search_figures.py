"""Pictures of a search: drawn for every shape of data, and the same bytes for the same numbers."""

import pytest
from PIL import Image

from models.placement import SLOTS, Placement
from pipelines.evaluation.search_figures import draw_coordinates, draw_history, draw_pareto, draw_strip, draw_supernet


def rows(num_trials, **changes):
    made = []
    for number in range(num_trials):
        overrides = {"train.learning_rate": 0.01 * (number + 1)}
        if number % 2:
            overrides["model.scope"] = "joint"
        row = {"trial": number, "placement": str(Placement(SLOTS[:number])), "overrides": overrides, "top1": 0.1 * number}
        made.append({**row, "state": "completed", "cost": 100.0 * number, "is_pareto": True, **changes})
    return made


def effects(effect):
    return [{"slot": slot, "effect": effect} for slot in SLOTS]


DRAWINGS = {
    "strip": lambda path: draw_strip(path, effects(0.02), "4e,5b"),
    "strip without effects": lambda path: draw_strip(path, effects(None), ""),
    "history": lambda path: draw_history(path, rows(5), "val/top1"),
    "history of failures": lambda path: draw_history(path, rows(3, state="failed", top1=None), "val/loss"),
    "coordinates": lambda path: draw_coordinates(path, rows(5), SLOTS, "val/top1"),
    "coordinates of one": lambda path: draw_coordinates(path, rows(1), (), "val/top1"),
    "pareto": lambda path: draw_pareto(path, rows(5), "val/top1", "MMACs a clip"),
    "pareto without costs": lambda path: draw_pareto(path, rows(2, cost=None, is_pareto=False), "val/top1", "MMACs a clip"),
    "supernet": lambda path: draw_supernet(path, {"none": 0.1, "all": 0.3, "5b": 0.2}, [("5b", 0.2, 0.4)], ["all", "5b"]),
    "supernet alone": lambda path: draw_supernet(path, {"none": 0.1}, [], []),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_as_wide_as_the_page_and_the_same_again(tmp_path, name):
    first, second = DRAWINGS[name](tmp_path / "a.png"), DRAWINGS[name](tmp_path / "b.png")
    with Image.open(first) as picture:
        assert picture.width == 900
    assert first.read_bytes() == second.read_bytes()
