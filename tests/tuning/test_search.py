"""Tests of the search with real Ray and Optuna: failures, resumption, events, budgets and capacity."""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from functools import partial

import optuna
import pytest
import ray
from ray import cloudpickle

from infra.errors import ClusterError, PipelineError
from models.placement import parse_placement
from tuning.search import run_search
from tuning.settings import SearchSettings
from tuning.trials import TrialRecord, open_storage


@pytest.fixture(scope="module")
def cluster():
    # Ray's workers cannot import a test module, so its functions travel by value.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 * 1024 * 1024, log_to_driver=False)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def score(overrides, epoch):
    """Fewer slots are better, every epoch helps; known in advance."""
    return 0.5 - 0.01 * len(parse_placement(overrides["model.placement"])) + 0.1 * epoch


def objective(overrides, report, trial_dir, faults=None, num_epochs=2):
    fault = (faults or {}).get(int(trial_dir.name))
    if fault == "raise":
        raise RuntimeError("no clips of class 3\nin this subset")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "silent":
        return
    for epoch in range(1, num_epochs + 1):
        report({"val/top1": float("nan") if fault == "nan" else score(overrides, epoch), "val/loss": 1 / epoch})
    (trial_dir / "pid").write_text(str(os.getpid()))


def settings(**changes):
    return SearchSettings(**{"num_trials": 2, "max_epochs": 2, "grace_epochs": 2, "max_concurrent_trials": 1} | changes)


def optuna_states(storage_dir):
    with open_storage(storage_dir) as storage:
        return [trial.state.name for trial in optuna.load_study(study_name="search", storage=storage).trials]


def test_failures_do_not_end_the_search_and_it_can_be_extended(cluster, tmp_path):
    broken = partial(objective, faults={1: "raise", 2: "nan", 3: "kill", 4: "silent"})
    events, progress = [], []

    def run(num_trials):
        changed = settings(num_trials=num_trials, max_concurrent_trials=0)
        return run_search(
            broken, changed, storage_dir=tmp_path, on_event=events.append, on_progress=lambda *args: progress.append(args)
        )

    result = run(6)
    assert [record.number for record in result.trials] == list(range(6))
    assert [record.state for record in result.trials] == ["completed"] + ["failed"] * 4 + ["completed"]
    errors = [record.error for record in result.trials]
    assert errors[1] == "RuntimeError: no clips of class 3"
    assert errors[2] == "ValueError: val/top1 is nan; expected a finite number, so the trial has diverged"
    assert "died" in errors[3]
    assert errors[4] == "RuntimeError: the objective returned without a report of val/top1"
    assert "in this subset" in (tmp_path / "trials" / "00001" / "error.txt").read_text()
    assert optuna_states(tmp_path) == ["COMPLETE"] + ["FAIL"] * 4 + ["COMPLETE"]
    assert [TrialRecord(**row) for row in json.loads((tmp_path / "trials.json").read_text())] == result.trials

    assert result.best == result.trials[0], "the baseline without attention wins by construction"
    assert result.trials[0].overrides == {"model.placement": "none", "train.learning_rate": 0.01}
    assert result.trials[0].top1_by_epoch == [score(result.trials[0].overrides, epoch) for epoch in (1, 2)]
    assert int((tmp_path / "trials" / "00000" / "pid").read_text()) != os.getpid()

    of_first = [(event.kind, event.epoch, event.state) for event in events if event.number == 0]
    assert of_first == [("started", 0, "running"), ("epoch", 1, "running"), ("epoch", 2, "running"), ("ended", 2, "completed")]
    assert [event.metrics for event in events if event.number == 0][1] == {
        "val/top1": result.trials[0].top1_by_epoch[0],
        "val/loss": 1,
    }
    assert Counter(event.kind for event in events if event.number in (1, 2, 3)) == {"started": 3, "ended": 3}
    assert progress[-1] == (6, 6, "trials, best val/top1 0.700 by trial 0 (none)")

    events.clear()
    assert run(6) == result
    assert events == []
    extended = []
    thread = threading.Thread(target=lambda: extended.append(run(7)))
    thread.start()
    thread.join()
    assert extended[0].trials[:6] == result.trials
    assert [record.number for record in extended[0].trials[6:]] == [6]


def test_if_all_fail_the_first_cause_is_shown_and_a_later_run_tries_again(cluster, tmp_path):
    message = (
        "all 2 trials failed; the first cause, of trial 0: RuntimeError: no clips of class 3; tracebacks are in .*error.txt"
    )
    with pytest.raises(PipelineError, match=message):
        run_search(partial(objective, faults={0: "raise", 1: "raise"}), settings(), storage_dir=tmp_path)
    result = run_search(objective, settings(), storage_dir=tmp_path)
    assert [(record.number, record.placement, record.state) for record in result.trials] == [
        (2, "5a,5b", "completed"),
        (3, "none", "completed"),
    ]


def test_an_error_of_the_callback_stops_the_search_and_costs_no_finished_trial(cluster, tmp_path):
    seen = []

    def on_event(event):
        seen.append(event)
        if event.number == 1 and event.kind == "epoch":
            raise OSError("MLflow is down")

    with pytest.raises(OSError, match="MLflow is down"):
        run_search(objective, settings(num_trials=3), storage_dir=tmp_path, on_event=on_event)
    assert seen[-1].number == 1

    seen.clear()
    with open_storage(tmp_path) as storage:
        study = optuna.load_study(study_name="search", storage=storage)
        study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING))  # killed before it had settings
    result = run_search(objective, settings(num_trials=3), storage_dir=tmp_path, on_event=seen.append)
    assert (seen[0].kind, seen[0].number, seen[0].state) == ("ended", 1, "interrupted")
    assert [(record.number, record.placement) for record in result.trials] == [(0, "none"), (2, "5a,5b"), (4, "all")]
    assert {event.number for event in seen} == {1, 2, 4}
    assert "RUNNING" not in optuna_states(tmp_path)


@pytest.mark.slow
def test_early_stopping_spares_epochs(cluster, tmp_path):
    changed = settings(num_trials=4, max_epochs=4, grace_epochs=1, reduction_factor=2)
    result = run_search(partial(objective, num_epochs=4), changed, storage_dir=tmp_path)
    none, everywhere = result.trials[:2]
    assert (none.state, none.epochs) == ("completed", 4)
    assert (everywhere.state, everywhere.epochs, everywhere.top1_by_epoch) == ("stopped", 1, [score(everywhere.overrides, 1)])
    assert optuna_states(tmp_path)[:2] == ["COMPLETE", "PRUNED"]


@pytest.mark.parametrize(
    ("changes", "asked", "advice"),
    [
        ({"cpus_per_trial": 3}, "3 CPUs and 0 GPUs on one node", "lower search.cpus_per_trial to 2"),
        ({"gpus_per_trial": 0.5}, "1 CPUs and 0.5 GPUs on one node", "lower search.gpus_per_trial to 0"),
        (
            {"workers_per_trial": 3},
            "3 workers with 1 CPUs and 0 GPUs each, a worker on one node",
            "lower search.workers_per_trial to 2, or search.cpus_per_trial",
        ),
    ],
)
def test_a_trial_that_does_not_fit_is_refused_at_once(cluster, tmp_path, changes, asked, advice):
    started = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        run_search(objective, settings(**changes), storage_dir=tmp_path)
    assert str(caught.value) == f"a trial asks for {asked}; the nodes of the cluster have 2 CPUs and 0 GPUs; {advice}"
    assert time.monotonic() - started < 30


def test_no_trials_search_nothing(tmp_path):
    result = run_search(objective, settings(num_trials=0), storage_dir=tmp_path)
    assert (result.trials, result.best, result.overrides) == ([], None, {})
    assert list(tmp_path.iterdir()) == []


def test_a_spent_budget_ends_the_search_without_an_error_and_more_trials_may_follow(cluster, tmp_path):
    result = run_search(objective, settings(num_trials=3, max_hours=1e-9), storage_dir=tmp_path)
    assert [record.number for record in result.trials] == [0]
    assert result.note == "search.max_hours=1e-09 is spent"
    assert run_search(objective, settings(num_trials=3, max_hours=1e-9), storage_dir=tmp_path) == result
    more = run_search(objective, settings(num_trials=2), storage_dir=tmp_path)
    assert (more.trials[0], len(more.trials), more.note) == (result.trials[0], 2, "")
