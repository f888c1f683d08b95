import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from preprocessing.transforms import (
    Crop,
    centre_crop,
    clip_rng,
    draw_flip,
    draw_train_crop,
    smallest_decoded_size,
    write_clip,
)

sides = st.integers(1, 700)
MIRROR = [1, 0, 2, -1]  # left, right, up, a label whose mirror image is no label


def textured(height, width, num_frames=2, seed=0):
    """Smooth random frames: [T, H, W, 3]."""
    coarse = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (num_frames, 3, 6, 8), dtype=np.uint8))
    return functional.resize(coarse, [height, width], antialias=True).permute(0, 2, 3, 1).contiguous().numpy()


def cropped(frames, crop, pixels, *, mirrored=False, size=None):
    height, width = size or frames.shape[1:3]
    out = np.empty((len(frames), pixels, pixels, 3), np.uint8)
    write_clip(list(frames), crop, height, width, mirrored, out)
    return out


def is_inside(crop, height, width):
    return (
        min(crop.height, crop.width) >= 1
        and min(crop.top, crop.left) >= 0
        and crop.top + crop.height <= height
        and crop.left + crop.width <= width
    )


@given(height=sides, width=sides, pixels=st.integers(1, 300), seed=st.integers(0, 1000))
def test_crops_are_inside_the_frame(height, width, pixels, seed):
    assert is_inside(draw_train_crop(height, width, pixels, clip_rng(seed, 0, "a")), height, width)
    assert is_inside(centre_crop(height, width, pixels), height, width)


@given(height=sides, width=sides, pixels=st.integers(1, 300), seed=st.integers(0, 1000))
def test_reduced_decoding_leaves_enough_pixels(height, width, pixels, seed):
    crop = draw_train_crop(height, width, pixels, clip_rng(seed, 0, "a"))
    min_height, min_width = smallest_decoded_size(crop, height, width, pixels)
    assert crop.height * min_height / height >= min(pixels, crop.height)
    assert crop.width * min_width / width >= min(pixels, crop.width)
    assert min_height <= height
    assert min_width <= width


def test_training_crops_are_those_of_tsn():
    """All crops of GSM's GroupMultiScaleCrop for 100 x 132 frames, written out from its rules."""
    drawn = {draw_train_crop(100, 132, 224, clip_rng(0, epoch, "a")) for epoch in range(3000)}
    sizes = [100, 87, 75, 66]
    expected = set()
    for i, height in enumerate(sizes):
        for width in sizes[max(0, i - 1) : i + 2]:
            down, right = (100 - height) // 4, (132 - width) // 4
            corners_edges_centre = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)]
            quarters = [(y, x) for y in (1, 3) for x in (1, 3)]
            expected |= {Crop(y * down, x * right, height, width) for y, x in corners_edges_centre + quarters}
    assert drawn == expected


def test_a_crop_side_close_to_the_network_side_becomes_it():
    sides = {draw_train_crop(256, 340, 222, clip_rng(0, epoch, "a")).height for epoch in range(200)}
    assert sides == {256, 222, 192, 168}, "224 = 0.875 x 256 is two pixels from 222"
    assert max(draw_train_crop(223, 300, 224, clip_rng(0, epoch, "a")).height for epoch in range(200)) == 223


def test_the_test_crop_is_exactly_scale_and_centre_crop_where_the_short_side_fits():
    frames = textured(256, 341)
    as_published = functional.center_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), [224, 224]).permute(0, 2, 3, 1)
    assert np.array_equal(cropped(frames, centre_crop(256, 341, 224), 224), as_published.numpy())


@pytest.mark.parametrize(("height", "width", "pixels"), [(100, 132, 224), (480, 640, 224), (240, 180, 112), (100, 176, 229)])
def test_the_test_crop_is_nearly_scale_and_centre_crop_elsewhere(height, width, pixels):
    frames = textured(height, width)
    scaled = functional.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), [pixels * 256 // 224], antialias=True)
    as_published = functional.center_crop(scaled, [pixels, pixels]).permute(0, 2, 3, 1).numpy()
    difference = np.abs(cropped(frames, centre_crop(height, width, pixels), pixels).astype(int) - as_published)
    assert difference.mean() < 1.5, "of 255 grey levels"


def test_one_crop_for_all_frames():
    frames = textured(100, 132, num_frames=1).repeat(5, axis=0)
    clip = cropped(frames, draw_train_crop(100, 132, 64, clip_rng(0, 0, "a")), 64)
    assert (clip == clip[0]).all()


def test_a_mirrored_clip_is_exactly_the_mirror_image():
    frames = textured(100, 132)
    crop = Crop(4, 8, 75, 66)
    assert np.array_equal(cropped(frames, crop, 64, mirrored=True), cropped(frames, crop, 64)[:, :, ::-1])


def test_frames_decoded_at_reduced_size_give_nearly_the_same_clip():
    frames = textured(256, 340)
    half = (
        functional.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), [128, 170], antialias=True).permute(0, 2, 3, 1).numpy()
    )
    crop = Crop(13, 41, 224, 192)
    difference = np.abs(cropped(frames, crop, 64).astype(int) - cropped(half, crop, 64, size=(256, 340)))
    assert difference.mean() < 3.0, "of 255 grey levels: the window is rounded to whole pixels of the reduced frame"


@given(label=st.integers(-1, 3), seed=st.integers(0, 10000))
def test_flips_change_labels_by_the_map(label, seed):
    coin = bool(clip_rng(seed, 0, "a").random() < 0.5)
    assert draw_flip(label, MIRROR, "none", clip_rng(seed, 0, "a")) == (False, label)
    assert draw_flip(label, MIRROR, "naive", clip_rng(seed, 0, "a")) == (coin, label)
    expected = (True, MIRROR[label]) if coin and label in (0, 1, 2) else (False, label)
    assert draw_flip(label, MIRROR, "swap", clip_rng(seed, 0, "a")) == expected


def test_draws_depend_on_seed_epoch_and_key_and_on_nothing_else():
    first = clip_rng(1, 2, "a").integers(2**60, size=4).tolist()
    assert clip_rng(1, 2, "a").integers(2**60, size=4).tolist() == first
    others = [clip_rng(0, 2, "a"), clip_rng(1, 3, "a"), clip_rng(1, 2, "b"), clip_rng(12, 0, "a"), clip_rng(1, 20, "a")]
    assert all(other.integers(2**60, size=4).tolist() != first for other in others)
