"""What goes on inside a trained network on given clips, for pictures: where attention looks, how far gates open, the last map.

Legend: B clips, T segments, H x W map, C channels, K classes. A name such as x_BTHW gives the axes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.backbones import slotted
from models.classifier import VideoClassifier
from models.switch import slot_attentions, slot_gates
from models.temporal.attention import SelfAttention
from models.temporal.gate_shift import GateShift


class AttentionMap(NamedTuple):
    """Where one attention looks, and how much that counts.

    name: the slot ("5b"); of the two attentions of scope "divided" the first, that over time, has the name "5b_temporal".
    gamma: what the attention's answer is multiplied with before it is added (equation 4).
    received: the share of all looks of its group (see `SelfAttention.attention_rows`) that each position gets, in [0, 1];
        over each group it sums to 1. Shape: [B, T, H, W].
    num_positions: M, how many positions a group has.
    """

    name: str
    gamma: float
    received: Tensor
    num_positions: int

    @property
    def weight(self) -> Tensor:
        """|gamma| * M * received: 1 is what even attention gives to every position where gamma is 1. Its mean is |gamma|.

        Shape: [B, T, H, W].
        """
        return abs(self.gamma) * self.num_positions * self.received

    @property
    def spread(self) -> Tensor:
        """Over how large a share of each clip's places looks are spread: exp of their entropy, by the number of places.

        1 where all places get the same, 1 / (T * H * W) where one gets all. Shape: [B].
        """
        share = self.received.flatten(1)
        share = share / share.sum(dim=1, keepdim=True)
        spread: Tensor = torch.special.entr(share).sum(dim=1).exp() / share.shape[1]
        return spread


@torch.no_grad()
def attention_maps(model: VideoClassifier, clips_BT3HW: Tensor) -> tuple[Tensor, list[AttentionMap]]:
    """The logits of clips, bit for bit those of `forward`, and where each attention looked meanwhile.

    Args:
        model: in evaluation mode.
        clips_BT3HW: what `model.prepare` gives.

    Returns:
        Logits [B, K], and the maps in the order in which a frame passes them: none of a network without attention, nor of
        a slot where `attend_only` has switched it off.

    Raises:
        ValueError: if the network is in training mode, or the clips are not such that it was made for.

    Example:
        >>> from models.factory import build_model
        >>> model = build_model("sa_gsm_bn_inception", num_classes=2, num_segments=2, placement="5b", scope="divided").eval()
        >>> [(found.name, found.gamma) for found in attention_maps(model, torch.zeros(1, 2, 3, 32, 32))[1]]
        [('5b_temporal', 0.0), ('5b', 0.0)]
    """
    attentions: dict[str, SelfAttention] = {}
    for slot, attention in slot_attentions(model).items():
        if attention.bypassed:
            continue
        if isinstance(attention.temporal, SelfAttention):
            attentions[f"{slot}_temporal"] = attention.temporal
        attentions[slot] = attention
    found: dict[str, AttentionMap] = {}

    def look(attention: SelfAttention, inputs: tuple[Tensor], name: str) -> None:
        received_NHW = attention.attention_received(inputs[0])
        received_BTHW = received_NHW.view(-1, model.num_segments, *received_NHW.shape[1:])
        found[name] = AttentionMap(name, attention.gamma.item(), received_BTHW, _group_size(attention.scope, received_BTHW))

    with _watched(model, attentions, look):
        logits: Tensor = model(clips_BT3HW)
    return logits, [found[name] for name in attentions]


@torch.no_grad()
def gate_activity(model: VideoClassifier, clips_BT3HW: Tensor) -> dict[str, Tensor]:
    """How far the gate of each slot opens: the mean over the map and both groups of |tanh| (see `GateShift`).

    Args:
        model: in evaluation mode.
        clips_BT3HW: what `model.prepare` gives.

    Returns:
        By slot, in the order in which a frame passes them, [B, T], in [0, 1): 0 is a gate that lets nothing pass to another
        segment. Of a network without gates nothing.

    Raises:
        ValueError: as `attention_maps`.
    """
    gates = slot_gates(model)
    found: dict[str, Tensor] = {}

    def look(gate: GateShift, inputs: tuple[Tensor], name: str) -> None:
        found[name] = gate.gate(inputs[0]).float().abs().mean(dim=(2, 3, 4))

    with _watched(model, gates, look):
        model(clips_BT3HW)
    return {slot: found[slot] for slot in gates}


def last_map(model: VideoClassifier, clips_BT3HW: Tensor) -> Tensor:
    """The last map of a network that still has places: [B, C, T, H, W]; of 3-D baselines T may be less than the segments.

    Raises:
        ValueError: as `VideoClassifier.frames`.
    """
    backbone: Any = model.base_model
    frames = model.frames(clips_BT3HW)
    if model.takes_clips:
        map_BCTHW: Tensor = backbone.last_map(frames)
        return map_BCTHW
    map_NCHW = slotted.last_map(backbone, frames)
    return map_NCHW.view(-1, model.num_segments, *map_NCHW.shape[1:]).transpose(1, 2)


def classify_map(model: VideoClassifier, map_BCTHW: Tensor) -> Tensor:
    """The rest of the network: from what `last_map` gave to logits [B, K]."""
    backbone: Any = model.base_model
    features: Tensor = backbone.head(map_BCTHW if model.takes_clips else map_BCTHW.transpose(1, 2).flatten(0, 1))
    return model.classify(features)


@contextmanager
def _watched(model: VideoClassifier, modules: Mapping[str, nn.Module], look: Any) -> Iterator[None]:
    """Within it, `look(module, inputs, name=...)` is called before each of the modules works."""
    if model.training:
        raise ValueError("the network is in training mode, in which to look at it would change it: call eval()")
    handles = [module.register_forward_pre_hook(partial(look, name=name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _group_size(scope: str, received_BTHW: Tensor) -> int:
    _, num_segments, height, width = received_BTHW.shape
    return {"temporal": num_segments, "joint": num_segments * height * width}.get(scope, height * width)
