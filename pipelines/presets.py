"""Presets: recipes of training as dotted overrides of any experiment, `--set preset=paper` in the shell.

A preset is applied before all other `--set`s, in the same way. Only the settings that come out count: stages do not know its
name, which is kept as a tag of MLflow's runs. PAPER_NOTES.md has the rows D1 to D36.
"""

from collections.abc import Mapping
from typing import Any

from infra.errors import ConfigError
from infra.settings import apply_overrides, nearest
from pipelines.config import ExperimentConfig

PRESETS: dict[str, dict[str, Any]] = {
    # The experiment as it is written; our defaults are GSM's recipe with its mistakes mended.
    "fixed": {},
    # The paper's text taken literally. It names no first period and no factor: 5 and 2 end a second period with the 15 epochs
    # that its figures show.
    "paper": {
        "model.scope": "joint",  # D8
        "model.value": "bottleneck",  # D9
        "model.input_format": "caffe_bgr",  # D33
        "train.epochs": 15,
        "train.learning_rate": 0.01,
        "train.warmup_epochs": 0.0,
        "train.schedule": "sgdr",  # D12
        "train.sgdr_period_epochs": 5.0,
        "train.sgdr_growth": 2.0,
        "train.batch_size": 12,  # D14
        "train.validate_every_epochs": 1,  # D17
        "train.flip": "naive",  # "flipping", without a word about labels (D7)
    },
    # What the published code does. D16 is left out: no micro batch can leak here, since each step has its own clips.
    "seed_code": {
        "model.input_format": "caffe_bgr",  # D33
        "train.epochs": 15,
        "train.learning_rate": 0.01,
        "train.warmup_epochs": 10.0,  # D12
        "train.batch_size": 12,  # D14
        "train.accumulation": 2,
        "train.subset": 40_000,  # D6
        "train.flip": "naive",  # D7
        "train.validate_every_epochs": 2,  # D17
        "train.compat.freeze_gamma": True,  # D1
        "train.compat.val_protocol": "seed_code",  # D3
        "train.compat.logged_loss": True,  # D5
        "train.compat.lr_by_epoch": True,  # D12
        "train.compat.ignore_multipliers": True,  # D13
        "train.compat.clip_each_micro_batch": True,  # D15
        "train.num_workers": 1,  # D15 needs the whole gradient
    },
    # GSM's section 4.2.
    "gsm": {
        "train.epochs": 60,
        "train.learning_rate": 0.01,
        "train.warmup_epochs": 10.0,
        "train.batch_size": 16,
        "train.accumulation": 2,
        "train.flip": "swap",
    },
}


def apply_preset(config: ExperimentConfig, overrides: Mapping[str, Any]) -> ExperimentConfig:
    """`config` with the preset that `overrides` names, if any, and then with the other overrides.

    Raises:
        ConfigError: if there is no such preset or setting, or a value is not allowed.
    """
    name = overrides.get("preset", config.preset)
    if name not in PRESETS:
        raise ConfigError(f"{name!r} is not a preset; {nearest(str(name), PRESETS)}")
    return apply_overrides(config, {**(PRESETS[name] if "preset" in overrides else {}), **overrides})
