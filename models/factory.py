"""The networks by name: a method on a backbone, or a 3-D baseline.

A method is a small function that holds only what differs; its signature is the list of the network's options, and
`create_model` and `model_options` read it there. `_TABLE` says which method goes with which backbone.
"""

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from models.backbones.bn_inception import BNInception, MakeSlotModule
from models.backbones.c3d import C3D
from models.backbones.inception_v3 import InceptionV3
from models.backbones.resnet import ResNet, resnet_slots
from models.classifier import VideoClassifier
from models.imagenet import load_backbone_weights
from models.placement import Placement, parse_placement
from models.temporal.attention import SelfAttention
from models.temporal.gate_shift import GateShift
from models.temporal.relation import MultiScaleRelation
from models.temporal.shift import TemporalShift
from models.video import S3D, VideoResNet

_log = logging.getLogger(__name__)


class _Backbone(NamedTuple):
    make: Callable[..., nn.Module]  # of BNInception's form: (make_slot_module)
    slots: tuple[str, ...] = ()


def _tsn(
    backbone: _Backbone, *, num_classes: int, num_segments: int, dropout: float = 0.5, input_format: str = "unit_rgb"
) -> VideoClassifier:
    """TSN: no slot is filled, so nothing tells the order of the frames. Also the 3-D baselines, which see it by themselves."""
    return VideoClassifier(
        backbone.make(), num_classes=num_classes, num_segments=num_segments, dropout=dropout, input_format=input_format
    )


def _tsm(
    backbone: _Backbone, *, num_classes: int, num_segments: int, dropout: float = 0.5, input_format: str = "unit_rgb"
) -> VideoClassifier:
    """TSM: a shift in the residual branches; as published, in every second block of a network with 23 or more in a layer."""
    step = 2 if "layer3.22" in backbone.slots else 1

    def make_branch_input(slot: str, _channels: int) -> nn.Module:
        return nn.Identity() if int(slot.rpartition(".")[2]) % step else TemporalShift(num_segments)

    return VideoClassifier(
        backbone.make(make_branch_input=make_branch_input),
        num_classes=num_classes,
        num_segments=num_segments,
        dropout=dropout,
        input_format=input_format,
    )


def _trn(
    backbone: _Backbone, *, num_classes: int, num_segments: int, dropout: float = 0.5, input_format: str = "unit_rgb"
) -> VideoClassifier:
    """Multi-scale TRN: the frames meet in the consensus alone."""
    return VideoClassifier(
        backbone.make(),
        num_classes=num_classes,
        num_segments=num_segments,
        dropout=dropout,
        input_format=input_format,
        consensus=MultiScaleRelation(num_segments, num_classes),
    )


def _gsm(
    backbone: _Backbone,
    *,
    num_classes: int,
    num_segments: int,
    interleave: bool = True,
    dropout: float = 0.5,
    input_format: str = "unit_rgb",
) -> VideoClassifier:
    """GSM: a gate in every slot."""

    def make_slot_module(_slot: str, channels: int) -> nn.Module:
        return GateShift(channels, num_segments, interleave=interleave)

    return _gated(backbone, make_slot_module, num_classes, num_segments, dropout, input_format)


def _sa_gsm(
    backbone: _Backbone,
    *,
    num_classes: int,
    num_segments: int,
    placement: str | int | Placement = "all",
    scope: str = "frame",
    value: str = "fused",
    scaled: bool = False,
    num_heads: int = 1,
    interleave: bool = True,
    dropout: float = 0.5,
    input_format: str = "unit_rgb",
) -> VideoClassifier:
    """SA-GSM: a gate in every slot, and behind it attention in the slots of `placement`."""
    attended = parse_placement(placement, backbone.slots)

    def make_slot_module(slot: str, channels: int) -> nn.Module:
        if slot not in attended:
            return GateShift(channels, num_segments, interleave=interleave)
        attn = SelfAttention(channels, num_segments, scope=scope, value=value, scaled=scaled, num_heads=num_heads)
        return GateShift(channels, num_segments, interleave=interleave, attn=attn)

    return _gated(backbone, make_slot_module, num_classes, num_segments, dropout, input_format)


def _gated(
    backbone: _Backbone,
    make_slot_module: MakeSlotModule,
    num_classes: int,
    num_segments: int,
    dropout: float,
    input_format: str,
) -> VideoClassifier:
    return VideoClassifier(
        backbone.make(make_slot_module),
        num_classes=num_classes,
        num_segments=num_segments,
        dropout=dropout,
        input_format=input_format,
    )


_INCEPTIONS = {
    "bn_inception": _Backbone(BNInception, BNInception.SLOTS),
    "inception_v3": _Backbone(InceptionV3, InceptionV3.SLOTS),
}
_RESNETS = {f"resnet{depth}": _Backbone(partial(ResNet, depth), resnet_slots(depth)) for depth in (18, 50, 101)}
_TABLE = {
    "tsn": (_tsn, _INCEPTIONS | _RESNETS),
    "tsm": (_tsm, _RESNETS),  # there is no residual branch to shift in an Inception network
    "trn": (_trn, _INCEPTIONS | _RESNETS),
    "gsm": (_gsm, _INCEPTIONS | _RESNETS),
    "sa_gsm": (_sa_gsm, _INCEPTIONS | _RESNETS),
}
"""method -> its function, and the backbones that it stands on; together `<method>_<backbone>`."""
_VOLUMES = {
    "c3d": _Backbone(C3D),
    **{name: _Backbone(partial(VideoResNet, name)) for name in ("r2plus1d_18", "mc3_18", "r3d_18")},
    "s3d": _Backbone(S3D),
}
"""3-D baselines, by name."""


class _Entry(NamedTuple):
    build: Callable[..., VideoClassifier]
    backbone: _Backbone


_MODELS = {
    f"{method}_{name}": _Entry(build, backbone)
    for method, (build, backbones) in _TABLE.items()
    for name, backbone in backbones.items()
} | {name: _Entry(_tsn, backbone) for name, backbone in _VOLUMES.items()}


def list_models() -> list[str]:
    """The names that `create_model` takes: `<method>_<backbone>`, then the 3-D baselines.

    Example:
        >>> names = list_models()
        >>> names[:3], names[-2:]
        (['tsn_bn_inception', 'tsn_inception_v3', 'tsn_resnet18'], ['r3d_18', 's3d'])
    """
    return list(_MODELS)


def model_options(name: str) -> dict[str, Any]:
    """The options of a network and their defaults.

    Args:
        name: one of `list_models()`.

    Raises:
        ValueError: if there is no such network; the message names the nearest.

    Example:
        >>> model_options("tsn_bn_inception")
        {'dropout': 0.5, 'input_format': 'unit_rgb'}
    """
    parameters = inspect.signature(_entry(name).build).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not inspect.Parameter.empty}


def model_slots(name: str) -> tuple[str, ...]:
    """The slots of a network's backbone, in the order in which a frame passes them; none for a 3-D baseline.

    Args:
        name: one of `list_models()`.

    Raises:
        ValueError: if there is no such network; the message names the nearest.

    Example:
        >>> model_slots("sa_gsm_resnet18")[:3]
        ('layer1.0', 'layer1.1', 'layer2.0')
    """
    return _entry(name).backbone.slots


def create_model(
    name: str, *, num_classes: int, num_segments: int, backbone_weights: str | Path | None = None, **options: Any
) -> VideoClassifier:
    """Make a network, with ImageNet weights in its backbone or, said aloud in the log, with random ones.

    Args:
        name: one of `list_models()`.
        num_classes: K, at least 1.
        num_segments: T, the number of frames of a clip; at least 1, for TRN at least 2.
        backbone_weights: a file, URL or name that `load_backbone_weights` knows the hash of; None: random initialisation.
        options: those of `model_options(name)`. All networks: dropout in [0, 1), input_format "unit_rgb" or "caffe_bgr". GSM
            and SA-GSM: interleave (published channel order). SA-GSM: placement (see `parse_placement`), and those of
            `SelfAttention`.

    Returns:
        A module that maps float clips [B, T, 3, H, W], made by its `prepare` from bytes, to logits [B, K].

    Raises:
        ValueError: for an unknown name or option (the message names the nearest), or a value outside its range.
        OSError: if the weights cannot be read or fetched.
    """
    model = build_model(name, num_classes=num_classes, num_segments=num_segments, **options)
    if backbone_weights is None:
        _log.warning("%s: random initialisation; no weights were given for its backbone", name)
    else:
        load_backbone_weights(model, backbone_weights)
    return model


def build_model(name: str, *, num_classes: int, num_segments: int, **options: Any) -> VideoClassifier:
    """`create_model` without weights, silently: for a network that is only looked at.

    Raises:
        ValueError: as `create_model`.
    """
    known = model_options(name)
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; {_nearest(option, known)}")
    entry = _entry(name)
    return entry.build(entry.backbone, num_classes=num_classes, num_segments=num_segments, **options)


def _entry(name: str) -> _Entry:
    if name not in _MODELS:
        raise ValueError(f"there is no network named {name!r}; {_nearest(name, _MODELS)}")
    return _MODELS[name]


def _nearest(name: str, choices: Iterable[str]) -> str:
    known = list(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known are: {', '.join(known)}"
