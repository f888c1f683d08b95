import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from preprocessing.transforms import Crop, centre_crop, scaled_side
from preprocessing.views import FrameSampling, spread_crops, spread_views, view_size

lengths = st.integers(1, 400)
counts = st.integers(1, 16)
sides = st.integers(1, 400)
clips = st.sampled_from([1, 2, 10])
crops = st.sampled_from([1, 3, 5, 10])


@given(num_frames=lengths, num_segments=counts)
def test_two_clips_are_those_of_the_published_test(num_frames, num_segments):
    """GSM's `_get_test_indices` with num_clips=2, frames counted from 0; which of the two comes first does not matter."""
    tick = num_frames / float(num_segments)
    first = [int(tick * x) for x in range(num_segments)]
    centre = [int(tick * x + tick / 2.0) for x in range(num_segments)]
    assert [part.tolist() for part in FrameSampling(num_segments).spread(num_frames, 2)] == [centre, first]


@given(free=st.integers(0, 300), num_segments=st.sampled_from([4, 8, 16]))
def test_ten_dense_clips_are_those_of_the_published_test(free, num_segments):
    """TSM's `_get_test_indices` with dense_sample, for videos of at least 64 frames."""
    num_frames, stride = 64 + free, 64 // num_segments
    starts = np.linspace(0, free, num=10, dtype=int)
    published = [[index * stride + start for index in range(num_segments)] for start in starts]
    assert [part.tolist() for part in FrameSampling(num_segments, "dense", stride).spread(num_frames, 10)] == published


@given(num_frames=lengths, num_segments=counts, kind=st.sampled_from(["segments", "dense"]), stride=counts, num_clips=clips)
def test_every_clip_is_in_order_and_inside_the_video(num_frames, num_segments, kind, stride, num_clips):
    sampling = FrameSampling(num_segments, kind, stride)
    taken = sampling.spread(num_frames, num_clips)
    assert len(taken) == num_clips
    for indices in [*taken, sampling.draw(num_frames, np.random.default_rng(0))]:
        assert indices.shape == (num_segments,)
        assert (np.diff(indices) >= 0).all()
        assert 0 <= indices[0] <= indices[-1] < num_frames


@given(height=sides, width=sides, pixels=st.integers(1, 300), num_crops=crops)
def test_crops_are_inside_the_frame_and_of_one_size(height, width, pixels, num_crops):
    windows = spread_crops(height, width, pixels, num_crops)
    assert len(windows) == num_crops
    assert len({(crop.height, crop.width) for crop, _ in windows}) == 1
    for crop, _ in windows:
        assert min(crop.top, crop.left) >= 0
        assert crop.top + crop.height <= height
        assert crop.left + crop.width <= width
    centre = (height - windows[0][0].height) // 2, (width - windows[0][0].width) // 2
    middles = [crop for crop, _ in windows if abs(crop.top - centre[0]) <= 1 and abs(crop.left - centre[1]) <= 1]
    assert middles, "one of them is the centre"


def test_crops_of_something_something():
    assert [(c.top, c.left, c.height) for c, _ in spread_crops(100, 176, 224, 3)] == [(0, 0, 100), (0, 38, 100), (0, 76, 100)]
    assert [(c.top, c.left, c.height) for c, _ in spread_crops(176, 100, 224, 3)] == [(0, 0, 100), (38, 0, 100), (76, 0, 100)]
    five = spread_crops(100, 176, 224, 5)
    assert [(c.top, c.left) for c, _ in five[:4]] == [(0, 0), (0, 88), (12, 0), (12, 88)]
    assert five[4] == (centre_crop(100, 176, 224), False)
    assert spread_crops(100, 176, 224, 1) == five[4:]
    assert spread_crops(100, 176, 224, 10) == five + [(crop, True) for crop, _ in five]


def test_views_go_clip_by_clip():
    sampling = FrameSampling(4)
    views = spread_views(40, 100, 132, sampling, 64, 2, 3)
    assert [view.frame_indices for view in views] == [[5, 15, 25, 35]] * 3 + [[0, 10, 20, 30]] * 3
    assert [view.crop for view in views[:3]] == [view.crop for view in views[3:]]


@given(height=sides, width=sides, pixels=st.integers(8, 300))
def test_a_whole_frame_keeps_its_shape_and_has_the_short_side_of_the_crop(height, width, pixels):
    size = view_size(height, width, pixels, whole_frames=True)
    assert min(size) == scaled_side(pixels)
    # torchvision's Resize to a short side, which GSM and TSM use
    assert max(size) == int(scaled_side(pixels) * max(height, width) / min(height, width))
    assert (size[0] >= size[1]) == (height >= width) or size[0] == size[1]
    assert view_size(height, width, pixels, whole_frames=False) == (pixels, pixels)


def test_a_whole_frame_is_one_view_a_clip():
    views = spread_views(40, 100, 132, FrameSampling(4), 64, 2, 1, whole_frames=True)
    assert [view.crop for view in views] == [Crop(0, 0, 100, 132)] * 2
    assert not any(view.mirrored for view in views)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_segments is 0; expected at least 1"),
        ((8, "dense", 0), "stride is 0; expected at least 1"),
        ((8, "sparse"), "sampling is 'sparse'; expected one of segments, dense"),
    ],
)
def test_wrong_values_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        FrameSampling(*arguments)
