import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from infra.errors import DataError, PipelineError
from infra.tracking import Tracker
from infra.tracking_backup import check_database, copy_database, relocate_database, relocate_journal
from infra.tracking_spool import decode, encode

WRITER = (
    "import sys; from pathlib import Path; from infra.tracking import Tracker\n"
    "folder = Path(sys.argv[1])\n"
    "tracker = Tracker(f'sqlite:///{folder}/mlflow.db', 'demo', folder / 'mlflow-artifacts')\n"
    "with tracker.start_run('train') as run:\n"
    "    for step in range(1_000_000):\n"
    "        run.log_metrics({'a': step, 'b': step}, step)\n"
    "        if step % 5 == 4: tracker._spool.flush(60)\n"
    "        if step == 4: print(run.run_id, flush=True)\n"
)


def steps(database: Path, name: str) -> list[int]:
    with closing(sqlite3.connect(database)) as connection:
        return [step for (step,) in connection.execute("select step from metrics where key = ? order by step", (name,))]


def test_a_copy_made_while_a_run_writes_is_the_database_of_one_moment(empty_database: Path, tmp_path: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline()
            seen: set[int] = set()
            while len(seen) < 5:
                copy = tmp_path / "copy.db"
                copy.unlink(missing_ok=True)
                assert copy_database(tmp_path / "mlflow.db", copy) == 1
                found = steps(copy, "a")
                assert found == steps(copy, "b") == list(range(len(found)))  # each batch whole, none left out
                seen.add(len(found))
        finally:
            writer.kill()


def test_a_copy_serves_another_folder_and_its_runs_are_over(make_tracker: Callable[[], Tracker], tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new home"
    old.mkdir()
    shutil.move(tmp_path / "mlflow.db", old / "mlflow.db")
    tracker = Tracker(f"sqlite:///{old}/mlflow.db", "demo", old / "mlflow-artifacts")
    with tracker.start_run("done") as done:
        done.log_text("the page", "report/index.html")
    running = tracker.start_run("running")
    tracker.close()
    new.mkdir()
    assert copy_database(old / "mlflow.db", new / "mlflow.db") == 2
    neighbour = (old / "mlflow-artifacts-2").as_uri()  # whose name begins alike
    with closing(sqlite3.connect(new / "mlflow.db")) as connection, connection:
        connection.execute("insert into experiments (experiment_id, name, artifact_location) values (77, 'x', ?)", (neighbour,))
    relocate_database(new / "mlflow.db", old, new)
    shutil.move(old / "mlflow-artifacts", new / "mlflow-artifacts")
    shutil.rmtree(old)
    moved = Tracker(f"sqlite:///{new}/mlflow.db", "demo", new / "mlflow-artifacts")
    place = moved._client.download_artifacts(done.run_id, "report/index.html", str(tmp_path))
    assert Path(place).read_text() == "the page"
    assert moved._client.get_run(done.run_id).info.status == "FINISHED"
    assert moved._client.get_run(running.run_id).info.status == "KILLED"
    with moved.start_run("after") as after:
        after.log_text("more", "a.txt")
    assert list((new / "mlflow-artifacts").rglob("a.txt"))
    moved.close()
    with closing(sqlite3.connect(new / "mlflow.db")) as connection:
        assert (neighbour,) in connection.execute("select artifact_location from experiments").fetchall()
    assert not old.exists()


@pytest.mark.parametrize("damage", [lambda data: b"no database", lambda data: data[:8192] + b"\0" * (len(data) - 8192)])
def test_a_damaged_copy_is_refused(empty_database: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / "mlflow.db").write_bytes(damage(empty_database.read_bytes()))
    with pytest.raises(DataError, match=r"damaged copy of MLflow's database .*; expected a whole one; take an older backup"):
        check_database(tmp_path / "mlflow.db")
    with pytest.raises((DataError, PipelineError)):
        copy_database(tmp_path / "mlflow.db", tmp_path / "copy.db")


def test_what_was_not_sent_names_its_networks_in_the_new_folder() -> None:
    entries = [{"do": "model", "files": "/old/store/train/0/model"}, {"do": "tags", "files": "/older/x"}, {"do": "finish"}]
    moved, num_broken = decode(relocate_journal(b"".join(map(encode, entries)), Path("/old"), Path("/new")))
    assert [entry.get("files") for entry in moved] == ["/new/store/train/0/model", "/older/x", None]
    assert num_broken == 0
