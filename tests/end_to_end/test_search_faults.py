"""A search that is struck down again and again: the driver, the process of a trial, the raylet; with its record in MLflow."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import optuna
import psutil
import pytest

from tuning.trials import STUDY_FILE, STUDY_NAME

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
NUM_TRIALS = 24
STRIKES = ["trial", "driver", "trial", "driver", "raylet"]
DRIVER = """
import sys
import time
from pathlib import Path

from infra.cluster import session
from infra.tracking import Tracker
from pipelines.training.trial import TrialRuns
from tuning.search import run_search
from tuning.settings import SearchSettings

NUM_TRIALS = int(sys.argv[2])

def objective(overrides, report, trial_dir):
    for epoch in range(2):
        time.sleep(0.3)
        report({"val/top1": 0.1 * epoch + overrides["train.learning_rate"]})
    with (trial_dir.parents[1] / "finished.txt").open("a") as file:
        file.write(trial_dir.name + "\\n")

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    settings = SearchSettings(num_trials=NUM_TRIALS, max_epochs=2, grace_epochs=2)
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "template", folder / "artifacts")
    tracker.close_abandoned_runs()
    tags = {"stage": "search"}
    with session(None), tracker.start_run("search", tags=tags, resume_tags=tags) as run:
        with TrialRuns(tracker, run.run_id, "sagsm run demo") as runs:
            run_search(objective, settings, storage_dir=folder / "search", on_event=runs.on_event)
    tracker.close()
"""


def title(process):
    """How a process calls itself; empty if it has ended."""
    with suppress(psutil.Error):
        return (process.cmdline() or [""])[0].rpartition("/")[2]
    return ""


class Search:
    """The driver in a process of its own, and what it has left on the disk."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "driver.py").write_text(DRIVER)
        (folder / "stderr.txt").touch()
        self.process = None

    def records(self):
        table = self.folder / "search" / "trials.json"
        return json.loads(table.read_text()) if table.exists() else []

    def start(self):
        command = [sys.executable, str(self.folder / "driver.py"), str(self.folder), str(NUM_TRIALS)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (self.folder / "stderr.txt").open("w") as file:
            self.process = subprocess.Popen(command, env=env, stderr=file, stdout=file)

    def wait_for(self, condition, seconds=240):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "stderr.txt").read_text()
            time.sleep(0.02)

    def has_ended(self):
        return self.process is None or self.process.poll() is not None

    def strike(self, what):
        """SIGKILL; what dies with it is waited for."""
        if what == "driver":
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            self.process.wait()
            psutil.wait_procs(children, timeout=60)
            return
        name = {"trial": "ray::ImplicitFunc", "raylet": "raylet"}[what]

        def victims():
            return [
                child for child in psutil.Process(self.process.pid).children(recursive=True) if title(child).startswith(name)
            ]

        self.wait_for(victims)
        victims()[0].kill()
        if what == "raylet":
            self.wait_for(self.has_ended)


def test_struck_at_five_moments_a_search_loses_and_repeats_nothing(empty_database, tmp_path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    search, moments = Search(tmp_path), random.Random(0)
    seen = {}
    try:
        for number, what in enumerate(STRIKES):
            if search.has_ended():
                search.start()
            search.wait_for(lambda wanted=3 * number: len(search.records()) > wanted or search.has_ended())
            assert not search.has_ended(), (tmp_path / "stderr.txt").read_text()
            time.sleep(moments.uniform(0, 0.6))
            search.strike(what)
            rows = {row["number"]: row for row in search.records()}
            assert seen.items() <= rows.items(), "what has ended stays as it is"
            seen = rows
        search.start()
        search.wait_for(search.has_ended)
        assert search.process.returncode == 0, (tmp_path / "stderr.txt").read_text()
    finally:
        if not search.has_ended():
            search.process.kill()
    after = {row["number"]: row for row in search.records()}
    assert len(after) == len(search.records()) == NUM_TRIALS
    assert seen.items() <= after.items()

    study = optuna.load_study(study_name=STUDY_NAME, storage=f"sqlite:///{tmp_path / 'search' / STUDY_FILE}")
    states = {trial.number: trial.state.name for trial in study.trials}
    assert set(states.values()) <= {"COMPLETE", "FAIL"}
    completed = {number for number, row in after.items() if row["state"] == "completed"}
    assert completed == {number for number, state in states.items() if state == "COMPLETE"}
    finished = Counter(int(line) for line in (tmp_path / "search" / "finished.txt").read_text().split())
    assert max(finished.values()) == 1
    assert completed <= set(finished)
    assert NUM_TRIALS - len(completed) <= 4  # two that were killed, and those that the raylet may have taken along
    assert {"none", "all", "5a,5b"} <= {after[number]["placement"] for number in after}

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        runs = dict(database.execute("select run_uuid, status from runs"))
        trials = database.execute("select value, run_uuid from tags where key = 'trial'").fetchall()
        commands = dict(database.execute("select run_uuid, value from tags where key = 'rerun'"))
    assert "RUNNING" not in runs.values()
    assert len(trials) == len({number for number, _ in trials}), "one run a trial"
    assert set(map(str, after)) <= {number for number, _ in trials}
    assert all(commands[run].startswith("sagsm run demo --set search.num_trials=0 --set model.placement=") for _, run in trials)
