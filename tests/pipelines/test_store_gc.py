"""gc removes what nothing needs that is kept, and nothing else, whatever the artifacts and whenever it is killed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError, PipelineError
from infra.filesystems import Folder
from infra.storage import write_json
from infra.tracking_spool import encode
from pipelines.artifacts import Provenance, Store
from pipelines.leases import lease
from pipelines.store_gc import Keep, collect, plan_gc

DAYS = 86_400


def fingerprint(number):
    return f"{number:016x}"


def make(store, number, *, stage="train", inputs=(), experiment="demo", variant="", finished=True, age=0.0, config=None):
    """An artifact, or work that was killed; `inputs` are pairs of stage and number."""
    named = {f"{name}:{count}" if count else name: fingerprint(other) for count, (name, other) in enumerate(inputs)}
    provenance = Provenance(stage, 1, config or {}, named)
    extra = {"experiment": experiment, "variant": variant, "summary": {}, "mlflow_run_id": f"run-{number}"}
    with store.work_on(stage, fingerprint(number)) as partial:
        (partial / "sub").mkdir(exist_ok=True)
        (partial / "sub" / "data").write_bytes(b"x" * (number + 1))
        if finished:
            path = store.commit(partial, provenance, fingerprint(number), extra).path / "artifact.json"
        else:
            about = {**asdict(provenance), "experiment": experiment, "variant": variant, "run_id": f"run-{number}"}
            write_json(partial.with_suffix(".run"), about)
            path = partial
    then = time.time() - age * DAYS
    for each in [path] if finished else [*path.rglob("*"), path]:
        os.utime(each, (then, then))


def names(store):
    """What a run would find: finished artifacts and unfinished work, by stage and number."""
    found = set()
    for path in store.root.glob("*/*"):
        if path.is_dir() and path.suffix in ("", ".partial"):
            found.add((path.parent.name, int(path.stem, 16)))
            if not path.suffix:
                assert store.find(path.parent.name, path.name)[0] is not None
    return found


@st.composite
def stores(draw):
    """Artifacts of a random DAG, numbered so that each is made from lower numbers; and what the user keeps."""
    stages = ("index", "shards", "train")
    rows = []
    for number in range(draw(st.integers(1, 9))):
        below = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        rows.append(
            {
                "stage": draw(st.sampled_from(stages)),
                "inputs": tuple((rows[other]["stage"], other) for other in sorted(below)),
                "experiment": draw(st.sampled_from(["demo", "other"])),
                "variant": draw(st.sampled_from(["", "gsm"])),
                "finished": draw(st.integers(0, 4)) > 0,
                "age": draw(st.integers(0, 9)) + 0.5,
            }
        )
    kept_names = draw(st.sets(st.sampled_from(["demo", *map(fingerprint, range(len(rows)))]), max_size=2))
    known = {row["experiment"] for row in rows} | {fingerprint(number) for number in range(len(rows))}
    keep = Keep(
        tuple(sorted(kept_names & known)),
        draw(st.none() | st.integers(1, 2)),
        draw(st.none() | st.integers(0, 9)),
    )
    used = draw(st.sets(st.integers(0, len(rows) - 1), max_size=2))
    return rows, keep, used


def expected_to_stay(rows, keep, used):
    """Said another way than the program does it."""
    if keep.is_all:
        return set(range(len(rows)))
    wanted = set(used)
    for number, row in enumerate(rows):
        wanted |= {number} if {row["experiment"], fingerprint(number)} & set(keep.names) else set()
        wanted |= {number} if keep.days is not None and row["age"] <= keep.days else set()
        alike = [row[name] for name in ("stage", "experiment", "variant")]
        newer = [
            other
            for other, each in enumerate(rows)
            if [each[name] for name in ("stage", "experiment", "variant")] == alike and each["age"] < row["age"]
        ]
        wanted |= {number} if keep.last is not None and len(newer) < keep.last else set()
    for number in range(len(rows) - 1, -1, -1):
        if number in wanted:
            wanted |= {other for _, other in rows[number]["inputs"]}
    return wanted


@settings(max_examples=60)
@given(stores())
def test_what_a_kept_artifact_needs_stays_and_all_else_goes(drawn):
    rows, keep, used = drawn
    for number, row in enumerate(rows):
        row["age"] += number / 100  # no two of one age
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        for number, row in enumerate(rows):
            make(store, number, **row)
        everything = names(store)
        with lease(store.root, [(rows[number]["stage"], fingerprint(number)) for number in used], "a test"):
            would = plan_gc(Path(folder), keep)
            assert names(store) == everything
            done = collect(Path(folder), keep)
        stay = {(rows[number]["stage"], number) for number in expected_to_stay(rows, keep, used)}
        assert names(store) == stay
        assert {(item.stage, int(item.fingerprint, 16)) for item in done.kept} == stay
        assert (would.removed, would.num_bytes) == (done.removed, done.num_bytes)
        gone = {(stage, fingerprint(number)) for stage, number in everything - stay}
        left = {(path.parent.name, path.name.partition(".")[0]) for path in store.root.glob("[!.]*/*")}
        assert not gone & left  # no lock, no note, no half


class KilledError(BaseException):
    pass


@contextmanager
def killed_at(moment):
    """Raises before the given system call that renames or removes; yields the number of such calls so far."""
    calls = [0]

    def counted(function):
        def call(*arguments, **named):
            calls[0] += 1
            if calls[0] > moment:
                raise KilledError
            return function(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield calls


def test_a_gc_that_is_killed_at_any_moment_leaves_each_artifact_whole_or_gone(tmp_path):
    moment, was_killed = 0, True
    while was_killed:
        workdir = tmp_path / str(moment)
        store = Store(workdir / "store")
        make(store, 1, stage="shards")
        make(store, 2, inputs=[("shards", 1)])
        make(store, 3, inputs=[("shards", 1)], finished=False)
        make(store, 4, inputs=[("shards", 1)], experiment="other")
        (store.root / "train" / f"{fingerprint(5)}.damaged-7").mkdir()
        with killed_at(moment) as calls:
            try:
                collect(workdir, Keep(names=("other",)))
                was_killed = False
            except KilledError:
                pass
        assert {("shards", 1), ("train", 4)} <= names(store)  # `names` looks whether each is whole
        collect(workdir, Keep(names=("other",)))
        assert names(store) == {("shards", 1), ("train", 4)}
        assert sorted(path.name for path in (store.root / "train").iterdir()) == [fingerprint(4), f"{fingerprint(4)}.lock"]
        shutil.rmtree(workdir)
        moment += 1
    assert calls[0] > 10


RUN = (
    "import sys; from pathlib import Path; from pipelines.artifacts import Store; from pipelines.leases import lease\n"
    "with lease(Path(sys.argv[1]), [('train', f'{9:016x}'), ('shards', f'{1:016x}')], 'sagsm run demo'):\n"
    "    with Store(Path(sys.argv[1])).work_on('train', f'{9:016x}') as partial:\n"
    "        print('at work', flush=True); sys.stdin.read()\n"
)


def test_what_a_run_uses_stays_until_it_ends(tmp_path):
    """It has shards from the store and makes a training; the index is needed by the shards."""
    store = Store(tmp_path / "store")
    make(store, 0, stage="index")
    make(store, 1, stage="shards", inputs=[("index", 0)])
    make(store, 2)
    run = subprocess.Popen([sys.executable, "-c", RUN, store.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert run.stdout.readline() == b"at work\n"
        kept = collect(tmp_path, Keep(days=0)).kept
        assert names(store) == {("index", 0), ("shards", 1), ("train", 9)}
        assert [item.state for item in kept if item.stage == "shards"] == [kept[1].state]
        assert "complete, in use by sagsm run demo (" in kept[1].state
    finally:
        run.kill()
        run.communicate()
    collect(tmp_path, Keep(days=0))
    assert names(store) == set()


def test_work_whose_lock_is_held_stays_with_its_inputs_even_without_a_lease(tmp_path):
    store = Store(tmp_path / "store")
    make(store, 1, stage="shards")
    make(store, 2, inputs=[("shards", 1)], finished=False)
    with store.work_on("train", fingerprint(2)):
        collect(tmp_path, Keep(days=0))
        assert names(store) == {("shards", 1), ("train", 2)}


def test_runs_that_begin_while_artifacts_are_removed_have_them_or_know_it(tmp_path):
    """What a run has found after it got its lease stays as long as the lease."""
    store, ended, wrong = Store(tmp_path / "store"), threading.Event(), []

    def begin_runs():
        while not ended.is_set():
            with lease(store.root, [("train", fingerprint(1))], "a test"):
                path = store.folder("train", fingerprint(1))
                was_there = (path / "artifact.json").is_file()
                for _ in range(20):
                    if was_there and not (path / "artifact.json").is_file():
                        wrong.append(path)

    make(store, 1)
    threads = [threading.Thread(target=begin_runs) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        collect(tmp_path, Keep(days=0))
        if ("train", 1) not in names(store):
            make(store, 1)
    ended.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_network_that_is_still_to_be_registered_stays(tmp_path):
    store = Store(tmp_path / "store")
    make(store, 1)
    make(store, 2)
    (tmp_path / "mlflow-spool" / "0").mkdir(parents=True)
    entry = {"do": "model", "files": str(store.folder("train", fingerprint(2)) / "model")}
    (tmp_path / "mlflow-spool" / "0" / "1-1.journal").write_bytes(encode(entry))
    collect(tmp_path, Keep(days=0))
    assert names(store) == {("train", 2)}


def test_without_a_wish_only_leftovers_go(tmp_path):
    store = Store(tmp_path / "store")
    make(store, 1, age=99)
    make(store, 2, finished=False, age=99)
    for name in (
        f"{fingerprint(3)}.damaged-7",
        f"{fingerprint(4)}.removed-7",
        f"{fingerprint(5)}.lock",
        f"{fingerprint(6)}.run",
    ):
        path = store.root / "train" / name
        path.write_text("{}") if name.endswith(("lock", "run")) else path.mkdir()
    (store.root / "train" / "notes.txt").write_text("mine")
    done = collect(tmp_path, Keep())
    assert (done.removed, len(done.leftovers)) == ((), 4)
    assert names(store) == {("train", 1), ("train", 2)}
    assert (store.root / "train" / "notes.txt").read_text() == "mine"
    assert len(list((store.root / "train").iterdir())) == 6  # two folders, two locks, a note of a run, the text


def test_an_artifact_of_a_newer_program_stops_everything(tmp_path):
    store = Store(tmp_path / "store")
    make(store, 1)
    path = store.folder("train", fingerprint(1)) / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    make(store, 2, stage="shards")
    with pytest.raises(PipelineError, match=r"needs is not known, so nothing was removed: .* format version 99"):
        collect(tmp_path, Keep(days=0))
    assert store.find("shards", fingerprint(2))[0] is not None


def test_a_name_that_means_nothing_is_an_error_and_removes_nothing(tmp_path):
    store = Store(tmp_path / "store")
    make(store, 1)
    with pytest.raises(ConfigError, match=r"--keep 'dmo' is no experiment.*; did you mean demo\?"):
        collect(tmp_path, Keep(names=("dmo",)))
    assert names(store) == {("train", 1)}
    assert collect(tmp_path / "nowhere", Keep(days=0)).removed == ()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("asked", [False, True])
def test_what_lies_elsewhere_goes_only_if_that_is_asked_for(tmp_path, s3_url, asked):
    store = Store(tmp_path / "store")
    sets, checkpoints = Folder(f"{s3_url}/{asked}"), tmp_path / "elsewhere"
    make(store, 1, stage="shards", config={"shards": {"output": sets.url}})
    make(store, 2, config={"train": {"checkpoints": str(checkpoints)}})
    for number in (1, 8):  # the second is of another store
        (sets / fingerprint(number)).write_bytes("dataset.json", b"{}")
        (sets / fingerprint(number)).write_bytes("a.tar", b"tar")
    for number in (2, 8):
        (checkpoints / fingerprint(number) / "step-1").mkdir(parents=True)
        (checkpoints / fingerprint(number) / "step-1" / "manifest.json").write_text("{}")
    (checkpoints / fingerprint(2) / "link").symlink_to(checkpoints / fingerprint(8))
    places = {str(sets / fingerprint(1)), str(Folder(checkpoints) / fingerprint(2))}
    assert set(plan_gc(tmp_path, Keep(days=0)).outside) == places
    assert set(collect(tmp_path, Keep(days=0), outside=asked).outside) == places
    assert bool((sets / fingerprint(1)).list()) == (checkpoints / fingerprint(2)).exists() == (not asked)
    assert len((sets / fingerprint(8)).list()) == 2
    assert (checkpoints / fingerprint(8) / "step-1" / "manifest.json").exists()


def test_a_place_elsewhere_that_cannot_be_reached_is_tried_again(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    elsewhere = tmp_path / "elsewhere"
    make(store, 1, stage="shards", config={"shards": {"output": str(elsewhere)}})
    (elsewhere / fingerprint(1)).mkdir(parents=True)

    def broken(path):
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.store_gc._delete_elsewhere", broken)
        with pytest.raises(PipelineError, match=r"1 of 1 could not be deleted: .*not yours.* run gc again"):
            collect(tmp_path, Keep(days=0), outside=True)
    assert names(store) == set()
    assert plan_gc(tmp_path, Keep()).outside == (str(elsewhere / fingerprint(1)),)
    collect(tmp_path, Keep(), outside=True)
    assert not (elsewhere / fingerprint(1)).exists()
    assert list((store.root / "shards").iterdir()) == []
