"""What a network costs, and what its authors reported: parameters, multiply-accumulates, maps of attention, top-1.

Nothing is computed on numbers: the network is made and run on torch's meta device, which knows shapes alone.

Legend: B clips, T segments, C channels, H x W map, S = H * W positions of a frame.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.factory import build_model, model_slots
from models.temporal.attention import SelfAttention

_MAP_BYTES = 4


class ModelFacts(NamedTuple):
    """Facts of one network.

    parameters: trainable numbers.
    macs_per_clip: multiply-accumulates of a forward pass of one clip at the usual size of its frames (half of the counted
        floating-point operations of convolutions and matrix products).
    attention_map_bytes: memory of all maps of attention of one clip in float32 if they were stored; they are not.
    published_top1: the fraction of Something-V1's validation videos that the published network got right (ImageNet weights, one
        clip, centre crop); None where there is no number.
    source: the frames of a clip and the paper of that number; else "".
    """

    parameters: int
    macs_per_clip: int
    attention_map_bytes: int
    published_top1: float | None
    source: str


_SETTING = "{} frames; {}"
_SA_GSM = "SA-GSM paper, table 2"
_PUBLISHED = {
    "tsn_bn_inception": (0.1752, _SETTING.format(16, _SA_GSM)),
    "trn_bn_inception": (0.3444, _SETTING.format(8, _SA_GSM)),
    "tsm_resnet50": (0.456, _SETTING.format(8, "TSM, arXiv 1811.08383")),
    "gsm_bn_inception": (0.4956, _SETTING.format(16, _SA_GSM)),
    "gsm_inception_v3": (0.5063, _SETTING.format(16, _SA_GSM)),
}
"""Of SA-GSM itself there is no number to stand beside these: the paper's was trained on 40,000 of the 86,017 videos."""


def describe_model(name: str, num_classes: int, num_segments: int, *, pixels: int | None = None, **options: Any) -> ModelFacts:
    """Count what a network costs, without computing anything.

    Args:
        name: one of `models.list_models()`.
        num_classes: K, at least 1.
        num_segments: T, at least 1, for TRN at least 2.
        pixels: height and width of the frames; None is the usual size of the backbone.
        options: those of `models.model_options(name)`.

    Raises:
        ValueError: as `models.create_model`.

    Example:
        >>> facts = describe_model("tsn_bn_inception", num_classes=174, num_segments=8)
        >>> facts.parameters, facts.published_top1
        (10448590, 0.1752)
    """
    parameters, macs, attentions = _measure(name, num_classes, num_segments, pixels, options)
    macs += sum(attention.macs(num_pairs) for attention, num_pairs in attentions)
    heads = int(options.get("num_heads", 1))
    top1, source = _PUBLISHED.get(name, (None, ""))
    num_pairs = sum(num_pairs for _, num_pairs in attentions)
    return ModelFacts(parameters, macs, heads * _MAP_BYTES * num_pairs, top1, source)


def slot_macs(
    name: str, num_classes: int, num_segments: int, *, pixels: int | None = None, **options: Any
) -> tuple[int, dict[str, int]]:
    """The multiply-accumulates of one clip without attention, and what attention in each slot adds to them.

    What a placement costs is the sum, so that a thousand placements need not be counted one by one.

    Args:
        name: one of `models.list_models()` with attention.
        num_classes: K.
        num_segments: T.
        pixels: as in `describe_model`.
        options: as in `describe_model`; any placement is left aside.

    Raises:
        ValueError: as `models.create_model`.
    """
    _, macs, attentions = _measure(name, num_classes, num_segments, pixels, options | {"placement": "all"})
    added = [attention.macs(num_pairs) for attention, num_pairs in attentions]
    return macs, dict(zip(model_slots(name), added, strict=True))


def _measure(
    name: str, num_classes: int, num_segments: int, pixels: int | None, options: dict[str, Any]
) -> "tuple[int, int, list[tuple[_Outline, int]]]":
    """Parameters, multiply-accumulates without attention, and of each attention an outline and its pairs of positions."""
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes, num_segments=num_segments, **options).eval()
        side = pixels or int(model.base_model.input_pixels)  # type: ignore[arg-type]  # "Tensor | Module"
        clips = torch.empty(1, num_segments, 3, side, side)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    attentions = _take_out_attention(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clips)
    scope = str(options.get("scope", "frame"))
    pairs = [_pairs(attention.seen, num_segments, scope) for attention in attentions]
    return parameters, counter.get_total_flops() // 2, list(zip(attentions, pairs, strict=True))


class _Outline(nn.Module):
    """Stands where attention stood, passes the map on and remembers its shape.

    The cost of attention is reckoned, not counted: how it is computed (padding, kernels) is no property of the network.
    """

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.kernels = [module.weight for module in attention.modules() if isinstance(module, nn.Conv2d)]
        self.query_channels = int(attention.query_conv.out_channels)
        self.value_channels = int(attention.value_conv.out_channels)
        self.seen = torch.Size()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        self.seen = x_NCHW.shape
        return x_NCHW

    def macs(self, num_pairs: int) -> int:
        """Those of the 1 x 1 convolutions, and of a query times a key and a weight times a value for each pair."""
        num_positions = self.seen[0] * self.seen[2] * self.seen[3]
        in_convolutions = num_positions * sum(kernel.numel() for kernel in self.kernels)
        return in_convolutions + num_pairs * (self.query_channels + self.value_channels)


def _take_out_attention(model: nn.Module) -> list[_Outline]:
    outlines = []
    for parent in list(model.modules()):
        if isinstance(parent, SelfAttention):
            continue  # what is inside (the scope "divided" has two) is reckoned with it
        for name, child in list(parent.named_children()):
            if isinstance(child, SelfAttention):
                outline = _Outline(child)
                setattr(parent, name, outline)
                outlines.append(outline)
    return outlines


def _pairs(shape: torch.Size, num_segments: int, scope: str) -> int:
    """How many pairs of positions of one clip look at each other: the entries of its map, a head."""
    positions = shape[2] * shape[3]
    in_frames = num_segments * positions**2
    in_time = positions * num_segments**2
    return {"frame": in_frames, "temporal": in_time, "joint": in_frames * num_segments, "divided": in_frames + in_time}[scope]
