"""From the decoded frames of a clip to pixels x pixels: one crop for all frames, one resize, perhaps a flip.

Source: the multi-scale corner crop of TSN (Wang et al., 2016, section 3.2) and GSM's `transforms.py` and `main.py`.

Differs from that code:
- A test crop is cut out first and resized once, where GSM resizes whole frames and then crops. The two agree exactly where the
  short side is the scaled side already (256 for 224 pixels), else up to the rounding of the crop to whole source pixels.
- A crop side is pulled to the network's side (if nearer than 3 pixels) only as far as the frame reaches; GSM padded with black.
- Resizing is torchvision's antialiased bilinear filter on uint8, as Pillow's up to rounding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms.v2 import functional

Flip = Literal["swap", "none", "naive"]
Frame = npt.NDArray[np.uint8]

_TRAIN_SCALES = (1.0, 0.875, 0.75, 0.66)
_MAX_DISTORT = 1
_SNAP_PIXELS = 3
# Quarters of the free space (left, top): corners, centre, edge middles, quarter points, in GSM's order.
_CROP_OFFSETS = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))


@dataclass(frozen=True, slots=True)
class Crop:
    """A spatial window, in pixels of the stored frame."""

    top: int
    left: int
    height: int
    width: int


def clip_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The random numbers of one clip in one epoch: a pure function of its arguments, the same on every machine and worker."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def draw_train_crop(height: int, width: int, pixels: int, rng: np.random.Generator) -> Crop:
    """Draw TSN's multi-scale corner crop.

    Each side is the frame's short side times 1, 0.875, 0.75 or 0.66, both sides at most one step of that list apart; the
    window is in one of 13 fixed places.

    Args:
        height: of the stored frame, at least 1.
        width: of the stored frame, at least 1.
        pixels: side of the network's input; a crop side less than 3 pixels away from it is set to it.
        rng: gives two draws.
    """
    short_side = min(height, width)
    sides = [max(1, int(short_side * scale)) for scale in _TRAIN_SCALES]
    sides = [pixels if abs(side - pixels) < _SNAP_PIXELS and pixels <= short_side else side for side in sides]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= _MAX_DISTORT]
    crop_height, crop_width = pairs[rng.integers(len(pairs))]
    left_quarters, top_quarters = _CROP_OFFSETS[rng.integers(len(_CROP_OFFSETS))]
    return Crop(
        top=top_quarters * ((height - crop_height) // 4),
        left=left_quarters * ((width - crop_width) // 4),
        height=crop_height,
        width=crop_width,
    )


def scaled_side(pixels: int) -> int:
    """What a test scales the short side of a frame to before it crops `pixels` x `pixels`: 256 for 224."""
    return pixels * 256 // 224


def centre_crop(height: int, width: int, pixels: int) -> Crop:
    """The test window: what scaling the short side to `scaled_side` and cropping the centre would show.

    Args:
        height: of the stored frame, at least 1.
        width: of the stored frame, at least 1.
        pixels: side of the network's input.
    """
    short_side = min(height, width)
    side = max(1, round(short_side * pixels / scaled_side(pixels)))
    return Crop(top=round((height - side) / 2), left=round((width - side) / 2), height=side, width=side)


def smallest_decoded_size(crop: Crop, height: int, width: int, pixels: int) -> tuple[int, int]:
    """The least height and width to decode a frame at, such that the crop still has `pixels` on each side.

    Never above the frame's own size: a crop that is to be enlarged needs the frame as it is.
    """
    return min(height, -(-height * pixels // crop.height)), min(width, -(-width * pixels // crop.width))


def draw_flip(label: int, mirror: Sequence[int], flip: Flip, rng: np.random.Generator) -> tuple[bool, int]:
    """Decide whether a clip is mirrored, with chance one half where it may be, and the label it has then.

    Args:
        label: the clip's label, -1 if it has none.
        mirror: for each label the one that its mirror image has, -1 where that is none (`datasets.mirror_labels`).
        flip: "swap" changes the label along with the picture and leaves a clip alone whose label has no mirror or that has no
            label; "naive" mirrors every clip and keeps its label; "none" mirrors nothing.
        rng: gives one draw, whatever the outcome.

    Returns:
        (mirrored, label).
    """
    mirrored = bool(rng.random() < 0.5)
    if flip == "naive":
        return mirrored, label
    if flip == "none" or label < 0 or mirror[label] < 0 or not mirrored:
        return False, label
    return True, mirror[label]


def write_clip(frames: Sequence[Frame], crop: Crop, height: int, width: int, mirrored: bool, out: Frame) -> None:
    """Crop, resize and perhaps mirror the frames of one clip into `out`.

    Args:
        frames: T frames of one size, each [h, w, 3]; that is [height, width, 3] or, if decoded at reduced size, less.
        crop: the window, in pixels of the stored frame.
        height: of the stored frame.
        width: of the stored frame.
        mirrored: whether left and right are exchanged.
        out: receives the clip. Shape: [T, pixels, pixels, 3].
    """
    decoded_height, decoded_width = frames[0].shape[:2]
    rows = slice(_rescale(crop.top, decoded_height, height), _rescale(crop.top + crop.height, decoded_height, height))
    columns = slice(_rescale(crop.left, decoded_width, width), _rescale(crop.left + crop.width, decoded_width, width))
    window_THWC = np.stack([frame[rows, columns] for frame in frames])
    if mirrored:
        # Pixel by pixel as items of three bytes, which numpy reverses 2 to 5 times as fast as an axis before the last.
        window_THWC = np.ascontiguousarray(window_THWC.view("V3")[:, :, ::-1]).view(np.uint8)
    window_TCHW = torch.from_numpy(window_THWC).permute(0, 3, 1, 2)
    resized_TCHW = functional.resize(window_TCHW, list(out.shape[1:3]), antialias=True)
    # Numpy mirrors and copies because torch would start a team of threads for it in every loader thread (not for the resize).
    out[...] = resized_TCHW.permute(0, 2, 3, 1).numpy()


def _rescale(position: int, decoded_side: int, side: int) -> int:
    """`position * decoded_side / side`, halves rounded up, so that a window never loses its last pixel to rounding."""
    return (2 * position * decoded_side + side) // (2 * side)
