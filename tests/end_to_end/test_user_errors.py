"""Each user error is one clear message: found, expected, what to do; exit code 2, no traceback, nothing half written."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preprocessing.synthetic import SyntheticSettings, generate

SAGSM = str(Path(sys.executable).with_name("sagsm"))


def fail(*arguments, **more):
    done = subprocess.run([SAGSM, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120, **more)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw") / "something_v1"
    generate(SyntheticSettings(num_train=8, num_validation=8, num_broken=0), root, "something_v1", None)
    return root


@pytest.fixture
def damaged(raw, tmp_path):
    return Path(shutil.copytree(raw, tmp_path / "raw"))


def test_a_root_that_does_not_exist(tmp_path):
    message = fail("run", "diving48", "--set", "dataset.root=/nowhere", "--workdir", tmp_path / "work")
    assert "/nowhere" in message
    assert "dataset.root" in message
    assert not (tmp_path / "work").exists()


def test_a_missing_csv(damaged, tmp_path):
    (damaged / "something-something-v1-train.csv").unlink()
    message = fail("run", "something_v1_smoke", "--set", f"dataset.root={damaged}", "--workdir", tmp_path / "work")
    assert "something-something-v1-train.csv" in message
    assert not (tmp_path / "work").exists()


def test_a_label_that_is_in_no_list(damaged, tmp_path):
    path = damaged / "something-something-v1-train.csv"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].split(";")[0] + ";Moving something upp"
    path.write_text("\n".join(lines) + "\n")
    message = fail("run", "something_v1_smoke", "--set", f"dataset.root={damaged}", "--workdir", tmp_path / "work")
    assert "something-something-v1-train.csv" in message
    assert "row 3" in message
    assert "did you mean Moving something up?" in message
    assert list((tmp_path / "work" / "store").glob("*/*/artifact.json")) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "demmo"], ["'demmo' is not an experiment", "did you mean demo"]),
        (
            ["run", "demo", "--set", "train.learning_rat=1"],
            ["is not a setting", "did you mean train.learning_rate?"],
        ),
        (["run", "demo", "--set", "train.epochs=many"], ["train.epochs", "'many'"]),
        (["run", "demo", "--set", "model.placement=3z"], ["model.placement", "3z"]),
        (["run", "demo", "--set", "model.name=resnet"], ["model.name", "resnet"]),
        (["run", "demo", "--set", "train.epochs"], ["expected NAME=VALUE"]),
        (["run", "demo", "--only", "trian"], ["'trian', which is no stage", "did you mean train?"]),
        (["plan", "demo", "--workdir", "/proc/nowhere", "--only", "x"], ["which is no stage"]),
        (["run", "demo", "--workdir", "/proc/nowhere"], ["/proc/nowhere", "--workdir"]),
        (["run", "something_v1_smoke", "--set", "dataset.root=null"], ["dataset.root is not set"]),
        (["run", "demo", "--address", "127.0.0.1:1"], ["no Ray cluster at 127.0.0.1:1"]),
        (["ui"], ["found no runs", "--workdir"]),
        (["shards", "verify", "."], ["dataset.json"]),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else None,
)
def test_what_cannot_be_is_said_in_one_message(arguments, parts, tmp_path):
    if arguments[0] == "run" and "--workdir" not in arguments:
        arguments = [*arguments, "--workdir", str(tmp_path / "work")]
    message = fail(*arguments, cwd=tmp_path)
    for part in parts:
        assert part in message


def test_no_space(tmp_path):
    """A disk of 8 MB: said before the run starts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        message = fail("run", "demo", "--workdir", disk / "work")
        assert "are free; free some space" in message
        assert list((disk / "work").iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_port_that_is_taken(tmp_path):
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = fail("ui", "--workdir", tmp_path, "--port", port)
    assert f"port {port}" in message
    assert "--port" in message


def test_a_failed_stage_is_told_in_json_too(damaged, tmp_path):
    (damaged / "something-something-v1-labels.csv").write_text("one\n")
    arguments = ["run", "something_v1_smoke", "--set", f"dataset.root={damaged}", "--workdir", tmp_path / "work", "--json"]
    done = subprocess.run([SAGSM, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    stages = {stage["name"]: stage["status"] for stage in json.loads(done.stdout)["stages"]}
    assert stages["index"] == "failed"
    assert set(stages.values()) == {"failed", "skipped"}


def test_ctrl_c_before_the_first_stage_says_how_to_go_on(tmp_path):
    """While libraries are loaded and before Ray has started."""
    workdir = tmp_path / "work"
    command = [SAGSM, "run", "demo", "--workdir", str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not workdir.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert stderr.strip() == f"stopped by SIGINT; go on with: sagsm run demo --workdir {workdir}"
