import json
from pathlib import Path

import pytest

from infra.tracking_run import TrackedRun
from infra.tracking_spool import Spool
from pipelines.artifacts import Artifact
from pipelines.experiments import find_experiment
from pipelines.explaining import explain
from pipelines.graph import StageContext
from pipelines.insight.settings import InsightSettings


@pytest.fixture
def explained(judged, tmp_path):
    """What the stage said, told MLflow, and left behind."""
    output_dir, told = tmp_path / "output", []
    output_dir.mkdir()
    spool = Spool(tmp_path / "spool", lambda entries: told.extend(entries) or len(entries), "it")
    run = TrackedRun("local-1", "insight p01", spool, {})
    context = StageContext(output_dir, run, None, lambda *_: None, "demo", find_experiment("demo")())
    shards = Artifact("shards", "1", judged.shards_dir, {"summary": {"place": None}})
    train = Artifact("train", "2", judged.train, {})
    manifest = {"config": {"evaluate": judged.settings.model_dump(mode="json")}}
    evaluate = Artifact("evaluate", "3", judged.evaluate, manifest)
    summary = explain(context, shards, train, evaluate, InsightSettings(num_examples=3))
    spool.close(5)
    return summary, told, output_dir


def test_all_that_the_page_shows_is_in_the_stages_folder_and_in_mlflow(explained):
    summary, told, output_dir = explained
    files = {str(path.relative_to(output_dir)) for path in output_dir.rglob("*") if path.is_file()}
    kept = {str(Path(entry["folder"]) / Path(entry["file"]).name) for entry in told if entry["do"] == "file"}
    assert kept == {name if "/" in name else f"report/{name}" for name in files}
    assert {entry["key"] for entry in told if entry["do"] == "image"} == {
        "contact_sheet/most_wrong",
        "contact_sheet/most_unsure",
    }
    (note,) = [entry["values"]["mlflow.note.content"] for entry in told if entry["do"] == "tags"]
    assert note.startswith(summary["text"])
    assert summary == json.loads(json.dumps(summary))
