"""A training of the verdict: a trial that leaves its scores behind, so that two networks can be compared clip by clip."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.training.job import TrainJob, save_model, score_model, train_job
from pipelines.training.metrics import EpochMetrics
from tuning.trials import SCRATCH

SCORES = "scores.parquet"


def run_final(
    overrides: dict[str, Any], report: Callable[[dict[str, float]], None], trial_dir: Path, *, job: TrainJob, num_threads: int
) -> None:
    """Train `job` with the trial's overrides, and score every clip of its validation split with the weights of the best epoch.

    An objective of `tuning.run_search`. It leaves `scores.parquet` in `trial_dir`; checkpoints and the model are in the folder
    that the search removes at a trial's end, so that disk does not grow with the seeds.

    Args:
        overrides: dotted settings, `model.placement`, `train.seed` and so on.
        report: given the metrics of each epoch.
        trial_dir: a folder of this trial alone.
        job: see `trial.trial_job`: as long as the trials, since that is the length at which the winner won.
        num_threads: of torch, as many as the trial has CPUs.
    """
    import torch

    torch.set_num_threads(num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def on_epoch(metrics: EpochMetrics) -> None:
        report(metrics.to_dict())

    changed, scratch = job.with_overrides(overrides), trial_dir / SCRATCH
    result = train_job(changed, checkpoint_dir=scratch / "checkpoints", device=device, on_epoch=on_epoch)
    assert result.best_weights is not None  # rank 0 with checkpoints, and each epoch is validated
    save_model(scratch / "model", changed, result.best_weights)
    split: Any = job.val_split
    score_model(scratch / "model", job.shards_place, EvaluateSettings(split=split), trial_dir / SCORES)
