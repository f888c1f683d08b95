"""The Temporal Shift Module.

Lin, Gan, Han: TSM: Temporal Shift Module for Efficient Video Understanding, ICCV 2019, https://arxiv.org/abs/1811.08383.
Function as in the authors' code (https://github.com/mit-han-lab/temporal-shift-module, ops/temporal_shift.py).

Legend: B clips, T segments, N = B * T frames (clips outermost), C channels, H x W map. A name such as x_NCHW gives the axes.
"""

import torch
from torch import Tensor, nn


class TemporalShift(nn.Module):
    """Move a part of the channels one segment earlier and as large a part one segment later.

    Of C channels, the first C // `fold_div` receive the next segment's values (the future), the next C // `fold_div` those of
    the segment before (the past), and the others stay. Segments from outside the clip are zero. No parameters; no arithmetic.

    Where it stands decides what it does to a network: at the entrance of the residual branch (`models.backbones.resnet`, the
    paper's "residual shift"), the skip connection keeps what the shift takes away.

    Args:
        num_segments: T, at least 1.
        fold_div: which part of the channels moves in each direction: 8, as published, moves an eighth each way. At least 2.

    Shape:
        input and output: [N, C, H, W] with N = B * T, clips outermost. The memory layout (contiguous or channels_last) is kept.

    Raises:
        ValueError: if `num_segments` is below 1 or `fold_div` below 2.

    Example:
        >>> frames = torch.arange(1.0, 4.0).view(3, 1, 1, 1).expand(3, 2, 1, 1)
        >>> TemporalShift(num_segments=3, fold_div=2)(frames).flatten(1).T
        tensor([[2., 3., 0.],
                [0., 1., 2.]])
    """

    def __init__(self, num_segments: int, *, fold_div: int = 8) -> None:
        super().__init__()
        if num_segments < 1:
            raise ValueError(f"TemporalShift got {num_segments} segments, but needs at least 1")
        if fold_div < 2:
            raise ValueError(f"TemporalShift got fold_div {fold_div}, but needs at least 2 (channels move in two directions)")
        self.num_segments = num_segments
        self.fold_div = fold_div

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Shift; see the class."""
        x_BTCHW = x_NCHW.view(-1, self.num_segments, *x_NCHW.shape[1:])
        fold = x_NCHW.shape[1] // self.fold_div
        shifted = torch.zeros_like(x_BTCHW)  # in the layout of its input
        shifted[:, :-1, :fold] = x_BTCHW[:, 1:, :fold]
        shifted[:, 1:, fold : 2 * fold] = x_BTCHW[:, :-1, fold : 2 * fold]
        shifted[:, :, 2 * fold :] = x_BTCHW[:, :, 2 * fold :]
        return shifted.view(x_NCHW.shape)
