"""The settings of a whole experiment: one section for each part, declared beside the code that it configures."""

from typing import Literal

from infra.settings import Settings
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.training.settings import ModelSettings, TrainSettings
from preprocessing.datasets import DatasetSettings
from preprocessing.shards import ShardSettings
from tuning.settings import SearchSettings


class ExperimentConfig(Settings):
    """All settings of an experiment; `sagsm run NAME --set section.name=value` changes one.

    `preset` only names what `pipelines.presets` has applied; no stage reads it.
    """

    preset: Literal["fixed", "paper", "seed_code", "gsm"] = "fixed"
    dataset: DatasetSettings
    shards: ShardSettings = ShardSettings()
    search: SearchSettings = SearchSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
