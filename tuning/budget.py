"""What a search may spend in hours and GPU-hours, and what it has spent so far; kept in its study, over all its runs."""

import time
from collections.abc import Callable

import optuna
from optuna.trial import TrialState

from tuning.settings import SearchSettings

_SPENT = "spent"
_SECONDS_AN_HOUR = 3600.0


class Budget:
    """Counts the seconds of a search, and of the GPUs that its running trials hold.

    A run that is killed loses what it spent since the last event of a trial.

    Args:
        study: keeps what is spent.
        settings: the `search` section.
        clock: gives seconds.
    """

    def __init__(self, study: optuna.Study, settings: SearchSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._study = study
        self._settings = settings
        self._clock = clock
        self._last = clock()
        self._num_running = 0
        spent = study.user_attrs.get(_SPENT, {})
        self.seconds: float = spent.get("seconds", 0.0)
        self.gpu_seconds: float = spent.get("gpu_seconds", 0.0)

    def tick(self, num_running: int) -> None:
        """Add the time since the last call, during which the trials ran that were told then.

        Args:
            num_running: trials that run from now on.
        """
        now = self._clock()
        num_gpus = self._settings.gpus_per_trial * self._settings.workers_per_trial * self._num_running
        self.seconds += now - self._last
        self.gpu_seconds += num_gpus * (now - self._last)
        self._last, self._num_running = now, num_running
        self._study.set_user_attr(_SPENT, {"seconds": round(self.seconds, 3), "gpu_seconds": round(self.gpu_seconds, 3)})

    @property
    def ended_by(self) -> str:
        """Which setting forbids another trial, in words; empty if none does. The first trial is always allowed."""
        if not self._has_begun():
            return ""
        self.tick(self._num_running)
        limits = {
            "max_hours": (self.seconds, self._settings.max_hours),
            "max_gpu_hours": (self.gpu_seconds, self._settings.max_gpu_hours),
        }
        for name, (seconds, limit) in limits.items():
            if limit is not None and seconds >= limit * _SECONDS_AN_HOUR:
                return f"search.{name}={limit:g} is spent"
        return ""

    def _has_begun(self) -> bool:
        return any(trial.state != TrialState.WAITING for trial in self._study.get_trials(deepcopy=False))
