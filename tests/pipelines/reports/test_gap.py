import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.reports.gap import gap_verdict, write_gap


def make_rows(name: str = "normalised", num_clips: int = 500) -> list[dict[str, Any]]:
    common = {"change": "mean and deviation", "top5": 0.6, "mean_class_accuracy": 0.2, "num_clips": num_clips}
    return [
        {**common, "name": "seed code's validation", "top1": 0.14, "gain": None},
        {**common, "name": name, "top1": 0.3, "gain": {"top1": 0.16, "interval": [0.12, 0.2], "separable": True}},
        {**common, "name": "2 clips", "top1": 0.29, "gain": {"top1": -0.01, "interval": [-0.03, 0.01], "separable": False}},
    ]


def test_the_verdict_names_the_ends_the_largest_step_and_what_is_more_than_noise() -> None:
    assert gap_verdict(make_rows()) == (
        "Top-1 of one network goes from 14.0 % to 29.0 % by the way of judging alone; the largest step is normalised (+16.0 "
        "points). Separable from the noise of clips: normalised."
    )


def test_where_no_step_changes_anything_none_is_called_the_largest() -> None:
    rows = [{"name": "a", "top1": 0.125, "gain": None}, {"name": "b", "top1": 0.125, "gain": {"top1": 0.0, "separable": False}}]
    assert gap_verdict(rows) == "Top-1 of one network is 12.5 % in every step: the way of judging changes nothing."


@pytest.mark.parametrize(("num_clips", "is_few"), [(500, True), (11522, False)])
def test_the_page_holds_the_steps_and_what_to_distrust(
    tmp_path: Path, read_page: Callable[[Path], Any], hostile_names: list[str], num_clips: int, is_few: bool
) -> None:
    rows = make_rows(hostile_names[0], num_clips)
    page = read_page(write_gap(tmp_path, "sagsm: gap", rows, {"network": hostile_names[2]}))
    text = " ".join(" ".join(page.text).split())
    for part in (gap_verdict(rows), "+16.0", "-1.0", "+12.0 to +20.0", "not separable", hostile_names[2], "One network"):
        assert part in text
    assert ("Only 500 clips" in text) == is_few
    assert page.tags.count("img") == 1
    assert json.loads((tmp_path / "gap.json").read_bytes())["steps"] == rows
    assert (tmp_path / "waterfall.png").is_file()
