"""Tests of the study as a record: what survives a kill at which moment, and who is best. No Ray needed."""

import json
import math

import optuna
import pytest
from optuna.trial import TrialState

from infra.errors import PipelineError
from tuning.settings import SearchSettings
from tuning.space import LEARNING_RATE, PLACEMENT, search_space, suggest
from tuning.trials import (
    STUDY_NAME,
    SearchResult,
    TrialRecord,
    best_record,
    end_trial,
    open_storage,
    overrides_in,
    prepare_study,
    rank_records,
    read_records,
    report_epoch,
    settle_interrupted,
    start_trial,
    write_records,
)

SETTINGS = SearchSettings(placement="booleans")
SPACE = search_space(SETTINGS)


@pytest.fixture
def study(tmp_path):
    with open_storage(tmp_path) as storage:
        study = optuna.create_study(study_name=STUDY_NAME, storage=storage, direction="maximize")
        prepare_study(study, SETTINGS, SPACE)
        yield study


def start(study, epochs=()):
    trial = study.ask()
    start_trial(trial, suggest(trial, SPACE), SPACE)
    for epoch, value in enumerate(epochs, start=1):
        report_epoch(study, trial, {"val/top1": value}, epoch, SETTINGS)
    return trial


def states(study):
    """Without what is queued."""
    return [trial.state.name for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]


def record(number, top1=0.5, num_slots=1, state="completed"):
    history = [] if top1 is None else [top1]
    return TrialRecord(number, {"train.epochs": number}, "5b", num_slots, 0.01, top1, history, len(history), state, 1.0, "")


def test_baselines_come_first_and_once(study):
    prepare_study(study, SETTINGS, SPACE)
    placements = [overrides_in(start(study))[PLACEMENT] for _ in range(4)]
    assert placements[:3] == ["none", "all", "5a,5b"]
    assert states(study) == ["RUNNING"] * 4


def test_an_ended_trial_becomes_a_record(study):
    ended = end_trial(study, start(study, [0.2, 0.4, 0.3]), "completed", 12.3456)
    assert ended == TrialRecord(
        number=0,
        overrides={LEARNING_RATE: 0.01, PLACEMENT: "none"},
        placement="none",
        num_slots=0,
        learning_rate=0.01,
        top1=0.4,
        top1_by_epoch=[0.2, 0.4, 0.3],
        epochs=3,
        state="completed",
        seconds=12.346,
        error="",
        metrics={"val/top1": 0.4},
    )
    assert read_records(study) == [ended]
    assert study.best_value == 0.4


def test_optuna_hears_of_stopped_and_failed_trials_as_such(study):
    end_trial(study, start(study, [0.3, 0.2]), "stopped", 1.0)
    end_trial(study, start(study, [0.1]), "failed", 1.0, "ValueError: val/top1 is nan")
    assert states(study) == ["PRUNED", "FAIL"]
    assert study.trials[0].value == 0.2, "TPE compares a pruned trial by its last epoch"
    assert [(item.state, item.top1, item.error) for item in read_records(study)] == [
        ("stopped", 0.3, ""),
        ("failed", 0.1, "ValueError: val/top1 is nan"),
    ]


def test_an_interrupted_trial_is_tried_again_under_a_new_number(study):
    killed = start(study, [0.1])
    end_trial(study, start(study, [0.5]), "completed", 1.0)
    assert [trial.number for trial in settle_interrupted(study)] == [0]
    assert settle_interrupted(study) == []
    assert states(study) == ["FAIL", "COMPLETE"]
    skipped_baseline, again = start(study), start(study)
    assert (skipped_baseline.number, overrides_in(skipped_baseline)[PLACEMENT]) == (2, "5a,5b")
    assert (again.number, again.params) == (3, killed.params)
    assert [item.number for item in read_records(study)] == [1]


def test_a_trial_can_be_interrupted_twice(study):
    params = start(study).params
    settle_interrupted(study)
    *baselines, again = (start(study) for _ in range(3))
    assert again.params == params
    settle_interrupted(study)
    assert [start(study).params for _ in range(3)] == [*(trial.params for trial in baselines), params]
    assert states(study) == ["FAIL"] * 4 + ["RUNNING"] * 3


def test_a_queued_trial_killed_before_it_asked_for_its_values_keeps_them(study):
    study.ask()
    settle_interrupted(study)
    *_, again = (start(study) for _ in range(3))
    assert overrides_in(again)[PLACEMENT] == "none"


@pytest.mark.parametrize(("state", "told"), [("completed", "COMPLETE"), ("stopped", "PRUNED"), ("failed", "FAIL")])
def test_killed_between_the_outcome_and_the_telling(study, state, told):
    end_trial(study, start(study, [0.5]), "completed", 1.0)
    start(study, [0.4]).set_user_attr("outcome", {"state": state, "seconds": 2.0, "error": ""})
    assert settle_interrupted(study) == []
    assert states(study) == ["COMPLETE", told]
    assert [(item.number, item.state, item.top1) for item in read_records(study)] == [(0, "completed", 0.5), (1, state, 0.4)]


def test_failures_count_once_any_trial_has_succeeded(study):
    end_trial(study, start(study), "failed", 1.0, "RuntimeError: no disk")
    end_trial(study, start(study, [0.5]), "completed", 1.0)
    settle_interrupted(study)
    assert [item.state for item in read_records(study)] == ["failed", "completed"]


def test_if_all_trials_failed_they_are_tried_again(study):
    for _ in range(3):
        end_trial(study, start(study), "failed", 1.0, "RuntimeError: no disk")
    assert len(read_records(study)) == 3
    settle_interrupted(study)
    assert read_records(study) == []
    assert [overrides_in(start(study))[PLACEMENT] for _ in range(3)] == ["none", "all", "5a,5b"]


def test_a_study_of_another_space_is_refused(study):
    other = SearchSettings(placement="families")
    with pytest.raises(PipelineError, match=r"the study searches val/top1 over .*Range.*, expected val/top1 over .*remove its"):
        prepare_study(study, other, search_space(other))
    prepare_study(study, SETTINGS.model_copy(update={"num_trials": 99}), SPACE)


def test_the_best_trial_has_the_best_epoch_then_fewer_slots_then_the_lower_number():
    trials = [
        record(0, 0.9, state="failed"),
        record(1, 0.5, num_slots=3),
        record(2, 0.6, num_slots=4),
        record(3, 0.6, num_slots=2, state="stopped"),
        record(4, 0.6, num_slots=2),
        record(5, None, state="failed"),
    ]
    assert [item.number for item in rank_records(trials)] == [3, 4, 2, 1, 0, 5]
    best = best_record(trials)
    assert best == trials[3]
    assert SearchResult(trials, best).overrides == {"train.epochs": 3}


def test_nothing_searched_has_no_best_and_no_overrides():
    assert best_record([]) is None
    assert best_record([record(0, state="failed")]) is None
    assert SearchResult([], None).overrides == {}


def test_the_table_of_trials_is_json(tmp_path):
    write_records([record(0), record(1, None, state="failed")], tmp_path / "trials.json")
    rows = json.loads((tmp_path / "trials.json").read_text())
    assert [TrialRecord(**row) for row in rows] == [record(0), record(1, None, state="failed")]


def test_the_study_on_disk_says_the_same(tmp_path):
    with open_storage(tmp_path) as storage:
        study = optuna.create_study(study_name=STUDY_NAME, storage=storage, direction="maximize")
        ended = end_trial(study, start(study, [1 / 3, math.pi / 10]), "completed", 1.0)
    with open_storage(tmp_path) as storage:
        study = optuna.load_study(study_name=STUDY_NAME, storage=storage)
        assert study.trials[0].state == TrialState.COMPLETE
        assert read_records(study) == [ended]
