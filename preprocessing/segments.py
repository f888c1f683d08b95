"""Which T frames of a video make a clip: one from each of T equal segments, or T at a fixed stride.

Source: Temporal Segment Networks (Wang et al., 2016, section 3.1) in the form of GSM's `dataset.py`, `_sample_indices` and
`_get_test_indices`, whose frames count from 1; ours count from 0. Dense sampling as in TSM's `ops/dataset.py`, there with
windows of 64 frames.

Differs from that code for short videos. In training by segments all segments of a video of fewer than T frames got the first
frame, a still picture; here they get random frames in order, some of them more than once. A dense window that is longer than
the video began again at the first frame; here the window shrinks to the video, so that time never runs backwards.
"""

from fractions import Fraction

import numpy as np
import numpy.typing as npt

_CENTRE = Fraction(1, 2)


def segment_indices(
    num_frames: int, num_segments: int, rng: np.random.Generator | None = None, place: Fraction = _CENTRE
) -> npt.NDArray[np.int64]:
    """Pick one frame of each of T equal segments.

    With `rng` (training) the frame is random: segments are `num_frames // num_segments` frames long and each gives one of its
    frames with equal chance, so the up to T - 1 frames after the last segment are never taken. A video of fewer than T frames
    gives T random frames in order. Without `rng` (testing) the frame is at `place` in the segment, whose length is then the
    fraction `num_frames / num_segments`; a video of fewer than T frames repeats frames.

    Args:
        num_frames: the number of frames of the video, at least 1.
        num_segments: T, at least 1.
        rng: the source of the draws, or None for `place`.
        place: in testing, from 0 (the segment's first frame) to below 1.

    Returns:
        T frame indices in [0, num_frames), never decreasing. Shape: [T].

    Raises:
        ValueError: if `num_frames` or `num_segments` is below 1.

    Example:
        >>> segment_indices(32, 4).tolist(), segment_indices(2, 4).tolist()
        ([4, 12, 20, 28], [0, 0, 1, 1])
    """
    _check_counts(num_frames, num_segments)
    segments = np.arange(num_segments)
    if rng is None:
        segment_length = num_frames / num_segments
        return (segment_length * float(place) + segment_length * segments).astype(np.int64)
    num_frames_each = num_frames // num_segments
    if num_frames_each == 0:
        return np.sort(rng.integers(num_frames, size=num_segments))
    return segments * num_frames_each + rng.integers(num_frames_each, size=num_segments)


def dense_indices(
    num_frames: int, num_segments: int, stride: int, rng: np.random.Generator | None = None, place: Fraction = _CENTRE
) -> npt.NDArray[np.int64]:
    """Pick T frames `stride` apart from a window of T * stride frames.

    With `rng` (training) each window inside the video has equal chance. Without (testing) the window is at `place`. In a video
    that is shorter than the window, the window is the video and its frames stand nearer, perhaps more than once.

    Args:
        num_frames: the number of frames of the video, at least 1.
        num_segments: T, at least 1.
        stride: frames from one to the next, at least 1.
        rng: the source of the draw, or None for `place`.
        place: in testing, of the window: from 0 (the video's beginning) over 1/2 (its centre) to 1 (its end).

    Returns:
        T frame indices in [0, num_frames), never decreasing. Shape: [T].

    Raises:
        ValueError: if a number is below 1.

    Example:
        >>> dense_indices(40, 4, 8).tolist(), dense_indices(40, 4, 8, place=Fraction(1)).tolist()
        ([4, 12, 20, 28], [8, 16, 24, 32])
    """
    _check_counts(num_frames, num_segments)
    if stride < 1:
        raise ValueError(f"got a stride of {stride} frames; it must be at least 1")
    window = min(num_frames, num_segments * stride)
    num_free = num_frames - window
    start = int(num_free * place) if rng is None else int(rng.integers(num_free + 1))
    return start + np.arange(num_segments) * window // num_segments


def _check_counts(num_frames: int, num_segments: int) -> None:
    if num_frames < 1 or num_segments < 1:
        raise ValueError(f"got {num_frames} frames and {num_segments} segments; both must be at least 1")
