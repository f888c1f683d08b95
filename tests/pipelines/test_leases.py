import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from infra.errors import PipelineError
from pipelines.artifacts import MANIFEST
from pipelines.leases import in_use, is_being_made, lease, leased, nobody_leases

KEY = ("train", "a" * 16)
OTHER = (
    "import sys; from pathlib import Path; from pipelines.leases import lease\n"
    "with lease(Path(sys.argv[1]), [('train', 'a' * 16)], 'a test'): print('in', flush=True); sys.stdin.read()\n"
)


def test_a_lease_of_another_process_is_seen_and_goes_with_it(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", OTHER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"in\n"
        assert list(leased(tmp_path)) == [KEY]
        assert leased(tmp_path)[KEY].startswith("a test (")
        assert f":{other.pid}:" in leased(tmp_path)[KEY]
    finally:
        other.kill()
        other.communicate()
    assert leased(tmp_path) == {}
    assert len(list((tmp_path / ".use").iterdir())) == 1  # to look changes nothing
    with nobody_leases(tmp_path) as found:
        assert found == {}
    assert list((tmp_path / ".use").iterdir()) == []


def test_a_lease_ends_with_its_block_even_by_an_error(tmp_path):
    def fail():
        with lease(tmp_path, [KEY, KEY, ("shards", "b" * 16)], "a test"):
            assert sorted(leased(tmp_path)) == [("shards", "b" * 16), KEY]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert leased(tmp_path) == {}


def test_nobody_gets_a_lease_while_artifacts_are_taken_away(tmp_path):
    got_it, may_end = threading.Event(), threading.Event()

    def take():
        with lease(tmp_path, [KEY], "a test"):
            got_it.set()
            may_end.wait(20)

    thread = threading.Thread(target=take)
    with nobody_leases(tmp_path) as found:
        thread.start()
        assert not got_it.wait(0.2)
        assert found == {}
    assert got_it.wait(20)
    with nobody_leases(tmp_path) as found:
        assert list(found) == [KEY]
    may_end.set()
    thread.join()


def test_a_store_that_we_may_not_write_to_is_read_without_a_lease():
    """Not even root may make folders there."""
    root = Path("/sys/kernel")
    with lease(root, [KEY], "a test"):
        assert leased(root) == {}


def test_a_disk_that_fails_is_an_error(tmp_path):
    (tmp_path / "store").write_text("a file")
    with (
        pytest.raises(PipelineError, match=r"cannot write into .* in use: .*; free some space"),
        lease(tmp_path / "store", [KEY], "a test"),
    ):
        pass


def test_who_writes_an_artifact_holds_its_lock(tmp_path):
    folder = tmp_path / ("a" * 16)
    assert not is_being_made(folder)
    with FileLock(folder.with_suffix(".lock")):
        assert is_being_made(folder)
        assert is_being_made(folder.with_suffix(".partial"))
    assert not is_being_made(folder)


def test_artifacts_of_two_stores_are_in_use_or_were_removed_a_moment_ago(tmp_path):
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name / "train" / KEY[1]
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text("{}")
        made.append(folder)
    with in_use(made, "a test"):
        assert [list(leased(tmp_path / name)) for name in ("one", "two")] == [[KEY], [KEY]]
    assert [leased(tmp_path / name) for name in ("one", "two")] == [{}, {}]
    (made[1] / MANIFEST).unlink()
    with pytest.raises(PipelineError, match="two/train/aaaaaaaaaaaaaaaa was removed a moment ago"), in_use(made, "a test"):
        pass
    assert leased(tmp_path / "one") == {}
