"""Serves the MLflow pages of a work directory on this machine, to this machine only."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from infra.errors import PipelineError
from infra.links import runs_url, trials_url
from infra.tracking import experiment_ids, has_runs
from infra.tracking_model import CLIENT_ENVIRONMENT

DEFAULT_PORT = 5000
_TRIAL_METRIC = "val/top1"
_LOOPBACK = ("127.0.0.1", "localhost")
_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_LOG_TAIL_BYTES = 1500

# Job execution starts worker processes that outlive the server; unpickling what somebody logged runs their code.
_SERVER_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}


def serve_ui(
    uri: str,
    artifact_root: Path,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the MLflow pages until Ctrl-C or SIGTERM, then stop every process that was started.

    Once the server answers, it says where the runs of each experiment are shown.

    Args:
        uri: of the database, as `infra.tracking.tracking_uri` gives it: of SQLite, or of a server such as PostgreSQL.
        artifact_root: where the files of runs are.
        host: 127.0.0.1 or localhost: the pages have no login.
        port: to listen on.
        say: prints a line.

    Raises:
        PipelineError: if the host is not this machine, the port is taken, there is no database, or the server does not start.
    """
    if host not in _LOOPBACK:
        raise PipelineError(
            f"--host is {host}; expected one of {', '.join(_LOOPBACK)}, since the pages have no login; "
            f"from another machine use `ssh -L {port}:127.0.0.1:{port}`"
        )
    if uri.startswith("http"):
        raise PipelineError(
            f"runs are recorded at {uri}, a server with its own pages; expected the database of a work directory; "
            f"open {uri} in a browser, or unset MLFLOW_TRACKING_URI"
        )
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise PipelineError(
            f"found no runs at {uri}; expected a SQLite database that `sagsm run` has written; "
            "run an experiment first, or name its folder with --workdir"
        )
    _require_free_port(host, port)
    with _interrupted_by_signals(), tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            server_command(artifact_root, host, port),
            env=server_environment(uri),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end the whole group
        )
        try:
            links = list(_links(uri, f"http://{host}:{port}"))
            _wait_until_healthy(server, f"http://{host}:{port}/health", log)
            for link in links:
                say(link)
            say("Ctrl-C stops the server.")
            server.wait()
            raise PipelineError(f"the MLflow server ended by itself; expected it to go on; its last words: {_tail(log)}")
        except KeyboardInterrupt:
            pass
        finally:
            _stop(server)


def server_environment(uri: str) -> dict[str, str]:
    """The environment of `server_command`: ours, and the database, whose URI may hold a password that `ps` must not show."""
    return {**CLIENT_ENVIRONMENT, **os.environ, **_SERVER_ENVIRONMENT, "MLFLOW_BACKEND_STORE_URI": uri}


def _links(uri: str, base: str) -> Iterator[str]:
    """A line for each page that a person should know of."""
    for name, number in experiment_ids(uri).items():
        yield f"{name}: {runs_url(base, number)}"
        if has_runs(uri, number, "trial"):
            yield f"{name}, trials: {trials_url(base, number, _TRIAL_METRIC)}"


def server_command(artifact_root: Path, host: str, port: int) -> list[str]:
    """The command of an MLflow server that answers only requests addressed to this machine at this port.

    Its own host check takes 10.attacker.example for a private address, hence the exact list.
    """
    names = [f"{name}:{port}" for name in _LOOPBACK]
    return [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--no-serve-artifacts"),
        *("--default-artifact-root", artifact_root.resolve().as_uri()),
        *("--host", host, "--port", str(port)),
        *("--allowed-hosts", ",".join(names), "--cors-allowed-origins", ",".join(f"http://{name}" for name in names)),
    ]


def _require_free_port(host: str, port: int) -> None:
    """MLflow itself finds out only after its slow start, and then stays."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was closed a moment ago is free
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise PipelineError(
                f"port {port} of {host} cannot be used ({error}); expected a free one; choose another with --port {port + 1}"
            ) from error


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, log: IO[bytes]) -> None:
    give_up = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < give_up:
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):  # noqa: S310 (our own http address)
            return
        time.sleep(0.1)
    state = "did not answer" if server.poll() is None else f"ended with code {server.returncode}"
    raise PipelineError(
        f"the MLflow server {state}; expected it at {address} within {_START_SECONDS:.0f} s; its last words: {_tail(log)}"
    )


def _stop(server: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):  # whoever of the group is left
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """SIGTERM ends us as Ctrl-C does, and SIGINT even where a shell started us with `&`, which makes Python ignore it.

    Signal handlers belong to the main thread; elsewhere nothing is changed.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tail(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
    return log.read().decode(errors="replace").strip() or "none"
