"""Real clusters that ask for a token: who is let in, what the others are told, and that nothing is open to the network."""

import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest

from infra.cluster import call, checkout, session
from infra.cluster_token import provide_token, require_entry, token_file
from infra.errors import ClusterError


@pytest.fixture(autouse=True)
def for_the_tests_after():
    """Ray remembers what it has read; this one is set up first and so is the last to end, when the variables are back."""
    yield
    provide_token()


@pytest.fixture
def nothing_configured(monkeypatch, tmp_path):
    """A user who has never heard of tokens."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


def test_a_token_is_made_once_and_only_its_owner_can_read_it(nothing_configured):
    with ThreadPoolExecutor(8) as pool:  # runs that start at the same moment
        list(pool.map(lambda _: provide_token(), range(8)))
    assert token_file() == nothing_configured
    assert [path.name for path in nothing_configured.parent.iterdir()] == ["auth_token"]
    assert stat.S_IMODE(nothing_configured.stat().st_mode) == 0o600
    assert stat.S_IMODE(nothing_configured.parent.stat().st_mode) == 0o700
    token = nothing_configured.read_text()
    assert len(bytes.fromhex(token)) == 32
    nothing_configured.chmod(0o644)  # as Ray makes it
    provide_token()
    assert stat.S_IMODE(nothing_configured.stat().st_mode) == 0o600
    assert nothing_configured.read_text() == token
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_what_is_configured_is_left_alone(nothing_configured, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "own" / "token"))
    provide_token()
    assert stat.S_IMODE((tmp_path / "own" / "token").stat().st_mode) == 0o600
    (tmp_path / "own" / "token").chmod(0o440)  # as a mounted secret
    provide_token()
    assert stat.S_IMODE((tmp_path / "own" / "token").stat().st_mode) == 0o440
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    provide_token()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    provide_token()
    assert not nothing_configured.exists()


def test_a_home_without_room_for_a_token(nothing_configured):
    nothing_configured.parent.write_text("not a folder")
    with pytest.raises(ClusterError, match=r"cannot keep the token .*; let RAY_AUTH_TOKEN_PATH name a file"):
        provide_token()


def start_other_process(address, **variables):
    """What Ray itself does with a driver that does not ask first; the exit code is 0 if it could run a task."""
    code = (
        "import os, ray\n"
        "from ray._private import ray_constants\n"
        "ray_constants.ENABLE_RAY_CLUSTER = False\n"  # else it looks for 127.0.0.1 elsewhere
        f"ray.init(address={address!r}, log_to_driver=False, logging_level='error')\n"
        "assert ray.get(ray.remote(os.path.basename).remote('folder/name')) == 'name'\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, cwd="/", **pipes)


def listening():
    """Address and port of each socket on which this process, or what it started, waits for connections."""
    found = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            found |= {link.laddr for link in process.net_connections("tcp") if link.status == psutil.CONN_LISTEN}
    return found


def http_answer(port):
    """What a port says to somebody without a token: 401, "metrics" (numbers for Prometheus), or None if it speaks no HTTP/1."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/job_agent/jobs/", timeout=10) as answer:
            return "metrics" if answer.read(7) == b"# HELP " else answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException):
        return None


@pytest.mark.slow
def test_nobody_without_the_token_uses_a_cluster_of_our_own(monkeypatch, tmp_path):
    import ray

    token, wrong = tmp_path / "token", tmp_path / "wrong"
    wrong.write_text("b" * 64)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with session(None):
        address = ray.get_runtime_context().gcs_address
        strangers = [
            start_other_process(address, RAY_AUTH_MODE="disabled"),
            start_other_process(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(wrong)),
            start_other_process(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)),
        ]
        [node] = ray.nodes()
        assert node["Resources"]["object_store_memory"] == 256 * 2**20
        niceness = call(os.getpriority, num_cpus=1, num_gpus=0, arguments={"which": os.PRIO_PROCESS, "who": 0})
        assert niceness == os.getpriority(os.PRIO_PROCESS, 0)  # see `cluster._SYSTEM_SETTINGS`

        sockets = listening()
        assert {place.ip.removeprefix("::ffff:") for place in sockets} == {"127.0.0.1"}
        answers = Counter(http_answer(place.port) for place in sockets)
        assert set(answers) <= {401, "metrics", None}
        assert answers[401] >= 1
        assert answers[None] >= 4  # gRPC of the head, two of the node, a worker or the driver: see the strangers

        assert require_entry(address) == ray.__version__
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
        with pytest.raises(ClusterError, match=f"{address} refuses the token in {wrong}; let RAY_AUTH_TOKEN_PATH name a file"):
            require_entry(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(ClusterError, match=f"{address} asks for a token, and there is none in {tmp_path / 'none'}; let "):
            require_entry(address)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.raises(ClusterError, match="asks for a token, but here RAY_AUTH_MODE is 'disabled'; unset it, and let "):
            require_entry(address)
        errors = [stranger.communicate(timeout=120)[1] for stranger in strangers]
        assert [stranger.returncode for stranger in strangers] == [1, 1, 0], errors
        assert all("Authentication token is missing or incorrect" in error for error in errors[:2])


@pytest.mark.slow
def test_a_cluster_that_lets_everybody_in_is_refused_unless_that_is_meant(monkeypatch):
    """And the workers of one that does not ask for a token can be used then."""
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with session(None):
        address = ray.get_runtime_context().gcs_address
        assert require_entry(address) == ray.__version__
        assert ray.get(ray.remote(os.path.basename).remote("folder/name")) == "name"
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        with pytest.raises(ClusterError, match=f"{address} lets everybody in who can reach it; expected one that asks for a"):
            require_entry(address)


def test_the_default_is_a_token(nothing_configured):
    code = "from infra.cluster_token import provide_token; provide_token(); import os; print(os.environ['RAY_AUTH_MODE'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=checkout())
    assert done.stdout == "token\n"
    assert Path(nothing_configured).exists()
