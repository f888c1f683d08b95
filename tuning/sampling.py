"""What to try next: Optuna's samplers behind Ray's interface, with equal settings as one trial.

A suggestion that equals a trial which has ended is not trained again: Optuna is told the known result under a new number (user
attribute `same_as`), which no budget counts, and is asked again. Told, because a sampler that is told nothing suggests the same
point for ever: it has learned nothing.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.experiment import Trial
from ray.tune.search.optuna import OptunaSearch

from tuning.process import NUMBER, OVERRIDES
from tuning.settings import SearchSettings
from tuning.space import Params, Space, key_of, suggest
from tuning.trials import STUDY_NAME, is_interrupted, overrides_in, start_trial, tell_repeat

_MOST_REPEATS = 20  # suggestions in a row that were known, before a random one that is not takes their place
_MOST_POINTS = 20_000  # of a finite space that are looked through for one that was not tried
_MOST_DRAWS = 1_000  # the same for a space with real numbers


class Searcher(OptunaSearch):
    """OptunaSearch that only asks; the search tells what became of a trial, since Ray does not know all of it.

    A trial's config is its `number` and its dotted `overrides`.

    Attributes:
        study: of Optuna.
        is_exhausted: nothing was left to try when Ray asked last.
    """

    def __init__(self, storage: optuna.storages.BaseStorage, settings: SearchSettings, space: Space) -> None:
        super().__init__(
            partial(suggest, space=space),
            # Ray wants metric and mode here, not in TuneConfig, when the space is a function; nothing reads their names.
            metric="value" if settings.cost is None else ["value", "cost"],
            mode="max" if settings.cost is None else ["max", "min"],
            storage=storage,
            study_name=STUDY_NAME,
            sampler=_sampler(settings, 0),
        )
        self.study = cast(optuna.Study, self._ot_study)
        self.is_exhausted = False
        self._settings = settings
        self._points = space

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Ray leaves its own FINISHED out
        """The next trial, or that there is none."""
        trial = next_trial(self.study, self._settings, self._points)
        self.is_exhausted = trial is None
        if trial is None:
            return str(self.FINISHED)
        self._ot_trials[trial_id] = trial
        return {NUMBER: trial.number, OVERRIDES: overrides_in(trial)}

    def optuna_trial(self, trial: Trial) -> optuna.Trial:
        """Optuna's side of a trial of Ray."""
        found: optuna.Trial = self._ot_trials[trial.trial_id]
        return found

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Told by the search."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Told by the search."""


def next_trial(study: optuna.Study, settings: SearchSettings, space: Space) -> optuna.Trial | None:
    """Begin the next trial: a queued one, else what the sampler suggests, else any that was not tried; None if there is none.

    Only one process may ask at a time.
    """
    num_repeats = 0
    while _is_queued(study) or (settings.sampler != "grid" and num_repeats < _MOST_REPEATS):
        trial = _ask(study, settings, space)
        twin = _twin(study, trial)
        if twin is None:
            return trial
        tell_repeat(study, trial, twin)
        num_repeats += 1
    point = _untried_point(study, settings, space)
    if point is None:
        return None
    study.enqueue_trial(point)
    return _ask(study, settings, space)


def _ask(study: optuna.Study, settings: SearchSettings, space: Space) -> optuna.Trial:
    """Seed the sampler by the number of trials, so that a resumed search does not draw its first points again."""
    study.sampler = _sampler(settings, _seed(study, settings))
    trial = study.ask()
    start_trial(trial, suggest(trial, space), space)
    return trial


def _sampler(settings: SearchSettings, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna 5's TPE as it comes, which looks at all parameters at once (multivariate).

    On the objective of tests/tuning/test_sampling.py (ten slots, interactions, noise) the best of 1,024 placements was among
    120 trials in 39 of 40 searches; of random search in 4.
    """
    if settings.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _seed(study: optuna.Study, settings: SearchSettings) -> int:
    num_trials = len(study.get_trials(deepcopy=False))
    return int(np.random.SeedSequence([settings.seed, num_trials]).generate_state(1)[0])


def _is_queued(study: optuna.Study) -> bool:
    return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _twin(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial | None:
    """A trial of equal settings that has succeeded, else one that is running."""
    key = key_of(overrides_in(trial))
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    twins = [
        other
        for other in study.get_trials(deepcopy=False, states=states)
        if other.number != trial.number and key_of(overrides_in(other)) == key
    ]
    return min(twins, key=lambda twin: (twin.state == TrialState.RUNNING, twin.number), default=None)


def _untried_point(study: optuna.Study, settings: SearchSettings, space: Space) -> Params | None:
    """Of a grid the next, else a random one."""
    trials = study.get_trials(deepcopy=False)
    tried = {key_of(overrides_in(trial)) for trial in trials if not is_interrupted(trial)}
    rng = np.random.default_rng(_seed(study, settings))
    drawn = space.points() if space.is_finite else (space.draw(rng) for _ in range(_MOST_DRAWS))
    untried: Iterator[Params] = (point for point in drawn if key_of(space.overrides_of(point)) not in tried)
    if settings.sampler == "grid" or not space.is_finite:
        return next(untried, None)
    points = list(islice(untried, _MOST_POINTS))
    return points[rng.integers(len(points))] if points else None
