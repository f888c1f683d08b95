import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from infra.errors import ConfigError, PipelineError
from infra.tracking import Tracker, experiment_ids, has_runs, recorded_runs, tracking_uri


def steps_and_values(tracker: Tracker, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in tracker._client.get_metric_history(run_id, metric)]


def test_runs_form_a_tree(tracker: Tracker) -> None:
    with tracker.start_run("p01") as pipeline, tracker.start_run("search p01", parent=pipeline.run_id) as search:
        assert tracker._client.get_run(search.run_id).data.tags["mlflow.parentRunId"] == pipeline.run_id


def test_a_resumed_run_draws_one_curve_and_keeps_its_params(make_tracker: Callable[[], Tracker]) -> None:
    earlier = make_tracker()
    first = earlier.start_run("train")
    first.log_params({"epochs": 4})
    for step in range(3):
        first.log_metrics({"train/loss": 1.0 - step / 10}, step)
    first.finish("KILLED")
    earlier.close()
    tracker = make_tracker()  # another process
    with tracker.start_run("train", resume_id=first.run_id, tags={"resumed": "yes"}) as again:
        assert again.run_id == first.run_id
        assert tracker._client.get_run(again.run_id).info.status == "RUNNING"
        again.log_params({"epochs": 9, "workers": 2})
        for step in range(1, 5):  # from the last checkpoint, before the last step that was recorded
            again.log_metrics({"train/loss": 1.0 - step / 10}, step)
    assert steps_and_values(tracker, first.run_id, "train/loss") == [(0, 1.0), (1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6)]
    stored = tracker._client.get_run(first.run_id)
    assert stored.data.params == {"epochs": "4", "workers": "2"}
    assert (stored.info.status, stored.data.tags["resumed"]) == ("FINISHED", "yes")


def test_a_run_that_the_database_lost_is_started_anew(tracker: Tracker) -> None:
    with tracker.start_run("train", resume_id="0" * 32) as run:
        assert run.run_id != "0" * 32
    tracker._client.delete_run(run.run_id)
    with tracker.start_run("train", resume_id=run.run_id) as after_deletion:
        assert after_deletion.run_id != run.run_id


def test_tags_find_the_newest_run_that_has_them_all(tracker: Tracker) -> None:
    tags = {"stage": "train", "fingerprint": "it's"}
    with tracker.start_run("a", tags=tags, resume_tags=tags):
        time.sleep(0.002)  # start times have milliseconds
    with tracker.start_run("b", tags=tags) as newest, tracker.start_run("c", tags={"stage": "train"}):
        assert tracker.start_run("b again", resume_tags=tags).run_id == newest.run_id


def test_names_count_up(make_tracker: Callable[[], Tracker]) -> None:
    tracker = make_tracker()
    assert tracker.next_name("p", "demo") == "p01 demo"
    for name in ("p09 demo", "plan", "t012 3a"):
        tracker.start_run(name).finish()
    assert make_tracker().next_name("p", "wide search") == "p10 wide search"


def test_open_runs_are_ended_together(tracker: Tracker) -> None:
    runs = [tracker.start_run("p01"), tracker.start_run("shards p01"), tracker.start_run("index p01")]
    runs[2].finish()
    tracker.finish_open_runs("KILLED")
    tracker.close()
    assert [tracker._client.get_run(run.run_id).info.status for run in runs] == ["KILLED", "KILLED", "FINISHED"]


def test_no_run_is_started_after_the_open_ones_were_ended(tracker: Tracker) -> None:
    """A stage that is still busy in its thread would otherwise leave the run of its next trial open."""
    threads = [threading.Thread(target=_start_runs_until_refused, args=(tracker,), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    tracker.finish_open_runs("KILLED")
    tracker.close()
    statuses = [run.info.status for run in tracker._client.search_runs([tracker.experiment_id], max_results=1000)]
    for thread in threads:
        thread.join(timeout=30)
    assert set(statuses) == {"KILLED"}
    assert len(tracker._client.search_runs([tracker.experiment_id], max_results=1000)) == len(statuses)
    with pytest.raises(PipelineError, match=r"'t001' was not started"):
        tracker.start_run("t001")


def _start_runs_until_refused(tracker: Tracker) -> None:
    with suppress(PipelineError):
        while True:
            tracker.start_run("trial")


def test_experiments_are_listed_without_the_default(tracker: Tracker) -> None:
    assert experiment_ids(tracker.uri) == {"demo": tracker.experiment_id, "template": "1"}


def test_an_experiment_says_what_to_open(tracker: Tracker) -> None:
    description = tracker._client.get_experiment(tracker.experiment_id).tags["mlflow.note.content"]
    assert description.startswith("Open p01, p02, ...: each says what came out.\n")


def test_runs_of_a_stage_are_listed_over_all_experiments_the_newest_first(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.tracking_query._RUNS_PER_PAGE", 2)
    other = Tracker(tracker.uri, "other", tmp_path / "artifacts")
    for number in range(5):
        writer = (tracker, other)[number % 2]
        with writer.start_run(f"p{number}", tags={"stage": "pipeline", "number": str(number)}) as run:
            writer.start_run(f"t{number}", parent=run.run_id, tags={"stage": "trial"}).finish()
    other.close()
    found = recorded_runs(tracker.uri, "pipeline")
    assert [run.name for run in found] == ["p4", "p3", "p2", "p1", "p0"]
    assert found[0].run_id == run.run_id
    assert [run.tags["number"] for run in found] == ["4", "3", "2", "1", "0"]
    assert has_runs(tracker.uri, other.experiment_id, "trial")
    assert not has_runs(tracker.uri, other.experiment_id, "search")


def test_who_only_asks_makes_no_database(tmp_path: Path) -> None:
    assert recorded_runs(f"sqlite:///{tmp_path}/mlflow.db", "pipeline") == []
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_experiment_is_an_error(make_tracker: Callable[[], Tracker]) -> None:
    tracker = make_tracker()
    tracker._client.delete_experiment(tracker.experiment_id)
    with pytest.raises(PipelineError, match=r"experiment demo was deleted .* expected an active one; restore it"):
        make_tracker()


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"hello world, this is text" * 50)
    with pytest.raises(PipelineError, match=r"mlflow\.db failed: file is not a database; expected .* --workdir"):
        Tracker(f"sqlite:///{tmp_path}/mlflow.db", "demo", tmp_path / "artifacts")


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match=r"failed: .*file.*; expected a database"):
        Tracker(f"sqlite:///{tmp_path}/file/mlflow.db", "demo", tmp_path / "artifacts")


def test_an_unreachable_server_is_an_error_within_seconds(tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, not listening: nobody else gets the port
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(
            PipelineError, match=f"tracking at {uri} failed: .*refused.*; expected a running MLflow server there; "
        ):
            Tracker(uri, "demo", tmp_path / "artifacts")
    assert time.monotonic() - started < 5


def test_the_environment_names_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert tracking_uri(tmp_path) == "http://mlflow.example:5000"


def test_importing_the_module_does_not_import_mlflow() -> None:
    subprocess.run([sys.executable, "-c", "import infra.tracking, sys; assert 'mlflow' not in sys.modules"], check=True)


def test_the_terminal_stays_quiet(empty_database: Path, tmp_path: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    code = (
        "from pathlib import Path; from infra.tracking import Tracker\n"
        f"tracker = Tracker('sqlite:///{tmp_path}/mlflow.db', 'quiet', Path('{tmp_path}/artifacts'))\n"
        "with tracker.start_run('a') as run: run.log_metrics({'a/b': 1.0})"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.slow
def test_several_processes_make_the_database_at_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from infra.tracking import Tracker\n"
        f"tracker = Tracker('sqlite:///{tmp_path}/mlflow.db', 'demo', Path('{tmp_path}/artifacts'))\n"
        "with tracker.start_run('a') as run: run.log_metrics({'a/b': 1.0})"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
        )
        for _ in range(3)
    ]
    assert [(process.communicate()[0], process.returncode) for process in processes] == [("", 0)] * 3
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "demo", tmp_path / "artifacts")
    assert len(tracker._client.search_runs([tracker.experiment_id])) == 3


def test_runs_of_a_killed_writer_are_closed_and_others_are_left_alone(tracker: Tracker, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from infra.tracking import Tracker\n"
        "run = Tracker(sys.argv[1], sys.argv[2], Path(sys.argv[3])).start_run('abandoned')\n"
        "print(run.run_id, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, tracker.uri, "demo", str(tmp_path / "artifacts")]
    abandoned = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    mine = tracker.start_run("mine")
    tracker.close_abandoned_runs()
    assert tracker._client.get_run(abandoned).info.status == "KILLED"
    assert tracker._client.get_run(mine.run_id).info.status == "RUNNING"


def test_who_asks_goes_from_the_address_into_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hu%40sh@mlflow.example/api")
    for _ in range(2):
        assert tracking_uri(tmp_path) == "https://mlflow.example/api"
        found = [os.environ[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD")]
        assert found == ["https://mlflow.example/api", "me", "hu@sh"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:other@mlflow.example/api")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD differ") as caught:
        tracking_uri(tmp_path)
    assert "other" not in str(caught.value)


@pytest.mark.parametrize("uri", ["postgresql://me:hushhush@127.0.0.1:1/mlflow", "postgresql://me:hush/hush@127.0.0.1/mlflow"])
def test_a_database_server_that_is_not_there_is_an_error_without_its_password(tmp_path: Path, uri: str) -> None:
    with pytest.raises(PipelineError, match=r"tracking at postgresql://\*\*\*@127.0.0.1.* failed") as caught:
        Tracker(uri, "demo", tmp_path / "artifacts")
    assert "hush" not in str(caught.value)
