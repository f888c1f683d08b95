import hashlib
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import PipelineError
from infra.storage import atomic_path, canonical_json, require_free_space, sha256_file, sha256_json, write_bytes, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")

    def fail_halfway():
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_a_killed_writer_leaves_no_half_file_under_the_final_name(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from infra.storage import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file.bin"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "file.bin").exists()
    assert all(entry.name.startswith(".tmp-") for entry in tmp_path.iterdir())


@given(data=st.binary(max_size=5000))
def test_hash_is_that_of_the_content(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("hash") / "file"
    path.write_bytes(data)
    assert sha256_file(path) == hashlib.sha256(data).hexdigest()


@given(value=st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none()))
def test_equal_json_has_equal_hash_whatever_the_order(value):
    assert sha256_json(value) == sha256_json(dict(reversed(list(value.items()))))
    assert "\n" not in canonical_json(value)


def test_json_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(PipelineError, match=r"a run needs .* MB in .*, but only .* MB are free; free some space"):
        require_free_space(tmp_path, 1 << 60, "a run")
