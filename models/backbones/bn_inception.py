"""BN-Inception.

Ioffe, Szegedy: Batch Normalization, ICML 2015, https://arxiv.org/abs/1502.03167, in the Caffe form that the TSN family uses
(https://github.com/yjxiong/tensorflow-model-zoo.torch): every convolution has a bias, and pooling rounds sizes up. Layers have
their published names, so published weights load by name.

Legend: N frames, C channels, H x W map. A name such as x_NCHW gives the axes.

Against the published form: the last pooling takes the mean of a map of any size (7 x 7 there), and in the blocks that halve the
map (3c, 4e) a map with an odd side is padded for max pooling, where the published network fails to join its branches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from models.backbones.slotted import Rest, pass_slots


class _Block(NamedTuple):
    """Output channels of the convolutions of one Inception block, and how its pooling branch pools.

    A block without `one` and `proj` halves the map: stride 2 in its 3 x 3 branches, and max pooling that is passed on as it is.
    """

    one: int
    three_reduce: int
    three: int
    double_reduce: int
    double: int
    pool: str
    proj: int

    @property
    def stride(self) -> int:
        return 1 if self.one else 2

    def out_channels(self, in_channels: int) -> int:
        return self.one + self.three + self.double + (self.proj or in_channels)


BLOCKS = {
    "3a": _Block(64, 64, 64, 64, 96, "avg", 32),
    "3b": _Block(64, 64, 96, 64, 96, "avg", 64),
    "3c": _Block(0, 128, 160, 64, 96, "max", 0),
    "4a": _Block(224, 64, 96, 96, 128, "avg", 128),
    "4b": _Block(192, 96, 128, 96, 128, "avg", 128),
    "4c": _Block(160, 128, 160, 128, 160, "avg", 128),
    "4d": _Block(96, 128, 192, 160, 192, "avg", 128),
    "4e": _Block(0, 128, 192, 192, 256, "max", 0),
    "5a": _Block(352, 192, 320, 160, 224, "avg", 128),
    "5b": _Block(352, 192, 320, 192, 224, "max", 128),
}

MakeSlotModule = Callable[[str, int], nn.Module]
"""(slot, channels) -> the module that stands in the slot; input and output [N, channels, H, W]."""


class BNInception(nn.Module):
    """BN-Inception without its classifier, with ten slots for temporal modules.

    A slot is named after its block. It lies in the first branch (1x1, or 3x3_reduce in blocks without a 1x1), between that
    branch's convolution and its batch norm, and its module is named `gsm_inception_<block>_<branch>`.

    Weights are random: He et al. 2015 (normal, fan in) for convolutions, zero biases, ones and zeros for batch norms. Nothing
    is downloaded; `models.load_backbone_weights` loads ImageNet's.

    Args:
        make_slot_module: makes the module of each slot; without it slots stay empty (TSN).

    Shape:
        input: [N, 3, H, W], H and W at least 32. Output: [N, 1024]. A channels_last input stays channels_last throughout.
    """

    SLOTS = tuple(BLOCKS)
    num_features = 1024
    input_pixels = 224
    min_pixels = 32

    def __init__(self, make_slot_module: MakeSlotModule | None = None) -> None:
        super().__init__()
        self._add_unit("conv1_7x7_s2", 3, 64, kernel_size=7, stride=2)
        self._add_unit("conv2_3x3_reduce", 64, 64, kernel_size=1)
        self._add_unit("conv2_3x3", 64, 192, kernel_size=3)
        channels = 192
        for slot, block in BLOCKS.items():
            self._add_block(slot, block, channels, make_slot_module)
            channels = block.out_channels(channels)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Features of frames: [N, 3, H, W] to [N, 1024]."""
        return pass_slots(self, x_NCHW)

    def stem(self, x_NCHW: Tensor) -> Tensor:
        """See `Slotted`; the map is an eighth of the frame."""
        x = self._pooled_unit("conv1_7x7_s2", x_NCHW)
        x = self._unit("conv2_3x3_reduce", x)
        return self._pooled_unit("conv2_3x3", x)

    def before(self, slot: str, x_NCHW: Tensor) -> tuple[Tensor, Rest]:
        """See `Slotted`; the rest are the other branches, in the order in which they are joined."""
        name, block, x = f"inception_{slot}", BLOCKS[slot], x_NCHW
        if not block.one:
            z = self.get_submodule(f"{name}_3x3_reduce")(x)
            return z, (self._double_branch(name, x), _halve(x))
        three = self._unit(f"{name}_3x3", self._unit(f"{name}_3x3_reduce", x))
        double = self._double_branch(name, x)
        pooled = average_3x3(x) if block.pool == "avg" else functional.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        projected = self._unit(f"{name}_pool_proj", pooled)
        return self.get_submodule(f"{name}_1x1")(x), (three, double, projected)

    def slot_module(self, slot: str) -> nn.Module | None:
        """See `Slotted`."""
        return self._modules.get(f"gsm_inception_{slot}_{_gated_branch(BLOCKS[slot])}")

    def after(self, slot: str, z_NCHW: Tensor, rest: Rest) -> Tensor:
        """See `Slotted`."""
        name, block = f"inception_{slot}", BLOCKS[slot]
        first = self._norm(f"{name}_{_gated_branch(block)}", z_NCHW)
        if not block.one:
            first = self._unit(f"{name}_3x3", first)
        return torch.cat((first, *rest), dim=1)

    def head(self, x_NCHW: Tensor) -> Tensor:
        """See `Slotted`."""
        return x_NCHW.mean(dim=(2, 3))

    def _add_block(self, slot: str, block: _Block, channels: int, make_slot_module: MakeSlotModule | None) -> None:
        name = f"inception_{slot}"
        if block.one:
            self._add_unit(f"{name}_1x1", channels, block.one, kernel_size=1)
        self._add_unit(f"{name}_3x3_reduce", channels, block.three_reduce, kernel_size=1)
        self._add_unit(f"{name}_3x3", block.three_reduce, block.three, kernel_size=3, stride=block.stride)
        self._add_unit(f"{name}_double_3x3_reduce", channels, block.double_reduce, kernel_size=1)
        self._add_unit(f"{name}_double_3x3_1", block.double_reduce, block.double, kernel_size=3)
        self._add_unit(f"{name}_double_3x3_2", block.double, block.double, kernel_size=3, stride=block.stride)
        if block.proj:
            self._add_unit(f"{name}_pool_proj", channels, block.proj, kernel_size=1)
        if make_slot_module:
            self.add_module(f"gsm_{name}_{_gated_branch(block)}", make_slot_module(slot, block.one or block.three_reduce))

    def _double_branch(self, name: str, x: Tensor) -> Tensor:
        double = self._unit(f"{name}_double_3x3_1", self._unit(f"{name}_double_3x3_reduce", x))
        return self._unit(f"{name}_double_3x3_2", double)

    def _add_unit(self, name: str, in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1) -> None:
        """A convolution and the batch norm behind it, under their published names; initialised as the class says."""
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        self.add_module(name, conv)
        self.add_module(f"{name}_bn", nn.BatchNorm2d(out_channels))

    def _unit(self, name: str, x: Tensor) -> Tensor:
        """Convolution, batch norm, ReLU."""
        return self._norm(name, self.get_submodule(name)(x))

    def _pooled_unit(self, name: str, x: Tensor) -> Tensor:
        """A unit and the max pooling behind it. The ReLU comes last, since it commutes and has a quarter of the map to do."""
        x = self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x))
        return functional.relu(functional.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True), inplace=True)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """The unit without its convolution."""
        return functional.relu(self.get_submodule(f"{name}_bn")(x), inplace=True)


def _gated_branch(block: _Block) -> str:
    """The first branch, in which the slot lies."""
    return "1x1" if block.one else "3x3_reduce"


def average_3x3(x_NCHW: Tensor) -> Tensor:
    """The mean of each 3 x 3 window of the map, which counts as zero outside: average pooling of stride 1, padded by 1."""
    averaged: Tensor = _Average3x3.apply(x_NCHW)
    return averaged


class _Average3x3(torch.autograd.Function):
    """`average_3x3`, whose gradient is the same average of the incoming gradient, since windows are symmetric.

    PyTorch's own backward pass of average pooling takes five times as long in bfloat16 and channels_last memory (6.8 against
    1.4 ms for 16 x 576 maps of 14 x 14 on one thread, November 2026).
    """

    @staticmethod
    def forward(_ctx: Any, x_NCHW: Tensor) -> Tensor:
        """The average."""
        return functional.avg_pool2d(x_NCHW, kernel_size=3, stride=1, padding=1)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, gradient_NCHW: Tensor) -> Tensor:
        """The gradient of the input."""
        return functional.avg_pool2d(gradient_NCHW, kernel_size=3, stride=1, padding=1)


def _halve(x_NCHW: Tensor) -> Tensor:
    """Max pooling to the size that a 3 x 3 convolution of stride 2 gives. The map is a ReLU's, so zero padding is neutral."""
    odd_height, odd_width = x_NCHW.shape[2] % 2, x_NCHW.shape[3] % 2
    if odd_height or odd_width:
        x_NCHW = functional.pad(x_NCHW, (0, odd_width, 0, odd_height))
    return functional.max_pool2d(x_NCHW, kernel_size=3, stride=2, ceil_mode=True)
