"""From clips to logits: a backbone on every frame, one linear layer, then the consensus over segments.

Wang et al.: Temporal Segment Networks, ECCV 2016, https://arxiv.org/abs/1608.00859. The names `base_model`, `new_fc` and
`consensus` and the initial values of `new_fc` are those of the code that TSN, TRN, TSM, GSM and SA-GSM share.

Legend: B clips, T segments, N = B * T frames (clips outermost), F what `new_fc` says of a frame, K classes.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.temporal.consensus import MeanConsensus
from models.temporal.relation import MultiScaleRelation

INPUT_FORMATS = {
    "unit_rgb": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "caffe_bgr": ((104.0, 117.0, 128.0), (1.0, 1.0, 1.0)),
}
"""name -> mean and deviation of each channel, in units of a byte (0 to 255) and in the network's order of channels: `unit_rgb`
has ImageNet's (0.485 and 0.229 of 255, ...), `caffe_bgr` those that the published BN-Inception expects."""

ROLES = ("weight", "bias", "norm", "gate", "gamma")


class VideoClassifier(nn.Module):
    """Classify clips: a backbone, `new_fc` on its features, and the consensus over segments.

    A backbone that takes whole clips (`takes_clips`, the 3-D baselines) has no segments to agree: `new_fc` gives the logits.

    Args:
        backbone: frames [N, 3, H, W] to features [N, num_features], or with `takes_clips` clips [B, 3, T, H, W] to
            [B, num_features]; says `num_features`, and `min_pixels` if it needs a least height and width.
        num_classes: K, at least 1.
        num_segments: T, at least 1; clips of another length are refused.
        dropout: probability in [0, 1) that a feature is dropped before the linear layer, in training.
        input_format: what `prepare` makes of bytes: "unit_rgb" or "caffe_bgr" (needed for published weights).
        consensus: from [B, T, F] to [B, K]; None: the mean over segments of the frames' logits (F = K).

    Shape:
        input: float [B, T, 3, H, W], H and W at least `backbone.min_pixels`. Output: logits [B, K].

    Raises:
        ValueError: for an argument outside its range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int,
        num_segments: int,
        dropout: float = 0.5,
        input_format: str = "unit_rgb",
        consensus: MeanConsensus | MultiScaleRelation | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1 or num_segments < 1:
            raise ValueError(f"num_classes is {num_classes} and num_segments is {num_segments}; both must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it is a probability in [0, 1)")
        if input_format not in INPUT_FORMATS:
            raise ValueError(f"input format {input_format!r} is not known; known are: {', '.join(INPUT_FORMATS)}")
        self.num_classes = num_classes
        self.num_segments = num_segments
        self.input_format = input_format
        self.base_model = backbone
        self.takes_clips = bool(getattr(backbone, "takes_clips", False))
        self.min_pixels = int(getattr(backbone, "min_pixels", 1))
        self.dropout = nn.Dropout(dropout)
        self.consensus = MeanConsensus(num_classes) if consensus is None else consensus
        self.new_fc = nn.Linear(int(backbone.num_features), self.consensus.frame_features)  # type: ignore[arg-type]  # "Tensor | Module"
        nn.init.normal_(self.new_fc.weight, std=0.001)
        nn.init.zeros_(self.new_fc.bias)
        mean, std = INPUT_FORMATS[input_format]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def class_tensors(self) -> list[str]:
        """Names of the parameters whose rows are classes, in the order of the labels that the network was trained with."""
        layers = [f"consensus.{name}" for name in self.consensus.class_layers] or ["new_fc"]
        return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]

    def prepare(self, clips_BT3HW: Tensor) -> Tensor:
        """Turn bytes into what `forward` takes, on the device where clips and network are.

        The frames that come back lie in channels_last memory, in which the network trains about twice as fast.

        Shape:
            input: uint8 RGB [B, T, 3, H, W]. Output: the same shape in the network's float type; channels in the order of
            `input_format`.

        Raises:
            ValueError: if the clips are not uint8.
        """
        if clips_BT3HW.dtype != torch.uint8:
            raise ValueError(f"prepare got clips of {clips_BT3HW.dtype}, but needs the bytes of RGB frames (torch.uint8)")
        frames = clips_BT3HW.flatten(0, 1)
        if self.input_format == "caffe_bgr":
            frames = frames.flip(1)
        frames = frames.to(self.mean.dtype, memory_format=torch.channels_last)
        # A row of pixels is one vector in memory, and so are mean and deviation: six times as fast on a CPU as loops of three.
        num_frames, _, height, width = frames.shape
        rows_NHX = frames.permute(0, 2, 3, 1).view(num_frames, height, -1)
        rows_NHX.sub_(self.mean.flatten().repeat(width)).div_(self.std.flatten().repeat(width))
        return frames.view(clips_BT3HW.shape)

    def forward(self, clips_BT3HW: Tensor) -> Tensor:
        """Logits of clips: float [B, T, 3, H, W] to [B, K].

        Raises:
            ValueError: as `frames`.
        """
        return self.classify(self.base_model(self.frames(clips_BT3HW)))

    def embed(self, clips_BT3HW: Tensor) -> Tensor:
        """What the classifier sees of each clip: the vector that alone decides its logits, without dropout.

        With the mean over segments as consensus it is the mean of the backbone's features: `new_fc`, being linear, makes the
        clip's logits of it. A consensus that looks at the order of segments sees more than a mean; there it is what `new_fc`
        says of each segment, one after another. Of a backbone that takes whole clips it is the features.

        Shape:
            input: float [B, T, 3, H, W]. Output: [B, D] in the type of the parameters; D is the backbone's `num_features`, or
            T times what `new_fc` says of a frame.

        Raises:
            ValueError: as `frames`.
        """
        features = self.base_model(self.frames(clips_BT3HW)).to(self.new_fc.weight.dtype)
        if self.takes_clips:
            return features  # type: ignore[no-any-return]
        if isinstance(self.consensus, MeanConsensus):
            return features.view(-1, self.num_segments, features.shape[-1]).mean(dim=1)  # type: ignore[no-any-return]
        with torch.autocast(features.device.type, enabled=False):
            return self.new_fc(features).view(len(clips_BT3HW), -1)  # type: ignore[no-any-return]

    def frames(self, clips_BT3HW: Tensor) -> Tensor:
        """What the backbone takes of clips: frames [B * T, 3, H, W], or whole clips [B, 3, T, H, W].

        Raises:
            ValueError: if the clips have another number of segments than the network was made for, another rank, or frames that
                are too small for the backbone.
        """
        if clips_BT3HW.dim() != 5 or clips_BT3HW.shape[1:3] != (self.num_segments, 3):
            expected = f"[B, {self.num_segments}, 3, H, W]"
            raise ValueError(f"the network got clips of shape {list(clips_BT3HW.shape)}, but was made for {expected}")
        height, width = clips_BT3HW.shape[3:]
        if min(height, width) < self.min_pixels:
            least = f"{self.min_pixels} x {self.min_pixels}"
            raise ValueError(f"the network got frames of {height} x {width} pixels, but its backbone needs at least {least}")
        return clips_BT3HW.transpose(1, 2) if self.takes_clips else clips_BT3HW.flatten(0, 1)

    def classify(self, features: Tensor) -> Tensor:
        """Logits of clips from what the backbone says of frames, or of clips if it takes those.

        Not under autocast: with the 8 bits of bfloat16, logits of different classes tie, and which of them is the first is
        chance (1.5 points of top-1 on 320 clips of the generated motion classes).

        Shape:
            input: float [B * T, F], or [B, F]. Output: [B, K], in the type of the parameters.
        """
        device_type = "cpu" if features.is_meta else features.device.type  # autocast knows no meta device
        with torch.autocast(device_type, enabled=False):
            logits: Tensor = self.new_fc(self.dropout(features.to(self.new_fc.weight.dtype)))
            if not self.takes_clips:
                logits = self.consensus(logits.view(-1, self.num_segments, logits.shape[-1]))
            return logits


def parameter_roles(model: nn.Module) -> dict[str, list[str]]:
    """Sort a network's trainable parameters by what an optimiser should do with them.

    Args:
        model: any network of this package; parameters that need no gradient are left out.

    Returns:
        The names of the parameters of each role: "norm" (scale and shift of batch norms), "gamma" (of SelfAttention), "bias"
        (of convolutions and linear layers), "gate" (kernels of GateShift), "weight" (the others). Each name is in one role.

    Example:
        >>> parameter_roles(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))["norm"]
        ['1.weight', '1.bias']
    """
    roles: dict[str, list[str]] = {role: [] for role in ROLES}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if parameter.requires_grad:
                roles[_role(module, name)].append(name)
    return roles


def _role(module: nn.Module, name: str) -> str:
    if isinstance(module, _BatchNorm):
        return "norm"
    if name.endswith("gamma"):
        return "gamma"
    if name.endswith("bias"):
        return "bias"
    return "gate" if name.endswith("conv3D.weight") else "weight"
