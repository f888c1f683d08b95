import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.errors import PipelineError
from infra.links import runs_url, trials_url
from infra.tracking import Tracker
from infra.ui_server import serve_ui, server_command, server_environment


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_taken_port_is_found_before_the_server_starts(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            PipelineError, match=f"port {port} .*in use.*; expected a free one; choose another with --port {port + 1}"
        ):
            serve_ui(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, port=port)


@pytest.mark.parametrize(
    ("uri", "host", "message"),
    [
        ("sqlite:////nowhere/mlflow.db", "127.0.0.1", "found no runs at sqlite:////nowhere/mlflow.db; expected .* --workdir"),
        ("http://mlflow.example", "127.0.0.1", "recorded at http://mlflow.example, .* expected .* in a browser"),
        ("sqlite:////nowhere/mlflow.db", "0.0.0.0", "--host is 0.0.0.0; expected one of 127.0.0.1, localhost, .* use `ssh -L"),
    ],
)
def test_what_cannot_be_served_is_an_error(tmp_path: Path, uri: str, host: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        serve_ui(uri, tmp_path, host=host)


def test_the_server_checks_hosts_exactly(tmp_path: Path) -> None:
    command = server_command(tmp_path, "127.0.0.1", 5001)
    assert command[command.index("--allowed-hosts") + 1] == "127.0.0.1:5001,localhost:5001"
    assert command[command.index("--workers") + 1] == "1"


def test_a_password_of_the_database_is_no_argument(tmp_path: Path) -> None:
    uri = "postgresql://me:hush@127.0.0.1/mlflow"
    assert server_environment(uri)["MLFLOW_BACKEND_STORE_URI"] == uri
    assert "postgresql" not in " ".join(server_command(tmp_path, "127.0.0.1", 5001))


def status_and_body(address: str, host: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers={"Host": host}), timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@contextlib.contextmanager
def serving(workdir: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    code = (
        "from pathlib import Path; from infra.ui_server import serve_ui\n"
        f"serve_ui('sqlite:///{workdir}/mlflow.db', Path('{workdir}/artifacts'), port={port}, "
        "say=lambda text: print(text, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()  # not kill: the server would outlive a wrapper that cannot stop it
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_the_ui_answers_this_machine_only_and_leaves_no_process(
    tmp_path: Path, free_port: int, stop_signal: signal.Signals
) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "demo", tmp_path / "artifacts")
    with tracker.start_run("p01") as run:
        run.log_text("the page", "report/index.html")
    tracker.start_run("t001", parent=run.run_id, tags={"stage": "trial"}).finish()
    tracker.close()
    base = f"http://127.0.0.1:{free_port}"
    with serving(tmp_path, free_port) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"demo: {runs_url(base, '1')}\n"
        assert process.stdout.readline() == f"demo, trials: {trials_url(base, '1', 'val/top1')}\n"
        assert process.stdout.readline() == "Ctrl-C stops the server.\n"
        children = psutil.Process(process.pid).children(recursive=True)
        host = f"127.0.0.1:{free_port}"
        assert status_and_body(f"{base}/", host)[0] == 200
        assert status_and_body(f"{base}/get-artifact?path=report/index.html&run_uuid={run.run_id}", host) == (200, b"the page")
        for stranger in ("10.attacker.example", "192.168.1.7", f"10.attacker.example:{free_port}", "evil.com"):
            assert status_and_body(f"{base}/", stranger)[0] == 403
        os.kill(process.pid, stop_signal)
        assert process.wait(60) == 0
        deadline = time.monotonic() + 5
        while any(child.is_running() for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert children
        assert not [child for child in children if child.is_running()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts", "mlflow-spool", "mlflow.db", "mlflow.db.lock"]
