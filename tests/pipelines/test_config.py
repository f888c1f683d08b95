"""Tests of an experiment's settings as a whole: an impossible search is found before anything runs."""

import pytest

from infra.errors import ConfigError
from infra.settings import apply_overrides
from pipelines.config import ExperimentConfig
from pipelines.training.settings import TrainSettings
from preprocessing.datasets import DatasetSettings

EXPERIMENT = ExperimentConfig(
    dataset=DatasetSettings(name="something_v1", root="/data"), train=TrainSettings(warmup_epochs=1.0)
)


def choice(*values, **conditions):
    return {"kind": "choice", "values": values, **conditions}


def test_everything_that_shapes_a_training_can_be_searched():
    not_without = {"unless": {"model.placement": ["none"]}}
    space = {
        "model.name": choice("sa_gsm_bn_inception", "sa_gsm_resnet18", "tsn_resnet18"),
        "model.scope": choice("frame", "temporal", "joint", "divided", **not_without),
        "model.value": choice("fused", "bottleneck", **not_without),
        "train.learning_rate": {"kind": "range", "low": 0.001, "high": 0.1, "log": True},
        "train.weight_decay": {"kind": "range", "low": 1e-5, "high": 1e-3, "log": True},
        "model.dropout": {"kind": "range", "low": 0.0, "high": 0.8},
        "train.num_segments": choice(4, 8, 16),
        "train.batch_norm": choice("train", "frozen"),
        "train.precise_bn_batches": choice(0, 10, when={"train.batch_norm": ["train"]}),
    }
    config = apply_overrides(EXPERIMENT, {"search.space": space, "search.fixed": {"train.momentum": 0.8}})
    assert list(config.search.space) == list(space)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            {"search.space": {"train.learning_rat": choice(1)}},
            ["search.space.train.learning_rat: train.learning_rat is not a setting; did you mean train.learning_rate?"],
        ),
        ({"search.space": {"dataset.name": choice("folder")}}, ["search.space.dataset.name: dataset.name is not a setting"]),
        (
            {"search.space": {"model.dropout": {"kind": "range", "low": 0.1, "high": 1.0}}},
            ["search.space.model.dropout: model.dropout", "less than 1", "1.0"],
        ),
        ({"search.space": {"model.scope": choice("frame", "video")}}, ["search.space.model.scope: model.scope", "'video'"]),
        ({"search.space": {"model.name": choice("tsn_resnet99")}}, ["tsn_resnet99"]),
        (
            {"search.space": {"model.placement": choice("none", "layer1.0")}, "search.placement": "fixed"},
            ["search.space.model.placement: model.placement", "layer1.0"],
        ),
        ({"search.space": {"train.epochs": choice(3)}}, ["train.epochs cannot be searched; a trial has search.max_epochs"]),
        ({"search.fixed": {"train.momentum": 1.5}}, ["search.fixed: train.momentum"]),
        (
            {"search.fixed": {"train.warmup_epochs": 4.0}},
            ["search.fixed: train: warmup_epochs is 4, but training has 4 epochs"],
        ),
        (
            {"search.space": {"model.scope": choice("frame", unless={"model.placement": ["5z"]})}},
            ["search.space.model.scope: model.placement", "5z"],
        ),
        ({"model.name": "gsm_resnet18"}, ["search.placement is families, but gsm_resnet18 has no attention to place"]),
    ],
)
def test_an_impossible_search_is_refused_by_name(overrides, parts):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(EXPERIMENT, overrides)
    for part in parts:
        assert part in str(caught.value)


def test_settings_without_a_search_may_have_any_space():
    config = apply_overrides(EXPERIMENT, {"search.num_trials": 0, "model.name": "gsm_resnet18"})
    assert config.model.name == "gsm_resnet18"
