"""Importance: planted effects are found, few trials are called few, and early stopping is not forgotten."""

import numpy as np
import pytest

from models.placement import SLOTS, Placement
from tuning.importance import MIN_TRIALS, weigh
from tuning.settings import Range
from tuning.trials import TrialRecord

SPACE = {"train.learning_rate": Range(low=0.01, high=0.1, log=True)}


def tried(number, slots, value, *, rate=0.03, state="completed", epochs=2, **others):
    placement = str(Placement(slots))
    overrides = {"model.placement": placement, "train.learning_rate": rate, **others}
    history = [] if value is None else [value - 0.01 * (epochs - 1 - epoch) for epoch in range(epochs)]
    return TrialRecord(number, overrides, placement, len(slots), rate, value, history, len(history), state, 1.0, "")


def searched(num_trials, value_of, **changes):
    rng = np.random.default_rng(0)
    trials = []
    for number in range(num_trials):
        slots = [slot for slot in SLOTS if rng.random() < 0.5]
        rate = float(np.exp(rng.uniform(np.log(0.01), np.log(0.1))))
        trials.append(tried(number, slots, value_of(slots) + 0.01 * rng.normal(), rate=rate, **changes))
    return trials


def test_a_planted_slot_is_the_most_important_and_its_effect_is_inside_its_interval():
    found = weigh(searched(60, lambda slots: 0.5 + 0.1 * ("4e" in slots)), SPACE, SLOTS, grace_epochs=1)
    assert next(iter(found.fanova)) == "4e"
    assert max(found.ped_anova, key=found.ped_anova.get) in ("4e", "train.learning_rate")  # 15 trials of 60: hardly any data
    assert sum(found.fanova.values()) == pytest.approx(1)
    effect = next(slot for slot in found.slots if slot.slot == "4e")
    assert effect.interval[0] < 0.1 < effect.interval[1]
    assert effect.num_with + effect.num_without == 60


def test_a_planted_pair_comes_first():
    found = weigh(searched(80, lambda slots: 0.5 + 0.1 * ("3a" in slots and "5b" in slots)), SPACE, SLOTS, grace_epochs=1)
    one, other, together = found.pairs[0]
    assert {one, other} == {"3a", "5b"}
    assert together == pytest.approx(0.1, abs=0.05)


def test_too_few_trials_give_no_shares_and_say_so():
    found = weigh(searched(MIN_TRIALS - 1, lambda slots: 0.5), SPACE, SLOTS, grace_epochs=1)
    assert (found.ped_anova, found.fanova, found.pairs) == ({}, {}, [])
    assert any(f"Only {MIN_TRIALS - 1} trials" in note for note in found.notes)
    assert len(found.slots) == len(SLOTS)


def test_where_most_were_stopped_all_are_compared_at_the_epoch_that_all_reached():
    trials = [
        tried(number, SLOTS[: number % 5], 0.5 + number / 100, state="completed" if number < 4 else "stopped", epochs=2)
        for number in range(16)
    ]
    found = weigh(trials, SPACE, SLOTS, grace_epochs=1)
    assert found.num_trials == 16
    assert found.basis.startswith("value after 1 epochs")
    assert any("Only 4 trials were completed" in note for note in found.notes)


def test_stopped_trials_are_left_out_and_named_as_a_bias():
    others = [tried(20, ["3a"], 0.1, state="stopped"), tried(21, ["3b"], None, state="failed")]
    trials = [*searched(20, lambda slots: 0.5), *others]
    found = weigh(trials, SPACE, SLOTS, grace_epochs=1)
    assert found.num_trials == 20
    assert any("1 trials were stopped early" in note for note in found.notes)


def test_conditional_settings_and_constants_do_no_harm():
    trials = searched(20, lambda slots: 0.5 + 0.1 * len(slots))
    for number, trial in enumerate(trials):
        trial.overrides["train.batch_size"] = 8
        if number % 2:
            trial.overrides["model.scope"] = "joint" if number % 4 == 1 else "frame"
    found = weigh(trials, SPACE, SLOTS, grace_epochs=1)
    assert "model.scope" in found.fanova
    assert "train.batch_size" not in found.fanova


def test_equal_values_have_no_causes():
    trials = [tried(number, SLOTS[: number % 5], 0.125) for number in range(20)]
    found = weigh(trials, SPACE, SLOTS, grace_epochs=1)
    assert found.fanova == {}
    assert found.notes == ["All trials reached the same value, or had the same settings."]
