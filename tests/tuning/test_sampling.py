"""What is tried next: how well placements are found, repeats, grids, exhaustion, and equal seeds; no cluster needed."""

import itertools

import numpy as np
import optuna

from models import SLOTS, parse_placement
from tuning.sampling import next_trial
from tuning.settings import SearchSettings
from tuning.space import PLACEMENT, search_space
from tuning.trials import (
    STUDY_NAME,
    end_trial,
    open_storage,
    overrides_in,
    prepare_study,
    report_epoch,
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
