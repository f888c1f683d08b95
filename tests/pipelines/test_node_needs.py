"""What an experiment asks of nodes, and what of it a run asks for the stages that it will start."""

from infra.cluster_findings import Question
from infra.settings import apply_overrides
from pipelines.experiments import find_experiment
from pipelines.node_needs import node_needs, stage_needs


def test_what_the_settings_name_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    store, ffmpeg = str(tmp_path / "store"), "preprocessing.decode:ffmpeg_version"
    assert node_needs(None, tmp_path) == Question({"store": store}, None, "http://mlflow:5000", ffmpeg)
    places = {"dataset.root": "/data", "shards.output": "s3://bucket/shards", "train.checkpoints": "/copies"}
    config = apply_overrides(find_experiment("diving48")(), places)
    folders = {"store": store, "shards.output": "s3://bucket/shards", "train.checkpoints": "/copies"}
    assert node_needs(config, tmp_path) == Question(folders, "/data", "http://mlflow:5000", ffmpeg)
    assert stage_needs(config, tmp_path, {"shards", "train"}) == Question(folders, "/data", None, ffmpeg)
    assert stage_needs(config, tmp_path, {"train", "evaluate"}) == Question(folders)


def test_generated_videos_lie_in_the_store(tmp_path):
    assert node_needs(find_experiment("demo")(), tmp_path).raw is None
