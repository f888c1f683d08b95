import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import ConfigError, DataError, PipelineError
from infra.storage import sha256_file
from pipelines.evaluation.evaluate import EvaluateSettings, join_scores
from pipelines.evaluation.scores import read_scores
from pipelines.training.job import TrainJob, keep_scores, load_model, save_model, score_model, score_part, train_job
from pipelines.training.settings import ModelSettings, TrainSettings
from pipelines.training.trial import trial_job
from preprocessing.clip_ledger import ClipLedger
from preprocessing.loader import make_loader
from preprocessing.reader import open_shards
from tuning.settings import SearchSettings

CPU = torch.device("cpu")
SMALL = {"epochs": 2, "batch_size": 4, "warmup_epochs": 0.5, "pixels": 32, "num_segments": 2, "loader_threads": 1}


def job_of(shards_dir, **changes):
    model = ModelSettings(name="gsm_resnet18")
    return TrainJob("test", str(shards_dir), model, TrainSettings(**(SMALL | changes)))


def test_a_job_trains_without_any_cluster(shards_dir, tmp_path):
    told = []
    job = job_of(shards_dir, accumulation=2, ema_decay=0.5)
    result = train_job(job, checkpoint_dir=tmp_path / "checkpoints", device=CPU, on_step=told.append)
    assert result.completed
    assert [status.steps_per_epoch for status in told] == [3] * 6  # 24 clips, 8 a step
    keys = open_shards(shards_dir, "train").keys
    assert [epoch.ledger for epoch in result.history] == [str(ClipLedger().add(keys))] * 2
    assert result.history[0].effective_batch == 8.0
    save_model(tmp_path, job, result.best_weights)
    model, settings, _ = load_model(tmp_path)
    assert settings == job.train
    assert sorted(name for name in model.state_dict() if "gsm" in name)


def test_a_job_stops_and_goes_on(shards_dir, tmp_path, tiny):
    stopped = train_job(job_of(shards_dir), checkpoint_dir=tmp_path, device=CPU, should_stop=tiny.stop_after(2))
    assert not stopped.completed
    result = train_job(job_of(shards_dir), checkpoint_dir=tmp_path, device=CPU)
    assert (result.completed, result.resumed_from_step) == (True, 2)
    with pytest.raises(ConfigError, match=r"model\.name 'gsm_resnet18' there and 'tsn_resnet18' now"):
        train_job(job_of(shards_dir).with_overrides({"model.name": "tsn_resnet18"}), checkpoint_dir=tmp_path, device=CPU)


def test_the_published_validation_draws_its_clips_anew_each_epoch(shards_dir):
    """With weights that hardly move, the centre gives the same loss in each epoch and random crops do not."""
    losses = {}
    for protocol in ("standard", "seed_code"):
        job = job_of(shards_dir, learning_rate=1e-12, subset=8, batch_norm="frozen", compat={"val_protocol": protocol})
        losses[protocol] = [epoch.val_loss for epoch in train_job(job, checkpoint_dir=None, device=CPU).history]
    assert losses["standard"][0] == pytest.approx(losses["standard"][1], abs=1e-9)
    assert losses["seed_code"][0] != pytest.approx(losses["seed_code"][1], abs=1e-6)
    again = train_job(job, checkpoint_dir=None, device=CPU)
    assert [epoch.val_loss for epoch in again.history] == losses["seed_code"]


def test_a_trial_is_the_long_training_in_small():
    train = TrainSettings(epochs=60, warmup_epochs=6, schedule="sgdr", sgdr_period_epochs=20)
    short = trial_job("", ModelSettings(), train, SearchSettings(max_epochs=6), val_split="validation").train
    assert (short.epochs, short.warmup_epochs, short.sgdr_period_epochs) == (6, 0.6, 2.0)


def test_sampling_and_augmentation_reach_the_clips_that_are_trained_on(shards_dir):
    """Validation sees the sampling, and nothing of the augmentation."""

    def losses(**changes):
        job = job_of(shards_dir, learning_rate=1e-12, subset=8, batch_norm="frozen", epochs=1, warmup_epochs=0.0, **changes)
        (epoch,) = train_job(job, checkpoint_dir=None, device=CPU).history
        return epoch.train_loss, epoch.val_loss

    train, val = losses()
    for changes in ({"randaugment_ops": 2}, {"erase_probability": 1.0}):
        changed_train, same_val = losses(**changes)
        assert changed_train != train, changes
        assert same_val == pytest.approx(val, abs=1e-9), changes
    assert losses(sampling="dense", stride=1)[1] != pytest.approx(val, abs=1e-9)


def same(scores, others):
    return (
        scores.keys == others.keys
        and np.array_equal(scores.labels, others.labels)
        and np.array_equal(scores.logits, others.logits)
    )


@pytest.mark.parametrize("protocol", ["centre", "full", "seed_code"])
def test_parts_of_a_split_have_the_numbers_of_the_whole_to_the_last_bit(shards_dir, model_dir, protocol):
    """8 clips, at most 3 at a time, are 3 batches, which two parts cannot share evenly; whole frames come one by one."""
    settings = EvaluateSettings(batch_size=3, protocol=protocol)
    whole = score_part(model_dir, str(shards_dir), settings)
    parts = [score_part(model_dir, str(shards_dir), settings, part, 2) for part in range(2)]
    assert [len(part.keys) for part in parts] == ([4, 4] if protocol == "full" else [3, 5])
    assert same(join_scores(parts), whole)
    assert sorted(whole.keys) == sorted(open_shards(shards_dir, "validation").keys)


def test_each_protocol_shows_something_else_and_keeps_what_it_was(shards_dir, model_dir, tmp_path):
    """`batch_size` changes nothing but rounding, labels are those of the videos, and the file names the protocol."""
    found = {}
    shards = open_shards(shards_dir, "validation")
    labels = dict(zip(shards.keys, shards.labels, strict=True))
    for protocol in ("centre", "2clips", "3crops", "10crops", "full", "2x3", "seed_code"):
        settings = EvaluateSettings(batch_size=7, protocol=protocol)
        score_model(model_dir, str(shards_dir), settings, tmp_path / "scores.parquet")
        scores = read_scores(tmp_path / "scores.parquet")
        assert (scores.origin.protocol, scores.origin.split) == (protocol, "validation")
        assert dict(zip(scores.keys, scores.labels.tolist(), strict=True)) == labels
        found[protocol] = dict(zip(scores.keys, scores.scores[:, 0], strict=True))
    columns = np.array([[scores[key] for key in sorted(labels)] for scores in found.values()])
    distance = np.abs(columns[:, None] - columns[None]).max(axis=2) + np.eye(len(found))
    assert distance.min() > 1e-5, distance
    other = EvaluateSettings(batch_size=2, protocol="seed_code")
    again = score_part(model_dir, str(shards_dir), other)
    np.testing.assert_allclose(
        torch.from_numpy(again.logits).softmax(1)[:, 0], [found["seed_code"][key] for key in again.keys], atol=1e-5
    )


def test_the_protocol_of_the_seed_code_has_no_mean_and_deviation(shards_dir, model_dir):
    """A network of the published input format is shown bytes; ours is shown bytes / 255, as `val_protocol` says."""
    settings = EvaluateSettings(protocol="seed_code")
    model, train, _ = load_model(model_dir)
    loader = make_loader(
        open_shards(shards_dir, "validation"),
        num_segments=2,
        batch_size=16,
        train=True,
        seed=3,
        pixels=train.pixels,
        flip="naive",
    )
    [batch] = loader
    with torch.inference_mode():
        expected = model(batch.clips.float() / 255)
    found = score_part(model_dir, str(shards_dir), settings)
    assert found.keys == batch.keys
    np.testing.assert_allclose(found.logits, expected, rtol=1e-3, atol=1e-4)


def test_what_does_not_fit_is_refused_by_name(shards_dir, model_dir, tmp_path):
    settings = EvaluateSettings(split="train")
    scores = score_part(model_dir, str(shards_dir), settings, 0, 2)
    with pytest.raises(
        PipelineError, match=r"found scores of 12 clips of 12 videos; expected each of the 24 in split train of"
    ):
        keep_scores(scores, str(shards_dir), settings, tmp_path / "scores.parquet")
    assert not (tmp_path / "scores.parquet").exists()
    (tmp_path / "model.safetensors").symlink_to(model_dir / "model.safetensors")
    facts = json.loads((model_dir / "model.json").read_bytes()) | {"label_passport": "0" * 16}
    (tmp_path / "model.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"was trained for labels 0{16}, .* has labels [0-9a-f]{16}; evaluate on shards with"):
        score_part(tmp_path, str(shards_dir), settings)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda weights: weights.pop("new_fc.bias"), r"is without new_fc.bias \(1 of \d+ weights are wrong\)"),
        (lambda weights: weights.update(stray=torch.zeros(1)), "is with stray, which the network has not"),
        (lambda weights: weights.update({"new_fc.bias": torch.zeros(7)}), r"with new_fc.bias of shape \[7\] in place of \[2\]"),
    ],
)
def test_a_network_of_which_weights_are_missing_is_refused(judged, tmp_path, spoil, message):
    """Also where somebody has put the new file's hash into model.json."""
    shutil.copytree(judged.train / "model", tmp_path / "model")
    path, facts_path = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "model.json"
    weights = load_file(path)
    spoil(weights)
    save_file(weights, path)
    with pytest.raises(DataError, match=r"model.json says"):
        load_model(tmp_path / "model")
    facts_path.write_text(json.dumps(json.loads(facts_path.read_bytes()) | {"sha256": sha256_file(path)}))
    with pytest.raises(DataError, match=message):
        load_model(tmp_path / "model")
    path.write_bytes(b"no weights")
    facts_path.write_text(json.dumps(json.loads(facts_path.read_bytes()) | {"sha256": sha256_file(path)}))
    with pytest.raises(DataError, match=r"model.safetensors cannot be read as weights: .*; train again"):
        load_model(tmp_path / "model")
