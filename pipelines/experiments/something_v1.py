"""Something-Something V1, whole and in small."""

from infra.settings import apply_overrides
from pipelines.config import ExperimentConfig
from pipelines.training.settings import TrainSettings
from preprocessing.datasets import DatasetSettings
from tuning.settings import SearchSettings


def something_v1() -> ExperimentConfig:
    """SA-GSM on Something-V1 (174 classes), attention placed by search; GSM's recipe: 60 epochs, 32 clips a step, 224 px.

    Command: `sagsm run something_v1 --set dataset.root=/data/something_v1`, where the root holds the folder
    20bn-something-something-v1 and the four csv files. Hardware: meant for GPUs (on 2 CPU cores an epoch takes days); never run
    on one by us yet. To compare with: published GSM, BN-Inception, 16 frames, ImageNet weights 49.56 % top-1.
    """
    return ExperimentConfig(
        dataset=DatasetSettings(name="something_v1", root="data/something_v1"),
        search=SearchSettings(num_trials=24, max_epochs=6, subset=20_000),
        train=TrainSettings(epochs=60, batch_size=32, learning_rate=0.01, warmup_epochs=10.0),
    )


def something_v1_smoke() -> ExperimentConfig:
    """The same stages on a few dozen videos in the layout of Something-V1, in minutes on a laptop; its numbers mean nothing.

    Command: `sagsm run something_v1_smoke --set dataset.root=DIR`. Hardware: 2 CPU cores, under 10 minutes.
    """
    return apply_overrides(
        something_v1(),
        {
            "shards.videos_per_shard": 16,
            "search.num_trials": 2,
            "search.max_epochs": 2,
            "search.subset": None,
            "train.epochs": 8,
            "train.warmup_epochs": 1.0,
            "train.batch_size": 8,
            "train.learning_rate": 0.02,
            "train.pixels": 96,
            "train.num_segments": 4,
        },
    )
