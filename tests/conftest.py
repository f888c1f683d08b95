"""What tests of several packages share."""

import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from infra.tracking import Tracker
from infra.ui_server import server_command, server_environment

# For every cluster of the tests, also those that a test starts without `cluster.session`; no token gets into the user's home.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# As in our own clusters: at Ray's 15 a worker starves beside the other process of the tests.
os.environ.setdefault("RAY_worker_niceness", "0")

# A busy machine is no failure: pytest-timeout ends what hangs.
settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """The URL of an empty bucket on an S3 server of our own; the environment leads pyarrow there for the rest of the module."""
    boto3 = pytest.importorskip("boto3")
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        yield "s3://bucket"
        client.close()
    server.stop()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making the 65 tables takes seconds, copying them does not."""
    folder = tmp_path_factory.mktemp("template")
    Tracker(f"sqlite:///{folder}/mlflow.db", "template", folder / "artifacts").close()
    return folder / "mlflow.db"


class MlflowServer:
    """A real MLflow server that a test kills, pauses and starts again, and the database behind it."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = folder / "mlflow.db"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = server_command(self._folder / "artifacts", "127.0.0.1", self.port)
        environment = server_environment(f"sqlite:///{self.database}")
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.05)
        raise AssertionError((self._folder / "server.log").read_text())

    def signal(self, number: signal.Signals) -> None:
        """To the whole group: the server works in children."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is None:
            return
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._process = None
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:  # its children may hold the port for a moment
            with suppress(OSError), socket.create_server(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)
        raise AssertionError(f"port {self.port} is still taken")

    def query(self, sql: str, *values: str) -> list[tuple]:
        connection = sqlite3.connect(self.database, timeout=20)
        try:
            return connection.execute(sql, values).fetchall()
        finally:
            connection.close()

    def points(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """Every (step, value) that is recorded, those that are there twice as well."""
        return self.query("select step, value from metrics where run_uuid = ? and key = ? order by step", run_id, name)


@pytest.fixture(scope="module")
def mlflow_server(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    server = MlflowServer(folder)
    server.start()
    yield server
    server.kill()
