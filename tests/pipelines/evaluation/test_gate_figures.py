from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.gate_figures import draw_gates


@pytest.mark.parametrize("num_slots, num_segments", [(1, 1), (10, 8), (33, 24)])
def test_any_number_of_slots_and_segments_fits(tmp_path, num_slots, num_segments):
    rng = np.random.default_rng(0)
    activity = {f"layer{slot}": rng.random(num_segments).tolist() for slot in range(num_slots)}
    path = draw_gates(tmp_path / "gates.png", activity, num_clips=64)
    with Image.open(path) as picture:
        assert picture.width == 900
        assert picture.height > 20 * num_slots
    first = path.read_bytes()
    assert draw_gates(Path(tmp_path / "gates.png"), activity, num_clips=64).read_bytes() == first


def test_closed_gates_have_one_colour_and_an_open_one_another(tmp_path):
    def colours(activity):
        path = draw_gates(tmp_path / "gates.png", activity, num_clips=1)
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        return [tuple(pixels[row, 200]) for row in (90, 120, 150)]

    closed = colours({"3a": [0.0, 0.0], "3b": [0.0, 0.0], "3c": [0.0, 0.0], "4a": [0.0, 0.0]})
    assert len(set(closed)) == 1
    assert len(set(colours({"3a": [0.0, 0.0], "3b": [0.5, 0.0], "3c": [0.1, 0.2], "4a": [0.0, 0.3]}))) > 1
