"""The search: Ray Tune runs trials as processes, Optuna says what to try next, ASHA stops the hopeless ones.

Ray asks and Optuna answers through `Searcher`; what came of a trial is told by `_Watcher` instead, because Ray hands the
searcher neither the cause of a failure nor the value at which a trial was stopped, and tells a stopped trial as a complete one.
Ray's own experiment state is thrown away: the study alone says what is done (see `tuning/trials.py`).
"""

import os
import re
import shutil
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from ray import tune
from ray.tune.experiment import Trial

from infra.cluster import node_resources
from infra.errors import ClusterError, PipelineError
from infra.progress import OnProgress
from tuning.budget import Budget
from tuning.capacity import count_trials, plan_concurrency, trial_bundle
from tuning.process import METRICS, NUMBER, OVERRIDES, STOP, Objective, run_objective, trial_dir_of
from tuning.sampling import Searcher
from tuning.schedulers import EPOCH, make_scheduler
from tuning.settings import SearchSettings
from tuning.space import SA_GSM, Space, search_space
from tuning.trials import (
    SCRATCH,
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

OnEvent = Callable[[TrialEvent], None]

_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_WITHOUT_NODES = 20.0  # nodes may come back


def run_search(
    objective: Objective,
    settings: SearchSettings,
    *,
    storage_dir: Path,
    network: str = SA_GSM,
    on_event: OnEvent | None = None,
    on_progress: OnProgress | None = None,
) -> SearchResult:
    """Try settings until `settings.num_trials` trials have ended, counting those of earlier runs in the same `storage_dir`, or
    until the budget of hours or GPU-hours is spent, after which no trial begins.

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
        ConfigError: if the workers of a trial would share a GPU.
        PipelineError: if all trials failed, if the search was stopped before its end, or if the study holds another search.
    """
    if settings.num_trials == 0:
        return SearchResult([], None)
    space = search_space(settings, network)
    storage_dir = storage_dir.absolute()
    storage_dir.mkdir(parents=True, exist_ok=True)
    with open_storage(storage_dir) as storage:
        searcher = _SearcherInBudget(storage, settings, space)
        prepare_study(searcher.study, settings, space)
        watcher = _Watcher(searcher, settings, storage_dir, on_event, on_progress)
        watcher.take_stock()
        num_remaining = settings.num_trials - len(watcher.records)
        if num_remaining > 0 and not searcher.budget.ended_by:
            _run_trials(objective, settings, searcher, watcher, num_remaining)
        note = searcher.why_ended if len(watcher.records) < settings.num_trials else ""
    return _result(watcher.records, settings, storage_dir, note)


def _run_trials(
    objective: Objective, settings: SearchSettings, searcher: "_SearcherInBudget", watcher: "_Watcher", num_trials: int
) -> None:
    num_concurrent = plan_concurrency(settings, node_resources())
    watcher.say(f"trials, {num_concurrent} at a time")
    for name, value in {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the user mean the same in a trial
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard copies of what the study holds
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # those that the searcher names stand for what it is told by us
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the cause is in the record, the traceback in the trial's folder
        "RAY_AIR_NEW_OUTPUT": "0",  # the newer reporters print even at verbose=0
    }.items():
        os.environ.setdefault(name, value)
    tune_dir = watcher.storage_dir / "tune"
    shutil.rmtree(tune_dir, ignore_errors=True)
    train = partial(run_objective, objective=objective, metric=settings.metric, trials_dir=watcher.storage_dir / "trials")
    tuner = tune.Tuner(
        tune.with_resources(train, trial_bundle(settings)),
        tune_config=tune.TuneConfig(
            num_samples=num_trials,
            max_concurrent_trials=num_concurrent,
            search_alg=searcher,
            scheduler=make_scheduler(settings, watcher.records, watcher.ask_to_stop),
            reuse_actors=settings.cost != "memory",  # a process starts for seconds; the peak of its memory is of all its trials
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="session", storage_path=str(tune_dir), verbose=0, callbacks=[watcher], stop=_StopWhen(watcher)
        ),
    )
    tuner.fit()
    watcher.remove_scratch()
    if watcher.broken_by is not None:
        raise watcher.broken_by
    shutil.rmtree(tune_dir, ignore_errors=True)


class _SearcherInBudget(Searcher):
    """Asks for no more trials once the budget is spent."""

    def __init__(self, storage: RDBStorage, settings: SearchSettings, space: Space) -> None:
        super().__init__(storage, settings, space)
        self.budget = Budget(self.study, settings)

    @property
    def why_ended(self) -> str:
        """Why there will be no more trials: a spent budget or a space that was tried out; empty if there may be more."""
        return self.budget.ended_by or ("all different settings of the space were tried" if self.is_exhausted else "")

    def suggest(self, trial_id: str) -> Any:
        """See `Searcher`."""
        return str(self.FINISHED) if self.budget.ended_by else super().suggest(trial_id)


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
        searcher: _SearcherInBudget,
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
        self._next_look = self._nodes_seen = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray writes its callbacks to `tuner.pkl`, which nobody reads."""
        return {}

    def take_stock(self) -> None:
        """Settle what an earlier run left behind and read what it has finished."""
        for trial in settle_interrupted(self._searcher.study):
            overrides = overrides_in(trial)
            if overrides:  # else it was killed before it had any, and nobody was told of it
                self._emit(TrialEvent("ended", trial.number, overrides, {}, len(trial.intermediate_values), "interrupted"))
        self.records = read_records(self._searcher.study)
        self._save()
        self.remove_scratch()

    def remove_scratch(self) -> None:
        """Free the disk that trials held which nobody runs any more."""
        for folder in (self.storage_dir / "trials").glob(f"*/{SCRATCH}"):
            shutil.rmtree(folder, ignore_errors=True)

    def ask_to_stop(self, trial: Trial) -> None:
        """Let a trial end when it has reported; it waits for the driver then."""
        (trial_dir_of(self.storage_dir / "trials", trial.config[NUMBER]) / STOP).touch()

    def look_for_nodes(self) -> None:
        """Give up once no living node has held a trial for a while: Ray would wait for one for ever."""
        now = time.monotonic()
        if now < self._next_look or self.broken_by is not None:
            return
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        if count_trials(self._settings, node_resources()):
            self._nodes_seen = now
        elif now - self._nodes_seen > _SECONDS_WITHOUT_NODES:
            self.broken_by = ClusterError(
                f"the cluster has lost the nodes that held trials, {len(self.records)} of {self._settings.num_trials} have "
                "ended; start nodes and run again to go on from there"
            )

    @_guarded
    def on_trial_start(self, trial: Trial, **_: Any) -> None:
        """The process of a trial is up."""
        number = trial.config[NUMBER]
        self._started[number] = time.monotonic()
        self._searcher.budget.tick(len(self._started))
        self._emit(TrialEvent("started", number, trial.config[OVERRIDES], {}, 0, "running"))

    @_guarded
    def on_trial_result(self, trial: Trial, result: dict[str, Any], **_: Any) -> None:
        """A trial has reported an epoch."""
        self._searcher.budget.tick(len(self._started))
        metrics, epoch = result[METRICS], result[EPOCH]
        report_epoch(self._searcher.study, self._searcher.optuna_trial(trial), metrics, epoch, self._settings)
        self._emit(TrialEvent("epoch", trial.config[NUMBER], trial.config[OVERRIDES], metrics, epoch, "running"))

    @_guarded
    def on_trial_complete(self, trial: Trial, **_: Any) -> None:
        """A trial has returned, or the scheduler has stopped it."""
        self._end(trial, "completed" if trial.last_result[EPOCH] >= self._settings.max_epochs else "stopped")

    @_guarded
    def on_trial_error(self, trial: Trial, **_: Any) -> None:
        """A trial has raised, or its process has died."""
        trial_dir = trial_dir_of(self.storage_dir / "trials", trial.config[NUMBER])
        trial_dir.mkdir(parents=True, exist_ok=True)
        text = Path(trial.error_file).read_text()
        (trial_dir / "error.txt").write_text(text)
        self._end(trial, "failed", _cause(text))

    def _end(self, trial: Trial, state: State, error: str = "") -> None:
        number = trial.config[NUMBER]
        seconds = time.monotonic() - self._started.pop(number, time.monotonic())
        self._searcher.budget.tick(len(self._started))
        shutil.rmtree(trial_dir_of(self.storage_dir / "trials", number) / SCRATCH, ignore_errors=True)
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
        self.say(self._progress_text())

    def say(self, text: str) -> None:
        """Show a text beside how many trials have ended."""
        if self._on_progress is not None:
            self._on_progress(len(self.records), self._settings.num_trials, text)

    def _progress_text(self) -> str:
        best = best_record(self.records)
        if best is None:
            return "trials"
        return f"trials, best {self._settings.metric} {best.top1:.3f} by trial {best.number} ({best.placement})"


class _StopWhen(tune.Stopper):
    """Ends the search once a callback has raised, or no node is left that could run a trial."""

    def __init__(self, watcher: _Watcher) -> None:
        self._watcher = watcher

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, *_: Any, **__: Any) -> bool:
        """No trial is stopped on its own."""
        return False

    def stop_all(self) -> bool:
        """Whether to stop the whole search."""
        self._watcher.look_for_nodes()
        return self._watcher.broken_by is not None


def _result(records: list[TrialRecord], settings: SearchSettings, storage_dir: Path, note: str) -> SearchResult:
    failed = [record for record in records if record.state == "failed"]
    if records and len(failed) == len(records):
        first = failed[0]
        raise PipelineError(
            f"all {len(failed)} trials failed; the first cause, of trial {first.number}: {first.error}; "
            f"tracebacks are in {storage_dir / 'trials'}/*/error.txt"
        )
    if note and not records:
        raise PipelineError(f"{note} before a single trial has ended; raise it and run again")
    if len(records) < settings.num_trials and not note:
        raise PipelineError(
            f"the search was stopped after {len(records)} of {settings.num_trials} trials; run it again to go on from there"
        )
    return SearchResult(records, best_record(records), note)


def _cause(text: str) -> str:
    """What made a trial fail, in one line: the exception at the end of its traceback, or how its process died."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit|Warning)\b", line)]
    return (exceptions or lines or ["unknown"])[-1]


def _trial_name(trial: Trial) -> str:
    return f"trial-{trial.config[NUMBER]:05d}"
