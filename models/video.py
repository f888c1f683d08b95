"""Baselines that look at a clip as a volume: torchvision's video networks under torchvision's names, without classifiers.

R3D-18, MC3-18, R(2+1)D-18: Tran, Wang, Torresani, Ray, LeCun, Paluri: A Closer Look at Spatiotemporal Convolutions for Action
Recognition, CVPR 2018, https://arxiv.org/abs/1711.11248. S3D: Xie, Sun, Huang, Tu, Murphy: Rethinking Spatiotemporal Feature
Learning, ECCV 2018, https://arxiv.org/abs/1712.04851.

Legend: B clips, C channels, T frames, H x W map. A name such as x_BCTHW gives the axes.
"""

from typing import Any

from torch import Tensor, nn
from torchvision.models import video

_RESNETS = {"r2plus1d_18": video.r2plus1d_18, "mc3_18": video.mc3_18, "r3d_18": video.r3d_18}


class VideoResNet(nn.Module):
    """R3D-18, MC3-18 or R(2+1)D-18 without its classifier, with random weights.

    Args:
        name: "r3d_18" (3 x 3 x 3 convolutions throughout), "mc3_18" (in the first layer only) or "r2plus1d_18" (each split into
            space and time).

    Shape:
        input: [B, 3, T, H, W], any T, H and W at least 32 (published: 16 frames of 112 x 112). Output: [B, 512].

    Raises:
        ValueError: if `name` is not one of those above.
    """

    SLOTS = ()
    takes_clips = True
    num_features = 512
    input_pixels = 112
    min_pixels = 32

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in _RESNETS:
            raise ValueError(f"there is no video ResNet named {name!r}; known are: {', '.join(_RESNETS)}")
        published: Any = _RESNETS[name](weights=None)
        for child in ("stem", "layer1", "layer2", "layer3", "layer4", "avgpool"):
            self.add_module(child, getattr(published, child))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Features of clips: [B, 3, T, H, W] to [B, 512]."""
        return self.head(self.last_map(x_BCTHW))

    def last_map(self, x_BCTHW: Tensor) -> Tensor:
        """What `head` gets of clips: [B, 512, t, h, w]."""
        x = x_BCTHW
        for child in ("stem", "layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(child)(x)
        return x

    def head(self, x_BCTHW: Tensor) -> Tensor:
        """The last map to features."""
        features: Tensor = self.get_submodule("avgpool")(x_BCTHW)
        return features.flatten(1)


class S3D(nn.Module):
    """S3D without its classifier, with random weights.

    Against torchvision: features are averaged over the whole last map (torchvision first averages windows of 2 x 7 x 7, which
    is the same at the published 16 frames of 224 x 224 pixels), and the last max pooling rounds sizes up, so that clips of
    fewer frames pass; at the published size nothing is rounded.

    Shape:
        input: [B, 3, T, H, W], any T, H and W at least 32. Output: [B, 1024].
    """

    SLOTS = ()
    takes_clips = True
    num_features = 1024
    input_pixels = 224
    min_pixels = 32

    def __init__(self) -> None:
        super().__init__()
        self.features = video.s3d(weights=None).features
        for module in self.features.children():
            if isinstance(module, nn.MaxPool3d) and module.kernel_size == (2, 2, 2):
                module.ceil_mode = True

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Features of clips: [B, 3, T, H, W] to [B, 1024]."""
        return self.head(self.last_map(x_BCTHW))

    def last_map(self, x_BCTHW: Tensor) -> Tensor:
        """What `head` gets of clips: [B, 1024, t, h, w]."""
        x: Tensor = self.features(x_BCTHW)
        return x

    def head(self, x_BCTHW: Tensor) -> Tensor:
        """The last map to features."""
        return x_BCTHW.mean(dim=(2, 3, 4))
