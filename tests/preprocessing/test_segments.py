import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.segments import dense_indices, segment_indices

lengths = st.integers(1, 2000)
segment_counts = st.integers(1, 64)


@given(num_frames=lengths, num_segments=segment_counts, seed=st.none() | st.integers(0, 2**32))
def test_indices_are_in_order_and_inside_the_video(num_frames, num_segments, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    indices = segment_indices(num_frames, num_segments, rng)
    assert indices.shape == (num_segments,)
    assert indices.dtype == np.int64
    assert (np.diff(indices) >= 0).all()
    assert indices[0] >= 0
    assert indices[-1] < num_frames
    if num_frames >= num_segments:
        assert len(set(indices.tolist())) == num_segments, "a frame is repeated although there are enough"


@given(num_frames=lengths, num_segments=segment_counts)
def test_test_indices_are_those_of_the_published_code(num_frames, num_segments):
    tick = num_frames / float(num_segments)
    published = [int(tick / 2.0 + tick * x) for x in range(num_segments)]
    assert segment_indices(num_frames, num_segments).tolist() == published


@given(num_segments=segment_counts, num_frames_each=st.integers(1, 30), rest=st.integers(0, 63), seed=st.integers(0, 2**32))
def test_training_indices_are_one_frame_of_each_segment(num_segments, num_frames_each, rest, seed):
    num_frames = num_segments * num_frames_each + rest % num_segments
    indices = segment_indices(num_frames, num_segments, np.random.default_rng(seed))
    assert (indices // num_frames_each).tolist() == list(range(num_segments))


def test_training_takes_every_frame_of_a_segment_equally_often():
    rng = np.random.default_rng(0)
    drawn = np.stack([segment_indices(13, 3, rng) for _ in range(4000)])
    counts = np.bincount(drawn.ravel(), minlength=13)
    assert counts[12] == 0, "12 frames are in segments, the 13th is the rest"
    assert abs(counts[:12] - 1000).max() < 120


def test_short_videos_repeat_frames():
    assert segment_indices(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    rng = np.random.default_rng(0)
    drawn = np.stack([segment_indices(3, 8, rng) for _ in range(200)])
    assert set(drawn.ravel().tolist()) == {0, 1, 2}
    assert any(len(set(row)) > 1 for row in drawn.tolist()), "a still picture, as in the published code"


@pytest.mark.parametrize(("num_frames", "num_segments"), [(0, 8), (8, 0)])
def test_nothing_to_pick_is_an_error(num_frames, num_segments):
    with pytest.raises(ValueError, match=f"got {num_frames} frames and {num_segments} segments; both must be at least 1"):
        segment_indices(num_frames, num_segments)


strides = st.integers(1, 20)


@given(num_frames=lengths, num_segments=segment_counts, stride=strides, seed=st.none() | st.integers(0, 2**32))
def test_dense_indices_are_in_order_and_inside_the_video(num_frames, num_segments, stride, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    indices = dense_indices(num_frames, num_segments, stride, rng)
    assert indices.shape == (num_segments,)
    assert indices.dtype == np.int64
    assert indices[0] >= 0
    assert indices[-1] < num_frames
    if num_frames >= num_segments * stride:
        assert (np.diff(indices) == stride).all()
    else:
        assert (np.diff(indices) >= 0).all()
        assert np.diff(indices).max(initial=0) <= stride


def test_dense_windows_are_drawn_equally_often_and_tested_in_the_centre():
    rng = np.random.default_rng(0)
    starts = [int(dense_indices(20, 4, 4, rng)[0]) for _ in range(5000)]
    assert np.abs(np.bincount(starts, minlength=5) - 1000).max() < 120
    assert dense_indices(20, 4, 4).tolist() == [2, 6, 10, 14]
    with pytest.raises(ValueError, match="got a stride of 0 frames; it must be at least 1"):
        dense_indices(20, 4, 0)
