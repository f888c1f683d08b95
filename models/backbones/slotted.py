"""A backbone as a chain of slots: the one way in which a frame passes it, cut where a placement makes a difference.

    stem -> for each slot: before -> what stands in the slot -> after -> head

What `before` gives does not depend on what stands in its slot, so it can be computed once for several answers to that question
(`models.walk`).

Legend: N frames, C channels, H x W map. A name such as x_NCHW gives the axes.
"""

from typing import Protocol

from torch import Tensor, nn

Rest = tuple[Tensor, ...]
"""What `after` needs of a block beside the map that went through the slot; nobody may write into it."""


class Slotted(Protocol):
    """A backbone with slots, each in a block of its own.

    Attributes:
        SLOTS: their names, in the order in which a frame passes them.
    """

    SLOTS: tuple[str, ...]

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
    x = backbone.stem(x_NCHW)
    for slot in backbone.SLOTS:
        z, rest = backbone.before(slot, x)
        module = backbone.slot_module(slot)
        x = backbone.after(slot, z if module is None else module(z), rest)
    return x
