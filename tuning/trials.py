"""The study: what was tried, kept in SQLite by Optuna so that a killed search goes on and a finished one can be extended.

Optuna's trials are the only record; `TrialRecord` and `trials.json` are read from them. A trial that has ended carries the user
attribute `outcome`, written before its state, so that one killed in between is still counted. A trial without `outcome` was
interrupted: it is marked FAIL, and its parameters are tried again under a new number.

SQLite because one torn byte makes Optuna's journal file unreadable for good.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from infra.errors import PipelineError
from infra.storage import write_json
from models.placement import parse_placement
from tuning.settings import SearchSettings
from tuning.space import LEARNING_RATE, PLACEMENT, baseline_points, overrides_of, search_space

State = Literal["completed", "stopped", "failed"]

_OUTCOME = "outcome"
_RETRY_OF = "retry_of"
_SPACE = "space"
STUDY_NAME = "search"
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


@dataclass(frozen=True)
class SearchResult:
    """All trials that have ended, by number, and the best of them; None if nothing was searched.

    `ended_by` says which budget ended the search before `num_trials`, empty if none did.
    """

    trials: list[TrialRecord]
    best: TrialRecord | None
    ended_by: str = ""

    @property
    def overrides(self) -> dict[str, Any]:
        """The dotted settings of the best trial; empty if nothing was searched."""
        return dict(self.best.overrides) if self.best else {}


@contextmanager
def open_storage(storage_dir: Path) -> Iterator[optuna.storages.RDBStorage]:
    """Open or create the database of the study, `storage_dir`/study.db, and close it at the end."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{storage_dir / 'study.db'}")
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def prepare_study(study: optuna.Study, settings: SearchSettings) -> None:
    """Queue the baselines in a new study, and refuse one that is for something else.

    Raises:
        PipelineError: if the study there searches another space or metric.
    """
    wanted = f"{settings.metric} over {search_space(settings)}"
    found = study.user_attrs.get(_SPACE, wanted)
    if found != wanted:
        raise PipelineError(f"the study searches {found}, expected {wanted}; remove its folder or search in another one")
    study.set_user_attr(_SPACE, wanted)
    for point in baseline_points(settings):
        study.enqueue_trial(point, skip_if_exists=True)


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
        repeat = trial.state == TrialState.FAIL and (_OUTCOME not in trial.user_attrs or not any_success)
        if repeat and trial.number not in retried:
            study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={_RETRY_OF: trial.number},
                    system_attrs=trial.system_attrs,  # the values of a queued trial that was killed before it asked for them
                )
            )
    return [trial for trial in running if _OUTCOME not in trial.user_attrs]


def end_trial(study: optuna.Study, trial: optuna.Trial, state: State, seconds: float, error: str = "") -> TrialRecord:
    """Record how a trial ended.

    Optuna learns the best epoch of a completed trial. A stopped one is told as PRUNED, so that TPE compares it by the epoch
    that it reached, instead of taking the value of an early epoch for a final one.
    """
    trial.set_user_attr(_OUTCOME, {"state": state, "seconds": round(seconds, 3), "error": error})
    return record_of(_tell(study, study.trials[trial.number]))


def read_records(study: optuna.Study) -> list[TrialRecord]:
    """The trials that have ended, by number, without those that were queued again."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished() and _OUTCOME in trial.user_attrs]
    retried = {trial.user_attrs.get(_RETRY_OF) for trial in study.get_trials(deepcopy=False)}
    return [record_of(trial) for trial in trials if trial.number not in retried]


def record_of(trial: FrozenTrial) -> TrialRecord:
    """Read a trial that has ended."""
    outcome = trial.user_attrs[_OUTCOME]
    history = [value for _, value in sorted(trial.intermediate_values.items())]
    overrides = overrides_of(trial.params)
    placement = overrides.get(PLACEMENT, "")
    return TrialRecord(
        number=trial.number,
        overrides=overrides,
        placement=placement,
        num_slots=len(parse_placement(placement)) if placement else 0,
        learning_rate=overrides.get(LEARNING_RATE),
        top1=max(history, default=None),
        top1_by_epoch=history,
        epochs=len(history),
        state=outcome["state"],
        seconds=outcome["seconds"],
        error=outcome["error"],
    )


def best_record(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial with the best epoch among those that did not fail; of equals the one with fewer slots, then the earlier one.

    A stopped trial may win: it had at least the grace epochs.
    """
    ranked = rank_records(records)
    return ranked[0] if ranked and ranked[0].state != "failed" else None


def rank_records(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Best first; failed trials last."""

    def order(record: TrialRecord) -> tuple[bool, float, int, int]:
        return record.state == "failed", math.inf if record.top1 is None else -record.top1, record.num_slots, record.number

    return sorted(records, key=order)


def write_records(records: Sequence[TrialRecord], path: Path) -> None:
    """Write the trials as JSON, atomically."""
    write_json(path, [asdict(record) for record in records])


def _tell(study: optuna.Study, trial: FrozenTrial) -> FrozenTrial:
    state = trial.user_attrs.get(_OUTCOME, {}).get("state")
    if state == "completed":
        return study.tell(trial.number, max(trial.intermediate_values.values()))
    return study.tell(trial.number, state=TrialState.PRUNED if state == "stopped" else TrialState.FAIL)
