"""A trial of the search: the same training on one process, shorter, and its record in MLflow."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from infra.settings import apply_overrides
from infra.tracking import RunStatus, TrackedRun, Tracker
from models.placement import parse_placement
from pipelines.training.job import TrainJob, train_job
from pipelines.training.metrics import EpochMetrics
from pipelines.training.settings import MIN_SGDR_PERIOD, ModelSettings, TrainSettings
from tuning.settings import SearchSettings
from tuning.trials import TrialEvent

# A trial that the scheduler stopped is not a failure: MLflow shows KILLED in red.
_STATUS: dict[str, RunStatus] = {"failed": "FAILED", "interrupted": "KILLED"}


def trial_job(
    shards_place: str, model: ModelSettings, train: TrainSettings, search: SearchSettings, *, val_split: str
) -> TrainJob:
    """The job of a trial before its own overrides: the experiment's training, cut to `search.max_epochs` and `search.subset`.

    The warm-up and the periods of SGDR keep their share of the training, so that a trial is the long training in small.
    """
    share = search.max_epochs / train.epochs
    short = {
        "epochs": search.max_epochs,
        "warmup_epochs": train.warmup_epochs * search.max_epochs / train.epochs,
        "sgdr_period_epochs": max(MIN_SGDR_PERIOD, train.sgdr_period_epochs * share),
        "subset": search.subset or train.subset,
        "validate_every_epochs": 1,
    }
    return TrainJob("trial", shards_place, model, apply_overrides(train, short), val_split=val_split)


def run_trial(
    overrides: dict[str, Any], report: Callable[[dict[str, float]], None], _trial_dir: Path, *, job: TrainJob, num_threads: int
) -> None:
    """Train `job` with the trial's overrides in this process, reporting each epoch; the objective of `tuning.run_search`.

    Args:
        overrides: dotted settings, `model.placement` and so on.
        report: given the metrics of each epoch; it may end the process.
        _trial_dir: not used, since a trial that was interrupted is tried anew.
        job: see `trial_job`.
        num_threads: of torch, as many as the trial has CPUs.
    """
    import torch

    torch.set_num_threads(num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def on_epoch(metrics: EpochMetrics) -> None:
        report(metrics.to_dict())

    train_job(job.with_overrides(overrides), checkpoint_dir=None, device=device, on_epoch=on_epoch)


class TrialRuns:
    """Turns the events of a search into MLflow runs under the run of the stage; to be used as a context manager.

    Args:
        tracker: writes the runs.
        parent: id of the stage's run.
    """

    def __init__(self, tracker: Tracker, parent: str) -> None:
        self._tracker = tracker
        self._parent = parent
        self._open: dict[int, TrackedRun] = {}

    def __enter__(self) -> "TrialRuns":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for run in self._open.values():
            run.finish("KILLED")

    def on_event(self, event: TrialEvent) -> None:
        """Record that a trial started, reported an epoch, or ended."""
        run = self._open.get(event.number) or self._start(event)
        if event.kind == "epoch":
            run.log_metrics(event.metrics, step=event.epoch)
        elif event.kind == "ended":
            run.set_tags({"state": event.state, **({"error": event.error} if event.error else {})})
            run.finish(_STATUS.get(event.state, "FINISHED"))
            del self._open[event.number]

    def _start(self, event: TrialEvent) -> TrackedRun:
        placement = str(event.overrides.get("model.placement", "")).replace(",", "+")
        tags = {"stage": "trial", "trial": str(event.number), "search": self._parent}
        run = self._tracker.start_run(
            f"t{event.number:03d} {placement}".strip(),
            parent=self._parent,
            tags=tags,
            resume_tags=tags,
        )
        run.log_params({**event.overrides, "num_slots": len(parse_placement(placement.replace("+", ",") or "none"))})
        self._open[event.number] = run
        return run
