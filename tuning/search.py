"""The search: Ray Tune runs trials as processes, Optuna says what to try next, ASHA stops the hopeless ones.

Ray asks and Optuna answers through `Searcher`; what came of a trial is told by `_Watcher` instead, because Ray hands the
searcher neither the cause of a failure nor the value at which a trial was stopped, and tells a stopped trial as a complete one.
Ray's own experiment state is thrown away: the study alone says what is done (see `tuning/trials.py`).
"""

import math
import os
import re
import shutil
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from infra.errors import ClusterError, PipelineError
from infra.progress import OnProgress
from tuning.sampling import NUMBER, OVERRIDES, Searcher
from tuning.settings import SearchSettings
from tuning.space import SA_GSM, search_space
from tuning.trials import (
    SearchResult,
    State,
    TrialEvent,
    TrialRecord,
    best_record,
    end_trial,
    open_storage,
    overrides_in,
    prepare_study,
    read_records,
    report_epoch,
    settle_interrupted,
    write_records,
)

Report = Callable[[dict[str, float]], None]
Objective = Callable[[dict[str, Any], Report, Path], None]
"""Called as `objective(overrides, report, trial_dir)` in the trial's own process.

It comes from an importable module (a `functools.partial` of such a function will do), calls `report(metrics)` once after each
epoch, and keeps its files in `trial_dir`.
"""
OnEvent = Callable[[TrialEvent], None]

_BEST = "best"
_METRICS = "metrics"
_EPOCH = "training_iteration"  # Ray's count of reports


def run_search(
    objective: Objective,
    settings: SearchSettings,
    *,
    storage_dir: Path,
    network: str = SA_GSM,
    on_event: OnEvent | None = None,
    on_progress: OnProgress | None = None,
) -> SearchResult:
    """Try settings until `settings.num_trials` trials have ended, counting those of earlier runs in the same `storage_dir`.

    A trial that raises, dies or reports a value that is not finite is a failed trial; the search goes on. A driver that is
    killed at any moment is simply run again. `storage_dir` gets `study.db` (Optuna), `trials.json` (after each trial) and
    `trials/<number>/` (the objective's own files). May be called from any thread; Ray must be connected.

    Args:
        objective: trains one trial; see `Objective`.
        settings: the `search` section.
        storage_dir: a folder that all nodes see.
        network: the experiment's `model.name`, whose slots are searched.
        on_event: told in this process whenever a trial starts, reports an epoch or ends. If it raises, the search stops with
            that error, and its running trials count as interrupted.
        on_progress: `done` counts ended trials.

    Raises:
        ConfigError: if the settings span no space; see `search_space`.
        ClusterError: if not even one trial fits into the cluster.
        PipelineError: if all trials failed, if the search was stopped before its end, or if the study holds another search.
    """
    if settings.num_trials == 0:
        return SearchResult([], None)
    space = search_space(settings, network)
    storage_dir = storage_dir.absolute()
    storage_dir.mkdir(parents=True, exist_ok=True)
    with open_storage(storage_dir) as storage:
        searcher = Searcher(storage, settings, space)
        prepare_study(searcher.study, settings, space)
        watcher = _Watcher(searcher, settings, storage_dir, on_event, on_progress)
        watcher.take_stock()
        num_remaining = settings.num_trials - len(watcher.records)
        if num_remaining > 0:
            _run_trials(objective, settings, searcher, watcher, num_remaining)
    return _result(watcher.records, settings, storage_dir, is_exhausted=searcher.is_exhausted)


def _run_trials(
    objective: Objective, settings: SearchSettings, searcher: Searcher, watcher: "_Watcher", num_trials: int
) -> None:
    num_concurrent = _num_concurrent(settings)
    for name, value in {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the user mean the same in a trial
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard copies of what the study holds
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the cause is in the record, the traceback in the trial's folder
        "RAY_AIR_NEW_OUTPUT": "0",  # the newer reporters print even at verbose=0
    }.items():
        os.environ.setdefault(name, value)
    tune_dir = watcher.storage_dir / "tune"
    shutil.rmtree(tune_dir, ignore_errors=True)
    train = partial(_run_trial, objective=objective, metric=settings.metric, trials_dir=watcher.storage_dir / "trials")
    tuner = tune.Tuner(
        tune.with_resources(train, {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial}),
        tune_config=tune.TuneConfig(
            num_samples=num_trials,
            max_concurrent_trials=num_concurrent,
            search_alg=searcher,
            scheduler=_scheduler(settings, watcher.records),
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="session", storage_path=str(tune_dir), verbose=0, callbacks=[watcher], stop=_StopWhen(watcher)
        ),
    )
    tuner.fit()
    if watcher.broken_by is not None:
        raise watcher.broken_by
    shutil.rmtree(tune_dir, ignore_errors=True)


def _run_trial(config: dict[str, Any], *, objective: Objective, metric: str, trials_dir: Path) -> None:
    """The body of a trial, in its own process."""
    best = -math.inf

    def report(metrics: dict[str, float]) -> None:
        nonlocal best
        if metric not in metrics:
            raise ValueError(f"the objective reported {sorted(metrics)}; expected {metric} among them")
        value = float(metrics[metric])
        if not math.isfinite(value):
            raise ValueError(f"{metric} is {value}; expected a finite number, so the trial has diverged")
        best = max(best, value)
        tune.report({_BEST: best, _METRICS: {name: float(number) for name, number in metrics.items()}})

    trial_dir = _trial_dir(trials_dir, config[NUMBER])
    trial_dir.mkdir(parents=True, exist_ok=True)
    objective(config[OVERRIDES], report, trial_dir)
    if best == -math.inf:
        raise RuntimeError(f"the objective returned without a report of {metric}")


def _guarded(callback: Callable[..., None]) -> Callable[..., None]:
    """Keep the first exception of a callback for the end of the search: Ray would take it for a failure of the trial."""

    @wraps(callback)
    def call(self: "_Watcher", *_: Any, **info: Any) -> None:
        if self.broken_by is None:
            try:
                callback(self, **info)
            except Exception as error:
                self.broken_by = error

    return call


class _Watcher(tune.Callback):
    """Follows the trials in the driver's process: tells Optuna, keeps the table, passes events on."""

    def __init__(
        self,
        searcher: Searcher,
        settings: SearchSettings,
        storage_dir: Path,
        on_event: OnEvent | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.storage_dir = storage_dir
        self.records: list[TrialRecord] = []
        self.broken_by: Exception | None = None
        self._searcher = searcher
        self._settings = settings
        self._on_event = on_event
        self._on_progress = on_progress
        self._started: dict[int, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray writes its callbacks to `tuner.pkl`, which nobody reads."""
        return {}

    def take_stock(self) -> None:
        """Settle what an earlier run left behind and read what it has finished."""
        for trial in settle_interrupted(self._searcher.study):
            self._emit(
                TrialEvent("ended", trial.number, overrides_in(trial), {}, len(trial.intermediate_values), "interrupted")
            )
        self.records = read_records(self._searcher.study)
        self._save()

    @_guarded
    def on_trial_start(self, trial: Trial, **_: Any) -> None:
        """The process of a trial is up."""
        number = trial.config[NUMBER]
        self._started[number] = time.monotonic()
        self._emit(TrialEvent("started", number, trial.config[OVERRIDES], {}, 0, "running"))

    @_guarded
    def on_trial_result(self, trial: Trial, result: dict[str, Any], **_: Any) -> None:
        """A trial has reported an epoch."""
        metrics, epoch = result[_METRICS], result[_EPOCH]
        report_epoch(self._searcher.study, self._searcher.optuna_trial(trial), metrics, epoch, self._settings)
        self._emit(TrialEvent("epoch", trial.config[NUMBER], trial.config[OVERRIDES], metrics, epoch, "running"))

    @_guarded
    def on_trial_complete(self, trial: Trial, **_: Any) -> None:
        """A trial has returned, or the scheduler has stopped it."""
        self._end(trial, "completed" if trial.last_result[_EPOCH] >= self._settings.max_epochs else "stopped")

    @_guarded
    def on_trial_error(self, trial: Trial, **_: Any) -> None:
        """A trial has raised, or its process has died."""
        trial_dir = _trial_dir(self.storage_dir / "trials", trial.config[NUMBER])
        trial_dir.mkdir(parents=True, exist_ok=True)
        text = Path(trial.error_file).read_text()
        (trial_dir / "error.txt").write_text(text)
        self._end(trial, "failed", _cause(text))

    def _end(self, trial: Trial, state: State, error: str = "") -> None:
        seconds = time.monotonic() - self._started.get(trial.config[NUMBER], time.monotonic())
        record = end_trial(self._searcher.study, self._searcher.optuna_trial(trial), state, seconds, error)
        self.records = sorted([*self.records, record], key=lambda record: record.number)
        self._save()
        metrics = {} if record.top1 is None else {self._settings.metric: record.top1}
        self._emit(TrialEvent("ended", record.number, record.overrides, metrics, record.epochs, state, error))

    def _save(self) -> None:
        write_records(self.records, self.storage_dir / "trials.json")

    def _emit(self, event: TrialEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)
        if self._on_progress is not None:
            self._on_progress(len(self.records), self._settings.num_trials, self._progress_text())

    def _progress_text(self) -> str:
        best = best_record(self.records)
        if best is None:
            return "trials"
        return f"trials, best {self._settings.metric} {best.top1:.3f} by trial {best.number} ({best.placement})"


class _StopWhen(tune.Stopper):
    """Ends the search once a callback has raised."""

    def __init__(self, watcher: _Watcher) -> None:
        self._watcher = watcher

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, *_: Any, **__: Any) -> bool:
        """No trial is stopped on its own."""
        return False

    def stop_all(self) -> bool:
        """Whether to stop the whole search."""
        return self._watcher.broken_by is not None


def _scheduler(settings: SearchSettings, records: list[TrialRecord]) -> TrialScheduler | None:
    """ASHA that knows the trials of earlier runs, so that a resumed search stops as early as one that was never killed.

    Its last rung lies before the last epoch: a trial that has come so far is not killed while it writes its files.
    """
    if settings.grace_epochs == settings.max_epochs:
        return None
    scheduler = ASHAScheduler(
        time_attr=_EPOCH,
        metric=_BEST,
        mode="max",
        max_t=settings.max_epochs - 1,
        grace_period=settings.grace_epochs,
        reduction_factor=settings.reduction_factor,
        stop_last_trials=False,
    )
    controller: Any = None
    for record in records:
        trial: Any = SimpleNamespace(trial_id=f"earlier-{record.number}")  # the scheduler asks a trial for nothing else
        scheduler.on_trial_add(controller, trial)
        for epoch, value in enumerate(np.maximum.accumulate(record.top1_by_epoch), start=1):
            scheduler.on_trial_result(controller, trial, {_EPOCH: epoch, _BEST: float(value)})
    return scheduler


def _num_concurrent(settings: SearchSettings) -> int:
    """How many trials to run at once; counted node by node, since a trial cannot span two.

    Raises:
        ClusterError: if not even one fits.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    num_fitting = sum(_num_fitting(node, settings) for node in nodes)
    if num_fitting == 0:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ClusterError(
            f"a trial asks for {settings.cpus_per_trial} CPUs and {settings.gpus_per_trial:g} GPUs on one node; "
            f"the nodes of the cluster have {have}; lower search.cpus_per_trial or search.gpus_per_trial"
        )
    return min(num_fitting, settings.max_concurrent_trials or num_fitting)


def _num_fitting(node: dict[str, float], settings: SearchSettings) -> int:
    by_cpu = int(node.get("CPU", 0) // settings.cpus_per_trial)
    if settings.gpus_per_trial == 0:
        return by_cpu
    return min(by_cpu, int(node.get("GPU", 0) / settings.gpus_per_trial + 1e-9))


def _result(records: list[TrialRecord], settings: SearchSettings, storage_dir: Path, *, is_exhausted: bool) -> SearchResult:
    failed = [record for record in records if record.state == "failed"]
    if records and len(failed) == len(records):
        first = failed[0]
        raise PipelineError(
            f"all {len(failed)} trials failed; the first cause, of trial {first.number}: {first.error}; "
            f"tracebacks are in {storage_dir / 'trials'}/*/error.txt"
        )
    if len(records) < settings.num_trials and is_exhausted:
        note = f"all {len(records)} different settings of the space were tried, {settings.num_trials} trials were asked for"
        return SearchResult(records, best_record(records), note)
    if len(records) < settings.num_trials:
        raise PipelineError(
            f"the search was stopped after {len(records)} of {settings.num_trials} trials; run it again to go on from there"
        )
    return SearchResult(records, best_record(records))


def _cause(text: str) -> str:
    """What made a trial fail, in one line: the exception at the end of its traceback, or how its process died."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit|Warning)\b", line)]
    return (exceptions or lines or ["unknown"])[-1]


def _trial_name(trial: Trial) -> str:
    return f"trial-{trial.config[NUMBER]:05d}"


def _trial_dir(trials_dir: Path, number: int) -> Path:
    return trials_dir / f"{number:05d}"
