"""Tests of the search space: points, baselines, conditions, and the dotted settings that they stand for."""

import itertools

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from infra.settings import apply_overrides
from models import SLOTS, list_models, model_options, model_slots, parse_placement
from pipelines.config import ExperimentConfig
from preprocessing.datasets import DatasetSettings
from tuning.settings import Choice, Range, SearchSettings
from tuning.space import LEARNING_RATE, NETWORK, PLACEMENT, baseline_points, families, key_of, search_space, suggest

KINDS = ("booleans", "families", "range")
ATTENDING = [name for name in list_models() if "placement" in model_options(name)]
NOT_WITHOUT = {PLACEMENT: ("none",)}
WIDE = {
    "model.scope": Choice(values=("frame", "temporal", "joint", "divided"), unless=NOT_WITHOUT),
    "model.value": Choice(values=("fused", "bottleneck"), unless=NOT_WITHOUT),
    LEARNING_RATE: Range(low=0.001, high=0.1, log=True),
    "train.weight_decay": Range(low=1e-5, high=1e-3, log=True),
    "model.dropout": Range(low=0, high=0.9999),
    "train.num_segments": Choice(values=(4, 8, 16)),
    "train.batch_size": Range(low=4, high=64, log=True),
    "model.num_heads": Choice(values=(1, 2), when={"model.value": ("fused",)}),
}
EXPERIMENT = ExperimentConfig(dataset=DatasetSettings(name="something_v1", root="/data"), search=SearchSettings(num_trials=0))
seeds = st.integers(0, 2**32 - 1)


def wide_space(kind, network):
    return search_space(SearchSettings(placement=kind, space=WIDE), network)


@given(st.sampled_from(KINDS), st.sampled_from(ATTENDING), seeds)
def test_every_point_is_legal_and_its_settings_are_what_is_trained(kind, network, seed):
    space = wide_space(kind, network)
    overrides = space.overrides_of(space.draw(np.random.default_rng(seed)))
    config = apply_overrides(EXPERIMENT, {NETWORK: network, PLACEMENT: "none"} | overrides)
    for name, value in overrides.items():
        section, field = name.split(".")
        assert getattr(getattr(config, section), field) == value
    assert space.num_slots(overrides) == len(parse_placement(overrides[PLACEMENT], model_slots(network)))


@given(st.sampled_from(KINDS), seeds)
def test_scope_and_value_are_asked_for_only_where_there_is_attention(kind, seed):
    space = wide_space(kind, "sa_gsm_resnet18")
    overrides = space.overrides_of(space.draw(np.random.default_rng(seed)))
    attends = overrides[PLACEMENT] != "none"
    assert ("model.scope" in overrides, "model.value" in overrides) == (attends, attends)
    assert ("model.num_heads" in overrides) == (overrides.get("model.value") == "fused")


@given(seeds)
def test_optuna_picks_points_of_the_space(seed):
    space = wide_space("range", "sa_gsm_bn_inception")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    assert suggest(trial, space) == trial.params
    again = suggest(optuna.trial.FixedTrial(trial.params), space)
    assert space.overrides_of(again) == space.overrides_of(trial.params)


@given(st.sampled_from(ATTENDING), st.data())
def test_equal_placements_are_equal_settings(network, data):
    slots = model_slots(network)
    first = data.draw(st.integers(0, len(slots) - 1))
    length = data.draw(st.integers(0, len(slots)))
    chosen = slots[first : first + length]
    found = [
        search_space(SearchSettings(placement="range"), network).overrides_of(
            {"model.placement.first": first, "model.placement.length": length}
        ),
        search_space(SearchSettings(placement="booleans"), network).overrides_of(
            {f"model.placement.{slot}": slot in chosen for slot in slots}
        ),
        search_space(
            SearchSettings(placement="fixed", fixed={PLACEMENT: "+".join(chosen[::-1]) or "none"}), network
        ).overrides_of({}),
    ]
    assert {key_of(overrides) for overrides in found} == {
        key_of({PLACEMENT: str(parse_placement(",".join(chosen) or "none", slots))})
    }


def test_a_range_reaches_each_row_of_slots():
    space = search_space(SearchSettings(placement="range", space={}))
    found = {space.overrides_of(point)[PLACEMENT] for point in space.points()}
    rows = {str(parse_placement(",".join(SLOTS[first:end]))) for first, end in itertools.combinations(range(11), 2)}
    assert found == rows | {"none"}


def test_all_points_of_a_finite_space_are_listed_once():
    booleans = search_space(SearchSettings(placement="booleans", space={}))
    assert len({key_of(booleans.overrides_of(point)) for point in booleans.points()}) == 1024
    scope = Choice(values=("frame", "joint"), unless={PLACEMENT: ("0",)})  # a mask: no slot
    seed = Range(low=0, high=2)
    space = search_space(SearchSettings(space={"model.scope": scope, "train.seed": seed}))
    assert space.is_finite
    assert len(list(space.points())) == 3 * (2 * (len(families(SLOTS)) - 1) + 1)
    assert not search_space(SearchSettings()).is_finite


@pytest.mark.parametrize("network", ATTENDING)
@pytest.mark.parametrize("kind", KINDS)
def test_baselines_are_points_of_the_space(kind, network):
    space = wide_space(kind, network)
    points = baseline_points(space)
    assert [suggest(optuna.trial.FixedTrial(point), space) for point in points] == points
    slots = model_slots(network)
    last_two = str(parse_placement(",".join(slots[-2:]), slots))
    assert [space.overrides_of(point)[PLACEMENT] for point in points] == ["none", "all", last_two]
    assert [space.overrides_of(point).get("model.scope") for point in points] == [None, "frame", "frame"]
    assert {space.overrides_of(point)[LEARNING_RATE] for point in points} == {0.01}


def test_a_space_without_placements_has_no_baselines_and_may_choose_them_itself():
    chosen = SearchSettings(
        placement="fixed", space={PLACEMENT: Choice(values=("4e,3a", "none"))}, fixed={"train.epochs": 9}, sampler="grid"
    )
    space = search_space(chosen)
    assert [space.overrides_of(point) for point in space.points()] == [
        {PLACEMENT: "3a,4e", "train.epochs": 9},
        {PLACEMENT: "none", "train.epochs": 9},
    ]
    assert [space.overrides_of(point)[PLACEMENT] for point in baseline_points(space)] == ["none"]
    assert baseline_points(search_space(SearchSettings(placement="fixed"))) == []


def test_families_are_different_placements_that_include_the_baselines():
    for network in ATTENDING:
        slots = model_slots(network)
        placements = [parse_placement(family, slots) for family in families(slots)]
        assert len(set(placements)) == len(placements)
        assert {"none", "all", ",".join(slots[-2:])} <= {str(placement) for placement in placements}


def test_with_networks_to_choose_only_what_all_of_them_have_is_searched():
    networks = Choice(values=("tsn_resnet18", "sa_gsm_resnet18", "sa_gsm_bn_inception"))
    space = search_space(SearchSettings(space={NETWORK: networks, "model.scope": WIDE["model.scope"]}))
    assert space.dimensions[PLACEMENT].values == ("none", "all", "stage3", "stage4", "stage5", "stage4,stage5")
    found = [space.overrides_of(point) for point in space.points()]
    assert {NETWORK: "sa_gsm_resnet18", PLACEMENT: "layer2.0,layer2.1", "model.scope": "joint"} in found
    assert [overrides for overrides in found if overrides[NETWORK] == "tsn_resnet18"] == [
        {NETWORK: "tsn_resnet18", PLACEMENT: "none"}
    ]
    assert {overrides[NETWORK] for overrides in map(space.overrides_of, baseline_points(space))} == {"sa_gsm_resnet18"}


def test_numbers_are_trained_as_they_are_printed_and_stay_inside_their_range():
    space = search_space(
        SearchSettings(space={LEARNING_RATE: Range(low=0.012345, high=0.9999), "train.seed": Choice(values=(1.23456,))})
    )
    for value, printed in ((0.0312345, 0.0312), (0.9999, 0.9999), (0.012346, 0.012345)):
        assert space.overrides_of({LEARNING_RATE: value})[LEARNING_RATE] == printed
    assert space.overrides_of({"train.seed": 1.23456})["train.seed"] == 1.23456


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {PLACEMENT: Choice(values=("none",))}},
            "search.space.model.placement and search.placement=families both choose the placement; leave",
        ),
        ({"fixed": {PLACEMENT: "all"}}, "search.fixed.model.placement and search.placement=families both choose the placement"),
        (
            {"fixed": {LEARNING_RATE: 0.1}},
            "search.space.train.learning_rate and search.fixed.train.learning_rate both choose it",
        ),
        (
            {"space": {"model.num_heads": Choice(values=(1,), when={"model.value": ("fused",)})}},
            "search.space.model.num_heads depends on model.value, which is not chosen before it; put model.value before it",
        ),
        (
            {"placement": "booleans", "space": {NETWORK: Choice(values=("sa_gsm_resnet18", "sa_gsm_bn_inception"))}},
            "search.placement is booleans, but the networks of search.space.model.name have different slots",
        ),
        ({"fixed": {NETWORK: "tsn_resnet18"}}, "search.placement is families, but tsn_resnet18 has no attention to place"),
    ],
)
def test_an_impossible_space_says_what_to_do(changes, message):
    with pytest.raises(ConfigError) as caught:
        search_space(SearchSettings(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"space": {LEARNING_RATE: {"kind": "range", "low": 0.5, "high": 0.1}}}, "low 0.5 is above high 0.1; swap them"),
        ({"grace_epochs": 9}, "grace_epochs 9 is above max_epochs 4; a trial cannot be granted more epochs than it trains"),
        ({"num_trials": -1}, "num_trials: Input should be greater than or equal to 0"),
        ({"trials": 3}, "trials is not a setting"),
        ({"sampler": "grid"}, "space.train.learning_rate is a range, of which a grid cannot try each value; make it a choice"),
    ],
)
def test_impossible_settings_say_what_to_do(overrides, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(SearchSettings(), overrides)
    assert message in str(caught.value)
