"""A backbone as a chain of slots: the one way in which a frame passes it, cut where a placement makes a difference.

    stem -> for each slot: before -> what stands in the slot -> after -> head

What `before` gives does not depend on what stands in its slot, so it can be computed once for several answers to that question
(`models.walk`).

Legend: N frames, C channels, H x W map. A name such as x_NCHW gives the axes.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

Rest = tuple[Tensor, ...]
"""What `after` needs of a block beside the map that went through the slot; nobody may write into it."""

_STEM_PIXELS = 8 * 224 * 224
"""So many pixels go through the stem at a time where a CPU is only asked (see `first_map`)."""


class Slotted(Protocol):
    """A backbone with slots, each in a block of its own.

    Attributes:
        SLOTS: their names, in the order in which a frame passes them.
        training: as every module says it.
    """

    SLOTS: tuple[str, ...]
    training: bool

    def stem(self, x_NCHW: Tensor) -> Tensor:
        """Frames to the input of the first slot's block."""

    def before(self, slot: str, x_NCHW: Tensor) -> tuple[Tensor, Rest]:
        """The input of a block to the map that enters its slot, and all of the block that goes around the slot."""

    def slot_module(self, slot: str) -> nn.Module | None:
        """What stands in the slot; None if it is empty."""

    def after(self, slot: str, z_NCHW: Tensor, rest: Rest) -> Tensor:
        """The map that left the slot, and what went around it, to the input of the next slot's block."""

    def head(self, x_NCHW: Tensor) -> Tensor:
        """What the last slot's block gave to features [N, num_features]."""


def pass_slots(backbone: Slotted, x_NCHW: Tensor) -> Tensor:
    """Features of frames: [N, 3, H, W] to [N, num_features]."""
    return backbone.head(last_map(backbone, x_NCHW))


def last_map(backbone: Slotted, x_NCHW: Tensor) -> Tensor:
    """What `head` gets of frames: [N, 3, H, W] to [N, C, h, w]."""
    x = first_map(backbone, x_NCHW)
    for slot in backbone.SLOTS:
        z, rest = backbone.before(slot, x)
        module = backbone.slot_module(slot)
        x = backbone.after(slot, z if module is None else module(z), rest)
    return x


def first_map(backbone: Slotted, x_NCHW: Tensor) -> Tensor:
    """What the stem gives of frames: [N, 3, H, W] to [N, C, h, w].

    Its maps are the largest of all. Where a CPU is only asked, few frames at a time keep them in its cache; later maps are
    small, and more frames at a time are better. BN-Inception's stem took 61 ms for 16 frames of 224 px at once, 47 ms for 8 and
    8 of them (bfloat16, two cores of an AMD EPYC, November 2026).
    """
    asked = not (torch.is_grad_enabled() or backbone.training or torch.compiler.is_compiling())
    if not (asked and x_NCHW.is_cpu):
        return backbone.stem(x_NCHW)
    num_frames = max(1, _STEM_PIXELS // (x_NCHW.shape[2] * x_NCHW.shape[3]))
    return torch.cat([backbone.stem(frames) for frames in torch.split(x_NCHW, num_frames)])
