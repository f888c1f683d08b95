"""Which slots and settings made trials good: Optuna's two analyses of variance, mean effects of slots, and pairs.

PED-ANOVA (Watanabe, Bansal and Hutter 2023) says what sets the best quarter of the trials apart; fANOVA (Hutter, Hoos and
Leyton-Brown 2014) by how much a setting explains the spread of all. Both are shares and know no sign. Effects of slots are
plain differences of means with Welch's interval, so that a sign and its doubt can be seen.

The slots are switches of their own here, however the search chose the placement. All is taken from the trials that were tried:
the sampler preferred the good ones, so that no setting was tried under equal conditions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.placement import parse_placement
from tuning.settings import Dimension, Range
from tuning.space import PLACEMENT
from tuning.trials import TrialRecord

if TYPE_CHECKING:
    import optuna

MIN_TRIALS = 10
_BEST_SHARE = 0.25
_NUM_TREES = 64
_MAX_FOREST_ROWS = 200
_MAX_PAIRS = 10
_NOT_SETTINGS = (PLACEMENT, "train.seed")


@dataclass(frozen=True)
class SlotEffect:
    """What trials with attention in a slot reached beyond those without.

    Attributes:
        slot: its name.
        effect: difference of the mean values; None if all trials had it, or none.
        interval: of `effect`, 95 % (Welch); None if a side has fewer than two trials, or no spread.
        num_with: trials with attention there.
        num_without: the others.
    """

    slot: str
    effect: float | None
    interval: tuple[float, float] | None
    num_with: int
    num_without: int


@dataclass(frozen=True)
class Importance:
    """What the trials say of slots and settings.

    Attributes:
        num_trials: that were used.
        basis: which of their values, in words.
        notes: what makes it less certain; the reason where nothing is told.
        ped_anova: shares that sum to 1, by slot or dotted setting, the largest first; empty with too few trials.
        fanova: likewise.
        pairs: two names, and by how much both together change the value beyond the sum of each alone; the largest first.
        slots: by slot, in the order of the network.
    """

    num_trials: int
    basis: str
    notes: list[str]
    ped_anova: dict[str, float]
    fanova: dict[str, float]
    pairs: list[tuple[str, str, float]]
    slots: list[SlotEffect]


def weigh(
    records: Sequence[TrialRecord], space: Mapping[str, Dimension], slots: Sequence[str], *, grace_epochs: int
) -> Importance:
    """Weigh slots and settings by the value of the search's metric; with two objectives, by the metric alone.

    Args:
        records: all trials of the search.
        space: its dimensions by dotted setting, which say what is logarithmic.
        slots: of the backbone, in the order of the network.
        grace_epochs: that every trial had before it might be stopped.
    """
    used, values, basis, notes = _choose_values(records, grace_epochs)
    effects = [_slot_effect(slot, used, values, slots) for slot in slots]
    if len(used) < MIN_TRIALS:
        notes.append(f"Only {len(used)} trials can be compared: shares and pairs need {MIN_TRIALS}, and mean a little from 50.")
        return Importance(len(used), basis, notes, {}, {}, [], effects)
    columns = _columns(used, space, slots)
    if not columns or np.ptp(values) == 0:
        notes.append("All trials reached the same value, or had the same settings.")
        return Importance(len(used), basis, notes, {}, {}, [], effects)
    if len(used) < 5 * len(columns):
        notes.append(f"{len(used)} trials for {len(columns)} slots and settings: shares this small in data are mostly noise.")
    ped_anova, fanova = _shares(columns, values)
    return Importance(len(used), basis, notes, ped_anova, fanova, _pairs(columns, values), effects)


@dataclass(frozen=True)
class _Column:
    """A slot or setting: its value in each trial, and how Optuna would have drawn it."""

    name: str
    values: list[Any]
    distribution: "optuna.distributions.BaseDistribution"

    def numbers(self) -> npt.NDArray[np.float64]:
        """Values for a forest: categories by their position."""
        choices = getattr(self.distribution, "choices", None)
        return np.array([value if choices is None else choices.index(value) for value in self.values], dtype=np.float64)


def _choose_values(
    records: Sequence[TrialRecord], grace_epochs: int
) -> tuple[list[TrialRecord], npt.NDArray[np.float64], str, list[str]]:
    """Completed trials by their best epoch; where these are too few, all by the epoch that all of them reached."""
    completed = [record for record in records if record.state == "completed" and record.top1 is not None]
    num_stopped = sum(record.state == "stopped" for record in records)
    reached = [record for record in records if record.state != "failed" and record.epochs >= grace_epochs]
    if len(completed) < MIN_TRIALS <= len(reached):
        notes = [
            f"Only {len(completed)} trials were completed. All {len(reached)} are compared after {grace_epochs} epochs "
            "instead, the last that each of them had: it says what learns fast, not what ends high."
        ]
        values = np.array([max(record.top1_by_epoch[:grace_epochs]) for record in reached])
        return reached, values, f"value after {grace_epochs} epochs of all trials that did not fail", notes
    notes = []
    if num_stopped:
        notes.append(
            f"{num_stopped} trials were stopped early and are left out: those that were completed had begun well, so that "
            "effects look smaller than they are."
        )
    return completed, np.array([record.top1 for record in completed], dtype=np.float64), "best epoch of completed trials", notes


def _slot_effect(
    slot: str, records: Sequence[TrialRecord], values: npt.NDArray[np.float64], slots: Sequence[str]
) -> SlotEffect:
    from scipy.stats import ttest_ind

    has = np.array([slot in parse_placement(record.placement or "none", slots) for record in records], dtype=bool)
    ours, others = values[has], values[~has]
    if len(ours) == 0 or len(others) == 0:
        return SlotEffect(slot, None, None, len(ours), len(others))
    interval = None
    if min(len(ours), len(others)) > 1 and np.ptp(ours) + np.ptp(others) > 0:
        found = ttest_ind(ours, others, equal_var=False).confidence_interval(0.95)
        interval = (float(found.low), float(found.high))
    return SlotEffect(slot, float(ours.mean() - others.mean()), interval, len(ours), len(others))


def _columns(records: Sequence[TrialRecord], space: Mapping[str, Dimension], slots: Sequence[str]) -> list[_Column]:
    """Slots and settings that are not the same in all trials."""
    from optuna.distributions import CategoricalDistribution

    placements = [parse_placement(record.placement or "none", slots) for record in records]
    found = [
        _Column(slot, [slot in placement for placement in placements], CategoricalDistribution((False, True)))
        for slot in slots
        if len({slot in placement for placement in placements}) > 1
    ]
    names = dict.fromkeys(name for record in records for name in record.overrides if name not in _NOT_SETTINGS)
    for name in names:
        values = [record.overrides.get(name) for record in records]
        if len(set(map(str, values))) > 1:
            found.append(_setting(name, values, space.get(name)))
    return found


def _setting(name: str, values: Sequence[Any], dimension: Dimension | None) -> _Column:
    """A setting; where a trial was not asked for a number (a condition of the space), it counts as the median."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    known = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        numbers = [float(np.median(known) if value is None else value) for value in values]
        is_log = isinstance(dimension, Range) and dimension.log
        return _Column(name, numbers, FloatDistribution(min(numbers), max(numbers), log=is_log))
    return _Column(name, list(values), CategoricalDistribution(tuple(dict.fromkeys(values))))


def _shares(columns: Sequence[_Column], values: npt.NDArray[np.float64]) -> tuple[dict[str, float], dict[str, float]]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    distributions = {column.name: column.distribution for column in columns}
    for number, value in enumerate(values):
        params = {column.name: column.values[number] for column in columns}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=float(value)))
    ped_anova = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE))
    fanova = get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=_NUM_TREES, seed=0))
    return _plain(ped_anova), _plain(fanova)


def _plain(shares: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(share) for name, share in shares.items()}


def _pairs(columns: Sequence[_Column], values: npt.NDArray[np.float64]) -> list[tuple[str, str, float]]:
    """Interactions as a random forest sees them: f(both) - f(only one) - f(only the other) + f(neither), all else as tried.

    A number goes from its lower to its upper quartile, a category from its commonest value to the next.
    """
    from sklearn.ensemble import RandomForestRegressor

    table = np.stack([column.numbers() for column in columns], axis=1)
    forest = RandomForestRegressor(n_estimators=_NUM_TREES, random_state=0).fit(table, values)
    levels = [_two_levels(column, numbers) for column, numbers in zip(columns, table.T, strict=True)]
    pairs = list(combinations(range(len(columns)), 2))
    rows = table[:: -(-len(table) // _MAX_FOREST_ROWS)]
    corners = []
    for first, second in pairs:
        for high_first, high_second in ((1, 1), (1, 0), (0, 1), (0, 0)):
            corner = rows.copy()
            corner[:, first], corner[:, second] = levels[first][high_first], levels[second][high_second]
            corners.append(corner)
    if not pairs:
        return []
    means = forest.predict(np.concatenate(corners)).reshape(len(pairs), 4, len(rows)).mean(axis=2)
    together = means @ np.array([1.0, -1.0, -1.0, 1.0])
    order = np.argsort(-np.abs(together), kind="stable")[:_MAX_PAIRS]
    return [(columns[pairs[at][0]].name, columns[pairs[at][1]].name, float(together[at])) for at in order]


def _two_levels(column: _Column, numbers: npt.NDArray[np.float64]) -> tuple[float, float]:
    if not hasattr(column.distribution, "choices"):
        low, high = np.quantile(numbers, [0.25, 0.75])
        return float(low), float(high)
    found, counts = np.unique(numbers, return_counts=True)
    if set(column.values) <= {False, True}:
        return 0.0, 1.0
    first, second = found[np.argsort(-counts, kind="stable")[:2]]
    return float(first), float(second)
