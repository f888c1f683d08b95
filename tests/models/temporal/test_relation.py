import math
from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch

from models.temporal.relation import RELATIONS_PER_SCALE, MultiScaleRelation


def by_definition(head, features, relations_of_scale):
    """The published loop: for each scale, ReLU, linear, ReLU, linear on each relation, all added up."""
    total = 0
    for scale, (_, first, _, second) in zip(head.scales, head.fc_fusion_scales, strict=True):
        for relation in relations_of_scale(scale):
            tuple_of_frames = torch.cat([features[:, frame] for frame in relation], dim=1)
            total = total + second(first(tuple_of_frames.relu()).relu())
    return total


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_segments", [2, 3])
def test_up_to_three_segments_every_relation_counts(num_segments, training):
    head = MultiScaleRelation(num_segments, 5, frame_features=6).train(training)
    features = torch.randn(4, num_segments, 6)
    expected = by_definition(head, features, lambda scale: combinations(range(num_segments), scale))
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize("num_segments", [4, 8, 9, 64])
def test_at_evaluation_three_fixed_relations_of_each_scale(num_segments):
    head = MultiScaleRelation(num_segments, 5, frame_features=2).eval()
    assert head.scales == tuple(range(num_segments, 1, -1))
    for scale in head.scales[1:]:
        earliest, spread, latest = head.relations(scale)
        assert earliest == tuple(range(scale))
        assert latest == tuple(range(num_segments - scale, num_segments))
        assert (spread[0], spread[-1], len(set(spread))) == (0, num_segments - 1, scale)
        assert list(spread) == sorted(spread)
        gaps = {after - before for before, after in pairwise(spread)}
        assert max(gaps) - min(gaps) <= 1
    assert head.relations(num_segments) == [tuple(range(num_segments))]
    features = torch.randn(2, num_segments, 2)
    torch.testing.assert_close(head(features), by_definition(head, features, head.relations))
    assert torch.equal(head(features), head(features))


def test_in_training_three_relations_are_drawn_without_favour():
    head = MultiScaleRelation(4, 5, frame_features=2)
    torch.manual_seed(0)
    num_draws = 2000
    counts = Counter(relation for _ in range(num_draws) for relation in head.relations(2))
    assert set(counts) == set(combinations(range(4), 2))
    share = RELATIONS_PER_SCALE / math.comb(4, 2)
    deviation = math.sqrt(num_draws * share * (1 - share))
    assert all(abs(count - num_draws * share) < 5 * deviation for count in counts.values())
    torch.manual_seed(1)
    first = head.relations(2)
    torch.manual_seed(1)
    assert head.relations(2) == first


def test_the_order_of_frames_counts():
    head = MultiScaleRelation(3, 5, frame_features=6)
    features = torch.randn(1, 3, 6)
    assert not torch.allclose(head(features), head(features.flip(1)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1, 5), "MultiScaleRelation got 1 segments, but a relation needs at least 2 frames"),
        ((3, 0), "MultiScaleRelation got 0 classes and 256 features a frame; both must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleRelation(*arguments)
