import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from infra.errors import ConfigError
from preprocessing import augment
from preprocessing.augment import MAX_MAGNITUDE, NO_AUGMENTATION, Augmentation, augment_clip
from preprocessing.transforms import clip_rng

ALL = Augmentation(num_ops=2, magnitude=9, erase_probability=0.5)


def clip_of(seed=0, num_frames=3, side=24):
    coarse = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (num_frames, 3, 5, 6), dtype=np.uint8))
    return v2.functional.resize(coarse, [side, side + 8], antialias=True).permute(0, 2, 3, 1).contiguous().numpy()


def augmented(clip, augmentation, seed=0):
    clip = clip.copy()
    augment_clip(clip, augmentation, clip_rng(seed, 0, "a"))
    return clip


@pytest.mark.parametrize("name", augment._NAMES)
def test_every_operation_is_torchvisions(name):
    """With both signs, bit for bit."""
    theirs = v2.RandAugment()
    clip = torch.from_numpy(clip_of()).permute(0, 3, 1, 2)
    magnitudes, is_signed = theirs._AUGMENTATION_SPACE[name]
    operation = augment._OPERATIONS[name]
    assert operation.is_signed == is_signed
    table = magnitudes(MAX_MAGNITUDE + 1, *clip.shape[-2:])
    for level in (0, 1, 9, 17, MAX_MAGNITUDE):
        for sign in (1, -1) if is_signed else (1,):
            magnitude = 0.0 if table is None else sign * float(table[level])
            expected = theirs._apply_image_or_video_transform(clip, name, magnitude, v2.InterpolationMode.NEAREST, {})
            assert torch.equal(operation.apply(clip, sign * operation.strength(level)), expected)


def test_the_operations_are_those_of_torchvision():
    assert set(augment._NAMES) == set(v2.RandAugment()._AUGMENTATION_SPACE)


def test_nothing_is_done_by_default():
    clip = clip_of()
    assert np.array_equal(augmented(clip, NO_AUGMENTATION), clip)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), num_ops=st.integers(1, 3), magnitude=st.integers(0, 30))
def test_all_frames_get_the_same(seed, num_ops, magnitude):
    """Equal frames stay equal."""
    clip = clip_of(num_frames=1).repeat(4, axis=0)
    changed = augmented(clip, Augmentation(num_ops, magnitude, erase_probability=1.0), seed)
    assert (changed == changed[0]).all()


def test_draws_are_pure_and_leave_the_global_generators_alone():
    """While other threads draw from torch's generator."""
    clip = clip_of()
    alone = [augmented(clip, ALL, seed) for seed in range(20)]
    state = torch.get_rng_state()
    assert all(np.array_equal(augmented(clip, ALL, seed), alone[seed]) for seed in range(20))
    assert torch.equal(torch.get_rng_state(), state)
    stop = threading.Event()
    disturber = threading.Thread(target=lambda: [torch.rand(10) for _ in iter(stop.is_set, True)])
    disturber.start()
    try:
        assert all(np.array_equal(augmented(clip, ALL, seed), alone[seed]) for seed in range(20))
    finally:
        stop.set()
        disturber.join()
    assert len({clip.tobytes() for clip in alone}) > 15


def test_erasing_fills_one_rectangle_with_noise_as_often_as_asked():
    clip = np.full((2, 40, 50, 3), 7, np.uint8)
    num_erased, areas = 0, []
    for seed in range(300):
        changed = augmented(clip, Augmentation(erase_probability=0.25), seed) != 7
        touched = changed.any(axis=(0, 3))
        if touched.any():
            num_erased += 1
            rows, columns = np.flatnonzero(touched.any(axis=1)), np.flatnonzero(touched.any(axis=0))
            box = touched[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert box.mean() > 0.95, "a rectangle, but for noise that is 7 by chance"
            areas.append(box.size / touched.size)
    assert 50 <= num_erased <= 100
    assert 0.01 < min(areas) < 0.08
    assert 0.25 < max(areas) < 0.36


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_ops": -1}, "num_ops of RandAugment is -1; expected at least 0"),
        ({"magnitude": 31}, "magnitude of RandAugment is 31; expected 0 to 30"),
        ({"erase_probability": 1.5}, "erase_probability is 1.5; expected 0 to 1"),
    ],
)
def test_wrong_values_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**arguments)
