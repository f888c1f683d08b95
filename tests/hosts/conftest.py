"""What runs on the hosts: Ray with a token, MLflow with PostgreSQL, an S3 server that asks who one is."""

import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts.network import Host, Network, is_possible

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
GCS_PORT, MLFLOW_PORT, S3_PORT = 6379, 5000, 9000
NODE = ["--object-store-memory=100000000", "--disable-usage-stats"]
# As infra/deploy/ray_up/machines.yaml starts nodes.
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_task_oom_retries": "3",
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",
    "AUTOSCALER_METRIC_PORT": "-1",
    "RAY_raylet_start_wait_time_s": "120",
}


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds:g} s for {what}")


class Site:
    """The hosts `head`, `one`, `two` (Ray), `tracking` (MLflow), `database` and `objects` (S3).

    Attributes:
        network: to cut links.
        shared: a folder that all hosts see.
        environment: for `sagsm` on the head.
    """

    def __init__(self, folder: Path) -> None:
        self.network = Network(folder)
        self.shared = folder / "shared"
        self.shared.mkdir()
        hosts = [self.network.add(name) for name in ("head", "one", "two", "tracking", "database", "objects")]
        self.head, self.one, self.two, self.tracking, self.database, self.objects = hosts
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        for host in (self.head, self.one, self.two):
            host.environment |= RAY | {"RAY_AUTH_TOKEN_PATH": str(token)}
        self._password, self._admin = secrets.token_hex(16), secrets.token_hex(16)
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        self._make_database()
        self.start_database()
        keys = self._start_objects()
        for host in (self.head, self.one, self.two, self.tracking):
            host.environment |= keys
        self.start_tracking()
        self.head.environment |= {
            "MLFLOW_TRACKING_URI": f"http://{self.tracking.address}:{MLFLOW_PORT}",
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": self._admin,
        }
        self.start_head()
        for host in (self.one, self.two):
            self.start_worker(host)

    def start_head(self) -> None:
        options = [f"--port={GCS_PORT}", f"--node-ip-address={self.head.address}", "--dashboard-host=0.0.0.0"]
        done = self.head.run(BIN / "ray", "start", "--head", "--num-cpus=0", *options, *NODE)
        assert done.returncode == 0, done.stdout + done.stderr

    def start_worker(self, host: Host) -> None:
        address = [f"--address={self.head.address}:{GCS_PORT}", f"--node-ip-address={host.address}"]
        done = host.run(BIN / "ray", "start", "--num-cpus=1", *address, *NODE)
        assert done.returncode == 0, done.stdout + done.stderr

    def _make_database(self) -> None:
        data, password = self.database.folder / "data", self.database.folder / "password"
        password.write_text(self._password)
        shutil.chown(self.database.folder, "postgres", "postgres")
        shutil.chown(password, "postgres")
        options = ["-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={password}", "--no-sync", "-D", data]
        done = self.database.run("runuser", "-u", "postgres", "--", POSTGRES / "initdb", *options)
        assert done.returncode == 0, done.stderr
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {self.tracking.address}/32 scram-sha-256\n")

    def start_database(self) -> None:
        folder = self.database.folder
        options = [f"listen_addresses={self.database.address}", f"unix_socket_directories={folder}"]
        settings = [word for option in options for word in ("-c", option)]
        postgres = ["runuser", "-u", "postgres", "--", POSTGRES / "postgres", "-D", folder / "data", *settings]
        self.database.start(*postgres, log="postgres.log")
        self.database.environment |= {"PGUSER": "mlflow", "PGPASSWORD": self._password, "PGHOST": str(folder)}
        ready = [POSTGRES / "psql", "--dbname", "postgres", "--command", "select 1"]
        wait_until(lambda: self.database.run(*ready).returncode == 0, "PostgreSQL")
        self.database.run(POSTGRES / "createdb", "mlflow")  # the second time it is there

    def ask_database(self, query: str) -> str:
        """What PostgreSQL answers, as CSV."""
        done = self.database.run(POSTGRES / "psql", "--csv", "--tuples-only", "--dbname", "mlflow", "--command", query)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start_tracking(self) -> None:
        """The server of infra/deploy/mlflow/compose.yaml, command and variables."""
        service = yaml.safe_load((ROOT / "infra/deploy/mlflow/compose.yaml").read_text())["services"]["mlflow"]
        place = f"{self.tracking.address}:{MLFLOW_PORT}"
        changed = {
            "--host": self.tracking.address,
            "--workers": "1",
            "--artifacts-destination": "s3://bucket/mlflow",
            "--allowed-hosts": place,
            "--cors-allowed-origins": f"http://{place}",
        }
        words = [word.partition("=") for word in service["command"][1:]]
        command = [f"{name}{equals}{changed.get(name, value)}" for name, equals, value in words]
        fixed = {name: value for name, value in service["environment"].items() if value and "$" not in value and name != "HOME"}
        given = {
            "PGHOST": self.database.address,
            "PGPASSWORD": self._password,
            "MLFLOW_S3_ENDPOINT_URL": f"http://{self.objects.address}:{S3_PORT}",
            "MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "infra/deploy/mlflow/basic_auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self._admin,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        }
        self.tracking.start(sys.executable, "-m", "mlflow", *command, log="mlflow.log", **(fixed | given))
        health = f"import urllib.request as r; r.urlopen('http://{place}/health', timeout=5)"
        wait_until(lambda: self.tracking.run(sys.executable, "-c", health).returncode == 0, "MLflow")

    def _start_objects(self) -> dict[str, str]:
        """Moto's S3, which asks for the keys of a user that is made in the first three requests."""
        self.objects.start(
            *(BIN / "moto_server", "-H", self.objects.address, "-p", str(S3_PORT)),
            log="s3.log",
            INITIAL_NO_AUTH_ACTION_COUNT="4",
        )
        endpoint = f"http://{self.objects.address}:{S3_PORT}"
        made = wait_until(lambda: self.objects.run(sys.executable, "-c", _MAKE_USER, AWS_ENDPOINT_URL=endpoint).stdout, "S3")
        return {**json.loads(made), "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}


_MAKE_USER = """
import boto3, json
options = dict(region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")
iam, s3 = (boto3.client(name, **options) for name in ("iam", "s3"))
iam.create_user(UserName="sagsm")
key = iam.create_access_key(UserName="sagsm")["AccessKey"]
rule = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
iam.put_user_policy(UserName="sagsm", PolicyName="bucket", PolicyDocument=policy)
s3.create_bucket(Bucket="bucket")
print(json.dumps({"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}))
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if not is_possible():
        pytest.skip("needs root and `ip` (iproute2), to make network namespaces")
    if POSTGRES is None:
        pytest.skip("PostgreSQL is not on this machine (`make packages` installs it)")
    folder = Path(tempfile.mkdtemp(prefix="sagsm-hosts-"))
    folder.chmod(0o711)  # PostgreSQL runs as a user of its own
    made = Site(folder)
    try:
        made.start()
        yield made
    finally:
        made.network.close()
        shutil.rmtree(folder)
