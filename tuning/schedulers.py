"""Who stops hopeless trials: ASHA or the median rule of Ray Tune, both told of the trials of earlier runs.

Ray ends the process of a stopped trial at once. Of one that trains with workers this leaves behind what they reserved and an
actor that watches over it (Ray 2.60, issue 54305); so here a trial is asked to stop, and ends by itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from tuning.settings import SearchSettings
from tuning.trials import TrialRecord

EPOCH = "training_iteration"  # Ray's count of reports
BEST = "best"  # what a trial reports: its best epoch so far


def make_scheduler(
    settings: SearchSettings, records: Sequence[TrialRecord], ask_to_stop: Callable[[Trial], None]
) -> TrialScheduler | None:
    """The scheduler of a search, None if nothing is ever stopped.

    It knows the trials of earlier runs, so that a resumed search stops as early as one that was never killed. It stops no trial
    at its last epoch: one that has come so far is not killed while it writes its files.

    Args:
        settings: the `search` section.
        records: the trials that have ended.
        ask_to_stop: called in the driver, before the trial goes on, when it shall go on no more.
    """
    if settings.scheduler == "none" or settings.grace_epochs == settings.max_epochs:
        return None
    scheduler = _asha(settings) if settings.scheduler == "asha" else _MedianRule(settings)
    controller: Any = None
    for record in records:
        trial: Any = _EarlierTrial(f"earlier-{record.number}")
        scheduler.on_trial_add(controller, trial)
        for epoch, value in enumerate(np.maximum.accumulate(record.top1_by_epoch), start=1):
            if scheduler.on_trial_result(controller, trial, {EPOCH: epoch, BEST: float(value)}) == TrialScheduler.STOP:
                break
    return _Asking(scheduler, ask_to_stop)


class _Asking(FIFOScheduler):
    """Asks a trial to stop where `rule` would have Ray end its process."""

    def __init__(self, rule: TrialScheduler, ask_to_stop: Callable[[Trial], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
        self._rule = rule
        self._ask_to_stop = ask_to_stop

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """See Ray's class."""
        self._rule.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """See Ray's class."""
        if self._rule.on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            self._ask_to_stop(trial)
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """See Ray's class."""
        self._rule.on_trial_complete(tune_controller, trial, result)


@dataclass(frozen=True)
class _EarlierTrial:
    """All that a scheduler asks of a trial."""

    trial_id: str


def _asha(settings: SearchSettings) -> TrialScheduler:
    return ASHAScheduler(
        time_attr=EPOCH,
        metric=BEST,
        mode="max",
        max_t=settings.max_epochs - 1,
        grace_period=settings.grace_epochs,
        reduction_factor=settings.reduction_factor,
        stop_last_trials=False,
    )


class _MedianRule(MedianStoppingRule):
    """Stops a trial whose best epoch is below the median of what the others had at the same epoch."""

    def __init__(self, settings: SearchSettings) -> None:
        super().__init__(
            time_attr=EPOCH,
            metric=BEST,
            mode="max",
            grace_period=settings.grace_epochs,
            min_time_slice=math.inf,  # type: ignore[arg-type]  # else it pauses trials, which then begin again
        )
        self._last_epoch = settings.max_epochs

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """See Ray's class."""
        if result[EPOCH] < self._last_epoch and trial not in self._stopped_trials:
            return super().on_trial_result(tune_controller, trial, result)
        self._results[trial].append(result)
        return TrialScheduler.CONTINUE
