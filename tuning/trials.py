"""The study: what was tried, kept in SQLite by Optuna so that a killed search goes on and a finished one can be extended.

Optuna's trials are the only record; `TrialRecord` and `trials.json` are read from them. A trial that has ended carries the user
attribute `outcome`, written before its state, so that one killed in between is still counted. A trial without `outcome` was
interrupted: it is marked FAIL, and its parameters are tried again under a new number. One with `same_as` was never trained: it
told the sampler the result of the trial whose settings it has.

SQLite because one torn byte makes Optuna's journal file unreadable for good.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from infra.errors import PipelineError
from infra.storage import write_json
from tuning.settings import SearchSettings
from tuning.space import LEARNING_RATE, PLACEMENT, Params, Space, baseline_points

State = Literal["completed", "stopped", "failed"]

_OUTCOME = "outcome"
_OVERRIDES = "overrides"
_NUM_SLOTS = "num_slots"
_HISTORY = "history"  # of a study with two objectives, which takes no intermediate values
_COST = "cost"
_METRICS = "metrics"
_RETRY_OF = "retry_of"
_SAME_AS = "same_as"
_SPACE = "space"
STUDY_NAME = "search"
STUDY_FILE = "study.db"
SCRATCH = "scratch"
"""A folder in a trial's own for what nobody needs once it has ended; the driver removes it then."""


@dataclass(frozen=True)
class TrialEvent:
    """What happens in a trial, told to the driver while it happens.

    Attributes:
        kind: `started` once, `epoch` after each epoch, `ended` once.
        number: of the trial; stays the same when the search is resumed.
        overrides: dotted settings of the trial.
        metrics: what the objective reported, for `epoch`; the best value of the search's metric, for `ended`, if it has one.
        epoch: epochs reported so far, from 0.
        state: for `ended` one of `completed`, `stopped` (before its last epoch), `failed`, `interrupted` (with the driver, in
            an earlier run); `running` otherwise.
        error: the cause, for `failed`; empty otherwise.
    """

    kind: Literal["started", "epoch", "ended"]
    number: int
    overrides: dict[str, Any]
    metrics: dict[str, float]
    epoch: int
    state: str
    error: str = ""


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has ended.

    Attributes:
        number: from 0, in the order of the study; interrupted trials leave gaps.
        overrides: dotted settings; running them again runs the trial again.
        placement: canonical spelling of the slots with attention; empty if the search does not choose it.
        num_slots: how many slots that is.
        learning_rate: `train.learning_rate`; None if the search does not choose it.
        top1: best epoch's value of the search's metric, a fraction for the default `val/top1`; None without any.
        top1_by_epoch: its value after each epoch.
        epochs: number of epochs reported.
        state: `completed`, `stopped` before its last epoch, or `failed`.
        seconds: from the start of the trial's process to its end.
        error: the cause of a failure; empty otherwise.
        cost: what `search.cost` names, of the best epoch; None without it.
        metrics: all that the objective reported at the best epoch.
    """

    number: int
    overrides: dict[str, Any]
    placement: str
    num_slots: int
    learning_rate: float | None
    top1: float | None
    top1_by_epoch: list[float]
    epochs: int
    state: State
    seconds: float
    error: str
    cost: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        trials: all that have ended, by number.
        best: of them; None if nothing was searched.
        note: why there are fewer trials than were asked for; empty if there are not.
    """

    trials: list[TrialRecord]
    best: TrialRecord | None
    note: str = ""

    @property
    def overrides(self) -> dict[str, Any]:
        """The dotted settings of the best trial; empty if nothing was searched."""
        return dict(self.best.overrides) if self.best else {}

    @property
    def pareto(self) -> list[TrialRecord]:
        """The trials that no other one beats in both accuracy and cost, the cheapest first; empty without `search.cost`."""
        return pareto_front(self.trials)


@contextmanager
def open_storage(storage_dir: Path) -> Iterator[optuna.storages.RDBStorage]:
    """Open or create the database of the study, `storage_dir`/`STUDY_FILE`, and close it at the end."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{storage_dir / STUDY_FILE}")
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def prepare_study(study: optuna.Study, settings: SearchSettings, space: Space) -> None:
    """Queue the baselines in a new study, and refuse one that is for something else.

    Raises:
        PipelineError: if the study there searches another space or metric.
    """
    metrics = [settings.metric] if settings.cost is None else [settings.metric, cost_metric(settings.cost)]
    wanted = f"{' and '.join(metrics)} over {space}"
    found = study.user_attrs.get(_SPACE, wanted)
    if found != wanted:
        raise PipelineError(f"the study searches {found}, expected {wanted}; remove its folder or search in another one")
    study.set_user_attr(_SPACE, wanted)
    for point in baseline_points(space) if settings.baselines else []:
        study.enqueue_trial(point, skip_if_exists=True)


def cost_metric(cost: str) -> str:
    """The name under which the objective reports a cost."""
    return f"cost/{cost}"


def settle_interrupted(study: optuna.Study) -> list[FrozenTrial]:
    """Leave no trial of a killed run behind: tell what had ended, fail the rest and queue its parameters again.

    If no trial has succeeded yet, those that failed are queued again too, since their cause was common.

    Returns:
        the trials that were found running and had not ended.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in running:
        _tell(study, trial)
    trials = study.get_trials(deepcopy=False)
    any_success = any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
    retried = {trial.user_attrs.get(_RETRY_OF) for trial in trials}
    for trial in trials:
        has_failed = trial.state == TrialState.FAIL and _OUTCOME in trial.user_attrs
        if (is_interrupted(trial) or (has_failed and not any_success)) and trial.number not in retried:
            study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={_RETRY_OF: trial.number},
                    system_attrs=trial.system_attrs,  # the values of a queued trial that was killed before it asked for them
                )
            )
    return [trial for trial in running if not {_OUTCOME, _SAME_AS} & trial.user_attrs.keys()]


def is_interrupted(trial: FrozenTrial) -> bool:
    """Whether a trial was left behind by a killed run, and is told so already."""
    return trial.state == TrialState.FAIL and not {_OUTCOME, _SAME_AS} & trial.user_attrs.keys()


def start_trial(trial: optuna.Trial, params: Params, space: Space) -> None:
    """Keep the settings that a trial trains with."""
    overrides = space.overrides_of(params)
    trial.set_user_attr(_NUM_SLOTS, space.num_slots(overrides))
    trial.set_user_attr(_OVERRIDES, overrides)


def overrides_in(trial: optuna.Trial | FrozenTrial) -> dict[str, Any]:
    """The settings that a trial trains with; empty if it was killed before it had any."""
    overrides: dict[str, Any] = trial.user_attrs.get(_OVERRIDES, {})
    return overrides


def report_epoch(
    study: optuna.Study, trial: optuna.Trial, metrics: Mapping[str, float], epoch: int, settings: SearchSettings
) -> None:
    """Keep what an objective reported after an epoch, from 1.

    Raises:
        PipelineError: if the metric or the cost that the search goes by is not among it.
    """
    wanted = [settings.metric] if settings.cost is None else [settings.metric, cost_metric(settings.cost)]
    if missing := [name for name in wanted if name not in metrics]:
        raise PipelineError(f"the objective reported {', '.join(sorted(metrics))}; expected {' and '.join(missing)} among them")
    history, value = _history(study.get_trials(deepcopy=False)[trial.number]), metrics[settings.metric]
    if settings.cost is None:
        trial.report(value, epoch)
    else:
        trial.set_user_attr(_HISTORY, [*history, value])
    if not history or value > max(history):
        trial.set_user_attr(_METRICS, dict(metrics))
        if settings.cost is not None:
            trial.set_user_attr(_COST, metrics[cost_metric(settings.cost)])


def end_trial(study: optuna.Study, trial: optuna.Trial, state: State, seconds: float, error: str = "") -> TrialRecord:
    """Record how a trial ended.

    Optuna learns the best epoch of a completed trial. A stopped one is told as PRUNED, so that TPE compares it by the epoch
    that it reached, instead of taking the value of an early epoch for a final one; with two objectives no scheduler stops
    any, so that what one has reached is final.
    """
    trial.set_user_attr(_OUTCOME, {"state": state, "seconds": round(seconds, 3), "error": error})
    return record_of(_tell(study, study.get_trials(deepcopy=False)[trial.number]))


def tell_repeat(study: optuna.Study, trial: optuna.Trial, twin: FrozenTrial) -> None:
    """Tell the result of `twin` for a trial of equal settings, which is not trained; of a running twin there is none yet."""
    trial.set_user_attr(_SAME_AS, twin.number)
    if twin.state == TrialState.COMPLETE:
        study.tell(trial, twin.values)
        return
    if twin.state == TrialState.PRUNED:
        for epoch, value in twin.intermediate_values.items():
            trial.report(value, epoch)
    study.tell(trial, state=TrialState.PRUNED if twin.state == TrialState.PRUNED else TrialState.FAIL)


def read_records(study: optuna.Study) -> list[TrialRecord]:
    """The trials that have ended, by number, without those that were queued again."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished() and _OUTCOME in trial.user_attrs]
    retried = {trial.user_attrs.get(_RETRY_OF) for trial in study.get_trials(deepcopy=False)}
    return [record_of(trial) for trial in trials if trial.number not in retried]


def record_of(trial: FrozenTrial) -> TrialRecord:
    """Read a trial that has ended."""
    outcome = trial.user_attrs[_OUTCOME]
    history, overrides = _history(trial), overrides_in(trial)
    return TrialRecord(
        number=trial.number,
        overrides=overrides,
        placement=overrides.get(PLACEMENT, ""),
        num_slots=trial.user_attrs.get(_NUM_SLOTS, 0),
        learning_rate=overrides.get(LEARNING_RATE),
        top1=max(history, default=None),
        top1_by_epoch=history,
        epochs=len(history),
        state=outcome["state"],
        seconds=outcome["seconds"],
        error=outcome["error"],
        cost=trial.user_attrs.get(_COST),
        metrics=trial.user_attrs.get(_METRICS, {}),
    )


def best_record(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial with the best epoch among those that did not fail; of equals the cheaper, then fewer slots, then the earlier.

    A stopped trial may win: it had at least the grace epochs.
    """
    ranked = rank_records(records)
    return ranked[0] if ranked and ranked[0].state != "failed" else None


def rank_records(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Best first; failed trials last."""

    def order(record: TrialRecord) -> tuple[bool, float, float, int, int]:
        value = math.inf if record.top1 is None else -record.top1
        return record.state == "failed", value, record.cost or 0.0, record.num_slots, record.number

    return sorted(records, key=order)


def pareto_front(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that no other one beats in both accuracy and cost, the cheapest first; of equals the first in rank."""
    front: list[TrialRecord] = []
    priced = [record for record in rank_records(records) if record.state != "failed" and record.cost is not None]
    for record in priced:  # best first, so that each must be cheaper than all before it
        if not front or (record.cost or 0.0) < (front[-1].cost or 0.0):
            front.append(record)
    return front[::-1]


def write_records(records: Sequence[TrialRecord], path: Path) -> None:
    """Write the trials as JSON, atomically."""
    write_json(path, [asdict(record) for record in records])


def _history(trial: FrozenTrial) -> list[float]:
    values: list[float] = trial.user_attrs.get(_HISTORY) or [value for _, value in sorted(trial.intermediate_values.items())]
    return values


def _tell(study: optuna.Study, trial: FrozenTrial) -> FrozenTrial:
    state = trial.user_attrs.get(_OUTCOME, {}).get("state")
    if state == "completed" or (state == "stopped" and len(study.directions) > 1):
        cost = [trial.user_attrs[_COST]] if len(study.directions) > 1 else []
        return study.tell(trial.number, [max(_history(trial)), *cost])
    return study.tell(trial.number, state=TrialState.PRUNED if state == "stopped" else TrialState.FAIL)
