import json
from pathlib import Path

import pytest

from infra import cluster
from infra.tracking_run import TrackedRun
from infra.tracking_spool import Spool
from pipelines.artifacts import Artifact
from pipelines.experiments import find_experiment
from pipelines.explaining import explain
from pipelines.graph import StageContext
from pipelines.insight.settings import InsightSettings

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Ray's processes, whose output nobody closes


@pytest.fixture(scope="module")
def explained(judged, tmp_path_factory):
    """What the stage said, told MLflow, and left behind."""
    output_dir, told = tmp_path_factory.mktemp("explained"), []
    spool = Spool(tmp_path_factory.mktemp("spool"), lambda entries: told.extend(entries) or len(entries), "it")
    run = TrackedRun("local-1", "insight p01", spool, {})
    context = StageContext(output_dir, run, None, lambda *_: None, "demo", find_experiment("demo")())
    shards = Artifact("shards", "1", judged.shards_dir, {"summary": {"place": None}})
    train = Artifact("train", "2", judged.train, {})
    manifest = {"config": {"evaluate": judged.settings.model_dump(mode="json")}}
    evaluate = Artifact("evaluate", "3", judged.evaluate, manifest)
    with cluster.session(None):
        summary = explain(context, shards, train, evaluate, InsightSettings(num_examples=3))
    spool.close(5)
    return summary, told, output_dir


def test_all_that_the_page_shows_is_in_the_stages_folder_and_in_mlflow(explained):
    summary, told, output_dir = explained
    files = {str(path.relative_to(output_dir)) for path in output_dir.rglob("*") if path.is_file()}
    kept = {str(Path(entry["folder"]) / Path(entry["file"]).name) for entry in told if entry["do"] == "file"}
    assert kept == {name if "/" in name else f"report/{name}" for name in files}
    tiles = {entry["key"] for entry in told if entry["do"] == "image"}
    assert tiles == {
        *("features/map", "contact_sheet/most_wrong", "contact_sheet/most_unsure"),
        *("gates/activity", "grad_cam/pairs"),
    }
    (note,) = [entry["values"]["mlflow.note.content"] for entry in told if entry["do"] == "tags"]
    assert note.startswith(summary["text"])
    assert {"insight/purity", "insight/purity_chance"} <= set(summary["metrics"])
    metrics = [entry["values"] for entry in told if entry["do"] == "metrics"]
    assert {name: value for values in metrics for name, value in values.items()} == summary["metrics"]
    assert summary == json.loads(json.dumps(summary))


def test_the_page_has_the_map_the_frames_and_every_answer(explained):
    summary, _, output_dir = explained
    page = (output_dir / "index.html").read_text()
    assert page.index(summary["text"]) < page.index("Most wrong") < page.index("Most unsure")
    assert page.count("data:image/png") == 3
    assert page.count("data:image/gif") == len(list((output_dir / "figures").glob("attention_*.mp4"))) == 2
    assert page.count("data:image/jpeg") == 2 * 3 * 4
    assert len((output_dir / "tables" / "most_unsure.csv").read_text().splitlines()) == 1 + 24
