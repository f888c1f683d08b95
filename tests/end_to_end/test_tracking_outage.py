"""A pipeline whose MLflow server dies while the train stage is at work, and comes back."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.tracking_spool import encode

EPOCHS = int(os.environ.get("SAGSM_TEST_EPOCHS", "40"))
AWAY_SECONDS = float(os.environ.get("SAGSM_TEST_AWAY_SECONDS", "0"))  # 300 is run by hand, with 1000 epochs
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500 + 3 * AWAY_SECONDS)]
SETTINGS = [
    "dataset.synthetic.num_train=16",
    "dataset.synthetic.num_validation=8",
    "dataset.synthetic.num_broken=1",
    "shards.max_bad_fraction=0.1",
    "search.num_trials=0",
    f"train.epochs={EPOCHS}",
    "train.warmup_epochs=1",
    "train.num_segments=2",
    "train.pixels=32",
    "model.name=gsm_resnet18",
]


def test_training_goes_on_without_its_server_and_all_metrics_are_there_afterwards(mlflow_server, tmp_path):
    settings = [item for assignment in SETTINGS for item in ("--set", assignment)]
    command = [str(Path(sys.executable).with_name("sagsm")), "run", "demo", "--only", "train", "--json", *settings]
    command += ["--workdir", str(tmp_path)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": mlflow_server.uri}
    errors = tmp_path / "errors.txt"
    with errors.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        wait_for(process, lambda: steps_done(tmp_path) > 0)
        mlflow_server.kill()
        wait_for(process, lambda: "is away" in errors.read_text())
        lost_at, after = time.monotonic(), steps_done(tmp_path)
        wait_for(process, lambda: steps_done(tmp_path) >= after + 4 and time.monotonic() >= lost_at + AWAY_SECONDS)
        mlflow_server.start()
        output, _ = process.communicate(timeout=900 + AWAY_SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, errors.read_text()
    stages = {stage["name"]: stage for stage in json.loads(output)["stages"]}
    train = stages["train"]["mlflow_run_id"]
    for name in ("train/loss", "val/top1"):
        assert [step for step, _ in mlflow_server.points(train, name)] == list(range(EPOCHS))
    names = {name for (name,) in mlflow_server.query("select distinct key from metrics where run_uuid = ?", train)}
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= names
    assert set(mlflow_server.query("select status from runs")) == {("FINISHED",)}
    assert errors.read_text().count("is away") == errors.read_text().count("is back after") == 1
    (folder,) = (tmp_path / "mlflow-spool").iterdir()
    assert not list(folder.glob("*.journal"))
    (folder / "1-1.journal").write_bytes(encode({"do": "tags", "run": train, "values": {"left": "over"}}))
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=100)  # all is in the store
    assert mlflow_server.query("select value from tags where run_uuid = ? and key = 'left'", train) == [("over",)]


def steps_done(workdir):
    """The step of the latest checkpoint; an epoch has two."""
    folders = (workdir / "store" / "train").glob("*.partial/checkpoints/step-*")
    return max((int(folder.name.split("-")[1]) for folder in folders), default=0)


def wait_for(process, condition):
    deadline = time.monotonic() + 300 + AWAY_SECONDS
    while not condition():
        assert process.poll() is None, "the pipeline has ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)
