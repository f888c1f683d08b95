import http.server
import itertools
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from infra.errors import PipelineError
from infra.tracking import TrackedRun, Tracker
from infra.tracking_client import _means_away

OUTAGE_SECONDS = float(os.environ.get("SAGSM_OUTAGE_SECONDS", "14"))


@contextmanager
def answering(port: int, status: int) -> Iterator[None]:
    """A server that has only one answer, as a proxy gives it whose server is gone."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def log_until(is_over: Callable[[], bool], run: TrackedRun, steps: Iterator[int]) -> list[float]:
    """Log a step about every 20 ms; how long each call took."""
    seconds = []
    while not is_over():
        step = next(steps)
        started = time.monotonic()
        run.log_metrics({"train/loss": step / 10, "train/lr": 0.1}, step)
        seconds.append(time.monotonic() - started)
        time.sleep(0.02)
    return seconds


def log_for(seconds: float, run: TrackedRun, steps: Iterator[int]) -> list[float]:
    end = time.monotonic() + seconds
    return log_until(lambda: time.monotonic() > end, run, steps)


@pytest.mark.slow
def test_a_server_that_is_killed_costs_no_metric_and_no_time(mlflow_server: Any, tmp_path: Path) -> None:
    tracker = Tracker(mlflow_server.uri, "outage", tmp_path / "artifacts")
    steps = itertools.count()
    run = tracker.start_run("train")
    calls = log_for(1, run, steps)
    mlflow_server.kill()
    went = time.monotonic()
    calls += log_for(OUTAGE_SECONDS / 2, run, steps)
    started = time.monotonic()
    search = tracker.start_run("search", parent=run.run_id)
    with tracker.start_run("trial", parent=search.run_id, tags={"search": search.run_id}) as trial:
        trial.log_params({"slots": "3a"})
        trial.log_metrics({"val/top1": 0.5}, step=1)
        trial.log_text("seed: 0\n", "conf/config.yaml")
        trial.log_dataset("diving48", "f" * 36, "/data", "train")
    assert time.monotonic() - started < 2
    calls += log_for(OUTAGE_SECONDS / 2, run, steps)
    with ThreadPoolExecutor(1) as pool:
        restarted = pool.submit(mlflow_server.start)
        calls += log_until(restarted.done, run, steps)
        restarted.result()
    was_away = time.monotonic() - went
    search.finish("KILLED")
    run.finish()
    tracker.close(60)
    print(
        f"away for {was_away:.0f} s; {len(calls)} calls of log_metrics, median {1000 * statistics.median(calls):.1f} ms, "
        f"longest {1000 * max(calls):.0f} ms; {len(mlflow_server.points(run.run_id, 'train/loss'))} steps recorded"
    )
    assert statistics.median(calls) < 0.05
    assert max(calls) < 2  # the disk and the other processes of this machine; a try of MLflow's client takes longer
    assert mlflow_server.points(run.run_id, "train/loss") == [(step, step / 10) for step in range(next(steps))]
    assert mlflow_server.points(trial.run_id, "val/top1") == [(1, 0.5)]
    stored = tracker._client.get_run(trial.run_id)
    assert stored.data.tags["mlflow.parentRunId"] == stored.data.tags["search"] == search.run_id
    assert (stored.data.params, stored.info.status) == ({"slots": "3a"}, "FINISHED")
    assert [item.dataset.name for item in stored.inputs.dataset_inputs] == ["diving48"]
    assert Path(stored.info.artifact_uri.removeprefix("file://"), "conf/config.yaml").read_text() == "seed: 0\n"
    assert not list((tmp_path / "mlflow-spool").rglob("*.*"))


@pytest.mark.slow
def test_a_server_that_hangs_does_nothing_twice(mlflow_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    tracker = Tracker(mlflow_server.uri, "hanging", tmp_path / "artifacts")
    steps = itertools.count()
    run = tracker.start_run("train")
    calls = log_for(0.5, run, steps)
    mlflow_server.signal(signal.SIGSTOP)
    calls += log_for(4, run, steps)
    with tracker.start_run("trial") as trial:
        trial.log_metrics({"val/top1": 0.5})
    calls += log_for(4, run, steps)
    with pytest.raises(PipelineError, match="timed out"):
        Tracker(mlflow_server.uri, "hanging", tmp_path / "artifacts")
    mlflow_server.signal(signal.SIGCONT)
    run.finish()
    tracker.close(60)
    assert max(calls) < 2
    assert mlflow_server.points(run.run_id, "train/loss") == [(step, step / 10) for step in range(next(steps))]
    assert mlflow_server.points(trial.run_id, "val/top1") == [(0, 0.5)]
    assert mlflow_server.query("select count(*) from runs where experiment_id = ?", tracker.experiment_id) == [(2,)]


CLIENT = """
import os, signal, sys; from pathlib import Path; from infra.tracking import Tracker
tracker = Tracker(sys.argv[1], "killed", Path(sys.argv[2]))
with tracker.start_run("trial") as trial: pass
run = tracker.start_run("train")
for step in range(50): run.log_metrics({"train/loss": step / 10}, step)
tracker._spool.flush(20)
print(run.run_id, flush=True)
sys.stdin.readline()  # now the server is away
for step in range(50, 100): run.log_metrics({"train/loss": step / 10}, step)
late = tracker.start_run("late", parent=run.run_id)
late.log_metrics({"val/top1": 0.5})
print(late.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_a_killed_client_left_is_sent_by_the_next_one(mlflow_server: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLIENT, mlflow_server.uri, tmp_path / "artifacts"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        run_id = client.stdout.readline().strip()
        mlflow_server.kill()
        with answering(mlflow_server.port, 503):
            rest, errors = client.communicate("\n", timeout=100)
            assert client.returncode == -signal.SIGKILL, errors
            with pytest.raises(PipelineError, match="HTTP Error 503"):
                Tracker(mlflow_server.uri, "killed", tmp_path / "artifacts")
    assert len(mlflow_server.points(run_id, "train/loss")) == 50
    late_key = rest.strip()
    mlflow_server.start()
    tracker = Tracker(mlflow_server.uri, "killed", tmp_path / "artifacts")
    assert mlflow_server.points(run_id, "train/loss") == [(step, step / 10) for step in range(100)]
    tracker.close_abandoned_runs()
    with tracker.start_run("train", resume_id=run_id) as run:
        for step in range(80, 120):  # from the last checkpoint
            run.log_metrics({"train/loss": step / 10}, step)
    with tracker.start_run("late", resume_id=late_key) as late:
        late.log_metrics({"val/top1": 0.6})
    tracker.close()
    assert run.run_id == run_id
    assert mlflow_server.points(run_id, "train/loss") == [(step, step / 10) for step in range(120)]
    assert mlflow_server.points(late.run_id, "val/top1") == [(0, 0.5)]
    names = mlflow_server.query("select name from runs where experiment_id = ? order by name", tracker.experiment_id)
    assert names == [("late",), ("train",), ("trial",)]


def test_a_locked_database_is_waited_for_in_the_background(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.start_run("train")
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    other.execute("begin exclusive")
    started = time.monotonic()
    run.log_metrics({"train/loss": 1.0})
    assert time.monotonic() - started < 0.5
    assert not tracker._spool.flush(0.5)
    other.execute("rollback")
    other.close()
    tracker.close()
    assert tracker._client.get_run(run.run_id).data.metrics == {"train/loss": 1.0}


def test_a_replay_changes_nothing(tracker: Tracker, make_tracker: Callable[[], Tracker], tmp_path: Path) -> None:
    """The journal as a power loss leaves it whose emptying had not reached the disk."""
    sent: list[bytes] = []
    emptied = os.ftruncate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os, "ftruncate", lambda journal, size: (sent.append(os.pread(journal, 1 << 20, 0)), emptied(journal, size))
        )
        with tracker.start_run("train") as run:
            run.log_params({"epochs": 1})
            for step in range(3):
                run.log_metrics({"train/loss": 1.0}, step)
            run.log_dataset("diving48", "f" * 36, "/data", "train")
    place = tmp_path / "mlflow-spool" / tracker._spool.folder.name
    (place / "0-0.journal").write_bytes(b"".join(sent))

    def recorded() -> Any:
        found = tracker._client.get_run(run.run_id)
        history = tracker._client.get_metric_history(run.run_id, "train/loss")
        return found.to_dictionary(), [(point.step, point.timestamp) for point in history]

    before = recorded()
    make_tracker()
    assert not (place / "0-0.journal").exists()
    assert recorded() == before
    assert len(tracker._client.search_runs([tracker.experiment_id])) == 1


def test_what_mlflow_refuses_does_not_stop_the_rest(tracker: Tracker) -> None:
    with tracker.start_run("train") as run:
        run.log_metrics({"no@such@name": 1.0})
        run.log_metrics({"val/top1": 0.5})
    assert tracker._client.get_run(run.run_id).data.metrics == {"val/top1": 0.5}
    assert b"no@such@name" in (tracker._spool.folder / "refused.txt").read_bytes()


def test_a_value_that_no_database_can_store_does_not_stop_the_rest(tracker: Tracker) -> None:
    """MLflow calls that an internal error, as it does a lost database."""
    with tracker.start_run("train") as run:
        tracker._spool.append({"do": "finish", "run": run.run_id, "status": "KILLED", "time": 2**70})
        run.log_metrics({"val/top1": 0.5})
    tracker.close()
    stored = tracker._client.get_run(run.run_id)
    assert (stored.data.metrics, stored.info.status) == ({"val/top1": 0.5}, "FINISHED")
    assert b"too large" in (tracker._spool.folder / "refused.txt").read_bytes()


@pytest.mark.parametrize(
    ("error", "is_away"),
    [
        (MlflowException("locked", TEMPORARILY_UNAVAILABLE), True),
        (MlflowException("API request to endpoint /x failed with error code 400 != 200", INVALID_PARAMETER_VALUE), True),
        (MlflowException("a name has @", INVALID_PARAMETER_VALUE), False),
        (requests.exceptions.ReadTimeout("slow"), True),
        (ConnectionRefusedError(), True),
        (OSError(28, "No space left on device"), True),
        (PermissionError("/mlruns"), False),
        (KeyError("a defect of ours"), False),
    ],
    ids=str,
)
def test_what_can_be_sent_later_is_told_from_what_never_can(error: Exception, is_away: bool) -> None:
    assert _means_away(error) == is_away
