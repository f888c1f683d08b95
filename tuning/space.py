"""What the search may change: dimensions over dotted settings, as data.

A point of the space is a flat dict of Optuna parameters. `overrides_of` turns it into the dotted settings that `--set` takes,
so that every trial can be run again by hand. Ten switches (`model.placement.3a` and so on) fold into one `model.placement`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from infra.settings import Settings
from models.placement import SLOTS, parse_placement

if TYPE_CHECKING:
    import optuna

PLACEMENT = "model.placement"
LEARNING_RATE = "train.learning_rate"

FAMILIES = ("none", "all", "stage3", "stage4", "stage5", "stage4,stage5", "5b", "3c,4e,5b", "3b,4a,4c,4e,5b")
"""Named placements for a small budget: whole stages, the last slot, the last of each stage, every other slot."""

_BASELINES = ("none", "all")


class SearchSettings(Settings):
    """The `search` section: how many trials, how long each may train, and where they look.

    Attributes:
        num_trials: trials in all, earlier runs of the same search included; 0 leaves the settings as configured.
        seed: of the sampler. One trial at a time, equal seeds give equal trials.
        max_epochs: epochs that a trial trains if it is not stopped early.
        grace_epochs: epochs that every trial gets before it may be stopped.
        reduction_factor: of ASHA; about one in so many trials passes each rung.
        max_concurrent_trials: upper bound of trials at a time; 0 means as many as fit into the cluster.
        learning_rate_low: lower end of the range of `train.learning_rate`, searched on a logarithmic scale.
        learning_rate_high: upper end of that range.
        placement: `booleans` switches each of the ten slots; `families` picks one of `FAMILIES`, for budgets below 30 trials.
        baselines: try attention nowhere and everywhere first, both at the geometric mean of the learning rates.
        subset: number of training clips a trial trains on; None means all.
        metric: what `report` must contain and the search maximises.
        cpus_per_trial: CPU cores reserved for each trial.
        gpus_per_trial: GPUs reserved for each trial; fractions share one.
    """

    num_trials: int = Field(default=8, ge=0)
    seed: int = Field(default=0, ge=0)
    max_epochs: int = Field(default=4, ge=1)
    grace_epochs: int = Field(default=1, ge=1)
    reduction_factor: float = Field(default=3.0, gt=1.0)
    max_concurrent_trials: int = Field(default=0, ge=0)
    learning_rate_low: float = Field(default=0.001, gt=0.0)
    learning_rate_high: float = Field(default=0.1, gt=0.0)
    placement: Literal["booleans", "families"] = "families"
    baselines: bool = True
    subset: int | None = Field(default=None, ge=1)
    metric: str = "val/top1"
    cpus_per_trial: int = Field(default=1, ge=1)
    gpus_per_trial: float = Field(default=0.0, ge=0.0)

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if self.learning_rate_low > self.learning_rate_high:
            raise ValueError(
                f"learning_rate_low {self.learning_rate_low:g} is above learning_rate_high {self.learning_rate_high:g}; "
                "swap them"
            )
        if self.grace_epochs > self.max_epochs:
            raise ValueError(
                f"grace_epochs {self.grace_epochs} is above max_epochs {self.max_epochs}; "
                "a trial cannot be granted more epochs than it trains"
            )
        return self


@dataclass(frozen=True)
class Choice:
    """A parameter that takes one of some values, in no order."""

    name: str
    values: tuple[str | bool, ...]

    def suggest(self, trial: "optuna.Trial") -> Any:
        """Let Optuna pick a value."""
        return trial.suggest_categorical(self.name, self.values)


@dataclass(frozen=True)
class LogRange:
    """A positive parameter searched on a logarithmic scale, both ends included."""

    name: str
    low: float
    high: float

    def suggest(self, trial: "optuna.Trial") -> Any:
        """Let Optuna pick a value."""
        return trial.suggest_float(self.name, self.low, self.high, log=True)


Dimension = Choice | LogRange


def search_space(settings: SearchSettings) -> tuple[Dimension, ...]:
    """The dimensions that the settings span, in the order in which they are asked for."""
    learning_rate = LogRange(LEARNING_RATE, settings.learning_rate_low, settings.learning_rate_high)
    if settings.placement == "families":
        return Choice(PLACEMENT, FAMILIES), learning_rate
    return *(Choice(_switch(slot), (False, True)) for slot in SLOTS), learning_rate


def suggest_params(trial: "optuna.Trial", settings: SearchSettings) -> dict[str, Any]:
    """Ask Optuna for one point of the space: the define-by-run function of the search."""
    return {dimension.name: dimension.suggest(trial) for dimension in search_space(settings)}


def baseline_points(settings: SearchSettings) -> list[dict[str, Any]]:
    """The points tried before the sampler may choose: attention nowhere, then everywhere; none without `baselines`."""
    if not settings.baselines:
        return []
    learning_rate = math.sqrt(settings.learning_rate_low * settings.learning_rate_high)
    learning_rate = min(max(learning_rate, settings.learning_rate_low), settings.learning_rate_high)
    points = []
    for name in _BASELINES:
        placement = parse_placement(name)
        where = {PLACEMENT: name} if settings.placement == "families" else {_switch(slot): slot in placement for slot in SLOTS}
        points.append({**where, LEARNING_RATE: learning_rate})
    return points


def overrides_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted settings of a point.

    Numbers are rounded to three significant digits: what is trained is what is printed.

    Args:
        params: a point of the space; names that are no dotted settings are left out.

    Example:
        >>> overrides_of({"model.placement.3a": True, "model.placement.4e": True, "train.learning_rate": 0.031234})
        {'model.placement': '3a,4e', 'train.learning_rate': 0.0312}
    """
    switches = {_switch(slot): slot for slot in SLOTS}
    overrides: dict[str, Any] = {}
    if PLACEMENT in params:
        overrides[PLACEMENT] = str(parse_placement(params[PLACEMENT]))
    elif switches.keys() & params.keys():
        overrides[PLACEMENT] = ",".join(slot for name, slot in switches.items() if params.get(name)) or "none"
        overrides[PLACEMENT] = str(parse_placement(overrides[PLACEMENT]))
    for name, value in params.items():
        if "." in name and name != PLACEMENT and name not in switches:
            overrides[name] = float(f"{value:.3g}") if isinstance(value, float) else value
    return overrides


def _switch(slot: str) -> str:
    return f"{PLACEMENT}.{slot}"
