"""What a network costs beside its accuracy, for a search with two objectives: `cost/mmacs`, `cost/memory` or `cost/latency`."""

import statistics
import time
from typing import Literal

import torch

from models import model_options
from models.facts import describe_model
from pipelines.training.job import TrainJob
from pipelines.training.metrics import EpochMetrics
from pipelines.training.precision import autocast, resolve_precision
from pipelines.training.settings import build_model
from preprocessing.reader import open_shards

Cost = Literal["mmacs", "memory", "latency"]

_NUM_WARMUPS = 2
_NUM_PASSES = 9


def measure_cost(job: TrainJob, cost: Cost | None, device: torch.device) -> dict[str, float]:
    """What is known of a job's network before it is trained.

    Args:
        job: what would be trained.
        cost: what is asked for.
        device: where latency is measured.

    Returns:
        `cost/mmacs`, millions of multiply-accumulates of a forward pass of one clip, or `cost/latency`, the median seconds of
        such a pass; empty for another cost.
    """
    if cost == "mmacs":
        return {"cost/mmacs": count_mmacs(job)}
    if cost == "latency":
        return {"cost/latency": measure_latency(job, device)}
    return {}


def epoch_cost(metrics: EpochMetrics, cost: Cost | None, device: torch.device) -> dict[str, float]:
    """What an epoch of training tells: `cost/memory`, the peak bytes of a GPU, if it is one, else of rank 0's process."""
    if cost != "memory":
        return {}
    is_gpu = device.type == "cuda"
    return {"cost/memory": float(torch.cuda.max_memory_allocated(device) if is_gpu else metrics.peak_memory_bytes)}


def count_mmacs(job: TrainJob) -> float:
    """Millions of multiply-accumulates of a forward pass of one clip, at the size that the job trains on."""
    options = {name: getattr(job.model, name) for name in model_options(job.model.name)}
    num_classes = len(open_shards(job.shards_place, job.train_split).label_names)
    facts = describe_model(job.model.name, num_classes, job.train.num_segments, pixels=job.train.pixels, **options)
    return facts.macs_per_clip / 1e6


def measure_latency(job: TrainJob, device: torch.device) -> float:
    """Median seconds of a forward pass of one clip through the untrained network, whose weights change nothing in it.

    Other trials that run at the same time disturb it; for figures to publish, search one trial at a time.
    """
    num_classes = len(open_shards(job.shards_place, job.train_split).label_names)
    model = build_model(
        job.model.model_copy(update={"weights": None, "weights_labels": None, "backbone_weights": None}),
        num_classes=num_classes,
        num_segments=job.train.num_segments,
    )
    model.to(device).eval()
    clip = torch.zeros(1, job.train.num_segments, 3, job.train.pixels, job.train.pixels, device=device)
    seconds = []
    with torch.inference_mode(), autocast(resolve_precision(job.train.precision, device), device):
        for _ in range(_NUM_WARMUPS + _NUM_PASSES):
            _synchronize(device)
            started = time.perf_counter()
            model(clip)
            _synchronize(device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[_NUM_WARMUPS:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
