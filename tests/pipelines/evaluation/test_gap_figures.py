from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.evaluation.gap_figures import draw_waterfall


def steps(*top1: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"name": "first $x^$", "top1": top1[0], "gain": None}]
    for before, after in pairwise(top1):
        gain = {"top1": after - before, "interval": [after - before - 0.02, after - before + 0.02]}
        rows.append({"name": f"to {after}", "top1": after, "gain": gain})
    return rows


def test_the_same_numbers_give_the_same_bytes_and_others_another_picture(tmp_path: Path) -> None:
    pictures = [
        draw_waterfall(tmp_path / f"{number}.png", steps(*top1)).read_bytes()
        for number, top1 in enumerate([(0.14, 0.3, 0.28), (0.14, 0.3, 0.28), (0.14, 0.3, 0.32), (0.0, 0.0, 1.0)])
    ]
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 3
    with Image.open(tmp_path / "0.png") as picture:
        assert picture.width == 900
