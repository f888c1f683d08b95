"""Self-attention over the positions of a feature map.

Cappuccio, Paliotta: Self-Attention Gate-Shift Networks for Video Action Recognition, equations 1 to 4, after Zhang, Goodfellow,
Metaxas, Odena: Self-Attention Generative Adversarial Networks, ICML 2019, https://arxiv.org/abs/1805.08318.

Legend: B clips, T segments, N = B * T frames (clips outermost), C channels, H x W map, G groups of M positions that attend to
one another. A name such as x_NCHW gives the axes.

Against the paper: its text has attention over space and time, and two matrices W_h and W_v; its published code attends within
each frame and has one C -> C convolution. Both are here (`scope`, `value`); the defaults follow the code. Scores are not
divided by the square root of the width (equation 1).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

SCOPES = ("frame", "joint")
VALUES = ("fused", "bottleneck")


class SelfAttention(nn.Module):
    """Add to every position what it finds at the others, scaled by a learned gamma that starts at 0.

        s_ij    = f(x_i)^T g(x_j)                       (1)  key f, query g: 1 x 1 convolutions C -> C/8
        beta_ji = softmax over i of s_ij                (2)
        o_j     = v(sum over i of beta_ji h(x_i))       (3)
        y_j     = gamma o_j + x_j                       (4)

    With `value="fused"` v and h are one convolution h: C -> C (as in the published code; the same function, since the weights
    beta sum to 1). With "bottleneck" h is C -> C/2 and v is C/2 -> C, at the same cost.

    The map of all pairs is never stored: queries and keys are padded with zeros to the width of the values, because otherwise
    `scaled_dot_product_attention` falls back to storing it (475 MB instead of 17 MB for 8 frames of 28 x 28, and slower).

    Args:
        channels: C; a multiple of 8.
        num_segments: T; needed by the scope "joint".
        scope: "frame", every position attends to those of its own frame, or "joint", to those of its whole clip.
        value: "fused" or "bottleneck".

    Shape:
        input and output: [N, C, H, W] with N = B * T, clips outermost.

    Raises:
        ValueError: if `channels` is not a positive multiple of 8, or `scope` or `value` is not one of those above.

    Example:
        >>> x_NCHW = torch.randn(2 * 4, 16, 7, 7)
        >>> torch.equal(SelfAttention(channels=16, num_segments=4)(x_NCHW), x_NCHW)
        True
    """

    def __init__(self, channels: int, num_segments: int, *, scope: str = "frame", value: str = "fused") -> None:
        super().__init__()
        if channels <= 0 or channels % 8:
            raise ValueError(f"SelfAttention got {channels} channels, but needs a positive multiple of 8 for queries and keys")
        if scope not in SCOPES:
            raise ValueError(f"attention scope {scope!r} is not known; known are: {', '.join(SCOPES)}")
        if value not in VALUES:
            raise ValueError(f"attention value {value!r} is not known; known are: {', '.join(VALUES)}")
        self.frames_per_group = num_segments if scope == "joint" else 1
        width = channels if value == "fused" else channels // 2
        self.gamma = nn.Parameter(torch.zeros(1))
        self.query_conv = nn.Conv2d(channels, channels // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(channels, channels // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(channels, width, kernel_size=1)
        self.output_conv = nn.Identity() if value == "fused" else nn.Conv2d(width, channels, kernel_size=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Equations 1 to 4; see the class."""
        value = self._positions(self.value_conv(x_NCHW))
        padding = (0, value.shape[-1] - self.query_conv.out_channels)
        query = functional.pad(self._positions(self.query_conv(x_NCHW)), padding)
        key = functional.pad(self._positions(self.key_conv(x_NCHW)), padding)
        found_G1MC = functional.scaled_dot_product_attention(query, key, value, scale=1.0)
        num_frames, _, height, width = x_NCHW.shape
        found_NCHW = found_G1MC.reshape(num_frames, height, width, -1).permute(0, 3, 1, 2)
        o_NCHW: Tensor = self.output_conv(found_NCHW)
        return x_NCHW + self.gamma.to(x_NCHW.dtype) * o_NCHW

    def _positions(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] to [G, 1, M, C] (one head), channels next to one another in memory as the fast path demands."""
        num_groups = x_NCHW.shape[0] // self.frames_per_group
        return x_NCHW.flatten(2).transpose(1, 2).contiguous().view(num_groups, 1, -1, x_NCHW.shape[1])
