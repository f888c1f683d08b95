"""A trial of the search: the same training, shorter, and its record in MLflow."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from infra.settings import apply_overrides
from infra.tracking import RunStatus, TrackedRun, Tracker
from models.placement import parse_placement
from pipelines.training.job import TrainJob, train_job
from pipelines.training.metrics import EpochMetrics, StepStatus
from pipelines.training.settings import ModelSettings, TrainSettings
from tuning.leaderboard import rerun_command
from tuning.settings import SearchSettings
from tuning.trials import SCRATCH, TrialEvent

if TYPE_CHECKING:
    import torch

_WAIT_SECONDS = 600.0  # for the CPUs that a trial before it, or another stage, has yet to give back

# A trial that the scheduler stopped is not a failure: MLflow shows KILLED in red.
_STATUS: dict[str, RunStatus] = {"failed": "FAILED", "interrupted": "KILLED"}


def trial_job(
    shards_place: str, model: ModelSettings, train: TrainSettings, search: SearchSettings, *, val_split: str
) -> TrainJob:
    """The job of a trial before its own overrides: the experiment's training, cut to `search.max_epochs` and `search.subset`.

    The warm-up and the periods of SGDR keep their share of the training, so that a trial is the long training in small.
    """
    changes = {"subset": search.subset or train.subset, "validate_every_epochs": 1}
    short = apply_overrides(train.with_epochs(search.max_epochs), changes)
    return TrainJob("trial", shards_place, model, short, val_split=val_split)


def run_trial(
    overrides: dict[str, Any],
    report: Callable[[dict[str, float]], None],
    trial_dir: Path,
    *,
    job: TrainJob,
    search: SearchSettings,
) -> None:
    """Train `job` with the trial's overrides, reporting each epoch; the objective of `tuning.run_search`.

    It trains in this process, or on `search.workers_per_trial` workers of the cluster, or in this process with
    `search.seeds_per_trial` seeds in turn, an epoch of each, whose mean is reported.

    Args:
        overrides: dotted settings, `model.placement` and so on.
        report: given the metrics of each epoch, `search.cost` among them; what it raises ends the trial.
        trial_dir: holds checkpoints while the trial runs; it starts without, since a trial that was interrupted is tried anew.
        job: see `trial_job`.
        search: the section; torch gets as many threads as the trial has CPUs.
    """
    import torch

    from pipelines.training.costs import epoch_cost, measure_cost

    torch.set_num_threads(search.cpus_per_trial)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = job.with_overrides(overrides)
    cost = measure_cost(job, search.cost, device)

    def named(metrics: EpochMetrics) -> dict[str, float]:
        return metrics.to_dict() | cost | epoch_cost(metrics, search.cost, device)

    def on_epoch(metrics: EpochMetrics) -> None:
        report(named(metrics))

    scratch = trial_dir / SCRATCH
    if search.workers_per_trial > 1:
        _train_on_workers(job, search, scratch, on_epoch)
    elif search.seeds_per_trial > 1:
        jobs = [job.with_overrides({"train.seed": job.train.seed + number}) for number in range(search.seeds_per_trial)]
        for epoch in range(job.train.epochs):
            report(_mean([named(_train_epoch(each, scratch / str(each.train.seed), epoch, device)) for each in jobs]))
    else:
        train_job(job, checkpoint_dir=None, device=device, on_epoch=on_epoch)


def _train_on_workers(
    job: TrainJob, search: SearchSettings, storage_dir: Path, on_epoch: Callable[[EpochMetrics], None]
) -> None:
    from pipelines.training.room import WorkerPlan
    from pipelines.training.worker import train_on_cluster

    ended_by: list[Exception] = []

    def tell(metrics: EpochMetrics) -> None:
        if ended_by:
            return
        try:
            on_epoch(metrics)
        except Exception as error:  # in the thread that listens; the workers must give back what they hold first
            ended_by.append(error)

    patient = {"train.min_workers": None, "train.wait_seconds": _WAIT_SECONDS}
    plan = WorkerPlan(search.workers_per_trial, search.cpus_per_trial, use_gpu=search.gpus_per_trial > 0)
    train_on_cluster(
        job.with_overrides(patient), storage_dir=storage_dir, plan=plan, on_epoch=tell, should_stop=lambda: bool(ended_by)
    )
    if ended_by:
        raise ended_by[0]


def _train_epoch(job: TrainJob, checkpoint_dir: Path, epoch: int, device: "torch.device") -> EpochMetrics:
    """Train from the checkpoint of the epoch before, and stop when this one has ended; other seeds have their turn then."""
    is_ended = False

    def on_step(status: StepStatus) -> None:
        nonlocal is_ended
        is_ended = status.step_in_epoch == status.steps_per_epoch

    result = train_job(job, checkpoint_dir=checkpoint_dir, device=device, on_step=on_step, should_stop=lambda: is_ended)
    return result.history[epoch]


def _mean(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(metrics[name] for metrics in seeds) for name in seeds[0]}


class TrialRuns:
    """Turns the events of a search into MLflow runs under the run of the stage; to be used as a context manager.

    Args:
        tracker: writes the runs.
        parent: id of the stage's run.
        command_prefix: what starts the experiment, see `tuning.leaderboard`; the tag `rerun` is the command of the trial.
        stage: what the runs are: a `trial`, or a training of the `verdict`; its first letter begins their names.
    """

    def __init__(self, tracker: Tracker, parent: str, command_prefix: str, stage: str = "trial") -> None:
        self._tracker = tracker
        self._parent = parent
        self._command_prefix = command_prefix
        self._stage = stage
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
        tags = {"stage": self._stage, "trial": str(event.number), "search": self._parent}
        run = self._tracker.start_run(
            f"{self._stage[0]}{event.number:03d} {placement}".strip(),
            parent=self._parent,
            tags={**tags, "rerun": rerun_command(self._command_prefix, event.overrides)},
            resume_tags=tags,
        )
        run.log_params({**event.overrides, "num_slots": len(parse_placement(placement.replace("+", ",") or "none"))})
        self._open[event.number] = run
        return run
