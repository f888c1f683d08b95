"""The views of a video: in training one that is drawn, in testing clips times crops that are spread over time and space.

Conventions of GSM (`dataset.py`, `main.py`) and TSM (`ops/dataset.py`, `ops/transforms.py`):

clips by segments   1: the centre of each segment; 2: its centre and its first frame; 10: ten places, a tenth of a segment apart
clips, dense        1: the window in the middle; 2 and 10: windows from the video's beginning to its end, evenly spread
crops               1: the centre, a square of 224/256 of the short side; 3: squares of the full short side at both ends and in
                    the middle of the long side ("full resolution"); 5: squares of 224/256 in the corners and the centre; 10:
                    these five and their mirror images
whole frames        nothing is cropped; the short side is scaled to 256 for 224 pixels, the long one with it

Differs from that code: of a frame that is higher than wide TSM's three full crops are one and the same; here they are the top,
the middle and the bottom.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError
from preprocessing.segments import dense_indices, segment_indices
from preprocessing.transforms import Crop, centre_crop, scaled_side

Sampling = Literal["segments", "dense"]
NumClips = Literal[1, 2, 10]
NumCrops = Literal[1, 3, 5, 10]


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """How the frames of a clip are taken.

    Attributes:
        num_segments: T, frames a clip.
        kind: "segments" takes a frame of each of T equal segments, "dense" T frames at a fixed stride.
        stride: of dense sampling, in frames.

    Raises:
        ConfigError: if a value is out of range.
    """

    num_segments: int
    kind: Sampling = "segments"
    stride: int = 8

    def __post_init__(self) -> None:
        for name in ("num_segments", "stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.kind not in get_args(Sampling):
            raise ConfigError(f"sampling is {self.kind!r}; expected one of {', '.join(get_args(Sampling))}")

    def draw(self, num_frames: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """The frame indices of a training clip. Shape: [T]."""
        if self.kind == "dense":
            return dense_indices(num_frames, self.num_segments, self.stride, rng)
        return segment_indices(num_frames, self.num_segments, rng)

    def spread(self, num_frames: int, num_clips: int) -> list[npt.NDArray[np.int64]]:
        """The frame indices of each clip of a test. Shape: [T] each."""
        if self.kind == "dense":
            last = num_clips - 1
            places = [Fraction(clip, last) if last else Fraction(1, 2) for clip in range(num_clips)]
            return [dense_indices(num_frames, self.num_segments, self.stride, place=place) for place in places]
        places = [(Fraction(1, 2) + Fraction(clip, num_clips)) % 1 for clip in range(num_clips)]
        return [segment_indices(num_frames, self.num_segments, place=place) for place in places]


@dataclass(frozen=True, slots=True)
class View:
    """What is shown of a video: which frames, which window of them, and whether left and right are exchanged."""

    frame_indices: list[int]
    crop: Crop
    mirrored: bool


def view_size(height: int, width: int, pixels: int, whole_frames: bool) -> tuple[int, int]:
    """Height and width at which a network sees the views of a video: `pixels`, or of a whole frame as GSM and TSM scale it.

    Args:
        height: of the stored frame, at least 1.
        width: of the stored frame, at least 1.
        pixels: side of the network's input where it sees crops.
        whole_frames: whether nothing is cropped.

    Example:
        >>> view_size(100, 176, 224, whole_frames=True)
        (256, 450)
    """
    if not whole_frames:
        return pixels, pixels
    short_side, side = min(height, width), scaled_side(pixels)
    return side * height // short_side, side * width // short_side


def spread_views(
    num_frames: int,
    height: int,
    width: int,
    sampling: FrameSampling,
    pixels: int,
    num_clips: int,
    num_crops: int,
    whole_frames: bool = False,
) -> list[View]:
    """The `num_clips * num_crops` views of a video in testing, clip by clip; all their crops have the same size.

    Args:
        num_frames: of the video, at least 1.
        height: of its frames.
        width: of its frames.
        sampling: of the clips.
        pixels: side of the network's input.
        num_clips: 1, 2 or 10.
        num_crops: 1, 3, 5 or 10.
        whole_frames: show each clip's whole frames in place of crops.
    """
    whole = [(Crop(0, 0, height, width), False)]
    crops = whole if whole_frames else spread_crops(height, width, pixels, num_crops)
    clips = sampling.spread(num_frames, num_clips)
    return [View(indices.tolist(), crop, mirrored) for indices in clips for crop, mirrored in crops]


def spread_crops(height: int, width: int, pixels: int, num_crops: int) -> list[tuple[Crop, bool]]:
    """The windows of a test, each with whether it is mirrored.

    Args:
        height: of the stored frame.
        width: of the stored frame.
        pixels: side of the network's input.
        num_crops: 1, 3, 5 or 10.
    """
    if num_crops == 3:
        side = min(height, width)
        halves = [(half * (height - side) // 2, half * (width - side) // 2) for half in range(3)]
        return [(Crop(top, left, side, side), False) for top, left in halves]
    centre = centre_crop(height, width, pixels)
    if num_crops == 1:
        return [(centre, False)]
    side = centre.height
    corners = [Crop(top, left, side, side) for top in (0, height - side) for left in (0, width - side)]
    return [(crop, mirrored) for mirrored in (False, True) for crop in (*corners, centre)][:num_crops]
