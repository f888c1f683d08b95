"""infra/deploy/mlflow: compose.yaml holds against the compose specification and our rules, and the server does what it says."""

import base64
import configparser
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import boto3
import jsonschema
import pytest
import yaml

from infra.tracking import Tracker, is_all_sent

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "infra" / "deploy" / "mlflow"
TEXTS = {path.name: path.read_text() for path in sorted(FOLDER.iterdir())}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SCHEMA = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|_KEY")
# No more, since gunicorn and waitress (--gunicorn-opts, --waitress-opts) have no host check.
OPTIONS = {
    *("host", "port", "workers", "backend-store-uri", "serve-artifacts", "artifacts-destination"),
    *("app-name", "allowed-hosts", "cors-allowed-origins", "x-frame-options"),
}
IMAGE = re.compile(r"(\$\{REGISTRY:\?[^}]*\}/)?[\w.-]+(/[\w.-]+)*:[0-9]+\.[0-9]+[\w.-]*(@sha256:[0-9a-f]{64})?")


def problems(texts: dict[str, str]) -> list[str]:
    found = list(compose_problems(texts["compose.yaml"]))
    found += [f"basic_auth.ini: {problem}" for problem in auth_problems(texts["basic_auth.ini"])]
    return found


def compose_problems(text: str) -> Iterator[str]:
    try:
        compose = yaml.load(text, Loader=yaml.CSafeLoader)
    except yaml.YAMLError as error:
        yield f"not YAML: {error}"
        return
    errors = [f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(compose)]
    yield from errors
    if errors:
        return
    for name, service in compose["services"].items():
        yield from (f"{name}: {problem}" for problem in service_problems(service, compose))
    yield from server_problems(compose["services"].get("mlflow", {}))


def service_problems(service: dict, compose: dict) -> Iterator[str]:
    if not IMAGE.fullmatch(service.get("image", "")):
        yield f"image {service.get('image')} is not of one version"
    if "/sagsm" in service["image"] and service["image"].rpartition(":")[2] != VERSION:
        yield f"image {service['image']} is not of version {VERSION}"
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", service.get("user", "")):
        yield "may run as root"
    if service.get("cap_drop") != ["ALL"] or "cap_add" in service or service.get("privileged"):
        yield "keeps capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "may gain privileges"
    yield from (
        f"has no {limit}" for limit in ("mem_limit", "cpus", "pids_limit", "restart", "healthcheck") if limit not in service
    )
    if not isinstance(service.get("cpus", 0), int | float):
        yield f"cpus is {service['cpus']!r}"
    for port in service.get("ports", []):
        match = re.fullmatch(r"127\.0\.0\.1:(\d+):(\d+)", str(port))
        if not match or not all(0 < int(number) < 65536 for number in match.groups()):
            yield f"port {port} is not one of this machine alone"
    for variable, value in service.get("environment", {}).items():
        if SECRET.search(variable) and not re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", str(value)):
            yield f"{variable} is in clear, or may be missing"
    known = {"networks": compose.get("networks", {}), "depends_on": compose["services"]}
    yield from (f"no {kind} {name}" for kind, names in known.items() for name in service.get(kind, []) if name not in names)
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        if not (source in compose.get("volumes", {}) or (source.startswith("./") and (FOLDER / source).is_file())):
            yield f"no volume or file {source}"


def server_problems(service: dict) -> Iterator[str]:
    program, command, *words = service.get("command", ["", ""])
    if (program, command) != ("mlflow", "server"):
        yield "expected the command `mlflow server`"
        return
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    yield from (f"--{name} is not among the options that a server needs" for name in options.keys() ^ OPTIONS)
    if options.get("app-name") != "basic-auth":
        yield "listens for others without a login (--app-name)"
    hosts, origins = (
        re.sub(r"\$\{\w+:-(.*)\}", r"\1", options.get(name, "*")) for name in ("allowed-hosts", "cors-allowed-origins")
    )
    yield from (f"host {host!r} is not exact" for host in hosts.split(",") if not re.fullmatch(r"[a-z0-9.-]+:\d+", host))
    yield from (
        f"origin {origin!r} is not exact" for origin in origins.split(",") if not re.fullmatch(r"https?://[a-z0-9.:-]+", origin)
    )
    if not options.get("port", "").isdigit():
        yield f"port {options.get('port')!r} is no number"
    if "@" in options.get("backend-store-uri", ""):
        yield "the database's password is in the command line"
    environment = service.get("environment", {})
    for name in ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"):
        if environment.get(name) != "false":
            yield f"{name} is not false"
    mounted = [volume.split(":")[1] for volume in service.get("volumes", [])]
    if environment.get("MLFLOW_AUTH_CONFIG_PATH") not in mounted:
        yield "MLFLOW_AUTH_CONFIG_PATH is no file of the container"
    yield from (
        f"no {name}" for name in ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY") if name not in environment
    )
    if service.get("read_only") is not True:
        yield "can write to its image"


def auth_problems(text: str) -> Iterator[str]:
    parser = configparser.ConfigParser()
    try:
        parser.read_string(text)
    except configparser.Error as error:
        yield f"{error}"
        return
    settings = dict(parser["mlflow"]) if "mlflow" in parser else {}
    wanted = {
        "default_permission": r"READ|NO_PERMISSIONS",
        "admin_username": r"\w+",
        "database_uri": r"postgresql\+psycopg:///mlflow",
        "authorization_function": r"mlflow\.server\.auth:authenticate_request_basic_auth",
    }
    yield from (f"{name} is no setting, or does not belong into a file" for name in settings.keys() - wanted.keys())
    for name, pattern in wanted.items():
        if not re.fullmatch(pattern, settings.get(name, "")):
            yield f"{name} is {settings.get(name)!r}"


def test_the_files_are_right():
    assert problems(TEXTS) == []


MISTAKES = [
    ("compose.yaml", "  postgres:\n    image", "postgres:\n    image", "not YAML"),
    ("compose.yaml", "    restart: unless-stopped", "    restarts: unless-stopped", "restarts"),
    ("compose.yaml", "    restart: unless-stopped", "   restart: unless-stopped", "not YAML"),
    ("compose.yaml", "postgres:17.6-bookworm", "postgres:latest", "not of one version"),
    ("compose.yaml", "sagsm-mlflow:0.1.0", "sagsm-mlflow:0.0.9", "not of version"),
    ("compose.yaml", "${POSTGRES_PASSWORD:?the password of the database}", "hunter2", "in clear"),
    ("compose.yaml", "${POSTGRES_PASSWORD:?the password of the database}", "${POSTGRES_PASSWORD:-mlflow}", "in clear"),
    (
        "compose.yaml",
        "postgresql+psycopg:///mlflow",
        "postgresql+psycopg://mlflow:hunter2@postgres/mlflow",
        "in the command line",
    ),
    ("compose.yaml", 'user: "1000:1000"', 'user: "0:0"', "root"),
    ("compose.yaml", '    user: "999:999"\n', "", "root"),
    ("compose.yaml", "127.0.0.1:5000:5000", "5000:5000", "this machine alone"),
    ("compose.yaml", "127.0.0.1:5000:5000", "0.0.0.0:5000:5000", "this machine alone"),
    ("compose.yaml", "127.0.0.1:5000:5000", "127.0.0.1:50000000:5000", "this machine alone"),
    ("compose.yaml", "      - --app-name=basic-auth\n", "", "without a login"),
    ("compose.yaml", "--app-name=basic-auth", "--app-name=basic_auth", "without a login"),
    ("compose.yaml", "--allowed-hosts=", "--allowed-host=", "--allowed-host "),
    ("compose.yaml", "localhost:5000,127.0.0.1:5000}", "localhost:5000,10.*}", "not exact"),
    ("compose.yaml", "      - --allowed-hosts=${MLFLOW_HOSTS:-localhost:5000,127.0.0.1:5000}\n", "", "not exact"),
    ("compose.yaml", "${MLFLOW_ORIGINS:-http://localhost:5000}", "*", "not exact"),
    ("compose.yaml", "--port=5000", "--port=five", "no number"),
    ("compose.yaml", "      - --x-frame-options=DENY\n", "      - --gunicorn-opts=--timeout=60\n", "gunicorn-opts"),
    ("compose.yaml", "--x-frame-options=DENY", "--disable-security-middleware", "disable-security"),
    ("compose.yaml", 'DESERIALIZATION: "false"', 'DESERIALIZATION: "true"', "DESERIALIZATION is not false"),
    ("compose.yaml", "    cap_drop: [ALL]\n", "    privileged: true\n", "keeps capabilities"),
    ("compose.yaml", "    mem_limit: 2g\n", "", "has no mem_limit"),
    ("compose.yaml", "    cpus: 2\n", "    cpus: two\n", "cpus is 'two'"),
    ("compose.yaml", "networks: [database, outside]", "networks: [databse, outside]", "no networks databse"),
    ("compose.yaml", "./basic_auth.ini:/etc", "./basic-auth.ini:/etc", "basic-auth.ini"),
    ("compose.yaml", "/etc/mlflow/basic_auth.ini:ro", "/etc/mlflow.ini:ro", "no file of the container"),
    ("compose.yaml", "postgres: {condition: service_healthy}", "postgres: {condition: healthy}", "healthy"),
    ("basic_auth.ini", "admin_username = admin\n", "", "admin_username is None"),
    ("basic_auth.ini", "admin_username = admin\n", "admin_username = admin\nadmin_password = hunter2\n", "does not belong"),
    ("basic_auth.ini", "postgresql+psycopg:///mlflow", "postgresql://mlflow:hunter2@postgres/mlflow", "database_uri"),
    ("basic_auth.ini", "default_permission = READ", "default_permission = MANAGE", "default_permission"),
    ("basic_auth.ini", "default_permission", "default_permissions", "default_permissions is no setting"),
    ("basic_auth.ini", "[mlflow]", "[mlflow", "mlflow"),
    ("basic_auth.ini", "[mlflow]", "[auth]", "default_permission is None"),
    ("basic_auth.ini", "[mlflow]\n", "", "no section headers"),
    ("basic_auth.ini", "[mlflow]", "[MLFLOW]", "default_permission is None"),
    ("basic_auth.ini", "default_permission = READ", "default_permission = EDIT", "default_permission is 'EDIT'"),
    ("basic_auth.ini", "default_permission = READ", "default_permission = read", "default_permission is 'read'"),
    ("basic_auth.ini", "default_permission = READ", "default_permission", "parsing errors"),
    ("basic_auth.ini", "default_permission = READ", "default_permission =", "default_permission is ''"),
    ("basic_auth.ini", "default_permission = READ\n", "", "default_permission is None"),
    ("basic_auth.ini", "admin_username = admin", "admin_username = me@example", "admin_username is 'me@example'"),
    ("basic_auth.ini", "admin_username = admin", "admin_user = admin", "admin_user is no setting"),
    ("basic_auth.ini", "admin_username = admin\n", "admin_username = admin\n" * 2, "already exists"),
    ("basic_auth.ini", "postgresql+psycopg:///mlflow", "sqlite:///basic_auth.db", "database_uri is 'sqlite"),
    ("basic_auth.ini", "postgresql+psycopg:///mlflow", "postgresql+psycopg://postgres/mlflow", "database_uri"),
    ("basic_auth.ini", "authorization_function =", "authorisation_function =", "authorisation_function is no setting"),
    ("basic_auth.ini", "authenticate_request_basic_auth", "authenticate_request", "authorization_function is"),
]


@pytest.mark.parametrize(
    "name, right, wrong, said", MISTAKES, ids=[f"{name}: {wrong.strip()[:40]}" for name, _, wrong, _ in MISTAKES]
)
def test_a_mistake_is_found(name, right, wrong, said):
    assert right in TEXTS[name]
    found = problems({**TEXTS, name: TEXTS[name].replace(right, wrong, 1)})
    assert [problem for problem in found if said in problem], found


def test_misspelt_fields_are_found():
    """Twenty, drawn by a fixed seed."""
    text = TEXTS["compose.yaml"]
    fields = [
        match.span(1)
        for match in re.finditer(r"^ *(?!mlflow|postgres|outside|database)([a-z_]+):(?=[ \n])", text, flags=re.MULTILINE)
    ]
    for start, end in random.Random(0).sample(fields, 20):
        assert list(compose_problems(text[: end - 1] + text[end:])), text[start:end]


class Server:
    """The server of compose.yaml as it is written there, but for the database, which is SQLite, and the port."""

    def __init__(self, folder: Path, database: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        shutil.copy(database, folder / "mlflow.db")
        sqlite = f"sqlite:///{folder}/mlflow.db"
        (folder / "basic_auth.ini").write_text(TEXTS["basic_auth.ini"].replace("postgresql+psycopg:///mlflow", sqlite))
        given = {
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": "the password of admin",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "0123456789abcdef0123456789abcdef",
        }
        service = yaml.safe_load(TEXTS["compose.yaml"])["services"]["mlflow"]
        fixed = {name: value for name, value in service["environment"].items() if value and "$" not in value and name != "HOME"}
        changed = {
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--workers": "1",
            "--backend-store-uri": sqlite,
            "--artifacts-destination": "s3://bucket/mlflow",
            "--allowed-hosts": f"localhost:{self.port},127.0.0.1:{self.port}",
            "--cors-allowed-origins": f"http://localhost:{self.port}",
        }
        words = [word.partition("=") for word in service["command"][1:]]
        command = [f"{name}{equals}{changed.get(name, value)}" for name, equals, value in words]
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command],
                env={**os.environ, **fixed, **given},
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(OSError):
                if self.ask("GET", "/health") == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def ask(self, method: str, path: str, user: str | None = None, body: dict | None = None, **headers: str) -> int:
        """The status of the answer; `user` is a name and a password with a colon between them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if user is not None:
            headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        try:
            connection.request(method, path, json.dumps(body or {}), {"Content-Type": "application/json", **headers})
            return connection.getresponse().status
        finally:
            connection.close()

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(empty_database: Path, s3_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"), empty_database)
    started.wait_until_healthy()
    yield started
    started.stop()


ADMIN = "admin:the password of admin"
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


REQUESTS = {
    "the admin": (200, {"user": ADMIN}),
    "nobody": (401, {}),
    "another password": (401, {"user": "admin:password1234"}),
    "an unknown user": (401, {"user": "me:the password of admin"}),
    "the pages, without a login": (401, {"path": "/"}),
    "files, without a login": (401, {"path": "/api/2.0/mlflow-artifacts/artifacts"}),
    "another host": (403, {"user": ADMIN, "Host": "evil.example"}),
    "a host that looks like a private address": (403, {"user": ADMIN, "Host": "10.attacker.example"}),
    "a private address": (403, {"user": ADMIN, "Host": "192.168.0.1:5000"}),
    "another site": (403, {"user": ADMIN, "method": "POST", "Origin": "http://evil.example"}),
    "a path out of the store": (400, {"user": ADMIN, "path": "/api/2.0/mlflow-artifacts/artifacts?path=..%2f..%2fetc"}),
}


@pytest.mark.slow
def test_the_server_asks_who_one_is_and_from_where_one_comes(server):
    answers = {name: server.ask(**{"method": "GET", "path": SEARCH, **request}) for name, (_, request) in REQUESTS.items()}
    assert answers == {name: status for name, (status, _) in REQUESTS.items()}


@pytest.mark.slow
def test_a_user_of_its_own_records_runs_and_files_in_the_bucket(server, tmp_path, monkeypatch):
    """As infra/README.md says: the pipeline is no admin, and has no key of the bucket."""
    user = {"username": "sagsm", "password": "the password of sagsm"}
    assert server.ask("POST", "/api/2.0/mlflow/users/create", "nobody:nothing at all", user) == 401
    assert server.ask("POST", "/api/2.0/mlflow/users/create", ADMIN, user) == 200
    bucket = boto3.client("s3", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user["username"])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", user["password"])
    tracker = Tracker(server.uri, "demo", tmp_path / "artifacts")
    (tmp_path / "note.txt").write_text("hello")
    with tracker.start_run("a run") as run:
        run.log_metrics({"loss": 1.0}, step=1)
        run.log_file(tmp_path / "note.txt", "tables")
    tracker.close(120)
    assert is_all_sent(server.uri, tmp_path / "artifacts")
    keys = [item["Key"] for item in bucket.list_objects_v2(Bucket="bucket", Prefix="mlflow/")["Contents"]]
    assert [key for key in keys if key.endswith("/artifacts/tables/note.txt")]
