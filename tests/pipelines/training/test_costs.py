import pytest
import torch

from pipelines.training.costs import count_mmacs, epoch_cost, measure_cost
from pipelines.training.job import TrainJob, train_job
from pipelines.training.settings import ModelSettings, TrainSettings

CPU = torch.device("cpu")


def job_of(shards_dir, placement="none", **changes):
    small = {"epochs": 1, "batch_size": 8, "warmup_epochs": 0.5, "pixels": 32, "num_segments": 2, "loader_threads": 1}
    return TrainJob("test", str(shards_dir), ModelSettings(placement=placement), TrainSettings(**(small | changes)))


def test_attention_pixels_and_segments_cost_multiply_accumulates(shards_dir):
    alone = count_mmacs(job_of(shards_dir))
    assert alone < count_mmacs(job_of(shards_dir, "5b")) < count_mmacs(job_of(shards_dir, "3a,5b"))
    assert count_mmacs(job_of(shards_dir, num_segments=4)) == pytest.approx(2 * alone)
    assert count_mmacs(job_of(shards_dir, pixels=64)) > 3 * alone


def test_what_is_asked_for_is_measured_and_nothing_else(shards_dir):
    job = job_of(shards_dir)
    latency = measure_cost(job, "latency", CPU)
    assert list(latency) == ["cost/latency"]
    assert 0 < latency["cost/latency"] < 10
    assert measure_cost(job, "mmacs", CPU) == {"cost/mmacs": count_mmacs(job)}
    assert measure_cost(job, "memory", CPU) == measure_cost(job, None, CPU) == {}
    (epoch,) = train_job(job, checkpoint_dir=None, device=CPU).history
    assert epoch_cost(epoch, "memory", CPU) == {"cost/memory": epoch.peak_memory_bytes}
    assert epoch_cost(epoch, "mmacs", CPU) == {}
