"""A backup holds what was finished, wherever it goes and whenever it is killed, and becomes a work directory again."""

import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from infra.errors import ConfigError, DataError
from infra.filesystems import Folder
from infra.tracking import Tracker
from infra.tracking_spool import decode, encode
from pipelines.artifacts import Store
from pipelines.experiments import find_experiment
from pipelines.graph import plan, select
from pipelines.stages import STAGES
from pipelines.store_backup import back_up, restore


def quiet(done, total, text):
    pass


@pytest.fixture
def workdir(tmp_path, finish, empty_database):
    """With a finished evaluation, work in progress, and an MLflow of two runs, of which one has a file."""
    finish()
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "demo", tmp_path / "mlflow-artifacts")
    with tracker.start_run("done") as run:
        run.log_text("the page", "report/index.html")
    tracker.start_run("at work")
    tracker.close()
    with Store(tmp_path / "store").work_on("train", "f" * 16) as partial:
        (partial / "half").write_text("1")
    return tmp_path


def contents(folder):
    """What of a work directory a backup is about."""
    kept = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in kept
        if ".use" not in path.parts
        and ".lock" not in path.name
        and ".partial" not in str(path)
        and not path.name.startswith("mlflow.db")
        and "mlflow-spool" not in path.parts
    }


def cached(workdir):
    """Which stages a run of the made-up evaluation would not run."""
    from infra.settings import apply_overrides

    config = apply_overrides(find_experiment("demo")(), {"search.num_trials": 0})
    planned = select(plan(STAGES, config, "demo", Store(workdir / "store")), "evaluate")
    return {item.name: item.artifact is not None for item in planned}


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_after_the_loss_of_everything_all_is_there_in_another_place(workdir, tmp_path_factory, s3_url, kind):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    place = Folder(elsewhere / "copy" if kind == "folder" else f"{s3_url}/copy")
    before, new = contents(workdir), elsewhere / "new home"
    # A bucket's times are whole seconds, and what was made within the second of its copy is copied again.
    for path in (workdir / "mlflow-artifacts").rglob("*"):
        os.utime(path, (time.time() - 5,) * 2)
    order = [item.fingerprint for stage in ("train", "evaluate") for item in Store(workdir / "store").finished(stage)]
    first = back_up(workdir, place, quiet)
    assert (first.num_artifacts, first.num_copied, first.num_runs) == (5, 5, 2)
    assert (first.damaged, first.unfinished) == ((), (f"train {'f' * 16}",))
    again = back_up(workdir, place, quiet)
    assert (again.num_artifacts, again.num_copied, again.num_bytes) == (5, 0, 0)
    old = workdir.resolve()
    for path in workdir.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = restore(place, new, quiet)
    assert (done.num_artifacts, done.num_copied, done.num_runs, done.damaged) == (5, 5, 2, ())
    assert contents(new) == before
    assert [item.fingerprint for stage in ("train", "evaluate") for item in Store(new / "store").finished(stage)] == order
    assert set(cached(new).values()) == {True}
    assert not list(old.iterdir())
    tracker = Tracker(f"sqlite:///{new}/mlflow.db", "demo", new / "mlflow-artifacts")
    runs = {run.info.run_name: run.info for run in tracker._client.search_runs([tracker.experiment_id])}
    assert {name: info.status for name, info in runs.items()} == {"done": "FINISHED", "at work": "KILLED"}
    page = tracker._client.download_artifacts(runs["done"].run_id, "report/index.html", str(elsewhere))
    assert Path(page).read_text() == "the page"
    tracker.close()
    with pytest.raises(ConfigError, match=r"has an mlflow.db; expected a work directory without one"):
        restore(place, new, quiet)


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("direction", ["backup", "restore"])
def test_killed_at_any_moment_and_repeated_it_ends_the_same(workdir, tmp_path_factory, monkeypatch, direction):
    """Killed before each rename: what is there then is whole, and the same command ends the work."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    before, moment, was_killed = contents(workdir), 0, True
    if direction == "restore":
        back_up(workdir, Folder(elsewhere / "copy"), quiet)
    while was_killed:
        place = elsewhere / ("copy" if direction == "restore" else f"copy-{moment}")
        new = elsewhere / f"new-{moment}"
        calls = 0

        def killing(rename, moment=moment):
            def call(*arguments, **named):
                nonlocal calls
                calls += 1
                if calls > moment:
                    raise KilledError
                return rename(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(os, name, killing(getattr(os, name)))
            try:
                back_up(workdir, Folder(place), quiet) if direction == "backup" else restore(Folder(place), new, quiet)
                was_killed = False
            except KilledError:
                pass
        for manifest in (*place.glob("store/*/*/artifact.json"), *new.glob("store/*/*[0-9a-f]/artifact.json")):
            files = json.loads(manifest.read_bytes())["files"]
            assert all((manifest.parent / name).stat().st_size == entry["bytes"] for name, entry in files.items())
        if was_killed:
            assert not (new / "mlflow.db").exists()
            assert direction == "restore" or not (place / "backup.json").exists()
        if direction == "backup":
            back_up(workdir, Folder(place), quiet)
        if was_killed or direction == "backup":
            restore(Folder(place), new, quiet)
        assert contents(new) == before
        moment += 1 if calls < 8 else 3
    assert calls > 10


def test_damage_is_found_in_both_directions_and_left_out(workdir, tmp_path_factory):
    place, new = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("new") / "work"
    [scores] = (workdir / "store" / "evaluate").glob("*/scores.parquet")
    whole = scores.read_bytes()
    scores.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the same size, so that no run would notice
    found = back_up(workdir, Folder(place), quiet)
    assert (found.num_artifacts, len(found.damaged)) == (4, 1)
    assert "scores.parquet is damaged: its content has changed since it was written" in found.damaged[0]
    scores.write_bytes(whole)
    assert back_up(workdir, Folder(place), quiet).damaged == ()
    [history] = (place / "store" / "train").glob("*/history.json")
    history.write_bytes(history.read_bytes().replace(b"1.0", b"1.1"))
    found = restore(Folder(place), new, quiet)
    assert (found.num_artifacts, len(found.damaged)) == (4, 1)
    assert "history.json is damaged" in found.damaged[0]
    assert cached(new) == {"index": True, "shards": True, "search": True, "train": False, "evaluate": True}
    assert not list((new / "store" / "train").glob("*.partial"))


def test_what_a_server_has_yet_to_hear_is_in_the_backup(tmp_path, finish, tmp_path_factory):
    finish()
    place, new = Folder(tmp_path_factory.mktemp("copy")), tmp_path_factory.mktemp("new") / "work"
    spool = tmp_path / "mlflow-spool" / "01234567"
    (spool / "files" / "a").mkdir(parents=True)
    (spool / "files" / "a" / "page.html").write_text("the page")
    entries = [
        {"do": "file", "file": "files/a/page.html"},
        {"do": "model", "files": f"{tmp_path.resolve()}/store/train/0/model"},
    ]
    (spool / "1-1.journal").write_bytes(b"".join(map(encode, entries)))
    found = back_up(tmp_path, place, quiet)
    assert found.num_runs is None
    restore(place, new, quiet)
    [journal] = (new / "mlflow-spool" / "01234567").glob("*.journal")
    assert decode(journal.read_bytes())[0] == [entries[0], {"do": "model", "files": f"{new}/store/train/0/model"}]
    assert (journal.parent / "files" / "a" / "page.html").read_text() == "the page"
    (spool / "1-1.journal").unlink()  # it was sent
    back_up(tmp_path, place, quiet)
    assert not (place / "mlflow-spool" / "01234567").list()


def test_a_second_backup_has_what_is_new_and_the_newest_database(workdir, tmp_path_factory):
    place = Folder(tmp_path_factory.mktemp("copy"))
    back_up(workdir, place, quiet)
    tracker = Tracker(f"sqlite:///{workdir}/mlflow.db", "demo", workdir / "mlflow-artifacts")
    with tracker.start_run("later") as run:
        run.log_text("more", "more.txt")
    tracker.close()
    found = back_up(workdir, place, quiet)
    assert (found.num_copied, found.num_bytes, found.num_runs) == (0, len("more"), 3)
    with closing(sqlite3.connect(place.local / "mlflow.db")) as database:
        assert database.execute("select count(*) from runs").fetchone() == (3,)


def test_user_errors(workdir, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ConfigError, match=r"lies in .*, which it is to outlive"):
        back_up(workdir, Folder(workdir / "copy"), quiet)
    with pytest.raises(ConfigError, match=r"found no store and no mlflow.db in"):
        back_up(empty, Folder(workdir / "copy"), quiet)
    assert not (workdir / "copy").exists()
    for content, message in (
        (None, r"holds no backup.json; expected what `sagsm store backup` has written, to its end"),
        ("{", "backup.json is damaged"),
        ('{"format_version": 9}', "has format version 9, this program reads 1"),
        (
            '{"format_version": 1, "artifacts": [["..", "../../../../etc", 0]]}',
            r"damaged: \.\. \.\./\.\./\.\./\.\./etc is no artifact",
        ),
    ):
        if content is not None:
            (empty / "backup.json").write_text(content)
        with pytest.raises(DataError, match=message):
            restore(Folder(empty), workdir.parent / "new", quiet)
    assert not (workdir.parent / "new").exists()
