"""Tests of the search space: points, baselines, and the dotted settings that they stand for."""

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from infra.settings import apply_overrides
from models.placement import SLOTS, parse_placement
from tuning.settings import Range, SearchSettings
from tuning.space import FAMILIES, LEARNING_RATE, PLACEMENT, baseline_points, overrides_of, search_space, suggest_params

KINDS = ("booleans", "families")


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_are_points_of_the_space(kind):
    settings = SearchSettings(placement=kind)
    points = baseline_points(settings)
    assert [suggest_params(optuna.trial.FixedTrial(point), settings) for point in points] == points
    assert [overrides_of(point) for point in points] == [
        {PLACEMENT: "none", LEARNING_RATE: 0.01},
        {PLACEMENT: "all", LEARNING_RATE: 0.01},
    ]


def test_without_baselines_nothing_is_queued():
    assert baseline_points(SearchSettings(baselines=False)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_stays_inside_the_space(kind):
    settings = SearchSettings(placement=kind, space={LEARNING_RATE: Range(low=0.02, high=0.03, log=True)})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    overrides = [overrides_of(suggest_params(study.ask(), settings)) for _ in range(30)]
    assert all(0.02 <= point[LEARNING_RATE] <= 0.03 for point in overrides)
    assert all(str(parse_placement(point[PLACEMENT])) == point[PLACEMENT] for point in overrides)
    assert len({point[PLACEMENT] for point in overrides}) > 5


def test_families_are_different_placements_that_include_the_baselines():
    assert len({parse_placement(family) for family in FAMILIES}) == len(FAMILIES)
    assert {"none", "all"} <= set(FAMILIES)


@given(st.sets(st.sampled_from(SLOTS)), st.floats(1e-6, 1.0))
def test_switches_fold_into_the_placement_that_they_spell(slots, learning_rate):
    params = {f"model.placement.{slot}": slot in slots for slot in SLOTS} | {LEARNING_RATE: learning_rate, "number": 7}
    overrides = overrides_of(params)
    assert set(overrides) == {PLACEMENT, LEARNING_RATE}
    assert set(parse_placement(overrides[PLACEMENT])) == slots
    assert overrides[LEARNING_RATE] == pytest.approx(learning_rate, rel=5e-3)
    assert overrides_of(overrides) == overrides


def test_every_dimension_is_a_setting():
    names = {name for kind in KINDS for name in search_space(SearchSettings(placement=kind))}
    assert names == {PLACEMENT, LEARNING_RATE, *(f"{PLACEMENT}.{slot}" for slot in SLOTS)}


def test_one_learning_rate_can_be_held():
    settings = SearchSettings(space={LEARNING_RATE: Range(low=0.03, high=0.03, log=True)})
    assert baseline_points(settings)[0][LEARNING_RATE] == 0.03


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"space": {LEARNING_RATE: {"kind": "range", "low": 0.5, "high": 0.1}}}, "low 0.5 is above high 0.1; swap them"),
        ({"grace_epochs": 9}, "grace_epochs 9 is above max_epochs 4; a trial cannot be granted more epochs than it trains"),
        ({"num_trials": -1}, "num_trials: Input should be greater than or equal to 0"),
        ({"trials": 3}, "trials is not a setting"),
    ],
)
def test_impossible_settings_say_what_to_do(overrides, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(SearchSettings(), overrides)
    assert message in str(caught.value)
