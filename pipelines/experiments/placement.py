"""Where should attention go? The question that the paper leaves open, asked of generated videos on two cores."""

from infra.settings import apply_overrides
from pipelines.config import ExperimentConfig
from pipelines.reproduction import Band, Expected
from pipelines.training.settings import ModelSettings, TrainSettings
from preprocessing.datasets import DatasetSettings
from preprocessing.shards import ShardSettings
from preprocessing.synthetic import SyntheticSettings
from tuning.settings import Choice, Range, SearchSettings
from tuning.space import LEARNING_RATE, PLACEMENT


def placement() -> ExperimentConfig:
    """Ten switches of attention, its scope and the learning rate on generated videos: 24 trials with ASHA, then a verdict.

    Asks what section 6 of the paper names as future work, "the optimal position of the self-attention layers and their optimal
    quantity". Trials are 3 epochs on 1,280 clips; attention nowhere, everywhere and in the last two slots come first. The
    winner and none are then trained anew with two seeds each, which says whether the gain is more than noise.

    Command: `sagsm run placement`. Hardware: 2 CPU cores, 8 GB, at most 40 minutes. Must reach: all 24 trials on the page and
    in MLflow, and a verdict, whatever it is; validation top-1 of the final training of at least 0.70 (chance 0.125). Seen, on a
    machine with other work: 34 minutes, 0.883, and "not separable from seed noise: +2.3 points" (-3.1 to +7.7).
    """
    return ExperimentConfig(
        dataset=DatasetSettings(name="something_v1", synthetic=SyntheticSettings(num_train=1280, num_validation=240)),
        shards=ShardSettings(videos_per_shard=64),
        search=SearchSettings(
            num_trials=24,
            max_epochs=3,
            grace_epochs=1,
            placement="booleans",
            space={
                LEARNING_RATE: Range(low=0.004, high=0.02, log=True),
                "model.scope": Choice(values=("frame", "joint"), unless={PLACEMENT: ("none",)}),
            },
            verdict_seeds=2,
        ),
        model=ModelSettings(dropout=0.0),
        train=TrainSettings(epochs=10, batch_size=8, learning_rate=0.01, warmup_epochs=2.0, pixels=48, num_segments=4),
        expected=Expected(bands=(Band(low=0.70, source="seen: 0.883"),)),
    )


def placement_supernet() -> ExperimentConfig:
    """The same question by weight sharing: one supernet scores all 1,024 placements, and 14 of them are trained to check it.

    Trained are the three baselines, the supernet's best five and six seeded random ones, since a rank correlation over the best
    alone would say nothing of the rest. The page shows Spearman's correlation with its interval, whatever it is.

    Command: `sagsm run placement_supernet`. Hardware: 2 CPU cores, 8 GB, at most 40 minutes. Must reach: 1,024 scores, and a
    rank correlation over 14 trained placements; validation top-1 of the final training of at least 0.70 (chance 0.125). Seen,
    beside some tests: 39 minutes, 0.875; the supernet trained for 549 s and scored for 103 s, where a normal training of that
    length took 476 s; Spearman -0.41 (95 % interval -0.83 to 0.17), so its scores say nothing about placements here.
    """
    changes = {
        "method": "supernet",
        "num_trials": 14,
        "scheduler": "none",
        "placement": "fixed",
        "space": {},
        "verdict_seeds": 0,
    }
    return apply_overrides(placement(), {f"search.{name}": value for name, value in changes.items()})
