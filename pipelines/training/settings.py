"""Settings of the network (section `model`) and of its training (section `train`).

The defaults are the preset `fixed` of PAPER_NOTES.md: the recipe of GSM (Sudhakaran et al., CVPR 2020, section 4.2 and its
published `main.py`) with the multipliers of bias and norm applied as published (D13), one clipping before the step (D15), one
cosine after the warm-up (D12), validation at each epoch (D17) and a gamma that is trained (D1).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from infra.errors import ConfigError
from infra.settings import Settings, apply_overrides
from models import (
    SLOTS,
    VideoClassifier,
    load_backbone_weights,
    load_published_weights,
    model_options,
    model_slots,
    parse_placement,
)
from models.factory import build_model as build_network

MIN_SGDR_PERIOD = 0.1  # epochs

_log = logging.getLogger(__name__)
_NOT_OPTIONS = ("name", "weights", "weights_labels", "backbone_weights", "backbone_sha256")


class ModelSettings(Settings):
    """Which network, and what of it can be chosen.

    Attributes:
        name: a name of `models.list_models()`.
        placement: the slots that carry attention; any spelling that `models.parse_placement` reads, kept as it prints itself,
            so that equal placements are equal settings; SA-GSM only.
        scope: attention within each `frame`, over time at each place (`temporal`), `joint` over the whole clip, or `divided`
            into temporal and then frame; SA-GSM only.
        value: form of the value path, the published `fused` or equation 3's `bottleneck`; SA-GSM only.
        scaled: divide scores by the square root of the width of the queries (not in equation 1); SA-GSM only.
        num_heads: number of attention heads; divides an eighth of the channels of each slot; SA-GSM only.
        interleave: interleave channels after the shift, as published (D10); GSM and SA-GSM.
        dropout: probability of dropout before the classifier.
        input_format: `caffe_bgr` for the published ImageNet weights, otherwise `unit_rgb`.
        weights: file of published weights of the whole network; None leaves it as `backbone_weights` says.
        weights_labels: text file with the labels that `weights` were trained with, one a line, in the order of their classes;
            the classifier is then put in the order of the dataset's labels (D34). None vouches that both orders are one.
        backbone_weights: ImageNet weights of the backbone: a file, an https URL, or a name of `models.BACKBONE_SOURCES`; None
            initialises at random.
        backbone_sha256: the first 8 or more digits of that file's SHA-256; not needed for those of `models.BACKBONE_SOURCES`.
    """

    name: str = "sa_gsm_bn_inception"
    placement: str = "all"
    scope: Literal["frame", "temporal", "joint", "divided"] = "frame"
    value: Literal["fused", "bottleneck"] = "fused"
    scaled: bool = False
    num_heads: int = Field(default=1, ge=1)
    interleave: bool = True
    dropout: float = Field(default=0.5, ge=0, lt=1)
    input_format: Literal["unit_rgb", "caffe_bgr"] = "unit_rgb"
    weights: Path | None = None
    weights_labels: Path | None = None
    backbone_weights: str | None = None
    backbone_sha256: str | None = None

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.weights is not None and self.backbone_weights is not None:
            raise ValueError("weights and backbone_weights are both set; expected one, since weights fill the backbone too")
        if self.weights_labels is not None and self.weights is None:
            raise ValueError("weights_labels is set without weights; expected both, since it says the order of their classes")
        return self

    @property
    def start(self) -> str:
        """Where training begins, in words."""
        if self.weights is not None:
            return f"the weights in {self.weights}"
        return "random weights" if self.backbone_weights is None else f"the backbone weights {self.backbone_weights}"

    @field_validator("name")
    @classmethod
    def _network_exists(cls, name: str) -> str:
        model_options(name)
        return name

    @field_validator("placement", mode="before")
    @classmethod
    def _spell_placement(cls, placement: Any, info: ValidationInfo) -> str:
        slots = model_slots(info.data["name"]) if "name" in info.data else ()
        return str(parse_placement(placement, slots or SLOTS))


class CompatSettings(Settings):
    """What the published training does and ours does not, each to be switched on alone (PAPER_NOTES.md); all off by default.

    Attributes:
        freeze_gamma: gammas keep their value, as in the published code, whose optimiser does not know them (D1). Where that is
            0, attention changes nothing and its other weights are frozen too. There the stale gradient of gamma still entered
            the clipping; here it does not.
        ignore_multipliers: one learning rate and one weight decay for all tensors (D13).
        clip_each_micro_batch: clip the gradient after each micro batch, not once before the step (D15).
        lr_by_epoch: the rate of an epoch's first step is that of all its steps.
        logged_loss: the training loss that is reported is the mean, over micro batches, of what its step has accumulated so
            far: 0.75 of the truth with two micro batches a step (D5).
        val_protocol: `seed_code` validates on training crops, training flips, random segments and pixels that are not
            normalised (D3); `standard` on the centre.
    """

    freeze_gamma: bool = False
    ignore_multipliers: bool = False
    clip_each_micro_batch: bool = False
    lr_by_epoch: bool = False
    logged_loss: bool = False
    val_protocol: Literal["standard", "seed_code"] = "standard"


class TrainSettings(Settings):
    """How a network is trained.

    Attributes:
        epochs: passes over the training clips.
        batch_size: clips of a micro batch, that is, of a worker's forward and backward pass (D14).
        accumulation: micro batches of each worker in an optimiser step; the effective batch is batch_size * accumulation *
            workers. It is kept when a training goes on with another number of workers.
        learning_rate: peak of the schedule.
        momentum: of SGD (Nesterov is not used).
        weight_decay: on weights of convolutions and linear layers only.
        warmup_epochs: length of the linear warm-up, which starts at a tenth of the peak; below `epochs`.
        schedule: by step; `warmup_cosine` falls to 0 at the end of training, `sgdr` at the end of each period, after which it
            starts again at the peak (Loshchilov, Hutter, ICLR 2017, https://arxiv.org/abs/1608.03983).
        sgdr_period_epochs: T_0, length of the first period.
        sgdr_growth: T_mult, by which each period is longer than the one before.
        gradient_clip: largest norm of the whole gradient.
        label_smoothing: share of the target that is spread over all classes.
        mixup_alpha: of the Beta distribution that mixes each clip with its neighbour in the micro batch; 0 does not.
        cutmix_alpha: likewise for pasting a window of the neighbour; with both, one of the two is drawn for each micro batch.
        bias_multiplier: learning rate of biases, as a multiple.
        gamma_multiplier: learning rate of attention's gammas, as a multiple; they have no decay.
        ema_decay: d of the average of weights, average <- d * average + (1 - d) * weights after each step, which is then what
            is validated and kept as the best weights; None keeps no average.
        batch_norm: `train` normalises by the statistics of each worker's micro batch; `sync` by those of all workers (GPUs
            only); `partial` freezes all norms but the first and those of gates (TSN); `frozen` freezes all.
        precise_bn_batches: training batches from which the statistics of norms are measured anew before each validation; 0
            leaves them as training's moving averages.
        flip: `swap` mirrors half of the clips and swaps left/right labels, `naive` does not swap, `none` does not mirror (D7).
        randaugment_ops: operations of RandAugment on each training clip, the same for its frames; 0 for none.
        randaugment_magnitude: their strength.
        erase_probability: chance that a rectangle of a training clip is filled with noise.
        pixels: height and width of the crops.
        num_segments: T, frames taken from each video; the only place where it is set (D27).
        sampling: `segments` takes one frame of each of T equal segments, `dense` takes T frames `stride` apart.
        stride: of dense sampling, in frames.
        shuffle_shards: clips that follow one another come from so many shards; None for all, or for 16 if shards are remote.
        shard_cache: local folder for copies of remote shards; None reads frames from afar.
        shard_cache_bytes: of all copies together.
        precision: `bf16` and `fp16` compute convolutions in that type over fp32 weights, `fp16` with a scaled loss; `auto` is
            bf16 where the hardware has it, else fp32.
        compile: let `torch.compile` make the training steps, which takes minutes at the start and gives dropout other draws.
            Never tried on a GPU; on the CPU where SA-GSM on BN-Inception was, it was no faster than our own kernels (inference
            in bf16: 0.51 against 0.50 s).
        seed: of the initial weights, the order of clips, the random draws of preprocessing and dropout.
        num_workers: Ray Train workers; 0 means one a GPU, or one without GPUs.
        min_workers: with how few of them training starts and goes on while nodes are missing; None waits for all.
        wait_seconds: how long to wait for CPUs and GPUs that others hold, or for lost nodes to come back.
        local: train in the driver's own process, as one worker would, for a debugger.
        checkpoints: a folder (path, `s3://` or `gs://` URL) that gets a copy of each checkpoint, and from which another machine
            goes on; None keeps them in the store only.
        loader_threads: threads of each worker that read and decode.
        checkpoint_every_steps: steps between checkpoints; 0 writes one at each epoch's end only (which is always written).
        max_failures: how many lost workers a run survives.
        validate_every_epochs: the last epoch is always validated.
        random_placement: switch attention on in a random subset of its slots in each step, every subset equally likely, so that
            the weights serve all placements (a supernet; see `supernet.py`); a slot that is left out is not trained in that
            step, by momentum and decay neither. Validation has attention in all its slots. SA-GSM only.
        subset: train on this many clips only, the first of the index; None for all.
        compat: what the published code does otherwise.
    """

    epochs: int = Field(default=60, ge=1)
    batch_size: int = Field(default=16, ge=1)
    accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup_epochs: float = Field(default=10.0, ge=0)
    schedule: Literal["warmup_cosine", "sgdr"] = "warmup_cosine"
    sgdr_period_epochs: float = Field(default=5.0, ge=MIN_SGDR_PERIOD)
    sgdr_growth: float = Field(default=2.0, ge=1)
    gradient_clip: float = Field(default=20.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup_alpha: float = Field(default=0.0, ge=0)
    cutmix_alpha: float = Field(default=0.0, ge=0)
    bias_multiplier: float = Field(default=2.0, gt=0)
    gamma_multiplier: float = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    batch_norm: Literal["train", "sync", "partial", "frozen"] = "train"
    precise_bn_batches: int = Field(default=0, ge=0)
    flip: Literal["swap", "none", "naive"] = "swap"
    randaugment_ops: int = Field(default=0, ge=0)
    randaugment_magnitude: int = Field(default=9, ge=0, le=30)
    erase_probability: float = Field(default=0.0, ge=0, le=1)
    pixels: int = Field(default=224, ge=32)
    num_segments: int = Field(default=8, ge=1)
    sampling: Literal["segments", "dense"] = "segments"
    stride: int = Field(default=8, ge=1)
    shuffle_shards: int | None = Field(default=None, ge=1)
    shard_cache: Path | None = None
    shard_cache_bytes: int = Field(default=20 * 10**9, ge=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    seed: int = Field(default=0, ge=0)
    num_workers: int = Field(default=0, ge=0)
    min_workers: int | None = Field(default=None, ge=1)
    wait_seconds: float = Field(default=30.0, ge=0)
    local: bool = False
    checkpoints: str | None = None
    loader_threads: int = Field(default=2, ge=1)
    checkpoint_every_steps: int = Field(default=0, ge=0)
    max_failures: int = Field(default=3, ge=0)
    validate_every_epochs: int = Field(default=1, ge=1)
    random_placement: bool = False
    subset: int | None = Field(default=None, ge=1)
    compat: CompatSettings = CompatSettings()

    @model_validator(mode="after")
    def _workers_fit_together(self) -> Self:
        if self.min_workers is not None and 0 < self.num_workers < self.min_workers:
            raise ValueError(f"min_workers is {self.min_workers}, but num_workers is {self.num_workers}; it must not be less")
        if self.local and self.num_workers > 1:
            raise ValueError(f"local trains in one process, but num_workers is {self.num_workers}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _warmup_ends_before_training(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs:g}, but training has {self.epochs} epochs; the warm-up must end before"
            )
        return self

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.compat.clip_each_micro_batch and self.precision == "fp16":
            raise ValueError("compat.clip_each_micro_batch clips before fp16 has unscaled the gradient; use another precision")
        if self.precise_bn_batches and self.batch_norm in ("partial", "frozen"):
            raise ValueError(
                f"precise_bn_batches is {self.precise_bn_batches}, but batch_norm={self.batch_norm} keeps statistics as they "
                "are; set one of the two back"
            )
        if self.random_placement and (self.compile or self.compat.freeze_gamma):
            other = "compile, which would compile each placement anew" if self.compile else "compat.freeze_gamma"
            raise ValueError(f"random_placement does not go with {other}; set one of the two back")
        return self

    def with_epochs(self, epochs: int) -> "TrainSettings":
        """The same training, longer or shorter: the warm-up and the periods of SGDR keep their share of it."""
        warmup, period = (value * epochs / self.epochs for value in (self.warmup_epochs, self.sgdr_period_epochs))
        changes = {"epochs": epochs, "warmup_epochs": warmup, "sgdr_period_epochs": max(MIN_SGDR_PERIOD, period)}
        return apply_overrides(self, changes)


def build_model(
    settings: ModelSettings, num_classes: int, num_segments: int, *, label_names: Sequence[str] | None = None
) -> VideoClassifier:
    """Make the network that the settings describe, from random or published weights; which of them is logged.

    A setting that was changed though the network has no such option is ignored with a warning.

    Args:
        settings: the section `model`.
        num_classes: number of labels.
        num_segments: T, from `TrainSettings.num_segments`.
        label_names: of the dataset, in the order of its classes; needed with `weights_labels`.

    Raises:
        ConfigError: if the network cannot be made so, or the weights cannot be read or do not fit; the setting is named.
    """
    known = model_options(settings.name)
    for name, field in type(settings).model_fields.items():
        if name not in (*known, *_NOT_OPTIONS) and getattr(settings, name) != field.default:
            _log.warning("model.%s=%s is ignored: %s has no such option", name, getattr(settings, name), settings.name)
    options = {name: getattr(settings, name) for name in known}
    try:
        model = build_network(settings.name, num_classes=num_classes, num_segments=num_segments, **options)
    except ValueError as error:
        chosen = " ".join(f"model.{name}={value}" for name, value in options.items())
        raise ConfigError(f"{settings.name} cannot be made with {chosen}: {error}") from error
    try:
        if settings.weights is not None:
            order = None if settings.weights_labels is None else settings.weights_labels.read_text().splitlines()
            load_published_weights(model, settings.weights, class_order=order, label_names=label_names if order else None)
        elif settings.backbone_weights is not None:
            load_backbone_weights(model, settings.backbone_weights, sha256_prefix=settings.backbone_sha256)
    except (OSError, ValueError) as error:
        chosen = f"backbone_weights={settings.backbone_weights}" if settings.weights is None else f"weights={settings.weights}"
        raise ConfigError(f"model.{chosen} cannot be used: {error}") from error
    _log.info("%s starts from %s", settings.name, settings.start)
    return model
