"""The experiment of the first five minutes."""

from pipelines.config import ExperimentConfig
from pipelines.reproduction import Band, Expected
from pipelines.training.settings import ModelSettings, TrainSettings
from preprocessing.datasets import DatasetSettings
from preprocessing.shards import ShardSettings
from preprocessing.synthetic import SyntheticSettings
from tuning.settings import Range, SearchSettings
from tuning.space import LEARNING_RATE


def demo() -> ExperimentConfig:
    """Eight motion classes on generated videos in the layout of Something-V1; only the order of frames tells them apart.

    Command: `make demo`, or `sagsm run demo`. Hardware: 2 CPU cores, 8 GB, under 10 minutes. Reaches: validation top-1 of at
    least 0.80 (chance 0.125).
    """
    return ExperimentConfig(
        dataset=DatasetSettings(name="something_v1", synthetic=SyntheticSettings(num_train=640, num_validation=160)),
        shards=ShardSettings(videos_per_shard=64),
        search=SearchSettings(
            num_trials=3, max_epochs=2, subset=320, space={LEARNING_RATE: Range(low=0.02, high=0.045, log=True)}
        ),
        model=ModelSettings(dropout=0.2),
        train=TrainSettings(epochs=13, batch_size=8, learning_rate=0.03, warmup_epochs=3.0, pixels=48, num_segments=4),
        expected=Expected(bands=(Band(low=0.80, source="83.8 % seen on 2 CPU cores"),)),
    )
