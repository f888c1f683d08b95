"""A trial in this process, with seeds, and on workers of a cluster that give back what they held; its record in MLflow."""

import os
import shutil
import signal
import sqlite3
import statistics
import sys
import time
from functools import partial

import psutil
import pytest
import torch

from infra.errors import ClusterError
from infra.tracking import Tracker
from pipelines.training.job import train_job
from pipelines.training.settings import ModelSettings, TrainSettings
from pipelines.training.trial import TrialRuns, run_trial, trial_job
from tuning.search import run_search
from tuning.settings import SearchSettings
from tuning.trials import SCRATCH, TrialEvent

CPU = torch.device("cpu")


def job_of(shards_dir, search):
    train = TrainSettings(epochs=4, batch_size=4, warmup_epochs=1, pixels=32, num_segments=2, loader_threads=1, flip="none")
    return trial_job(str(shards_dir), ModelSettings(dropout=0.2), train, search, val_split="validation")


def reported(overrides, trial_dir, job, search):
    reports = []
    run_trial(overrides, reports.append, trial_dir, job=job, search=search)
    return reports


def test_a_trial_reports_each_epoch_with_its_cost(shards_dir, tmp_path):
    search = SearchSettings(max_epochs=2, cost="mmacs", scheduler="none")
    reports = reported({"model.placement": "5b", "train.learning_rate": 0.02}, tmp_path, job_of(shards_dir, search), search)
    assert len(reports) == 2
    assert {"val/top1", "train/loss", "weights/gamma_5b", "cost/mmacs"} <= reports[0].keys()
    assert reports[1]["cost/mmacs"] == reports[0]["cost/mmacs"] > 1
    assert list(tmp_path.iterdir()) == []


def test_seeds_take_turns_and_their_mean_is_what_each_would_have_given_alone(shards_dir, tmp_path):
    search = SearchSettings(max_epochs=2, seeds_per_trial=2)
    job, overrides = job_of(shards_dir, search), {"model.placement": "none", "train.seed": 5}
    reports = reported(overrides, tmp_path, job, search)
    alone = [
        train_job(job.with_overrides({**overrides, "train.seed": seed}), checkpoint_dir=None, device=CPU) for seed in (5, 6)
    ]
    assert len(reports) == 2
    for epoch, metrics in enumerate(reports):
        for name in ("val/top1", "val/loss", "train/loss"):
            assert metrics[name] == pytest.approx(statistics.fmean(run.history[epoch].to_dict()[name] for run in alone))
    assert alone[0].history[0].train_loss != alone[1].history[0].train_loss
    assert [path.name for path in tmp_path.iterdir()] == [SCRATCH], "what a trial leaves is where the search removes it"


def test_every_trial_is_a_run_that_says_how_to_run_it_again(empty_database, tmp_path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "template", tmp_path / "artifacts")
    overrides = {"model.placement": "4e,5b", "train.learning_rate": 0.02}
    ends = {0: "completed", 1: "stopped", 2: "failed", 3: "interrupted"}
    with tracker.start_run("search") as stage, TrialRuns(tracker, stage.run_id, "sagsm run demo") as runs:
        for number, state in ends.items():
            runs.on_event(TrialEvent("started", number, overrides, {}, 0, "running"))
            runs.on_event(TrialEvent("epoch", number, overrides, {"val/top1": 0.5}, 1, "running"))
            runs.on_event(TrialEvent("ended", number, overrides, {}, 1, state, "no disk" if state == "failed" else ""))
        runs.on_event(TrialEvent("started", 4, overrides, {}, 0, "running"))
    tracker.close()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        status = dict(database.execute("select name, status from runs"))
        tags = {
            (name, key): value
            for name, key, value in database.execute(
                "select runs.name, tags.key, tags.value from tags join runs using (run_uuid)"
            )
        }
    names = [f"t00{number} 4e+5b" for number in range(5)]
    assert [status[name] for name in names] == ["FINISHED", "FINISHED", "FAILED", "KILLED", "KILLED"]
    for name in names:
        assert tags[name, "mlflow.parentRunId"] == stage.run_id
        assert tags[name, "rerun"] == (
            "sagsm run demo --set search.num_trials=0 --set model.placement=4e,5b --set train.learning_rate=0.02"
        )
    assert tags[names[2], "error"] == "no disk"


def getting_worse(overrides, report, trial_dir, **arguments):
    """A real training whose reports fall from trial to trial, so that the scheduler stops each after the first."""
    run_trial(overrides, lambda metrics: report({**metrics, "val/top1": 1 - 0.1 * int(trial_dir.name)}), trial_dir, **arguments)


def processes(name):
    found = psutil.Process().children(recursive=True)
    return [child for child in found if child.is_running() and child.name().startswith(name)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray reads its own old options there
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Ray's processes, whose output nobody closes
def test_trials_with_workers_that_are_killed_or_stopped_leave_room_for_the_next(shards_dir, tmp_path):
    """Each needs the whole cluster: were anything left behind, the next would wait until it fails."""
    ray = pytest.importorskip("ray")
    from ray import cloudpickle

    from infra.cluster import node_resources

    search = SearchSettings(num_trials=3, max_epochs=2, grace_epochs=1, reduction_factor=1000, workers_per_trial=2)
    objective = partial(getting_worse, job=job_of(shards_dir, search), search=search)

    def on_event(event):
        if event.kind == "epoch" and event.number == 0:
            os.kill(processes("ray::ImplicitFunc")[0].pid, signal.SIGKILL)

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    try:
        texts = []
        result = run_search(
            objective, search, storage_dir=tmp_path, on_event=on_event, on_progress=lambda *args: texts.append(args[2])
        )
        assert texts[0] == "trials, 1 at a time"
        assert [(record.state, record.epochs) for record in result.trials] == [("failed", 1), ("stopped", 1), ("stopped", 1)]
        assert all(record.metrics["work/workers"] == 2 for record in result.trials)
        assert [path for path in tmp_path.rglob("*") if path.name.startswith("step-")] == [], "checkpoints are gone"
        deadline = time.monotonic() + 60  # one watcher is left behind, that of the trial that was killed
        while node_resources(free=True)[0].get("CPU") != 2 or len(processes("ray::PlacementGroupCleaner")) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        ray.shutdown()
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray reads its own old options there
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Ray's processes, whose output nobody closes
@pytest.mark.parametrize(("num_cpus", "workers", "at_once"), [(1, 1, 1), (4, 1, 4), (4, 2, 2), (1, 2, 0)])
def test_a_search_never_hangs_whatever_the_cpus(shards_dir, tmp_path, num_cpus, workers, at_once):
    """One trial more than run at once: the last needs what another gives back. 4 CPUs are logical ones of fewer cores."""
    import ray

    search = SearchSettings(num_trials=at_once + 1, max_epochs=1, scheduler="none", workers_per_trial=workers)
    objective = partial(run_trial, job=job_of(shards_dir, search), search=search)
    texts = []
    ray.init("local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        started = time.monotonic()
        if at_once == 0:
            with pytest.raises(ClusterError, match=r"lower search\.workers_per_trial to 1"):
                run_search(objective, search, storage_dir=tmp_path)
            assert time.monotonic() - started < 30
            return
        result = run_search(objective, search, storage_dir=tmp_path, on_progress=lambda *args: texts.append(args[2]))
    finally:
        ray.shutdown()
    assert texts[0] == f"trials, {at_once} at a time"
    assert [record.state for record in result.trials] == ["completed"] * (at_once + 1)
    assert {record.metrics.get("work/workers", 1) for record in result.trials} == {workers}
