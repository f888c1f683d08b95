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


def test_labels_without_a_video_leave_no_gap(tmp_path: Path) -> None:
    """Of a part of a dataset most labels have none; bars fill the picture all the same."""
    pixels = np.asarray(Image.open(draw_label_counts(tmp_path / "l.png", np.array([7] * 8 + [0] * 166))))
    middle = pixels[pixels.shape[0] // 2]
    is_blue = (middle[:, 2] > middle[:, 0].astype(int) + 60) & (middle[:, 3] > 0)
    assert is_blue[200:-100].mean() > 0.7


@settings(max_examples=6)
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
