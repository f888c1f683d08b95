"""The networks by name, each a small function that holds only what differs.

The signature of such a function is the list of the network's options; `create_model` and `model_options` read it there.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from models.backbones.bn_inception import BNInception
from models.classifier import VideoClassifier
from models.placement import Placement, parse_placement
from models.temporal.attention import SelfAttention
from models.temporal.gate_shift import GateShift


def tsn_bn_inception(
    *, num_classes: int, num_segments: int, dropout: float = 0.5, input_format: str = "unit_rgb"
) -> VideoClassifier:
    """TSN: no slot is filled, so nothing tells the order of the frames."""
    return VideoClassifier(
        BNInception(), num_classes=num_classes, num_segments=num_segments, dropout=dropout, input_format=input_format
    )


def gsm_bn_inception(
    *, num_classes: int, num_segments: int, interleave: bool = True, dropout: float = 0.5, input_format: str = "unit_rgb"
) -> VideoClassifier:
    """GSM: a gate in every slot."""

    def make_slot_module(_slot: str, channels: int) -> nn.Module:
        return GateShift(channels, num_segments, interleave=interleave)

    return VideoClassifier(
        BNInception(make_slot_module),
        num_classes=num_classes,
        num_segments=num_segments,
        dropout=dropout,
        input_format=input_format,
    )


def sa_gsm_bn_inception(
    *,
    num_classes: int,
    num_segments: int,
    placement: str | int | Placement = "all",
    scope: str = "frame",
    value: str = "fused",
    interleave: bool = True,
    dropout: float = 0.5,
    input_format: str = "unit_rgb",
) -> VideoClassifier:
    """SA-GSM: a gate in every slot, and behind it attention in the slots of `placement`."""
    attended = parse_placement(placement)

    def make_slot_module(slot: str, channels: int) -> nn.Module:
        attn = SelfAttention(channels, num_segments, scope=scope, value=value) if slot in attended else None
        return GateShift(channels, num_segments, interleave=interleave, attn=attn)

    return VideoClassifier(
        BNInception(make_slot_module),
        num_classes=num_classes,
        num_segments=num_segments,
        dropout=dropout,
        input_format=input_format,
    )


_MODELS: dict[str, Callable[..., VideoClassifier]] = {
    build.__name__: build for build in (tsn_bn_inception, gsm_bn_inception, sa_gsm_bn_inception)
}


def list_models() -> list[str]:
    """The names that `create_model` takes.

    Example:
        >>> list_models()
        ['tsn_bn_inception', 'gsm_bn_inception', 'sa_gsm_bn_inception']
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
    if name not in _MODELS:
        raise ValueError(f"there is no network named {name!r}; {_nearest(name, _MODELS)}")
    parameters = inspect.signature(_MODELS[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not inspect.Parameter.empty}


def create_model(name: str, *, num_classes: int, num_segments: int, **options: Any) -> VideoClassifier:
    """Make a network with random weights (see `BNInception`; `load_published_weights` loads a file).

    Args:
        name: one of `list_models()`.
        num_classes: K, at least 1.
        num_segments: T, the number of frames of a clip; at least 1.
        options: those of `model_options(name)`. All networks: dropout in [0, 1), input_format "unit_rgb" or "caffe_bgr". GSM
            and SA-GSM: interleave (published channel order). SA-GSM: placement (see `parse_placement`), scope "frame" or
            "joint", value "fused" or "bottleneck".

    Returns:
        A module that maps float clips [B, T, 3, H, W], made by its `prepare` from bytes, to logits [B, K].

    Raises:
        ValueError: for an unknown name or option (the message names the nearest), or a value outside its range.
    """
    known = model_options(name)
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; {_nearest(option, known)}")
    return _MODELS[name](num_classes=num_classes, num_segments=num_segments, **options)


def _nearest(name: str, choices: Iterable[str]) -> str:
    known = list(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known are: {', '.join(known)}"
