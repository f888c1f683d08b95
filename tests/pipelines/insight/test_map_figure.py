import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.evaluation.figures import WIDTH_PIXELS
from pipelines.insight.map_figure import _NUMBER_ROOM, _number_places, _style, draw_map


def clips(num_clips: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_clips, 2)).astype(np.float32), np.arange(num_clips) % num_classes


@pytest.mark.parametrize("num_classes", [1, 8, 174])
def test_a_picture_is_as_wide_as_the_page_and_the_same_each_time(tmp_path: Path, num_classes: int) -> None:
    names = ["$\\frac{1$ \u6f22 <b>", "_hidden", *(f"class {number}" for number in range(172))]
    first, second = (draw_map(tmp_path / name, *clips(348, num_classes), names).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == WIDTH_PIXELS


def test_clips_at_one_place_are_drawn(tmp_path: Path) -> None:
    assert draw_map(tmp_path / "a.png", np.zeros((6, 2)), np.arange(6) % 2, ["a", "b"]).is_file()


def test_56_classes_differ_in_colour_or_form_and_neighbours_in_both() -> None:
    styles = [_style(number) for number in range(56)]
    assert len({(style["color"], style["marker"]) for style in styles}) == 56
    for one, other in itertools.pairwise(styles):
        assert one["color"] != other["color"]
        assert one["marker"] != other["marker"]


@given(st.integers(0, 10**6), st.integers(1, 40))
def test_numbers_stand_on_clips_of_their_class_and_cover_no_other_number(seed: int, num_classes: int) -> None:
    places, labels = clips(80, num_classes, seed)
    found = _number_places(places, labels)
    assert found
    for label, place in found.items():
        assert (places[labels == label] == place).all(axis=1).any()
    room = _NUMBER_ROOM * np.ptp(places, axis=0).max()
    spots = list(found.values())
    assert all(np.linalg.norm(a - b) > room for number, a in enumerate(spots) for b in spots[:number])
