import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tuning import agreement
from tuning.agreement import spearman

few = settings(max_examples=15, deadline=None)
pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=14)


@few
@given(pairs)
def test_it_is_scipys_number_within_its_interval(values):
    a, b = zip(*values, strict=True)
    found = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(found.rho)
        assert "says the same of all" in str(found)
        return
    assert found.rho == pytest.approx(spearmanr(a, b).statistic)
    assert -1 <= found.low <= found.high <= 1
    assert found.num_trials == len(values)
    assert spearman(a, b) == found


@few
@given(pairs)
def test_only_the_order_counts_and_the_sides_are_alike(values):
    a, b = zip(*values, strict=True)
    stretched = [math.exp(value) for value in a]
    for one, other in ((stretched, b), (b, a)):
        np.testing.assert_allclose(
            [spearman(one, other).rho, spearman(one, other).low], [spearman(a, b).rho, spearman(a, b).low], atol=1e-9
        )
    mirrored = spearman([-value for value in a], b)
    np.testing.assert_allclose([mirrored.rho, mirrored.low], [-spearman(a, b).rho, -spearman(a, b).high], atol=1e-9)


def test_the_interval_covers_the_truth_and_shrinks_with_more_trials():
    """Normal pairs of correlation 0.6 have a rank correlation of 6 / pi * asin(0.3) = 0.582."""
    generator = np.random.default_rng(1)
    truth, widths = 6 / math.pi * math.asin(0.3), {}
    for num_trials in (12, 60):
        covered, width = 0, 0.0
        for _ in range(40):
            a = generator.standard_normal(num_trials)
            found = spearman(a, 0.6 * a + 0.8 * generator.standard_normal(num_trials))
            covered += found.low <= truth <= found.high
            width += found.high - found.low
        widths[num_trials] = width
        assert covered >= 32  # of 40; 36 at 90 %
    assert widths[60] < 0.6 * widths[12]


def test_what_has_no_order_or_no_partner_is_refused():
    with pytest.raises(ValueError, match="found 2 and 2 values; expected as many of each, at least 3"):
        spearman([1, 2], [1, 2])
    with pytest.raises(ValueError, match="found 3 and 4 values"):
        spearman([1, 2, 3], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="not finite; leave out trials"):
        spearman([1, 2, math.nan], [1, 2, 3])


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(agreement).failed == 0
    assert str(spearman([1, 2, 3, 4], [1, 2, 3, 4])) == "Spearman 1.00 (95 % interval 1.00 to 1.00, 4 trials)"
