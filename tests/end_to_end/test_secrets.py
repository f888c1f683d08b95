"""Secrets planted where users put them are used, and then are in no log, record, artifact, process list or error message."""

import base64
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from infra.filesystems import Folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SAGSM = str(Path(sys.executable).with_name("sagsm"))
MARK = "planted"
LOGIN = base64.b64encode(f"me:{MARK}-tracking/1".encode()).decode()
ENVIRONMENT = {  # used or not, they are there while everything runs
    "AWS_ACCESS_KEY_ID": f"{MARK}-key-id-2",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}/secret+key-3",
    "AWS_SESSION_TOKEN": f"{MARK}-session-4",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": f"{MARK}-ray-5",
    "HTTPS_PROXY": f"http://me:{MARK}-proxy-6@127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
    "HF_TOKEN": f"{MARK}-hugging-face-7",
    "PGPASSWORD": f"{MARK}-postgres-8",
}
SETTINGS = [
    "dataset.synthetic.num_train=32",
    "dataset.synthetic.num_validation=16",
    "dataset.synthetic.num_broken=1",
    "shards.max_bad_fraction=0.1",
    "shards.videos_per_shard=16",
    "search.num_trials=0",
    "train.epochs=2",
    "train.warmup_epochs=1",
    "train.num_segments=2",
    "train.pixels=32",
    "model.name=gsm_resnet18",
]


def serve(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def login(mlflow_server):
    """A proxy before the MLflow server that lets in who knows the password; `login.num_let_in` counts."""

    class Login(BaseHTTPRequestHandler):
        def do(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path != "/health" and self.headers.get("Authorization") != f"Basic {LOGIN}":
                self.answer(401, b"who are you? not " + self.headers.get("Authorization", "").encode())
                return
            self.server.num_let_in += self.path != "/health"
            connection = http.client.HTTPConnection("127.0.0.1", mlflow_server.port, timeout=60)
            connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
            with connection.getresponse() as found:
                self.answer(found.status, found.read())
            connection.close()

        def answer(self, status, data):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

        do_GET = do_POST = do_PATCH = do_DELETE = do

    server = serve(Login)
    server.num_let_in = 0
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def refusing_s3():
    """Says what Amazon says to a key that it does not know, which it repeats."""

    class Refusal(BaseHTTPRequestHandler):
        def do(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = ENVIRONMENT["AWS_ACCESS_KEY_ID"]
            text = f"<Message>no {key}</Message><AWSAccessKeyId>{key}</AWSAccessKeyId>"
            text = f"<Error><Code>InvalidAccessKeyId</Code>{text}</Error>"
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode() if self.command != "HEAD" else b"")

        def log_message(self, *arguments):
            pass

        do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do

    server = serve(Refusal)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class ProcessWatch:
    """Looks at the arguments of all processes of the machine, over and over."""

    def __init__(self):
        self.seen, self._ended = set(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        self._thread.join()

    def _watch(self):
        while not self._ended.wait(0.25):
            self.seen |= {" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])}


def leaks(*places):
    """Where in texts, files and folders a secret is, plain or as a login."""
    found = []
    for place in places:
        paths = [] if isinstance(place, str) else [path for path in [place, *place.rglob("*")] if path.is_file()]
        texts = {str(path): path.read_bytes() for path in paths} or {str(place)[:2000]: str(place).encode()}
        found += [name for name, data in texts.items() if MARK.encode() in data or LOGIN.encode() in data]
    return found


@pytest.fixture
def home():
    """A home and a folder for temporary files, with a path short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def environment(home, **more):
    places = {"HOME": str(home), "TMPDIR": str(home), "RAY_TMPDIR": str(home)}
    return {**os.environ, **ENVIRONMENT, **places, **more}


def sagsm(*arguments, env):
    return subprocess.run([SAGSM, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=900, check=False)


def settings(*more):
    return [part for assignment in [*SETTINGS, *more] for part in ("--set", assignment)]


def test_what_is_found_is_a_leak(tmp_path):
    """The search itself works."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.txt").write_text(f"the key is {ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}")
    assert len(leaks(tmp_path, f"Authorization: Basic {LOGIN}", "nothing")) == 2


def test_a_pipeline_uses_secrets_and_shows_none(mlflow_server, login, s3_url, home, tmp_path):
    """With a gc in the middle of it, which must not take away what the run uses."""
    tracking = f"http://me:{MARK}-tracking%2F1@127.0.0.1:{login.server_port}"
    env = environment(home, MLFLOW_TRACKING_URI=tracking)
    work = tmp_path / "work"
    command = ["run", "demo", "--workdir", work, "--json"]
    command += settings(f"shards.output={s3_url}/sets", f"train.checkpoints={s3_url}/checkpoints")
    with ProcessWatch() as watch, subprocess.Popen(
        [SAGSM, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 500
        while not list(work.glob("store/train/*.partial/checkpoints/step-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        collected = sagsm("store", "gc", "--keep-days", 0, "--yes", "--json", "--workdir", work, env=env)
        output, errors = process.communicate(timeout=1000)
    assert process.returncode == 0, errors
    assert {stage["status"] for stage in json.loads(output)["stages"]} == {"ran"}
    assert json.loads(collected.stdout)["removed"] == []
    assert all("in use by sagsm run demo" in item["state"] for item in json.loads(collected.stdout)["kept"])
    assert login.num_let_in > 30
    assert set(mlflow_server.query("select status from runs")) == {("FINISHED",)}
    assert Folder(f"{s3_url}/checkpoints").entries()
    assert any("raylet" in text for text in watch.seen)
    assert list((home).glob("**/raylet.out"))
    assert leaks(output, errors, collected.stdout, collected.stderr, *watch.seen) == []
    assert leaks(work, home, mlflow_server.database.parent) == []
    assert sorted(path.name for path in mlflow_server.database.parent.iterdir()) == ["artifacts", "mlflow.db", "server.log"]


REFUSED = {
    "keys in a root": ("dataset.root=s3://KEY:planted-9@bucket/x", "root holds a URL with"),
    "a signed URL": (
        "model.backbone_weights=https://host/w.pth?X-Amz-Signature=planted-10",
        "backbone_weights holds a URL with",
    ),
    "keys in a query": ("shards.output=s3://bucket/x?secret_key=planted-11", "output holds a URL with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_setting_with_a_secret_is_refused(case, home, tmp_path):
    setting, message = REFUSED[case]
    done = sagsm("run", "demo", "--set", setting, "--workdir", tmp_path / "work", env=environment(home))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert leaks(done.stderr, home) == []
    assert not (tmp_path / "work").exists()


def test_errors_of_servers_that_refuse_show_no_secret(login, refusing_s3, home, tmp_path):
    """S3 that knows no such key; MLflow that wants another password; a database that is not there, also for `sagsm ui`."""
    database = {"MLFLOW_TRACKING_URI": f"postgresql://me:{MARK}-database-12@127.0.0.1:1/mlflow"}
    wrong = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{login.server_port}", "MLFLOW_TRACKING_USERNAME": "me"}
    wrong |= {"MLFLOW_TRACKING_PASSWORD": f"{MARK}-wrong-13"}
    refusal, endpoint = ({"AWS_ENDPOINT_URL": url} for url in (refusing_s3, f"http://me:{MARK}-endpoint-14@127.0.0.1:9"))
    run = ["run", "demo", "--only", "index", *settings()]
    cases = [
        (
            ["run", "demo", "--only", "shards", *settings("shards.output=s3://bucket/x")],
            refusal,
            "INVALID_ACCESS_KEY_ID during ListObjectsV2 operation: no ***; check",
        ),
        (["shards", "stats", "s3://bucket/x"], endpoint, "AWS_ENDPOINT_URL is 'http://***@127.0.0.1:9'"),
        (run, wrong, "401"),
        (run, database, "tracking at postgresql://***@127.0.0.1:1/mlflow failed"),
        (["ui"], database, "tracking at postgresql://***@127.0.0.1:1/mlflow failed"),
        (["predict", "--model", "models:/a@b", f"https://me:{MARK}-15@host/x"], database, "tracking at postgresql://***@"),
    ]
    with ProcessWatch() as watch:
        for number, (arguments, more, message) in enumerate(cases):
            where = [] if arguments[0] == "shards" else ["--workdir", tmp_path / str(number)]
            done = sagsm(*arguments, *where, env=environment(home, **more))
            assert done.returncode == 2, (arguments, done.stdout, done.stderr)
            assert message in done.stderr, (arguments, done.stderr)
            assert "Traceback" not in done.stderr
            assert leaks(done.stdout, done.stderr) == []
    typed = [text for text in watch.seen if f"{MARK}-15" in text]  # by the user, as an argument of our own process
    assert leaks(*(watch.seen - set(typed))) == []
    assert leaks(home, tmp_path) == []
