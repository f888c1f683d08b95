import json
from dataclasses import replace

import pytest
import ray
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from infra.errors import ConfigError, PipelineError
from models import attend_only
from models.factory import build_model
from pipelines.training import supernet
from pipelines.training.job import TrainJob, job_loader
from pipelines.training.settings import ModelSettings, TrainSettings
from pipelines.training.supernet import score_part, search_supernet, supernet_job
from preprocessing.reader import open_shards
from tuning.settings import SearchSettings


@pytest.fixture(scope="module")
def cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def job_of(shards_dir, name="sa_gsm_resnet18", **changes):
    arguments = {"epochs": 4, "batch_size": 2, "warmup_epochs": 1.0, "pixels": 32, "num_segments": 2, "loader_threads": 1}
    arguments |= {"precision": "fp32", "local": True}
    return TrainJob("test", str(shards_dir), ModelSettings(name=name), TrainSettings(**(arguments | changes)))


def test_the_supernet_is_the_configured_training_with_random_placements():
    job = replace(job_of("somewhere"), model=ModelSettings(placement="5b"))
    settings = SearchSettings(supernet_epochs=2, subset=7, fixed={"train.learning_rate": 0.5, "model.scope": "joint"})
    made = supernet_job(job, settings)
    assert (made.model.placement, made.model.scope, made.train.random_placement) == ("all", "joint", True)
    assert (made.train.epochs, made.train.warmup_epochs, made.train.subset, made.train.learning_rate) == (2, 0.5, 7, 0.5)
    assert supernet_job(job, SearchSettings()).train.epochs == 4


def test_networks_whose_placements_cannot_be_scored_are_refused():
    with pytest.raises(ConfigError, match=r"model\.name=gsm_resnet18 has none; choose an SA-GSM network"):
        supernet_job(job_of("somewhere", "gsm_resnet18"), SearchSettings())
    with pytest.raises(ConfigError, match=r"sa_gsm_resnet50 has 2\^16; expected at most 12 slots.*search\.method=trials"):
        supernet_job(job_of("somewhere", "sa_gsm_resnet50"), SearchSettings())


def test_scores_are_those_of_each_placement_and_parts_add_up(shards_dir, tmp_path):
    from safetensors.torch import save_file

    slots = "layer1.0,layer3.1,layer4.1"
    job = job_of(shards_dir).with_overrides({"model.placement": slots})
    torch.manual_seed(0)
    model = build_model("sa_gsm_resnet18", num_classes=2, num_segments=2, placement=slots).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    nn.init.normal_(model.new_fc.weight)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    whole = score_part(job, tmp_path / "weights.safetensors", 0, 1, num_threads=1)
    parts = [score_part(job, tmp_path / "weights.safetensors", part, 3, num_threads=1) for part in range(3)]
    assert len(whole) == 8
    for placement, sums in whole.items():
        assert sums == pytest.approx(
            [sum(values) for values in zip(*(part[placement] for part in parts), strict=True)], rel=1e-5
        )
    [batch] = job_loader(
        replace(job, train=job.train.model_copy(update={"batch_size": 8})),
        open_shards(shards_dir, "validation"),
        is_train=False,
        rank=0,
        world_size=1,
    )
    for placement in ("none", "layer1.0,layer4.1", slots):
        attend_only(model, placement)
        with torch.inference_mode():
            logits = model(model.prepare(batch.clips))
        loss, hits = cross_entropy(logits, batch.labels, reduction="sum"), (logits.argmax(dim=1) == batch.labels).sum()
        assert whole[placement] == [loss.double().item(), hits.item(), 8.0]


def test_the_best_come_first_then_the_smaller_loss_then_fewer_slots():
    values = {"none": (0.5, 1.0), "layer1.0": (0.5, 1.0), "all": (0.5, 0.9), "layer4.1": (0.75, 2.0), "layer1.1": (0.25, 0.1)}
    found = {
        "seconds_training": 1.0,
        "seconds_scoring": 2.0,
        "placements": {name: {"top1": top1, "loss": loss} for name, (top1, loss) in values.items()},
    }
    result = supernet._result(found, job_of("somewhere"), 4)
    assert result.top == ["layer4.1", "all", "none", "layer1.0"]
    assert (result.scores["all"], result.losses["all"]) == (0.5, 0.9)


def test_a_loss_that_is_no_number_stops_the_search():
    with pytest.raises(PipelineError, match=r"not finite with 1 of 2 placements, such as 5b; .*lower train\.learning_rate"):
        supernet._means({"none": [1.0, 1, 2], "5b": [float("nan"), 0, 2]})


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_interrupted_and_leaves_little(cluster, shards_dir, tmp_path, monkeypatch):
    job, settings, told = job_of(shards_dir), SearchSettings(supernet_epochs=2, supernet_top=3), []
    monkeypatch.setattr(supernet, "_BATCHES_AT_A_TIME", 2)  # two parts of four clips

    class Interrupted(BaseException):
        """As a signal would come."""

    def interrupt_at(kind, done):
        def on_progress(now, total, text):
            told.append((now, total, text))
            if kind in text and now >= done:
                raise Interrupted

        return on_progress

    with pytest.raises(Interrupted):
        search_supernet(job, settings, storage_dir=tmp_path, on_progress=interrupt_at("steps, epoch 2", 13))
    with pytest.raises(Interrupted):
        search_supernet(job, settings, storage_dir=tmp_path, on_progress=interrupt_at("parts", 1))
    [work_dir] = tmp_path.iterdir()
    assert len(list(work_dir.glob("part-*.json"))) == 1
    epochs = []
    result = search_supernet(job, settings, storage_dir=tmp_path, on_epoch=epochs.append, on_progress=interrupt_at("never", 0))
    assert told[-2:] == [(done, 2, "parts of the validation clips scored with 256 placements") for done in (1, 2)]
    assert len(result.scores) == len(result.losses) == 256
    assert all(score * 8 == round(score * 8) for score in result.scores.values())
    assert len(result.top) == 3
    assert result.scores[result.top[0]] == max(result.scores.values())
    assert result.seconds_training == pytest.approx(sum(epoch.seconds for epoch in epochs))
    assert result.seconds_scoring > 0
    assert [path.name for path in tmp_path.iterdir()] == ["supernet.json"]
    assert search_supernet(job, settings, storage_dir=tmp_path, on_progress=pytest.fail) == result  # nothing is left to do
    assert json.loads((tmp_path / "supernet.json").read_bytes())["placements"].keys() == result.scores.keys()
