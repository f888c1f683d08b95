"""Users' own videos."""

from pipelines.config import ExperimentConfig
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.training.settings import TrainSettings
from preprocessing.datasets import DatasetSettings
from preprocessing.shards import ShardSettings
from tuning.settings import SearchSettings


def folder() -> ExperimentConfig:
    """SA-GSM on your own videos: a folder a class, or a csv or Parquet file with path, label, split, start, end.

    Command: `sagsm run folder --set dataset.root=DIR`, where DIR holds <class>/<video>, or <split>/<class>/<video>; or with
    `--set dataset.annotations=videos.csv`, whose paths are relative to DIR. Hardware: meant for GPUs; never run on one yet.
    The validation split also chooses the best epoch and trial; with labelled test videos of your own take
    `--set evaluate.split=test`.
    """
    return ExperimentConfig(
        dataset=DatasetSettings(name="folder", root="data/videos"),
        shards=ShardSettings(short_side=256),
        search=SearchSettings(num_trials=12, max_epochs=6),
        train=TrainSettings(epochs=30, batch_size=32, learning_rate=0.01, warmup_epochs=3.0),
        evaluate=EvaluateSettings(split="validation"),
    )
