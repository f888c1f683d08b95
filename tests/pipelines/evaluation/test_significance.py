import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import beta, norm

from infra.errors import PipelineError
from pipelines.evaluation.significance import Difference, class_accuracy_interval, difference, mcnemar, top1_interval


def draw_hits(rng, ability, num_seeds, num_clips, seed_spread=0.0, difficulty=None):
    """A network is right where its ability, its seed's luck, the clip's ease and noise add up to more than 0."""
    ease = rng.normal(size=num_clips) if difficulty is None else difficulty
    luck = seed_spread * rng.normal(size=(num_seeds, 1))
    return ability + luck + ease + rng.normal(size=(num_seeds, num_clips)) > 0


def true_top1(ability, seed_spread):
    return norm.cdf(ability / np.sqrt(2 + seed_spread**2))


@pytest.mark.parametrize(("num_seeds", "num_clips", "spread"), [(1, 160, 0.0), (3, 160, 0.2), (2, 300, 0.15)])
def test_intervals_cover_the_truth_as_often_as_they_say(num_seeds, num_clips, spread):
    """Of 200 splits and sets of seeds, some 190 intervals hold the true accuracy, and some 190 the true difference of 0."""
    rng = np.random.default_rng(0)
    covered, level, apart = 0, 0, 0
    for _ in range(200):
        ease = rng.normal(size=num_clips)
        one, other = (draw_hits(rng, 0.5, num_seeds, num_clips, spread, ease) for _ in range(2))
        low, high = top1_interval(one)
        covered += low <= true_top1(0.5, spread) <= high
        found = difference(one, other)
        level += found.interval[0] <= 0 <= found.interval[1]
        apart += found.separable
    assert min(covered, level) >= 180
    assert apart <= 20


def test_intervals_are_no_wider_than_need_be():
    """With one seed the interval of an accuracy is Jeffreys'."""
    hits = np.arange(160)[None] < 120
    low, high = beta.ppf([0.025, 0.975], 120.5, 40.5)
    assert top1_interval(hits) == pytest.approx((low, high), abs=0.005)


@pytest.mark.parametrize("num_right", [0, 160])
def test_an_interval_is_not_empty_where_all_clips_score_the_same(num_right):
    low, high = top1_interval(np.arange(160)[None] < num_right)
    assert 0.005 < high - low < 0.03
    assert low <= num_right / 160 + 0.001
    assert high >= num_right / 160 - 0.001


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_two_copies_of_one_network_are_not_separable(num_seeds):
    hits = draw_hits(np.random.default_rng(1), 0.5, num_seeds, 500, 0.1)
    found = difference(hits, hits)
    assert not found.separable
    assert found.top1 == 0
    assert found.interval[0] < 0 < found.interval[1]
    assert set(found.mcnemar) == {1.0}
    assert "sa_gsm is level with gsm" in found.sentence("sa_gsm", "gsm")
    assert "not separable" in found.sentence("sa_gsm", "gsm")


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_ten_points_on_500_clips_are_separable(num_seeds):
    rng = np.random.default_rng(2)
    for _ in range(20):
        baseline = draw_hits(rng, 0.5, num_seeds, 500)
        gained = ~baseline & (np.cumsum(~baseline, axis=1) <= 50)  # 50 of the clips that it gets wrong
        found = difference(baseline | gained, baseline)
        assert found.top1 == pytest.approx(0.1)
        assert found.separable
        assert difference(baseline, baseline | gained).separable


def test_three_clips_are_not_separable_whatever_the_interval_says():
    """All three point one way, but a coin does that once in four times."""
    baseline = np.arange(160)[None] < 100
    found = difference(np.arange(160)[None] < 103, baseline)
    assert found.mcnemar == (0.25,)
    assert not found.separable


def test_the_spread_between_seeds_counts():
    """The same mean difference is separable if the seeds agree, and not if they scatter."""
    clips = np.arange(1000)
    steady = np.stack([clips < 500 + shift for shift in (-2, 0, 2)])
    scattered = np.stack([clips < 500 + shift for shift in (-150, 0, 150)])
    higher = np.stack([clips < 560 + shift for shift in (-2, 0, 2)])
    assert difference(higher, steady).separable
    assert not difference(higher, scattered).separable


@settings(max_examples=25)
@given(arrays(bool, (2, 40)), arrays(bool, (1, 40)))
def test_a_difference_turned_round_is_its_negative(one, other):
    there, back = difference(one, other), difference(other, one)
    assert there.top1 == pytest.approx(-back.top1)
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=0.02)
    assert there.interval[0] - 0.001 <= there.top1 <= there.interval[1] + 0.001


@given(st.integers(0, 8), st.integers(0, 8))
def test_mcnemar_asks_only_the_clips_that_tell_the_two_apart(gained, lost):
    hits = np.array([True] * gained + [False] * lost + [True, False] * 5)
    baseline = np.array([False] * gained + [True] * lost + [True, False] * 5)
    short = mcnemar(hits[: gained + lost], baseline[: gained + lost])
    assert mcnemar(hits, baseline) == short == mcnemar(baseline, hits)
    assert (short == 1.0) == (abs(gained - lost) <= 1)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            Difference(0.102, (0.051, 0.149), (0.01,), 1, True),
            "a is 10.2 points above b (5.1 to 14.9): separable from the noise of clips; one seed each, so that the noise of "
            "seeds is not known.",
        ),
        (
            Difference(-0.102, (-0.149, -0.051), (0.01, 0.2), 2, True),
            "a is 10.2 points below b (5.1 to 14.9): separable from the noise of clips and of 2 seeds.",
        ),
        (
            Difference(-0.01, (-0.05, 0.03), (0.01, 0.2, 0.4), 3, False),
            "a is 1.0 points below b (-5.0 to 3.0): not separable from the noise of clips and of 3 seeds.",
        ),
    ],
)
def test_the_sentence_says_what_was_found(found, expected):
    assert found.sentence("a", "b") == expected


@pytest.mark.parametrize(("num_right", "num_clips"), [(7, 10), (40, 200), (1, 2)])
def test_the_interval_of_one_class_is_jeffreys(num_right, num_clips):
    found = class_accuracy_interval(np.array([num_right]), np.array([num_clips]))
    expected = beta.ppf([0.025, 0.975], num_right + 0.5, num_clips - num_right + 0.5)
    assert found == pytest.approx(tuple(expected), abs=0.01)


def test_the_interval_of_the_mean_class_accuracy_covers_the_truth():
    rng = np.random.default_rng(3)
    accuracies, num_clips = np.array([0.95, 0.8, 0.5, 0.3, 0.1]), np.array([60, 8, 30, 4, 20])
    covered = 0
    for _ in range(100):
        low, high = class_accuracy_interval(rng.binomial(num_clips, accuracies), num_clips)
        covered += low <= accuracies.mean() <= high
    assert 86 <= covered <= 100


def test_classes_that_are_all_right_have_an_interval_that_is_neither_empty_nor_wide():
    num_clips = np.full(174, 60)
    low, high = class_accuracy_interval(num_clips, num_clips)
    assert high == 1
    assert 0.999 < low < 1


def test_other_clips_are_refused():
    with pytest.raises(PipelineError, match="found scores of 3 and of 4 clips"):
        difference(np.ones((1, 3), bool), np.ones((1, 4), bool))
    with pytest.raises(PipelineError, match=r"expected bool \[seeds, clips\]"):
        top1_interval(np.ones(3, bool))
