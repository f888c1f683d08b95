import subprocess
import sys

import pytest

from infra.errors import PipelineError
from pipelines.artifacts import Provenance, Store

PROVENANCE = Provenance(stage="shards", version=1, config={"shards": {"seed": 0}}, inputs={"index": "abc"})


def make(store, fingerprint="f" * 16, content=b"data"):
    with store.work_on("shards", fingerprint) as folder:
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "a.tar").write_bytes(content)
        return store.commit(folder, PROVENANCE, fingerprint, {"experiment": "demo", "summary": {"n": 1}, "mlflow_run_id": "r"})


def test_a_committed_artifact_is_found_with_what_it_holds(tmp_path):
    store = Store(tmp_path)
    made = make(store)
    found, problem = store.find("shards", "f" * 16)
    assert (found, problem) == (made, "")
    assert found.summary == {"n": 1}
    assert list(found.manifest["files"]) == ["sub/a.tar"]
    assert [artifact.fingerprint for artifact in store.history("shards", "demo")] == ["f" * 16]
    assert store.history("shards", "other") == []


def test_finished_artifacts_are_listed_and_nothing_else(tmp_path):
    store = Store(tmp_path)
    made = [make(store, digit * 16) for digit in "ab"]
    damaged = tmp_path / "shards" / ("c" * 16 + ".damaged-7")
    damaged.mkdir()
    (damaged / "artifact.json").write_text("{")
    with store.work_on("shards", "d" * 16):
        assert {item.fingerprint for item in store.finished("shards")} == {item.fingerprint for item in made}
    assert store.finished("train") == []


def test_unfinished_work_is_not_an_artifact_and_is_kept_for_the_next_run(tmp_path):
    store = Store(tmp_path)

    def interrupted():
        with store.work_on("shards", "f" * 16) as folder:
            (folder / "done.tar").write_bytes(b"1")
            (folder / ".tmp-half").write_bytes(b"2")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        interrupted()
    assert store.find("shards", "f" * 16) == (None, "")
    with store.work_on("shards", "f" * 16) as folder:
        assert [path.name for path in folder.iterdir()] == ["done.tar"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "sub/a.tar is gone from the store"),
        (lambda path: path.write_bytes(b"cut"), "sub/a.tar has 3 bytes in the store, 4 were written"),
    ],
)
def test_a_damaged_artifact_is_named_and_replaced(tmp_path, damage, problem):
    store = Store(tmp_path)
    damage(make(store).path / "sub" / "a.tar")
    assert store.find("shards", "f" * 16) == (None, problem)
    make(store)
    assert store.find("shards", "f" * 16)[0] is not None


def test_two_writers_of_one_artifact_do_not_mix(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipelines.artifacts import Store\n"
        "with Store(Path(sys.argv[1])).work_on('shards', 'f' * 16): print('in', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(PipelineError, match="another process is already making shards"):
            make(Store(tmp_path))
    finally:
        other.kill()
        other.communicate()
    make(Store(tmp_path))  # the lock goes with the process that held it


def test_a_manifest_that_cannot_be_read_says_what_to_do(tmp_path):
    store = Store(tmp_path)
    (make(store).path / "artifact.json").write_text("{")
    with pytest.raises(PipelineError, match=r"is not a readable manifest .* delete the folder"):
        store.find("shards", "f" * 16)
