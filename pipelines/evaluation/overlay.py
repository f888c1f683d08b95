"""Heat over pictures: where there is none, the picture stays as it is."""

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from torch.nn import functional

Picture = npt.NDArray[np.uint8]
Heat = npt.NDArray[np.float32]

_COLOURS = "plasma"
_MOST_COVER = 0.75
"""The picture shines through the greatest heat too."""


def enlarge(heat: Heat, num_frames: int, height: int, width: int) -> Heat:
    """A map of places at the size of the pictures that it belongs to: linear between the middles of places, flat beyond.

    Args:
        heat: any numbers. Shape: [t, h, w], with t at most `num_frames`.
        num_frames: of the pictures.
        height: of each.
        width: of each.

    Returns:
        Numbers between the least and the greatest of `heat`. Shape: [num_frames, height, width].
    """
    map_11THW = torch.tensor(heat, dtype=torch.float32)[None, None]
    enlarged = functional.interpolate(map_11THW, (num_frames, height, width), mode="trilinear", align_corners=False)
    result: Heat = enlarged[0, 0].numpy()
    return result


def overlay(frames: Picture, heat: Heat) -> Picture:
    """Lay heat over frames: colour and cover grow with it; 0 leaves a pixel bit for bit as it is, 1 and more cover it most.

    Args:
        frames: RGB. Shape: [T, H, W, 3].
        heat: not negative. Shape: [T, H, W].
    """
    share = np.clip(heat, 0, 1).astype(np.float32)
    cover = (_MOST_COVER * share)[..., np.newaxis]
    mixed = frames * (1 - cover) + heat_colours(share) * cover
    painted: Picture = np.rint(mixed).astype(np.uint8)
    return painted


def heat_colours(share: Heat) -> npt.NDArray[np.float32]:
    """The colour of heat in [0, 1]: RGB from 0 to 255. Shape: [..., 3]."""
    colours: npt.NDArray[np.float32] = 255 * colormaps[_COLOURS](share)[..., :3].astype(np.float32)
    return colours


def legend(height: int, width: int) -> Picture:
    """Heat from 0 to 1, left to right, over light grey. Shape: [height, width, 3]."""
    grey = np.full((1, height, width, 3), 235, np.uint8)
    heat = np.broadcast_to(np.linspace(0, 1, width, dtype=np.float32), (1, height, width))
    strip: Picture = overlay(grey, heat)[0]
    return strip
