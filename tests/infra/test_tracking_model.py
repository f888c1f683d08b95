"""A network goes into the registry and comes back: without pickle, once, under an alias that moves on."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from mlflow.tracking import MlflowClient

from infra.errors import ConfigError
from infra.tracking import download_model
from infra.tracking_model import _pyfunc, send_model
from infra.tracking_run import TrackedRun

CODE = """
from mlflow.models import set_model
from infra.tracking_model import python_model

def load(folder):
    bias = float((folder / "model.safetensors").read_text())
    row = {"status": "ok", "reason": "", "detail": "", "classes": ["a", "b"]}
    return lambda texts: [row | {"probabilities": [len(text) + bias, bias]} for text in texts]

set_model(python_model(load))
"""
PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npy", ".bin", ".cloudpickle"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "store" / "model"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text("{}")
    (folder / "model.safetensors").write_text("0.25")
    return folder


def log(run, files, card="# card\n"):
    run.log_model("sagsm-x", "newest", files, code=CODE, card=card, example="dmlkZW8=", tags={"label_passport": "0123"})


def wait(tracker):
    """`flush` would give up where packing has taken longer than a run waits at its end."""
    tracker.close(60)
    assert tracker._spool._is_closed


def test_a_network_is_registered_without_pickle_and_can_be_used_and_fetched(make_tracker, files, tmp_path):
    tracker = make_tracker()
    with tracker.start_run("report") as run:
        log(run, files)
    wait(tracker)
    client = MlflowClient(tracker.uri)
    version = client.get_model_version_by_alias("sagsm-x", "newest")
    assert (int(version.version), version.run_id, version.description) == (1, run.run_id, "# card\n")
    assert version.tags["label_passport"] == "0123"
    (model,) = client.search_logged_models([tracker.experiment_id])
    assert (model.source_run_id, str(model.status)) == (run.run_id, "READY")
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "sagsm-x", "version": "1"}]
    assert [output.model_id for output in client.get_run(run.run_id).outputs.model_outputs] == [model.model_id]
    folder = Path(model.artifact_location.removeprefix("file://"))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "card.md", "artifacts/model/model.safetensors", "input_example.json", "served.py"} <= names
    assert "code/pipelines/serving.py" in names
    assert {Path(name).suffix for name in names} & PICKLES == set()
    assert any(line.startswith("torch==") for line in (folder / "requirements.txt").read_text().splitlines())
    recipe = yaml.safe_load((folder / "MLmodel").read_text())
    assert "python_model" not in recipe["flavors"]["python_function"]
    assert json.loads(recipe["signature"]["inputs"]) == [{"type": "string", "name": "video", "required": True}]
    answer = _pyfunc().load_model(str(folder)).predict(pd.DataFrame({"video": ["abc", "a"]}))
    assert answer["probabilities"].tolist() == [[3.25, 0.25], [1.25, 0.25]]
    for spelling in ("models:/sagsm-x@newest", "models:/sagsm-x/1"):
        place = tmp_path / spelling.replace("/", "_")
        place.mkdir()
        fetched = download_model(tracker.uri, spelling, place)
        assert {path.name: path.read_text() for path in fetched.iterdir()} == {"model.json": "{}", "model.safetensors": "0.25"}


def test_an_entry_that_comes_twice_changes_nothing_and_the_alias_goes_to_the_newest(make_tracker, files):
    tracker = make_tracker()
    client = MlflowClient(tracker.uri)
    with tracker.start_run("report") as run:
        entry = {"key": "k1", "name": "sagsm-x", "alias": "newest", "files": str(files), "code": CODE, "card": "c"}
        entry |= {"example": "dmlkZW8=", "tags": {}}
        for _ in range(2):
            send_model(client, tracker.experiment_id, run.run_id, entry)
        assert [int(found.version) for found in client.search_model_versions("name = 'sagsm-x'")] == [1]
        assert len(client.search_logged_models([tracker.experiment_id])) == 1
        send_model(client, tracker.experiment_id, run.run_id, entry | {"key": "k2"})
    assert int(client.get_model_version_by_alias("sagsm-x", "newest").version) == 2


def test_a_network_that_is_gone_is_refused_and_the_record_goes_on(make_tracker, files, caplog):
    tracker = make_tracker()
    with tracker.start_run("report") as run:
        log(run, files.with_name("gone"))
        run.log_metrics({"val/top1": 0.5})
    wait(tracker)
    assert "holds no model any more" in caplog.text
    assert "holds no model any more" in (tracker._spool.folder / "refused.txt").read_text()
    assert MlflowClient(tracker.uri).get_run(run.run_id).data.metrics == {"val/top1": 0.5}


def test_logging_a_model_does_not_wait_for_a_server_that_is_away(files):
    entries = []
    spool = SimpleNamespace(append=entries.append)
    started = time.monotonic()
    log(TrackedRun("local-1", "report", spool, {}), files)
    assert time.monotonic() - started < 1
    assert [(entry["do"], entry["run"], entry["files"]) for entry in entries] == [("model", "local-1", str(files))]
    json.dumps(entries)


def test_what_is_not_registered_is_told_with_what_is(make_tracker, tmp_path):
    tracker = make_tracker()
    with pytest.raises(ConfigError, match=r"sagsm-y@newest is not registered with sqlite:.*registered are: none"):
        download_model(tracker.uri, "models:/sagsm-y@newest", tmp_path)
    with pytest.raises(ConfigError, match="expected models:/NAME@ALIAS"):
        download_model(tracker.uri, "models:/sagsm-y", tmp_path)
    with pytest.raises(ConfigError, match="give the right --workdir"):
        download_model(f"sqlite:///{tmp_path}/none/mlflow.db", "models:/sagsm-y@newest", tmp_path)
    assert not (tmp_path / "none").exists()
