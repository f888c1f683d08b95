import base64
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.reports.audit_figures import draw_label_counts, draw_spread, picture_uri


@pytest.mark.parametrize("counts", [[], [0, 0], [3], [2, 9, 4], list(range(174)), [10**6] * 2000])
def test_any_number_of_labels_gives_a_sharp_picture(tmp_path: Path, counts: list[int]) -> None:
    with Image.open(draw_label_counts(tmp_path / "l.png", np.array(counts, np.int64))) as picture:
        assert picture.width == 1800
        assert picture.mode == "RGBA"
        assert picture.getpixel((0, 0))[3] == 0  # no background, so that it suits light and dark pages


@settings(max_examples=6, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.lists(st.integers(1, 10**6), max_size=5), max_size=4), st.booleans())
def test_any_values_can_be_drawn(tmp_path_factory: pytest.TempPathFactory, values: dict[str, list[int]], whole: bool) -> None:
    path = tmp_path_factory.mktemp("figures") / "s.png"
    draw_spread(path, {name: np.array(numbers, float) for name, numbers in values.items()}, "frames", whole=whole)
    with Image.open(path) as picture:
        assert picture.width == 1800


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    values = {"train": np.array([3.0, 4.0, 4.0])}
    first, second = (draw_spread(tmp_path / name, values, "frames", whole=True).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


@pytest.mark.parametrize(("height", "width"), [(100, 176), (176, 100), (1080, 1920), (1920, 1080), (16, 16), (2, 2000)])
def test_pictures_keep_their_aspect(height: int, width: int) -> None:
    kind, data = picture_uri(np.zeros((height, width, 3), np.uint8)).split(",")
    assert kind == "data:image/jpeg;base64"
    found = Image.open(io.BytesIO(base64.b64decode(data)))
    assert found.width <= 220
    assert found.height <= 330
    assert found.width / found.height == pytest.approx(width / height, rel=0.02) or min(found.size) == 1
