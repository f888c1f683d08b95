import numpy as np
import pytest

from pipelines.evaluation.overlay import enlarge, legend, overlay

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (3, 20, 30, 3)).astype(np.uint8)


def test_no_heat_leaves_every_pixel_as_it_is():
    heat = np.zeros((3, 20, 30), np.float32)
    assert np.array_equal(overlay(FRAMES, heat), FRAMES)
    heat[1, 5, 7] = 1.0
    changed = (overlay(FRAMES, heat) != FRAMES).any(axis=3)
    assert np.argwhere(changed).tolist() == [[1, 5, 7]]


def test_more_heat_covers_more_and_what_is_beyond_1_no_more_than_1():
    grey = np.full((1, 1, 5, 3), 128, np.uint8)
    heat = np.array([[[0.0, 0.2, 0.6, 1.0, 9.0]]], np.float32)
    away = np.abs(overlay(grey, heat)[0, 0].astype(int) - 128).sum(axis=1)
    assert away[0] == 0 < away[1] < away[2] < away[3] == away[4]
    assert not np.array_equal(overlay(FRAMES, np.ones((3, 20, 30), np.float32))[0], overlay(FRAMES, heat[:, :, 3:4])[1])


@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 4, 5), (2, 20, 30)])
def test_a_map_is_enlarged_within_its_bounds_and_its_bright_place_stays(shape):
    heat = RNG.random(shape).astype(np.float32)
    heat[-1, 0, 1] = 2.0
    heat.setflags(write=False)  # as what comes from Ray
    large = enlarge(heat, 6, 40, 60)
    assert large.shape == (6, 40, 60)
    assert heat.min() <= large.min() <= large.max() <= heat.max() + 1e-6
    t, y, x = np.unravel_index(large.argmax(), large.shape)
    assert (t * shape[0] // 6, y * shape[1] // 40, x * shape[2] // 60) == (shape[0] - 1, 0, 1)


def test_a_map_of_that_size_is_not_changed():
    heat = RNG.random((3, 20, 30)).astype(np.float32)
    assert np.allclose(enlarge(heat, 3, 20, 30), heat, atol=1e-6)


def test_the_legend_goes_from_nothing_to_most():
    strip = legend(4, 50)
    assert strip.shape == (4, 50, 3)
    assert (strip[:, 0] == 235).all()
    assert np.array_equal(strip[0], strip[3])
