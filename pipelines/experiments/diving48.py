"""Diving48 V2, whole, in small, and with two learning rates."""

from infra.settings import apply_overrides
from pipelines.comparison import Comparison
from pipelines.config import ExperimentConfig
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.training.settings import TrainSettings
from preprocessing.datasets import DatasetSettings
from preprocessing.shards import ShardSettings
from tuning.settings import SearchSettings


def diving48() -> ExperimentConfig:
    """SA-GSM on Diving48 V2 (48 classes, 47 of them live), attention placed by search; flips are safe here.

    Command: `sagsm run diving48 --set dataset.root=/data/diving48`, where the root holds rgb/*.mp4 and the three json files.
    Hardware: meant for GPUs; never run on one by us yet. Diving48 has no validation split, so that, as in all published work,
    the test split also chooses the best epoch and trial.
    """
    return ExperimentConfig(
        dataset=DatasetSettings(name="diving48", root="data/diving48"),
        shards=ShardSettings(short_side=256),
        search=SearchSettings(num_trials=24, max_epochs=6),
        train=TrainSettings(epochs=30, batch_size=32, learning_rate=0.01, warmup_epochs=3.0),
        evaluate=EvaluateSettings(split="test"),
    )


def diving48_smoke() -> ExperimentConfig:
    """The same stages on a few dozen videos in the layout of Diving48 V2, in minutes on a laptop.

    Command: `sagsm run diving48_smoke --set dataset.root=DIR`. Hardware: 2 CPU cores, under 10 minutes.
    """
    return apply_overrides(
        diving48(),
        {
            "shards.short_side": 128,
            "shards.videos_per_shard": 16,
            "search.num_trials": 2,
            "search.max_epochs": 2,
            "train.epochs": 24,
            "train.warmup_epochs": 2.0,
            "train.batch_size": 8,
            "train.learning_rate": 0.02,
            "train.pixels": 96,
            "train.num_segments": 4,
        },
    )


def diving48_rates() -> Comparison:
    """SA-GSM on Diving48 V2 with the learning rate of the paper's text and that of its script, 0.01 and 0.1 (figures 7 and 8).

    The paper trains "in the same setting" as on Something-V1, its script with ten times the rate for 30 epochs; it reports
    training curves without numbers, and that runs differ visibly.

    Command: `sagsm run diving48_rates --set dataset.root=/data/diving48`. Hardware: meant for GPUs; never run on one by us yet.
    Must show: six raw curves, and whether the rates can be told apart by more than the noise of seeds.
    """
    config = apply_overrides(diving48(), {"search.num_trials": 0})
    variants = {f"lr{rate}": apply_overrides(config, {"train.learning_rate": rate}) for rate in (0.01, 0.1)}
    return Comparison(variants=variants, baseline="lr0.01", seeds=(0, 1, 2))
