"""Diving48 V2, whole and in small."""

from infra.settings import apply_overrides
from pipelines.config import ExperimentConfig
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.training.settings import TrainSettings
from preprocessing.datasets import DatasetSettings
from preprocessing.shards import ShardSettings
from tuning.space import SearchSettings


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
