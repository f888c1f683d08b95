import pytest
import torch

from infra.errors import ConfigError
from pipelines.training.job import TrainJob, load_model, save_model, train_job
from pipelines.training.settings import ModelSettings, TrainSettings
from pipelines.training.trial import trial_job
from preprocessing.clip_ledger import ClipLedger
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
