"""The settings of a whole experiment: one section for each part, declared beside the code that it configures."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from infra.errors import ConfigError
from infra.settings import Settings, apply_overrides
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.insight.settings import InsightSettings
from pipelines.reproduction import Expected
from pipelines.training.settings import ModelSettings, TrainSettings
from preprocessing.datasets import DatasetSettings
from preprocessing.shards import ShardSettings
from tuning.settings import Choice, Dimension, SearchSettings
from tuning.space import NETWORK, PLACEMENT, search_space


class _Trained(Settings):
    """What a trial of the search may change."""

    model: ModelSettings
    train: TrainSettings


class ExperimentConfig(Settings):
    """All settings of an experiment; `sagsm run NAME --set section.name=value` changes one.

    `preset` only names what `pipelines.presets` has applied; no stage reads it. `expected` is what the report judges.
    """

    preset: Literal["fixed", "paper", "seed_code", "gsm"] = "fixed"
    dataset: DatasetSettings
    shards: ShardSettings = ShardSettings()
    search: SearchSettings = SearchSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    insight: InsightSettings = InsightSettings()
    expected: Expected = Expected()

    @model_validator(mode="after")
    def _every_trial_is_possible(self) -> Self:
        if self.search.num_trials > 0:
            try:
                check_search(self.search, self.model, self.train)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self


def check_search(search: SearchSettings, model: ModelSettings, train: TrainSettings) -> None:
    """Try the extremes of each dimension, each value of a choice, and the fixed settings, before anything runs.

    Each is tried alone, with what its conditions ask for, on each network of the space.

    Raises:
        ConfigError: if there is no such setting or a value is not allowed; the setting of the search is named.
    """
    space = search_space(search, model.name)
    trained = _Trained(model=model, train=train)
    networks = _extremes(search.space[NETWORK]) if NETWORK in search.space else []
    free = {PLACEMENT: "none"} if space.has_placement or PLACEMENT in search.space else {}
    for network in networks or [search.fixed.get(NETWORK, model.name)]:
        common = {NETWORK: network, **free, **search.fixed}
        _try(trained, search, common, f"space.{NETWORK}" if networks else "fixed")
        for name, dimension in search.space.items():
            met = {other: values[0] for other, values in dimension.when.items() if values}
            for placement in (*dimension.when.get(PLACEMENT, ()), *dimension.unless.get(PLACEMENT, ())):
                _try(trained, search, {**common, PLACEMENT: placement}, f"space.{name}")
            for value in _extremes(dimension) if name != NETWORK else []:
                _try(trained, search, {**common, **met, name: value}, f"space.{name}")


def _try(trained: _Trained, search: SearchSettings, overrides: Mapping[str, Any], part: str) -> None:
    """With as many epochs as the experiment trains and as a trial does, whose warm-up is scaled unless it is searched."""
    try:
        for name in overrides:
            if name in ("train.epochs", "train.subset", "train.validate_every_epochs"):
                raise ConfigError(f"{name} cannot be searched; a trial has search.max_epochs and search.subset instead")
        apply_overrides(trained, overrides)
        apply_overrides(trained, {"train.epochs": search.max_epochs, "train.warmup_epochs": 0.0, **overrides})
    except ConfigError as error:
        raise ConfigError(f"search.{part}: {error}") from error


def _extremes(dimension: Dimension) -> list[Any]:
    return list(dimension.values) if isinstance(dimension, Choice) else [dimension.low, dimension.high]
