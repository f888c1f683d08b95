"""The served network: paths and bytes give what `sagsm predict` gives, over HTTP too."""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from infra.tracking import Tracker, tracking_uri
from infra.tracking_model import CLIENT_ENVIRONMENT
from pipelines.predict import load_predictor
from pipelines.serving import CODE, NEWEST, example_video, load_answerer, registered_name

BIN = Path(sys.executable).parent


def base64_of(path):
    return base64.b64encode(path.read_bytes()).decode()


def test_bytes_and_paths_are_answered_alike_and_broken_ones_do_not_disturb(asked):
    answer = load_answerer(asked.artifact / "model")
    film = asked.raw / "film.mov"
    texts = [str(film), base64_of(film), "not there.mp4", base64.b64encode(b"no video").decode(), "", str(asked.raw / "frames")]
    by_path, by_bytes, missing, text, empty, frames = answer(texts)
    assert by_path == by_bytes
    expected = load_predictor(asked.artifact).predict(film).top(5)
    assert by_path["probabilities"] == pytest.approx([score for _, score in expected])
    assert (by_path["status"], len(by_path["classes"]), frames["status"]) == ("ok", 5, "ok")
    assert [found["reason"] for found in (missing, text, empty)] == ["missing", "undecodable", "empty"]
    assert missing["detail"] == "'not there.mp4' is neither a path on this machine nor base64"
    assert all(found["status"] == "rejected" and found["classes"] == [] for found in (missing, text, empty))
    assert not any("/" in found["detail"] for found in (text, empty))  # nothing of this machine's folders


def test_the_example_is_a_video_that_is_small_and_the_same_each_time(asked):
    example = example_video()
    assert example == example_video()
    assert len(example) < 30_000
    (found,) = load_answerer(asked.artifact / "model")([example])
    assert (found["status"], found["detail"]) == ("ok", "")


@pytest.fixture
def served(asked, empty_database, tmp_path):
    """The URL of a server of the registered network, and the work directory whose MLflow it comes from."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = tracking_uri(tmp_path)
    tracker = Tracker(uri, "films", tmp_path / "mlflow-artifacts")
    name = registered_name("films")
    with tracker.start_run("report") as run:
        run.log_model(name, NEWEST, asked.artifact / "model", code=CODE, card="# films", example=example_video(), tags={})
    tracker.close(120)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [BIN / "mlflow", "models", "serve", "-m", f"models:/{name}@{NEWEST}", "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    path = f"{BIN}:{os.environ['PATH']}"
    environment = {**os.environ, **CLIENT_ENVIRONMENT, "MLFLOW_TRACKING_URI": uri, "PATH": path}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ping", timeout=5):
                break
            time.sleep(0.2)
        yield url, tmp_path
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_mlflow_serves_it_and_says_what_predict_says(asked, served, tmp_path):
    url, workdir = served
    film = asked.raw / "film.webm"
    (tmp_path / "text.mp4").write_text("no video")
    videos = [base64_of(film), str(film), str(asked.raw / "frames"), str(tmp_path / "text.mp4")]
    body = json.dumps({"dataframe_records": [{"video": video} for video in videos]}).encode()
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        by_bytes, by_path, frames, broken = json.loads(response.read())["predictions"]
    command = [BIN / "sagsm", "predict", "--model", "models:/sagsm-films@newest", "--workdir", workdir, "--json"]
    done = subprocess.run([*command, film, asked.raw / "frames"], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)["videos"]
    for answer, expected in ((by_bytes, said[0]), (by_path, said[0]), (frames, said[1])):
        assert answer["classes"] == [best["class"] for best in expected["top"]]
        assert answer["probabilities"] == pytest.approx([best["probability"] for best in expected["top"]], abs=1e-5)
    assert (broken["status"], broken["reason"]) == ("rejected", "undecodable")
    assert not list(workdir.glob(".tmp-model-*"))
