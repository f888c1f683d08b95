"""The `search` section of an experiment: what is searched, by which method, for how long, and what the winner must beat."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from infra.settings import Settings

Scalar = bool | int | float | str


class _Dimension(Settings):
    """What all dimensions share: conditions on dotted settings that are fixed, or chosen before.

    A dimension that is not asked for leaves its setting as the experiment has it.

    Attributes:
        when: asked for only where each of these settings has one of the values; one that was not asked for has none.
        unless: not asked for where one of these settings has one of the values; placements may be spelled in any way.
    """

    when: dict[str, tuple[Scalar, ...]] = Field(default={})
    unless: dict[str, tuple[Scalar, ...]] = Field(default={})


class Choice(_Dimension):
    """One of some values, in no order."""

    kind: Literal["choice"] = "choice"
    values: tuple[Scalar, ...] = Field(min_length=1)

    @property
    def middle(self) -> Scalar:
        """What a baseline takes: the first value."""
        return self.values[0]


class Range(_Dimension):
    """A number from `low` to `high`, both included: a whole one if both are whole, else a real one of three digits.

    Attributes:
        log: searched on a logarithmic scale.
    """

    kind: Literal["range"] = "range"
    low: int | float
    high: int | float
    log: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the number is an integer."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def middle(self) -> int | float:
        """What a baseline takes: the mean of the ends, the geometric one on a logarithmic scale."""
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        middle = min(max(middle, self.low), self.high)
        return round(middle) if self.is_whole else middle

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}; swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}; expected it above 0, since the scale is logarithmic")
        return self


Dimension = Annotated[Choice | Range, Field(discriminator="kind")]


class SearchSettings(Settings):
    """How many trials, how long each may train, and where they look.

    Attributes:
        method: `trials` trains every candidate by itself; `supernet` trains one network with a random placement in each step,
            scores all placements with its weights, and then tries the baselines and the best few as trials.
        num_trials: trials in all, earlier runs of the same search included; 0 leaves the settings as configured.
        max_hours: no new trial is begun after so many hours of searching, earlier runs included; None is no limit.
        max_gpu_hours: the same for the sum over trials of GPUs times hours; None is no limit.
        seed: of the sampler. One trial at a time, equal seeds give equal trials.
        sampler: who says what to try next: `tpe` learns from the trials, `random` does not, `grid` tries each combination once,
            after the baselines (choices and placements only). Whoever it is, equal settings are one trial, and the search ends
            early if nothing is left to try.
        scheduler: who stops hopeless trials: `asha`, `median` (below the median of the others at the same epoch), or `none`.
        max_epochs: epochs that a trial trains if it is not stopped early.
        grace_epochs: epochs that every trial gets before it may be stopped.
        reduction_factor: of ASHA; about one in so many trials passes each rung.
        placement: `booleans` switches each slot of the network; `families` picks one of `tuning.space.families`, for budgets
            below 30 trials; `range` picks a first slot and how many follow on it, cut at the last slot; `fixed` leaves it as
            configured, or to `space` and `fixed`.
        space: what else is searched: a dimension for each dotted setting of `model` and `train`. With `model.name` among them
            only families that all the networks have are searched.
        fixed: dotted settings that all trials share, and that the winner hands on.
        baselines: try attention nowhere, everywhere (as in the paper) and in the last two slots first, all else in the middle
            of its range; those that the space can express.
        cost: what the winner may not waste: with it the search has two objectives, `metric` and this one; see
            `pipelines/training/costs.py`.
        seeds_per_trial: trainings of a trial, with seeds of their own; its value is their mean.
        workers_per_trial: ranks that train a trial; 1 trains in the trial's process.
        max_concurrent_trials: upper bound of trials at a time; 0 means as many as fit into the cluster.
        subset: number of training clips a trial trains on; None means all.
        metric: what `report` must contain and the search maximises.
        cpus_per_trial: CPU cores reserved for each trial, or for each of its workers if there are several.
        gpus_per_trial: GPUs reserved for each trial, or worker; fractions share one.
        verdict_seeds: after the search the winner and the same settings without attention are trained with so many seeds, to
            tell whether the gain is more than noise; 0 leaves that open.
        supernet_epochs: epochs that the supernet trains; None means as many as `train.epochs`.
        supernet_top: of the supernet's best placements so many are handed to trials, after the baselines.
    """

    method: Literal["trials", "supernet"] = "trials"
    num_trials: int = Field(default=8, ge=0)
    max_hours: float | None = Field(default=None, gt=0)
    max_gpu_hours: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    scheduler: Literal["asha", "median", "none"] = "asha"
    max_epochs: int = Field(default=4, ge=1)
    grace_epochs: int = Field(default=1, ge=1)
    reduction_factor: float = Field(default=3.0, gt=1.0)
    placement: Literal["booleans", "families", "range", "fixed"] = "families"
    space: dict[str, Dimension] = Field(default={"train.learning_rate": Range(low=0.001, high=0.1, log=True)})
    fixed: dict[str, Any] = Field(default={})
    baselines: bool = True
    cost: Literal["mmacs", "memory", "latency"] | None = None
    seeds_per_trial: int = Field(default=1, ge=1)
    workers_per_trial: int = Field(default=1, ge=1)
    max_concurrent_trials: int = Field(default=0, ge=0)
    subset: int | None = Field(default=None, ge=1)
    metric: str = "val/top1"
    cpus_per_trial: int = Field(default=1, ge=1)
    gpus_per_trial: float = Field(default=0.0, ge=0.0)
    verdict_seeds: int = Field(default=0, ge=0)
    supernet_epochs: int | None = Field(default=None, ge=1)
    supernet_top: int = Field(default=5, ge=1)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.grace_epochs > self.max_epochs:
            raise ValueError(
                f"grace_epochs {self.grace_epochs} is above max_epochs {self.max_epochs}; "
                "a trial cannot be granted more epochs than it trains"
            )
        if self.seeds_per_trial > 1 and self.workers_per_trial > 1:
            raise ValueError(
                f"seeds_per_trial {self.seeds_per_trial} with workers_per_trial {self.workers_per_trial}; expected one of them "
                "to be 1, since the seeds of a trial take turns in one process"
            )
        ranges = [name for name, dimension in self.space.items() if isinstance(dimension, Range)]
        if self.sampler == "grid" and ranges:
            raise ValueError(
                f"space.{ranges[0]} is a range, of which a grid cannot try each value; make it a choice, or leave it out"
            )
        if self.cost is not None and self.scheduler != "none":
            raise ValueError(
                f"cost {self.cost} with scheduler {self.scheduler}; expected scheduler none, since Optuna compares no stopped "
                "trials by two objectives"
            )
        return self
