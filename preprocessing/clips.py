"""From the frames of one video to the pixels of its views, wherever the frames are: in a shard, or just decoded from a file."""

from collections.abc import Callable, Sequence

import numpy as np

from preprocessing.decode import DecodedVideo
from preprocessing.jpeg import decode_frame
from preprocessing.transforms import Frame, smallest_decoded_size, write_clip
from preprocessing.views import FrameSampling, View, spread_views

ReadFrames = Callable[[Sequence[int], tuple[int, int]], list[Frame]]
"""Given frame indices in rising order and the least (height, width) that would do, the pixels of each, [H, W, 3]."""


def write_views(views: Sequence[View], height: int, width: int, read_frames: ReadFrames, out: Frame) -> None:
    """Write the pixels of a video's views; each frame is read once, however many views show it.

    Args:
        views: whose crops all have the same size.
        height: of the stored frames.
        width: of the stored frames.
        read_frames: gives the frames' pixels.
        out: receives the views. Shape: [V, T, H, W, 3].
    """
    indices = sorted({frame_index for view in views for frame_index in view.frame_indices})
    size = smallest_decoded_size(views[0].crop, height, width, min(out.shape[2:4]))
    frames = dict(zip(indices, read_frames(indices, size), strict=True))
    for view, clip in zip(views, out, strict=True):
        write_clip([frames[i] for i in view.frame_indices], view.crop, height, width, view.mirrored, clip)


def centre_clip(video: DecodedVideo, sampling: FrameSampling, pixels: int, side: int | None = None) -> Frame:
    """The clip on which a video is judged by default: one clip, the centre crop, as a loader of `train=False` shows it.

    Args:
        video: whose frames are held in memory, as whole JPEG files.
        sampling: how the frames of the clip are taken.
        pixels: side of the network's input.
        side: of the pictures, if they are for people, who see the same window better at another size; None for `pixels`.

    Returns:
        uint8, RGB. Shape: [T, side, side, 3].
    """

    def read_frames(indices: Sequence[int], size: tuple[int, int]) -> list[Frame]:
        return [decode_frame(video.frames[index], video.height, video.width, size) for index in indices]

    views = spread_views(len(video.frames), video.height, video.width, sampling, pixels, num_clips=1, num_crops=1)
    side = side or pixels
    clip = np.empty((sampling.num_segments, side, side, 3), np.uint8)
    write_views(views, video.height, video.width, read_frames, clip[np.newaxis])
    return clip
