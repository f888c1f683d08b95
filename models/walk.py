"""Every placement's logits in one walk over the tree of placements, instead of a forward pass for each.

Placements that agree on the first slots share all that is computed before the slot in which they differ. So the walk is depth
first over the slots: the first block is computed once, that of slot k (from 0) 2^k times, and of each block only what follows
its slot twice as often. It keeps one map for each slot on the way, not one for each placement.

Legend: B clips, T segments, N = B * T frames (clips outermost), K classes.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from models.backbones.slotted import Slotted, first_map
from models.classifier import VideoClassifier
from models.placement import Placement
from models.temporal.attention import SelfAttention
from models.temporal.gate_shift import GateShift


@torch.no_grad()
def each_placement(model: VideoClassifier, clips_BT3HW: Tensor) -> Iterator[tuple[Placement, Tensor]]:
    """The logits of the same clips with attention in each subset of the slots in which it works, bit for bit those of a forward
    pass after `attend_only`.

    Args:
        model: an SA-GSM network in evaluation mode. Slots without attention, or where `attend_only` has switched it off, stay
            as they are; n others give 2^n placements.
        clips_BT3HW: what `model.prepare` gives.

    Yields:
        A placement and its logits [B, K]; "none" first, the last slot in quickest turn.

    Raises:
        ValueError: if the network is in training mode, where each pass would change the statistics of its batch norms, or has
            no gates, or the clips are not such that it was made for.

    Example:
        >>> from models.factory import build_model
        >>> model = build_model("sa_gsm_bn_inception", num_classes=2, num_segments=2, placement="3a,5b").eval()
        >>> [str(placement) for placement, _ in each_placement(model, torch.zeros(1, 2, 3, 32, 32))]
        ['none', '5b', '3a', '3a,5b']
    """
    if model.training:
        raise ValueError("the network is in training mode; placements can be compared in evaluation mode only: call eval()")
    backbone = cast("Slotted", model.base_model)
    gates = [backbone.slot_module(slot) for slot in backbone.SLOTS]  # a 3-D baseline has no slots
    if not gates or not all(isinstance(gate, GateShift) for gate in gates):
        raise ValueError("the network has no gates in its slots; attention can stand in those of an SA-GSM network only")
    walk = _Walk(model, backbone, cast("list[GateShift]", gates))
    yield from walk.below((), first_map(backbone, model.frames(clips_BT3HW)))


class _Walk:
    """What stays the same on the walk over one batch."""

    def __init__(self, model: VideoClassifier, backbone: Slotted, gates: list[GateShift]) -> None:
        self.model, self.backbone, self.gates = model, backbone, gates

    def below(self, choices: tuple[bool, ...], x_NCHW: Tensor) -> Iterator[tuple[Placement, Tensor]]:
        """All placements that begin with these choices, from the input of the next slot's block."""
        slots, depth = self.backbone.SLOTS, len(choices)
        if depth == len(slots):
            chosen = (slot for slot, is_chosen in zip(slots, choices, strict=True) if is_chosen)
            yield Placement(chosen, slots), self.model.classify(self.backbone.head(x_NCHW))
            return
        z_NCHW, rest = self.backbone.before(slots[depth], x_NCHW)
        shifted_NCHW = self.gates[depth].shift(z_NCHW)
        attention = self.gates[depth].attn
        yield from self.below((*choices, False), self.backbone.after(slots[depth], shifted_NCHW, rest))
        if isinstance(attention, SelfAttention) and not attention.bypassed:
            attended_NCHW = attention(shifted_NCHW)
            yield from self.below((*choices, True), self.backbone.after(slots[depth], attended_NCHW, rest))
