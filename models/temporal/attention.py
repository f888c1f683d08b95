"""Self-attention over the positions of a feature map.

Cappuccio, Paliotta: Self-Attention Gate-Shift Networks for Video Action Recognition, equations 1 to 4, after Zhang, Goodfellow,
Metaxas, Odena: Self-Attention Generative Adversarial Networks, ICML 2019, https://arxiv.org/abs/1805.08318. The scope "divided"
is that of Bertasius, Wang, Torresani: Is Space-Time Attention All You Need for Video Understanding?, ICML 2021,
https://arxiv.org/abs/2102.05095; heads and the division by a square root are those of Vaswani et al.: Attention Is All You
Need, NeurIPS 2017, https://arxiv.org/abs/1706.03762.

Legend: B clips, T segments, N = B * T frames (clips outermost), C channels, H x W map, G groups of M positions that attend to
one another, A heads, D channels of a head, P chosen positions. A name such as x_NCHW gives the axes.

Against the paper: its text has attention over space and time, and two matrices W_h and W_v; its published code attends within
each frame and has one C -> C convolution. Both are here (`scope`, `value`); the defaults follow the code: one head, and scores
that are not divided by the square root of their width (equation 1).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

SCOPES = ("frame", "temporal", "joint", "divided")
VALUES = ("fused", "bottleneck")

_SHORT_GROUP = 256
"""Groups of at most so many positions have their map written out (see `SelfAttention`)."""

_MEDIUM_GROUP = 1024
"""Groups of more than that and at most so many have theirs written out one group after the other, where that pays."""

_MAP_NUMBERS = 1 << 24
"""So many entries of the map exist at a time in `attention_received`: 64 MiB in float32."""


class SelfAttention(nn.Module):
    """Add to every position what it finds at the others, scaled by a learned gamma that starts at 0.

        s_ij    = f(x_i)^T g(x_j)                       (1)  key f, query g: 1 x 1 convolutions C -> C/8
        beta_ji = softmax over i of s_ij                (2)
        o_j     = v(sum over i of beta_ji h(x_i))       (3)
        y_j     = gamma o_j + x_j                       (4)

    The scope says to which positions i a position j attends:

        frame       all H * W of its frame (the published code)
        temporal    its own place in all T segments of its clip
        joint       all T * H * W of its clip (the paper's text)
        divided     temporal, then frame, as in TimeSformer: two attentions one behind the other, each with its own weights and
                    its own gamma. The frame's have the usual names, those over time are in the submodule `temporal`

    With `value="fused"` v and h are one convolution h: C -> C (as in the published code; with one head the same function, since
    the weights beta sum to 1). With "bottleneck" h is C -> C/2 and v is C/2 -> C, at the same cost.

    With A heads, f, g and h are cut into A equal parts, each part has its own beta, and the sums are put side by side before v.

    Memory: the map of a long group (over 1,024 positions) is never stored: `scaled_dot_product_attention` does that
    only if queries, keys and values are equally wide, hence queries and keys are padded with zeros (14 MB instead of 474 MB for
    8 frames of 28 x 28 as one group, and faster). The map of a short group (up to 256) is written out: at most 256 numbers
    a position, and on a CPU two to three times as fast as padding (38 against 12 ms, forward and backward, for 32 frames of
    14 x 14 x 160 in bf16 on one thread, November 2026). Groups between them take the way of the long ones, except where a map
    that fits the cache is faster, in main memory with eager execution: there they are done one after the other, with one map
    at a time, made again in the backward pass (16 frames of 28 x 28 x 128 with all of this module: 194 against 114 ms in bf16,
    240 against 159 ms in float32, likewise).

    Precision: under autocast f, g, h and the sums of equation 3 are rounded to the lower type, and so is beta before these
    sums; scores, their softmax and what sums add up in are float32.

    Args:
        channels: C; a multiple of 8.
        num_segments: T, at least 1; used by all scopes but "frame".
        scope: one of `SCOPES`.
        value: one of `VALUES`.
        scaled: divide scores by the square root of the width of a head's queries, C / 8 / num_heads.
        num_heads: A; divides C / 8.

    Attributes:
        bypassed: pass the map on as it is, which is what gammas of 0 give, at no cost; False at first (`models.attend_only`).

    Shape:
        input and output: [N, C, H, W] with N = B * T, clips outermost.

    Raises:
        ValueError: for an argument outside its range; from `forward`, if N is not a multiple of T (scopes but "frame").

    Example:
        >>> x_NCHW = torch.randn(2 * 4, 16, 7, 7)
        >>> torch.equal(SelfAttention(channels=16, num_segments=4)(x_NCHW), x_NCHW)
        True
    """

    def __init__(
        self,
        channels: int,
        num_segments: int,
        *,
        scope: str = "frame",
        value: str = "fused",
        scaled: bool = False,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        _check(channels, num_segments, scope, value, num_heads)
        self.num_segments = num_segments
        self.scope = scope
        self.num_heads = num_heads
        self.bypassed = False
        self.score_scale = 1 / math.sqrt(channels // 8 // num_heads) if scaled else 1.0
        width = channels if value == "fused" else channels // 2
        self.gamma = nn.Parameter(torch.zeros(1))
        self.query_conv = nn.Conv2d(channels, channels // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(channels, channels // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(channels, width, kernel_size=1)
        self.output_conv = nn.Identity() if value == "fused" else nn.Conv2d(width, channels, kernel_size=1)
        self.temporal: nn.Module = nn.Identity()
        if scope == "divided":
            self.temporal = SelfAttention(
                channels, num_segments, scope="temporal", value=value, scaled=scaled, num_heads=num_heads
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Equations 1 to 4; see the class."""
        if self.bypassed:
            return x_NCHW
        x_NCHW = self.temporal(x_NCHW)
        query_GAMD, key_GAMD = self._grouped(self.query_conv(x_NCHW)), self._grouped(self.key_conv(x_NCHW))
        value_GAMD = self._grouped(self.value_conv(x_NCHW))
        if query_GAMD.shape[2] <= _SHORT_GROUP:
            found_GAMD = _beta(query_GAMD, key_GAMD, self.score_scale).to(value_GAMD.dtype) @ value_GAMD
        elif query_GAMD.shape[2] <= _MEDIUM_GROUP and query_GAMD.is_cpu and not torch.compiler.is_compiling():
            found_GAMD = _OneByOne.apply(query_GAMD, key_GAMD, value_GAMD, self.score_scale)
        else:
            padding = (0, value_GAMD.shape[3] - query_GAMD.shape[3])
            query_GAMD, key_GAMD = functional.pad(query_GAMD, padding), functional.pad(key_GAMD, padding)
            found_GAMD = functional.scaled_dot_product_attention(query_GAMD, key_GAMD, value_GAMD, scale=self.score_scale)
        o_NCHW: Tensor = self.output_conv(self._ungrouped(found_GAMD, x_NCHW.shape))
        return x_NCHW + self.gamma.to(x_NCHW.dtype) * o_NCHW

    def attention_rows(self, x_NCHW: Tensor, positions_P: Tensor | None = None) -> Tensor:
        """Where chosen positions look: rows of beta (equation 2), for analysis. Only these rows are computed.

        Positions are numbered within their group: h * W + w in a frame (scopes "frame" and "divided"; of the latter, these are
        the rows of its second attention, and `temporal.attention_rows` gives those of its first), t over time ("temporal"),
        (t * H + h) * W + w in a clip ("joint"). The groups are the N frames, the B * H * W places, or the B clips.

        Args:
            x_NCHW: what `forward` gets (of a network: what a forward pre-hook on this module sees).
            positions_P: the positions j that look, integers in [0, M); None for all of them, which gives the whole map.

        Returns:
            [G, A, P, M], in float32 unless the map is float64; the weights of each row are in [0, 1] and sum to 1.

        Raises:
            ValueError: if `positions_P` is not a vector of integers in [0, M).
        """
        x_NCHW = self.temporal(x_NCHW)
        query_GAMD, key_GAMD = self._grouped(self.query_conv(x_NCHW)), self._grouped(self.key_conv(x_NCHW))
        if positions_P is not None:
            num_positions = query_GAMD.shape[2]
            if positions_P.dim() != 1 or positions_P.is_floating_point() or positions_P.dtype == torch.bool:
                found = f"{positions_P.dtype} of shape {list(positions_P.shape)}"
                raise ValueError(f"positions are {found}, but must be a vector of integers")
            if ((positions_P < 0) | (positions_P >= num_positions)).any():
                raise ValueError(f"positions must be in [0, {num_positions}), but {positions_P.tolist()} were given")
            query_GAMD = query_GAMD[:, :, positions_P]
        return _beta(query_GAMD, key_GAMD, self.score_scale)

    def attention_received(self, x_NCHW: Tensor) -> Tensor:
        """How much each position is looked at: the mean of its column of beta over all j of its group, for analysis.

        Of "divided" it is that of the second attention, as in `attention_rows`. A part of the map exists at a time.

        Args:
            x_NCHW: what `forward` gets.

        Returns:
            [N, H, W], the mean over heads, in the type of `attention_rows`; over each group it sums to 1.
        """
        x_NCHW = self.temporal(x_NCHW)
        query_GAMD, key_GAMD = self._grouped(self.query_conv(x_NCHW)), self._grouped(self.key_conv(x_NCHW))
        num_groups, num_heads, num_positions, _ = query_GAMD.shape
        rows = max(1, _MAP_NUMBERS // (num_groups * num_heads * num_positions))
        parts = [_beta(part, key_GAMD, self.score_scale).sum(dim=(1, 2)) for part in torch.split(query_GAMD, rows, dim=2)]
        received_GM = torch.stack(parts).sum(dim=0) / (num_heads * num_positions)
        return self._ungrouped(received_GM[:, None, :, None], x_NCHW.shape)[:, 0]

    def _grouped(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] to [G, A, M, D], the channels of a head next to one another in memory, as the fast path demands."""
        x_NMC = x_NCHW.flatten(2).transpose(1, 2).contiguous()
        if self.scope in ("temporal", "joint"):
            if x_NMC.shape[0] % self.num_segments:
                raise ValueError(f"{x_NMC.shape[0]} frames are no whole number of clips of {self.num_segments} segments")
            x_BTMC = x_NMC.view(-1, self.num_segments, *x_NMC.shape[1:])
            x_NMC = x_BTMC.transpose(1, 2).flatten(0, 1) if self.scope == "temporal" else x_BTMC.flatten(1, 2)
        return x_NMC.view(*x_NMC.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _ungrouped(self, x_GAMD: Tensor, shape: torch.Size) -> Tensor:
        """The way back: [G, A, M, D] to [N, C, H, W], in channels_last memory."""
        num_frames, _, height, width = shape
        x_GMC = x_GAMD.transpose(1, 2).flatten(2)
        if self.scope == "temporal":
            x_GMC = x_GMC.view(-1, height * width, *x_GMC.shape[1:]).transpose(1, 2)
        return x_GMC.reshape(num_frames, height, width, -1).permute(0, 3, 1, 2)


def _beta(query_APD: Tensor, key_AMD: Tensor, scale: float) -> Tensor:
    """Equations 1 and 2, written out: [..., A, P, M], in float32 or, from float64, in float64."""
    dtype = torch.promote_types(query_APD.dtype, torch.float32)
    with torch.autocast(query_APD.device.type, enabled=False):
        score_APM = scale * query_APD.to(dtype) @ key_AMD.to(dtype).transpose(-2, -1)
        return score_APM.softmax(dim=-1)


class _OneByOne(torch.autograd.Function):
    """The sums of equation 3 from queries, keys [G, A, M, D] and values [G, A, M, E]; at any time one group's map exists.

    The gradient, with o the sums and d for the gradient by what follows, is that of a product and a softmax:

        dh = beta^T do        dbeta = do h^T        ds = beta . (dbeta - row sums of beta . dbeta)
        dg = scale ds f       df = scale ds^T g
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The sums [G, A, M, E]."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        found = torch.empty_like(value)
        for group in range(len(query)):
            beta = _beta(query[group], key[group], scale).to(value.dtype)
            torch.matmul(beta, value[group], out=found[group])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dfound: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of queries, keys and values."""
        query, key, value = ctx.saved_tensors
        dquery, dkey, dvalue = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for group in range(len(query)):
            beta = _beta(query[group], key[group], ctx.scale)
            dvalue[group] = beta.to(value.dtype).transpose(1, 2) @ dfound[group]
            dbeta = (dfound[group] @ value[group].transpose(1, 2)).to(beta.dtype)
            dscore = torch.ops.aten._softmax_backward_data(dbeta, beta, 2, beta.dtype).mul_(ctx.scale).to(query.dtype)
            dquery[group] = dscore @ key[group]
            dkey[group] = dscore.transpose(1, 2) @ query[group]
        return dquery, dkey, dvalue, None


def _check(channels: int, num_segments: int, scope: str, value: str, num_heads: int) -> None:
    if channels <= 0 or channels % 8:
        raise ValueError(f"SelfAttention got {channels} channels, but needs a positive multiple of 8 for queries and keys")
    if num_segments < 1:
        raise ValueError(f"SelfAttention got {num_segments} segments, but needs at least 1")
    if scope not in SCOPES:
        raise ValueError(f"attention scope {scope!r} is not known; known are: {', '.join(SCOPES)}")
    if value not in VALUES:
        raise ValueError(f"attention value {value!r} is not known; known are: {', '.join(VALUES)}")
    if num_heads < 1 or channels // 8 % num_heads:
        raise ValueError(
            f"{num_heads} heads cannot share {channels // 8} channels of queries; give a divisor of {channels // 8}"
        )
