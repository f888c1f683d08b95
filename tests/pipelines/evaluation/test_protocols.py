from itertools import product
from typing import get_args

import pytest

from infra.errors import ConfigError
from pipelines.evaluation.protocols import NUM_CLIPS, NUM_CROPS, find_protocol
from preprocessing.views import NumClips, NumCrops

NAMED = ["centre", "2clips", "3crops", "5crops", "10crops", "full", "seed_code"]


def test_the_numbers_are_those_of_the_loader():
    assert get_args(NumClips) == NUM_CLIPS
    assert get_args(NumCrops) == NUM_CROPS


@pytest.mark.parametrize(("num_clips", "num_crops"), list(product(NUM_CLIPS, NUM_CROPS)))
def test_every_grid_has_one_name_and_the_shorter_one_wins(num_clips, num_crops):
    protocol = find_protocol(f"{num_clips}x{num_crops}")
    assert (protocol.num_clips, protocol.num_crops) == (num_clips, num_crops)
    assert not protocol.whole_frames
    assert not protocol.seed_code
    assert find_protocol(protocol.name) == protocol
    short = {(1, 1): "centre", (2, 1): "2clips", (1, 3): "3crops", (1, 5): "5crops", (1, 10): "10crops"}
    assert protocol.name == short.get((num_clips, num_crops), f"{num_clips}x{num_crops}")


def test_each_name_means_what_it_says():
    facts = [find_protocol(name) for name in NAMED]
    assert [(p.num_clips, p.num_crops) for p in facts] == [(1, 1), (2, 1), (1, 3), (1, 5), (1, 10), (1, 1), (1, 1)]
    assert [p.name for p in facts if p.whole_frames] == ["full"]
    assert [p.name for p in facts if p.seed_code] == ["seed_code"]
    assert len({protocol.describe() for protocol in facts}) == len(NAMED)


@pytest.mark.parametrize("name", ["", "center", "3x3", "10x", "4crops", "Centre", "1X1"])
def test_a_wrong_name_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(ConfigError) as caught:
        find_protocol(name)
    assert str(caught.value) == (
        f"found protocol {name!r}; expected one of {', '.join(NAMED)}, or clips x crops such as 10x3, with 1, 2 or 10 clips "
        "and 1, 3, 5 or 10 crops"
    )


def test_mirror_images_are_refused_where_they_have_other_labels():
    labels = ["up", "from left to right", "from right to left"]
    for name in NAMED:
        find_protocol(name).require_fits(labels[:1])
        if name != "10crops":
            find_protocol(name).require_fits(labels)
    for name in ("10crops", "2x10"):
        with pytest.raises(ConfigError, match=rf"evaluate\.protocol={name} .* that of 'from left to right' has .* 5crops"):
            find_protocol(name).require_fits(labels)
