"""What is tried next: how well placements are found, repeats, grids, exhaustion, and equal seeds; no cluster needed."""

import itertools
from types import SimpleNamespace

import numpy as np
import optuna
import pytest

from models import SLOTS, parse_placement
from tuning.sampling import Searcher, next_trial
from tuning.settings import Choice, Range, SearchSettings
from tuning.space import LEARNING_RATE, PLACEMENT, families, key_of, search_space
from tuning.trials import (
    STUDY_NAME,
    SearchResult,
    best_record,
    end_trial,
    open_storage,
    overrides_in,
    prepare_study,
    read_records,
    report_epoch,
    settle_interrupted,
)

PLACEMENTS = np.array(list(itertools.product((0, 1), repeat=len(SLOTS))))


def settings(**changes):
    return SearchSettings(**{"placement": "booleans", "space": {}} | changes)


def new_study(changed):
    directions = ["maximize"] if changed.cost is None else ["maximize", "minimize"]
    study = optuna.create_study(directions=directions)
    prepare_study(study, changed, search_space(changed))
    return study


def simulate(study, changed, objective, num_trials, until=None):
    """Ask and tell one trial after the other; the settings of those that were trained, until nothing is left, or to `until`."""
    found, space = [], search_space(changed)
    while len(found) < num_trials and until not in found and (trial := next_trial(study, changed, space)) is not None:
        overrides = overrides_in(trial)
        report_epoch(study, trial, objective(overrides), 1, changed)
        end_trial(study, trial, "completed", 1.0)
        found.append(overrides)
    return found


def flat(_overrides):
    return {"val/top1": 0.5, "cost/mmacs": 1.0}


def num_slots(overrides):
    return {"val/top1": 0.05 * len(parse_placement(overrides[PLACEMENT])), "cost/mmacs": 1.0}


def synthetic_objective(seed, noise=0.2):
    """Accuracy of each of the 1,024 placements: an effect of each slot, interactions of five pairs of slots, and noise.

    Effects and interactions are drawn from one normal distribution, so that a slot can help alone and harm beside another one.
    The sum is scaled to a deviation of 1 over all placements; to it each placement adds noise of deviation `noise`, as one
    training with one seed would. The best placement is that without noise, which noise can hide, and has any number of slots.
    """
    rng = np.random.default_rng(seed)
    value = PLACEMENTS @ rng.normal(0, 1, len(SLOTS))
    pairs = list(itertools.combinations(range(len(SLOTS)), 2))
    for pair in rng.choice(len(pairs), size=5, replace=False):
        one, other = pairs[pair]
        value = value + rng.normal(0, 1) * PLACEMENTS[:, one] * PLACEMENTS[:, other]
    value = value / value.std()
    seen = value + rng.normal(0, noise, len(value))
    names = [str(parse_placement(",".join(itertools.compress(SLOTS, row)) or "none")) for row in PLACEMENTS]
    table = dict(zip(names, seen, strict=True))
    return names[int(value.argmax())], lambda overrides: {"val/top1": float(table[overrides[PLACEMENT]])}


def num_found(sampler, num_seeds=10, num_trials=120):
    """In how many searches the truly best placement was among the trials."""
    found = 0
    for seed in range(num_seeds):
        best, objective = synthetic_objective(seed)
        changed = settings(sampler=sampler, seed=seed)
        found += {PLACEMENT: best} in simulate(new_study(changed), changed, objective, num_trials, until={PLACEMENT: best})
    return found


def test_tpe_finds_the_best_of_1024_placements_in_120_trials_and_random_search_does_not():
    assert num_found("tpe") >= 9
    assert num_found("random") <= 4


def found_in_sessions(folder, changed, sessions):
    """What is tried, one trial at a time, when the study is opened anew for each of the sessions."""
    folder.mkdir()
    found = []
    for num_trials in sessions:
        with open_storage(folder) as storage:
            study = optuna.create_study(study_name=STUDY_NAME, storage=storage, direction="maximize", load_if_exists=True)
            prepare_study(study, changed, search_space(changed))
            found += simulate(study, changed, num_slots, num_trials)
    return found


def test_equal_seeds_give_equal_trials_however_often_the_search_is_resumed(tmp_path):
    whole = found_in_sessions(tmp_path / "whole", settings(), [14])
    assert found_in_sessions(tmp_path / "resumed", settings(), [3, 1, 10]) == whole
    other = found_in_sessions(tmp_path / "other", settings(seed=1), [5])
    assert other[:3] == whole[:3]
    assert other[3:5] != whole[3:5]
    assert len({str(point) for point in whole}) == 14


def told(study):
    """State and original of each trial that was told and not trained."""
    trials = study.get_trials(deepcopy=False)
    return [(trial.state.name, trial.user_attrs["same_as"]) for trial in trials if "same_as" in trial.user_attrs]


SCOPE = {"model.scope": Choice(values=("frame", "joint"), unless={PLACEMENT: ("none",)})}


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_each_point_of_a_small_space_is_trained_once_and_then_the_search_is_over(sampler):
    changed = settings(placement="families", sampler=sampler, space=SCOPE)
    study = new_study(changed)
    found = simulate(study, changed, num_slots, 1000)
    assert len({key_of(overrides) for overrides in found}) == len(found) == 2 * (len(families(SLOTS)) - 1) + 1
    assert [overrides[PLACEMENT] for overrides in found[:3]] == ["none", "all", "5a,5b"]
    assert [record.overrides for record in read_records(study)] == found, "repeats count for nothing"
    assert (sampler == "grid") == (told(study) == [])
    assert settle_interrupted(study) == []
    assert next_trial(study, changed, search_space(changed)) is None


def test_a_grid_has_an_order_that_does_not_depend_on_the_results():
    changed = settings(placement="families", sampler="grid", space=SCOPE)
    assert simulate(new_study(changed), changed, num_slots, 99) == simulate(new_study(changed), changed, flat, 99)


def test_a_repeat_is_told_what_its_original_was_told():
    changed = settings(placement="fixed", baselines=False, space={PLACEMENT: Choice(values=("none", "4e,3a", "3a,4e"))})
    space, study = search_space(changed), new_study(changed)
    for name in ("none", "3a,4e", "none", "4e,3a"):
        study.enqueue_trial({PLACEMENT: name})
    for value, state in ((0.4, "completed"), (0.3, "stopped")):
        trial = next_trial(study, changed, space)
        report_epoch(study, trial, {"val/top1": value}, 1, changed)
        end_trial(study, trial, state, 1.0)
    assert next_trial(study, changed, space) is None
    assert told(study)[:2] == [("COMPLETE", 0), ("PRUNED", 1)]
    assert [trial.value for trial in study.trials[:4]] == [0.4, 0.3, 0.4, 0.3]


def test_what_is_running_is_not_trained_twice_but_what_failed_may_be_tried_again():
    changed = settings(placement="fixed", baselines=False, space={PLACEMENT: Choice(values=("none", "all"))})
    space, study = search_space(changed), new_study(changed)
    running = [next_trial(study, changed, space) for _ in range(2)]
    assert {overrides_in(trial)[PLACEMENT] for trial in running} == {"none", "all"}
    assert next_trial(study, changed, space) is None
    end_trial(study, running[0], "failed", 1.0, "RuntimeError: no memory")
    again = next_trial(study, changed, space)
    assert overrides_in(again) == overrides_in(running[0])


def test_an_empty_space_is_one_trial():
    changed = settings(placement="fixed", fixed={PLACEMENT: "5b"})
    assert simulate(new_study(changed), changed, num_slots, 5) == [{PLACEMENT: "5b"}]


def test_real_numbers_that_are_printed_alike_are_one_trial():
    rate = Range(low=0.1, high=0.1004, log=True)  # 0.1 to three digits
    changed = settings(placement="fixed", space={LEARNING_RATE: rate, PLACEMENT: Choice(values=("all",))}, baselines=False)
    assert simulate(new_study(changed), changed, num_slots, 5) == [{PLACEMENT: "all", LEARNING_RATE: 0.1}]


def test_with_a_cost_the_study_has_two_objectives_and_keeps_the_front():
    changed = settings(cost="mmacs", scheduler="none", seed=3)
    study = new_study(changed)

    def objective(overrides):
        size = len(parse_placement(overrides[PLACEMENT]))
        return {"val/top1": 0.5 + 0.04 * size - 0.004 * size * size, "cost/mmacs": 100.0 + size}

    simulate(study, changed, objective, 40)
    result = SearchResult(read_records(study), best_record(read_records(study)))
    assert result.best.num_slots == 5
    assert [(record.num_slots, record.cost) for record in result.pareto] == [(size, 100.0 + size) for size in range(6)]
    assert result.best.metrics == {"val/top1": pytest.approx(0.6), "cost/mmacs": 105.0}
    assert {trial.number for trial in study.best_trials} >= {record.number for record in result.pareto}


def test_the_searcher_speaks_to_ray(tmp_path):
    changed = settings(placement="families", sampler="grid")
    with open_storage(tmp_path) as storage:
        searcher = Searcher(storage, changed, search_space(changed))
        first = searcher.suggest("a")
        assert first == {"number": 0, "overrides": overrides_in(searcher.optuna_trial(SimpleNamespace(trial_id="a")))}
        while searcher.suggest("another") != "FINISHED":
            assert not searcher.is_exhausted
        assert searcher.is_exhausted
        assert len(searcher.study.trials) == len(families(SLOTS))
