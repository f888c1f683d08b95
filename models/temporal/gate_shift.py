"""The Gate-Shift Module.

Sudhakaran, Escalera, Lanz: Gate-Shift Networks for Video Action Recognition, CVPR 2020, https://arxiv.org/abs/1912.00381.
Written from the paper; parameter names, initial values and channel order are those of the authors' code
(https://github.com/swathikirans/GSM, gsm.py), so published weights load and give the published output.

Legend: B clips, T segments, N = B * T frames (clips outermost), C channels, H x W map. A name such as x_NCHW gives the axes;
2 in it is the axis of the two groups.

Where this differs from the authors' code in form, not in value: batch norm and convolution work on frames, so the map is never
copied to [B, C, T, H, W]; the 3 x 3 x 3 kernel runs as three 3 x 3 ones whose answers are added over neighbouring segments,
which mostly took less time than a 3-D convolution on a CPU (two threads, both memory layouts, November 2026; in one case more);
and the shift has its own gradient (`_Shift`), since what automatic differentiation does with slices copies whole maps.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_PAST = (0, 0, 0, 0, 0, 0, 1, 0)
"""Padding, last axis first, that puts one zero segment before the others of [B, T, C, H, W]."""
_FUTURE = (0, 0, 0, 0, 0, 0, 0, 1)
"""The same behind the others."""


class GateShift(nn.Module):
    """Let a learned gate move part of each feature map one segment back or forward in time.

    The channels X form two groups, X1 and X2. For each group g, with a gate in (-1, 1) for each position:

        Y_g = tanh(W_g * relu(bn(X_g))) . X_g     the gated part (* is the 3 x 3 x 3 convolution, one kernel a group)
        R_g = X_g - Y_g                           the residual, which stays in place
        Z1  = Y1 of segment t + 1, plus R1        the first group receives the future
        Z2  = Y2 of segment t - 1, plus R2        the second group receives the past

    Segments from outside the clip are zero. `conv3D` starts at zero, as published: gates are closed and open only as far as
    training pushes them (the gradient of tanh at 0 is 1, so they do move).

    Follows the authors' code in its channel order: the two quarters of each half are interleaved on the way out, so a fresh
    module (gates at zero) permutes channels and changes nothing else.

    Args:
        channels: C, the number of channels of the feature map; a multiple of 4.
        num_segments: T, the number of segments taken from each video.
        interleave: keep the published channel order (needed for published weights); if False, channels stay where they are.
        attn: what the shifted map passes at the end, in SA-GSM a `SelfAttention`; nothing by default.

    Shape:
        input and output: [N, C, H, W] with N = B * T, clips outermost. The memory layout (contiguous or channels_last) is kept.

    Raises:
        ValueError: if `channels` is not a positive multiple of 4, or `num_segments` is not positive; from `forward`, if N is
            not a multiple of T.

    Example:
        >>> gate_shift = GateShift(channels=8, num_segments=4).eval()
        >>> x_NCHW = torch.randn(2 * 4, 8, 7, 7)
        >>> torch.equal(gate_shift(x_NCHW), x_NCHW[:, [0, 2, 1, 3, 4, 6, 5, 7]])
        True
    """

    def __init__(self, channels: int, num_segments: int, *, interleave: bool = True, attn: nn.Module | None = None) -> None:
        super().__init__()
        if channels <= 0 or channels % 4:
            raise ValueError(f"GateShift got {channels} channels, but needs a positive multiple of 4 (two quarters a group)")
        if num_segments < 1:
            raise ValueError(f"GateShift got {num_segments} segments, but needs at least 1")
        self.num_segments = num_segments
        self.interleave = interleave
        self.conv3D = nn.Conv3d(channels, 2, kernel_size=3, padding=1, groups=2)
        nn.init.zeros_(self.conv3D.weight)
        nn.init.zeros_(self.conv3D.bias)  # type: ignore[arg-type]  # "Tensor | None": a convolution made with its bias has one
        self.bn = nn.BatchNorm2d(channels)
        self.attn = nn.Identity() if attn is None else attn

    def gate(self, x_NCHW: Tensor) -> Tensor:
        """The gates of both groups.

        Shape:
            input [N, C, H, W], output [B, T, 2, H, W] with values in (-1, 1).
        """
        kernels = self.conv3D.weight.transpose(1, 2).flatten(0, 1)  # (group, segment t-1 / t / t+1), C/2, 3, 3
        answers = functional.conv2d(functional.relu(self.bn(x_NCHW), inplace=True), kernels, padding=1, groups=2)
        past, present, future = answers.view(-1, self.num_segments, 2, 3, *x_NCHW.shape[2:]).unbind(3)
        sum_BT2HW = functional.pad(past[:, :-1], _PAST) + present + functional.pad(future[:, 1:], _FUTURE)
        gate_BT2HW = torch.tanh(sum_BT2HW + self.conv3D.bias[:, None, None])  # type: ignore[index]  # as in __init__
        return gate_BT2HW.to(x_NCHW.dtype)  # under autocast the bias has made it float32, and the map would follow

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Gate, shift, and pass on to `attn`; see the class."""
        z_NCHW: Tensor = self.attn(self.shift(x_NCHW))
        return z_NCHW

    def shift(self, x_NCHW: Tensor) -> Tensor:
        """Z of the equations, which `attn` gets; [N, C, H, W] in and out."""
        num_frames, channels, height, width = x_NCHW.shape
        if num_frames % self.num_segments:
            raise ValueError(f"{num_frames} frames are no whole number of clips of {self.num_segments} segments")
        x_BTGCHW = x_NCHW.view(-1, self.num_segments, 2, channels // 2, height, width)
        z_BTGCHW: Tensor = _Shift.apply(x_BTGCHW, self.gate(x_NCHW).unsqueeze(3))
        z_NCHW = z_BTGCHW.flatten(2, 3).flatten(0, 1)
        if self.interleave:
            z_NCHW = z_NCHW.view(-1, 2, 2, channels // 4, height, width).transpose(2, 3).flatten(1, 3)
        return z_NCHW.contiguous(memory_format=_layout(x_NCHW))


class _Shift(torch.autograd.Function):
    """Z of the equations in `GateShift`, from the groups X [B, T, 2, C/2, H, W] and their gates [B, T, 2, 1, H, W].

    The gradient: Y1 of segment t stands in Z1 of t - 1 with a plus and in Z1 of t with a minus, Y2 likewise in Z2 of t + 1 and
    of t, hence

        dY1 = dZ1 of segment t - 1, minus dZ1       dX = dZ + gate . dY
        dY2 = dZ2 of segment t + 1, minus dZ2       dgate = sum over channels of X . dY
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        """Z."""
        ctx.save_for_backward(x, gate)
        y = gate * x
        z = x - y
        z[:, :-1, 0] += y[:, 1:, 0]
        z[:, 1:, 1] += y[:, :-1, 1]
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients dX and dgate."""
        x, gate = ctx.saved_tensors
        dy = -dz
        dy[:, 1:, 0] += dz[:, :-1, 0]
        dy[:, :-1, 1] += dz[:, 1:, 1]
        return torch.addcmul(dz, gate, dy), (x * dy).sum(dim=3, keepdim=True)


def _layout(x_NCHW: Tensor) -> torch.memory_format:
    channels_last = x_NCHW.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
