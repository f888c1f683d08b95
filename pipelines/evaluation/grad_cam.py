"""Grad-CAM: which places of a clip raised the score of a class.

Selvaraju et al.: Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV 2017,
https://arxiv.org/abs/1610.02391, equations 1 and 2, by the package `grad-cam`, on a network's last map (`models.last_map`).

A clip is one volume of T frames: a channel has one weight, the mean of its gradient over all places and segments, and its maps
share one scale. For a network that averages the logits of its frames these are the weights of each frame too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.insight import classify_map, last_map
from pipelines.evaluation.figures import draw_contact_sheet
from pipelines.evaluation.overlay import enlarge, overlay

if TYPE_CHECKING:
    from models.classifier import VideoClassifier

Strip = tuple[str, npt.NDArray[np.uint8], npt.NDArray[np.float32] | None]
"""A title, frames [T, H, W, 3] and the heat [t, h, w] that covers them; None leaves them as they are."""


class _FromLastMap(nn.Module):
    """A network whose last map passes a module of its own, for the package to look at; what comes before gets no gradient."""

    def __init__(self, model: "VideoClassifier") -> None:
        super().__init__()
        self.model = model
        self.seen = nn.Identity()

    def forward(self, clips_BT3HW: Tensor) -> Tensor:
        with torch.no_grad():
            map_BCTHW = last_map(self.model, clips_BT3HW)
        return classify_map(self.model, self.seen(map_BCTHW.requires_grad_()))


def grad_cam(model: "VideoClassifier", clip_1T3HW: Tensor, label: int) -> npt.NDArray[np.float32]:
    """Where a clip shows what raises the logit of a class, in float32 whatever the precision of the training.

    Args:
        model: in evaluation mode; gradients of its parameters are cleared.
        clip_1T3HW: one clip, as `model.prepare` gives it.
        label: id of the class.

    Returns:
        Numbers from 0 to 1, of which the greatest is 1 unless nothing raises it, as large as the last map: [T, h, w] (of
        3-D baselines T may be less than the segments).
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    class MapSized(GradCAM):  # type: ignore[misc]  # "has type Any": the package has no types
        def get_target_width_height(self, input_tensor: Any) -> None:
            """The map is not enlarged: the package sets the middles of the outer places on the picture's edge."""

    network = _FromLastMap(model)
    found = MapSized(network, [network.seen])(clip_1T3HW, [ClassifierOutputTarget(label)])
    model.zero_grad(set_to_none=True)
    heat: npt.NDArray[np.float32] = found[0]
    return heat


def draw_grad_cam(path: Path, strips: Sequence[Strip]) -> Path:
    """Draw strips of frames under what Grad-CAM found.

    Args:
        path: of the PNG.
        strips: in order.
    """
    rows = [
        (title, list(frames if heat is None else overlay(frames, enlarge(heat, *frames.shape[:3]))))
        for title, frames, heat in strips
    ]
    return draw_contact_sheet(path, rows)
