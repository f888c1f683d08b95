"""Which T frames of a video make a clip: one from each of T equal segments.

Source: Temporal Segment Networks (Wang et al., 2016, section 3.1) in the form of GSM's `dataset.py`, `_sample_indices` and
`_get_test_indices`, whose frames count from 1; ours count from 0.

Differs from that code for videos shorter than T frames in training: there all segments got the first frame, a still picture;
here they get random frames in order, some of them more than once.
"""

import numpy as np
import numpy.typing as npt


def segment_indices(num_frames: int, num_segments: int, rng: np.random.Generator | None = None) -> npt.NDArray[np.int64]:
    """Pick one frame of each of T equal segments.

    With `rng` (training) the frame is random: segments are `num_frames // num_segments` frames long and each gives one of its
    frames with equal chance, so the up to T - 1 frames after the last segment are never taken. A video of fewer than T frames
    gives T random frames in order. Without `rng` (testing) the frame is the centre of the segment, whose length is then the
    fraction `num_frames / num_segments`; a video of fewer than T frames repeats frames.

    Args:
        num_frames: the number of frames of the video, at least 1.
        num_segments: T, at least 1.
        rng: the source of the draws, or None for the centres.

    Returns:
        T frame indices in [0, num_frames), never decreasing. Shape: [T].

    Raises:
        ValueError: if `num_frames` or `num_segments` is below 1.

    Example:
        >>> segment_indices(32, 4).tolist(), segment_indices(2, 4).tolist()
        ([4, 12, 20, 28], [0, 0, 1, 1])
    """
    if num_frames < 1 or num_segments < 1:
        raise ValueError(f"got {num_frames} frames and {num_segments} segments; both must be at least 1")
    segments = np.arange(num_segments)
    if rng is None:
        segment_length = num_frames / num_segments
        return (segment_length / 2 + segment_length * segments).astype(np.int64)
    num_frames_each = num_frames // num_segments
    if num_frames_each == 0:
        return np.sort(rng.integers(num_frames, size=num_segments))
    return segments * num_frames_each + rng.integers(num_frames_each, size=num_segments)
