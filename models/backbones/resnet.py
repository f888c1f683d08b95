"""ResNet-18, 50 and 101 with named slots.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, https://arxiv.org/abs/1512.03385, as torchvision
builds it (stride in the 3 x 3 convolution), with torchvision's names: the networks that TSN, TSM and GSF start from.

Legend: N frames, C channels, H x W map. A name such as x_NCHW gives the axes.

A slot is a residual block. Two things can stand in it, both in the residual branch, so the skip connection keeps the frame as
it is:

- `make_branch_input`: at the entrance of the branch, before `conv1`. TSM's shift stands here, as published (`TemporalShift`
  around `conv1`).
- `make_slot_module`: between `conv1` and `bn1`, on the narrow map, as a gate stands between a convolution and its batch norm in
  GSM's own BN-Inception. GSM published no ResNet. GSF's code (https://github.com/swathikirans/GSF, resnetGSFModels.py) puts its
  module between `conv3` and `bn3`, where a bottleneck is four times as wide and attention would need sixteen times the weights;
  its weights do not load here.
"""

from typing import Any, cast

from torch import Tensor, nn
from torchvision.models import resnet

from models.backbones.bn_inception import MakeSlotModule
from models.backbones.slotted import Rest

_BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""depth -> number of residual blocks of layer1 to layer4."""


class ResNet(nn.Module):
    """ResNet without its classifier, with a slot in each residual block.

    Slots are named as torchvision names the blocks, "layer1.0" to "layer4.2" (depth 50). Weights start as torchvision's: He
    initialisation, ones and zeros for batch norms; `models.load_backbone_weights` loads ImageNet's.

    Args:
        depth: 18, 50 or 101.
        make_slot_module: makes the module between `conv1` and `bn1` of each slot, [N, channels, H, W] in and out; or None.
        make_branch_input: makes the module before `conv1`, likewise, with the channels of the block's input; or None.

    Shape:
        input: [N, 3, H, W], H and W at least 32. Output: [N, num_features]: 512 at depth 18, else 2048.

    Raises:
        ValueError: if `depth` is not one of those above.
    """

    input_pixels = 224
    min_pixels = 32

    def __init__(
        self, depth: int, make_slot_module: MakeSlotModule | None = None, *, make_branch_input: MakeSlotModule | None = None
    ) -> None:
        super().__init__()
        self.SLOTS = resnet_slots(depth)
        block = _BasicBlock if depth == 18 else _Bottleneck
        published = resnet.ResNet(block, list(_BLOCKS[depth]))
        self.num_features = int(published.fc.in_features)
        del published.fc  # torchvision's own; `forward` ends before it
        for name, child in published.named_children():
            self.add_module(name, child)
        for slot in self.SLOTS:
            conv1 = cast("nn.Conv2d", self.get_submodule(f"{slot}.conv1"))
            if make_slot_module:
                self.get_submodule(slot).add_module("gsm", make_slot_module(slot, conv1.out_channels))
            if make_branch_input:
                self.get_submodule(slot).add_module("branch_input", make_branch_input(slot, conv1.in_channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Features of frames: [N, 3, H, W] to [N, num_features]."""
        x = x_NCHW
        for child in self.children():  # torchvision's, in its order: stem, four layers, average over the map
            x = child(x)
        return x.flatten(1)

    def stem(self, x_NCHW: Tensor) -> Tensor:
        """See `Slotted`; the map is a quarter of the frame."""
        x = x_NCHW
        for name in ("conv1", "bn1", "relu", "maxpool"):
            x = self.get_submodule(name)(x)
        return x

    def before(self, slot: str, x_NCHW: Tensor) -> tuple[Tensor, Rest]:
        """See `Slotted`; the rest is the skip connection."""
        z, skip = self._block(slot).before(x_NCHW)
        return z, (skip,)

    def slot_module(self, slot: str) -> nn.Module | None:
        """See `Slotted`."""
        module: nn.Module = self._block(slot).gsm
        return module

    def after(self, slot: str, z_NCHW: Tensor, rest: Rest) -> Tensor:
        """See `Slotted`."""
        return self._block(slot).after(z_NCHW, *rest)

    def head(self, x_NCHW: Tensor) -> Tensor:
        """See `Slotted`."""
        pooled: Tensor = self.get_submodule("avgpool")(x_NCHW)
        return pooled.flatten(1)

    def _block(self, slot: str) -> "_BasicBlock | _Bottleneck":
        return cast("_BasicBlock | _Bottleneck", self.get_submodule(slot))


def resnet_slots(depth: int) -> tuple[str, ...]:
    """The names of the residual blocks, in the order in which a frame passes them.

    Raises:
        ValueError: if `depth` is not 18, 50 or 101.

    Example:
        >>> resnet_slots(18)[:3], len(resnet_slots(101))
        (('layer1.0', 'layer1.1', 'layer2.0'), 33)
    """
    if depth not in _BLOCKS:
        raise ValueError(f"there is no ResNet of depth {depth!r} here; known are: {', '.join(map(str, _BLOCKS))}")
    return tuple(f"layer{layer}.{index}" for layer, count in enumerate(_BLOCKS[depth], start=1) for index in range(count))


class _Slot:
    """What both kinds of block have: a slot between `before`, which is the same for both, and `after`."""

    def before(self: Any, x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the slot, and the skip connection."""
        skip = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        return self.conv1(self.branch_input(x_NCHW)), skip

    def forward(self: Any, x_NCHW: Tensor) -> Tensor:
        z, skip = self.before(x_NCHW)
        result: Tensor = self.after(self.gsm(z), skip)
        return result


class _BasicBlock(_Slot, resnet.BasicBlock):  # type: ignore[misc]  # "has type Any": torchvision has no types
    """torchvision's block with its slot; without modules in the slot, the same function."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.branch_input = nn.Identity()
        self.gsm = nn.Identity()

    def after(self, z_NCHW: Tensor, skip: Tensor) -> Tensor:
        """From what left the slot."""
        out = self.bn2(self.conv2(self.relu(self.bn1(z_NCHW))))
        out += skip
        result: Tensor = self.relu(out)
        return result


class _Bottleneck(_Slot, resnet.Bottleneck):  # type: ignore[misc]  # "has type Any": torchvision has no types
    """torchvision's block with its slot; without modules in the slot, the same function."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.branch_input = nn.Identity()
        self.gsm = nn.Identity()

    def after(self, z_NCHW: Tensor, skip: Tensor) -> Tensor:
        """From what left the slot."""
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(z_NCHW)))))
        out = self.bn3(self.conv3(out))
        out += skip
        result: Tensor = self.relu(out)
        return result
