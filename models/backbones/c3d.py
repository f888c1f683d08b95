"""C3D.

Tran, Bourdev, Fergus, Torresani, Paluri: Learning Spatiotemporal Features with 3D Convolutional Networks, ICCV 2015,
https://arxiv.org/abs/1412.0767, figure 3: eight 3 x 3 x 3 convolutions, five max poolings, two layers of 4,096 units. No batch
norm, as published.

Legend: B clips, C channels, T frames, H x W map. A name such as x_BCTHW gives the axes.

Against the paper: the published network takes 16 frames of 112 x 112 pixels and nothing else. Here a pooling over time does
nothing once a single time step is left, and the last map is averaged to 1 x 4 x 4; both change nothing at the published size.
Weights start with He initialisation; the paper does not say how the authors' start.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_CONVS = {
    "conv1": (3, 64),
    "conv2": (64, 128),
    "conv3a": (128, 256),
    "conv3b": (256, 256),
    "conv4a": (256, 512),
    "conv4b": (512, 512),
    "conv5a": (512, 512),
    "conv5b": (512, 512),
}
_POOLED_AFTER = ("conv1", "conv2", "conv3b", "conv4b", "conv5b")


class C3D(nn.Module):
    """C3D without its classifier: clips to the 4,096 features of `fc7`.

    Args:
        dropout: probability in [0, 1) that a feature of `fc6` is dropped in training; 0.5 as published.

    Shape:
        input: [B, 3, T, H, W], any T, H and W at least 32. Output: [B, 4096].

    Raises:
        ValueError: if `dropout` is outside [0, 1).
    """

    SLOTS = ()
    takes_clips = True
    num_features = 4096
    input_pixels = 112
    min_pixels = 32

    def __init__(self, *, dropout: float = 0.5) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it is a probability in [0, 1)")
        for name, (in_channels, out_channels) in _CONVS.items():
            self.add_module(name, nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1))
        self.fc6 = nn.Linear(512 * 4 * 4, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # "Tensor | None": made with a bias

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Features of clips: [B, 3, T, H, W] to [B, 4096]."""
        return self.head(self.last_map(x_BCTHW))

    def last_map(self, x_BCTHW: Tensor) -> Tensor:
        """What `head` gets of clips: [B, 512, t, h, w]."""
        x = x_BCTHW
        for name in _CONVS:
            x = functional.relu(self.get_submodule(name)(x), inplace=True)
            if name in _POOLED_AFTER:
                x = _halve(x, time=name != "conv1", padding=int(name == "conv5b"))
        return x

    def head(self, x_BCTHW: Tensor) -> Tensor:
        """The last map to features."""
        x = functional.adaptive_avg_pool3d(x_BCTHW, (1, 4, 4)).flatten(1)
        x = self.dropout(functional.relu(self.fc6(x)))
        features: Tensor = torch.relu(self.fc7(x))
        return features


def _halve(x_BCTHW: Tensor, *, time: bool, padding: int) -> Tensor:
    """Max pooling of stride 2 over the map and, if `time` and there is more than one step, over time."""
    kernel = (2 if time and x_BCTHW.shape[2] > 1 else 1, 2, 2)
    return functional.max_pool3d(x_BCTHW, kernel, stride=kernel, padding=(0, padding, padding))
