"""Inception v3 as TSN, TRN and GSM use it.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception Architecture, CVPR 2016, https://arxiv.org/abs/1512.00567,
in the Caffe form of GSM's code (https://github.com/swathikirans/GSM, model_zoo/bninception/inceptionv3_gsm.yaml): every
convolution has a bias, batch norms add 1e-5, pooling rounds sizes up, and there is no auxiliary classifier. Layers have their
published names, so published weights load by name. GSM feeds it frames of 229 x 229 pixels.

It is not torchvision's network: there the 1 x 7 and 7 x 1 (1 x 3, 3 x 1) convolutions of a branch follow in the other order,
convolutions have no bias and batch norms add 1e-3, so torchvision's weights are not weights of this network.

Legend: N frames, C channels, H x W map. A name such as x_NCHW gives the axes.

Against the published form: the last pooling takes the mean of a map of any size (6 x 6 there), and the blocks that halve the
map (mixed_3, mixed_8) round their max pooling down, as their convolutions do. Where the published network runs (odd maps, as at
229 or 299 pixels) that is the same; elsewhere (at 224) it fails to join its branches.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones.bn_inception import MakeSlotModule, average_3x3
from models.backbones.slotted import Rest, pass_slots


class _Unit(NamedTuple):
    """A convolution, its batch norm and a ReLU. Of stride 1 it keeps the size of the map; of stride 2 it has no padding."""

    name: str
    channels: int
    height: int
    width: int
    stride: int = 1


class _Block(NamedTuple):
    """One Inception block: branches of units, and a pooling branch.

    `forks`: each branch of more than one unit ends in two units side by side, both on what came before. `pool`: "avg" or "max",
    followed by a 1 x 1 unit of `proj` channels, or "halve": max pooling of stride 2, passed on as it is.
    """

    branches: tuple[tuple[_Unit, ...], ...]
    pool: str
    proj: int = 0
    forks: bool = False


def _block_35(proj: int) -> _Block:
    """Figure 5 of the paper with a 5 x 5 branch; at 229 pixels on a map of 27 x 27 (35 x 35 at 299)."""
    five = (_Unit("tower_conv", 48, 1, 1), _Unit("tower_conv_1", 64, 5, 5))
    double = (_Unit("tower_1_conv", 64, 1, 1), _Unit("tower_1_conv_1", 96, 3, 3), _Unit("tower_1_conv_2", 96, 3, 3))
    return _Block(((_Unit("conv", 64, 1, 1),), five, double), "avg", proj)


def _block_17(width: int) -> _Block:
    """Figure 6: 7 x 7 convolutions as pairs of 7 x 1 and 1 x 7; at 229 pixels on 13 x 13 (17 x 17 at 299)."""
    seven = (_Unit("tower_conv", width, 1, 1), _Unit("tower_conv_1", width, 7, 1), _Unit("tower_conv_2", 192, 1, 7))
    double = (
        _Unit("tower_1_conv", width, 1, 1),
        _Unit("tower_1_conv_1", width, 1, 7),
        _Unit("tower_1_conv_2", width, 7, 1),
        _Unit("tower_1_conv_3", width, 1, 7),
        _Unit("tower_1_conv_4", 192, 7, 1),
    )
    return _Block(((_Unit("conv", 192, 1, 1),), seven, double), "avg", 192)


def _block_8(pool: str) -> _Block:
    """Figure 7: branches that end in a 3 x 1 and a 1 x 3 convolution side by side; at 229 pixels on 6 x 6 (8 x 8 at 299)."""
    three = (
        _Unit("tower_conv", 384, 1, 1),
        _Unit("tower_mixed_conv", 384, 3, 1),
        _Unit("tower_mixed_conv_1", 384, 1, 3),
    )
    double = (
        _Unit("tower_1_conv", 448, 1, 1),
        _Unit("tower_1_conv_1", 384, 3, 3),
        _Unit("tower_1_mixed_conv", 384, 3, 1),
        _Unit("tower_1_mixed_conv_1", 384, 1, 3),
    )
    return _Block(((_Unit("conv", 320, 1, 1),), three, double), pool, 192, forks=True)


_HALVE_35 = _Block(
    (
        (_Unit("conv", 384, 3, 3, 2),),
        (_Unit("tower_conv", 64, 1, 1), _Unit("tower_conv_1", 96, 3, 3), _Unit("tower_conv_2", 96, 3, 3, 2)),
    ),
    "halve",
)
_HALVE_17 = _Block(
    (
        (_Unit("tower_conv", 192, 1, 1), _Unit("tower_conv_1", 320, 3, 3, 2)),
        (
            _Unit("tower_1_conv", 192, 1, 1),
            _Unit("tower_1_conv_1", 192, 7, 1),
            _Unit("tower_1_conv_2", 192, 1, 7),
            _Unit("tower_1_conv_3", 192, 3, 3, 2),
        ),
    ),
    "halve",
)

BLOCKS = {
    "mixed": _block_35(proj=32),
    "mixed_1": _block_35(proj=64),
    "mixed_2": _block_35(proj=64),
    "mixed_3": _HALVE_35,
    "mixed_4": _block_17(width=128),
    "mixed_5": _block_17(width=160),
    "mixed_6": _block_17(width=160),
    "mixed_7": _block_17(width=192),
    "mixed_8": _HALVE_17,
    "mixed_9": _block_8(pool="avg"),
    "mixed_10": _block_8(pool="max"),
}

_WITHOUT_SLOT, _BEFORE_IT = "mixed_6", "mixed_5"

_STEM = (
    ("conv", 32, 3, 2, 0),
    ("conv_1", 32, 3, 1, 0),
    ("conv_2", 64, 3, 1, 1),
    ("conv_3", 80, 1, 1, 0),
    ("conv_4", 192, 3, 1, 0),
)
"""name, channels, kernel, stride, padding; max pooling follows `conv_2` and `conv_4`."""


class InceptionV3(nn.Module):
    """Inception v3 without its classifier, with a slot in every block but mixed_6, as GSM published it.

    A slot lies between the 1 x 1 convolution of a block (in the blocks that halve the map: the first 1 x 1 reduction) and its
    batch norm. A module in slot "mixed_4" is registered under the published name `gsm_mixed_4_conv_Conv2D`.

    Weights are random: He initialisation for convolutions, zero biases, ones and zeros for batch norms.
    `models.load_backbone_weights` loads ImageNet's.

    Args:
        make_slot_module: makes the module of each slot; [N, channels, H, W] in and out. None: slots stay empty (TSN).

    Shape:
        input: [N, 3, H, W], H and W at least 69. Output: [N, 2048]. A channels_last input stays channels_last throughout.
    """

    SLOTS = tuple(block for block in BLOCKS if block != _WITHOUT_SLOT)
    num_features = 2048
    input_pixels = 229
    min_pixels = 69

    def __init__(self, make_slot_module: MakeSlotModule | None = None) -> None:
        super().__init__()
        channels = 3
        for name, out_channels, kernel, stride, padding in _STEM:
            self._add_unit(name, channels, out_channels, kernel=(kernel, kernel), stride=stride, padding=(padding, padding))
            channels = out_channels
        for name, block in BLOCKS.items():
            channels = self._add_block(name, block, channels)
            if make_slot_module and name in self.SLOTS:
                conv = f"{name}_{_slot_unit(name)}_Conv2D"
                out_channels = int(self.get_submodule(conv).out_channels)  # type: ignore[arg-type]  # "Tensor | Module"
                self.add_module(f"gsm_{conv}", make_slot_module(name, out_channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Features of frames: [N, 3, H, W] to [N, 2048]."""
        return pass_slots(self, x_NCHW)

    def stem(self, x_NCHW: Tensor) -> Tensor:
        """See `Slotted`; the map is about an eighth of the frame."""
        x = x_NCHW
        for name, *_ in _STEM:
            x = self.get_submodule(f"{name}_batchnorm")(self.get_submodule(f"{name}_Conv2D")(x))
            if name in ("conv_2", "conv_4"):
                x = functional.max_pool2d(x, kernel_size=3, stride=2, ceil_mode=True)
            x = functional.relu(x, inplace=True)  # behind the pooling, with which it commutes: a quarter of the map
        return x

    def before(self, slot: str, x_NCHW: Tensor) -> tuple[Tensor, Rest]:
        """See `Slotted`; the rest are the other branches in their order."""
        block, z, others = BLOCKS[slot], x_NCHW, list[Tensor]()
        for units in block.branches:
            if units[0].name == _slot_unit(slot):
                z = self.get_submodule(f"{slot}_{units[0].name}_Conv2D")(x_NCHW)
            else:
                others += self._branch(slot, block, units, x_NCHW)
        return z, (*others, self._pool(slot, block, x_NCHW))

    def slot_module(self, slot: str) -> nn.Module | None:
        """See `Slotted`."""
        return self._modules.get(f"gsm_{slot}_{_slot_unit(slot)}_Conv2D")

    def after(self, slot: str, z_NCHW: Tensor, rest: Rest) -> Tensor:
        """See `Slotted`; the block without a slot goes with the one before it."""
        x = self._join(slot, z_NCHW, rest)
        return self._join(_WITHOUT_SLOT, *self.before(_WITHOUT_SLOT, x)) if slot == _BEFORE_IT else x

    def head(self, x_NCHW: Tensor) -> Tensor:
        """See `Slotted`."""
        return x_NCHW.mean(dim=(2, 3))

    def _add_block(self, name: str, block: _Block, in_channels: int) -> int:
        """Add the units of a block; returns the channels of its output."""
        total = 0
        for units in block.branches:
            num_chained = _num_chained(block, units)
            channels = in_channels
            for index, unit in enumerate(units):
                kernel = (unit.height, unit.width)
                padding = (unit.height // 2, unit.width // 2) if unit.stride == 1 else (0, 0)
                self._add_unit(
                    f"{name}_{unit.name}", channels, unit.channels, kernel=kernel, stride=unit.stride, padding=padding
                )
                channels = unit.channels if index < num_chained else channels
            total += sum(unit.channels for unit in units[num_chained:]) or channels
        if block.proj:
            self._add_unit(f"{name}_tower_2_conv", in_channels, block.proj, kernel=(1, 1), stride=1, padding=(0, 0))
        return total + (block.proj or in_channels)

    def _join(self, name: str, z: Tensor, rest: Rest) -> Tensor:
        """The output of a block: the branch with the slot from there on, at its place among the others."""
        branches = BLOCKS[name].branches
        place = next(place for place, units in enumerate(branches) if units[0].name == _slot_unit(name))
        first, *others = branches[place]
        gated = self._norm(f"{name}_{first.name}", z)
        for unit in others:
            gated = self._unit(f"{name}_{unit.name}", gated)
        return torch.cat((*rest[:place], gated, *rest[place:]), dim=1)

    def _branch(self, name: str, block: _Block, units: tuple[_Unit, ...], x: Tensor) -> list[Tensor]:
        num_chained = _num_chained(block, units)
        for unit in units[:num_chained]:
            x = self._unit(f"{name}_{unit.name}", x)
        return [self._unit(f"{name}_{unit.name}", x) for unit in units[num_chained:]] or [x]

    def _pool(self, name: str, block: _Block, x: Tensor) -> Tensor:
        if block.pool == "halve":
            return functional.max_pool2d(x, kernel_size=3, stride=2)
        pooled = average_3x3(x) if block.pool == "avg" else functional.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        return self._unit(f"{name}_tower_2_conv", pooled)

    def _add_unit(
        self, name: str, in_channels: int, out_channels: int, *, kernel: tuple[int, int], stride: int, padding: tuple[int, int]
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        self.add_module(f"{name}_Conv2D", conv)
        self.add_module(f"{name}_batchnorm", nn.BatchNorm2d(out_channels))

    def _unit(self, name: str, x: Tensor) -> Tensor:
        """Convolution, batch norm, ReLU."""
        return self._norm(name, self.get_submodule(f"{name}_Conv2D")(x))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """The unit without its convolution."""
        return functional.relu(self.get_submodule(f"{name}_batchnorm")(x), inplace=True)


def _slot_unit(name: str) -> str:
    """The unit behind whose convolution the slot of a block lies: its first 1 x 1 convolution."""
    return "tower_conv" if BLOCKS[name].pool == "halve" else "conv"


def _num_chained(block: _Block, units: tuple[_Unit, ...]) -> int:
    """How many units of a branch follow one another; the others stand side by side at its end."""
    return len(units) - 2 if block.forks and len(units) > 1 else len(units)
