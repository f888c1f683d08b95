"""Grad-CAM against its equations, written out."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.factory import build_model
from models.insight import classify_map, last_map
from pipelines.evaluation.grad_cam import draw_grad_cam, grad_cam

NUM_SEGMENTS = 3


def network(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=4, num_segments=NUM_SEGMENTS).eval()
    nn.init.normal_(model.new_fc.weight)
    return model


@pytest.mark.parametrize("name", ["gsm_resnet18", "trn_bn_inception", "sa_gsm_bn_inception", "r3d_18"])
def test_it_is_the_papers_equations(name):
    """Weights are the mean gradients of the logit (equation 1), the map the positive part of their sum (2), from 0 to 1."""
    model, clip = network(name), torch.randn(1, NUM_SEGMENTS, 3, 96, 96)
    with torch.no_grad():
        seen = last_map(model, clip)
    seen.requires_grad_()
    (gradient,) = torch.autograd.grad(classify_map(model, seen)[0, 2], seen)
    expected = (gradient.mean(dim=(2, 3, 4), keepdim=True) * seen).sum(dim=1)[0].clamp(min=0).detach()
    expected -= expected.min()
    found = grad_cam(model, clip, 2)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, (expected / expected.max()).numpy(), atol=1e-4)
    assert found.max() == pytest.approx(1, abs=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_bright_place_that_alone_speaks_for_the_class_is_where_the_map_is():
    """Of the last map only one number is not 0; class 1 is for it, class 0 against it."""
    model = network("tsn_resnet18")
    blank = torch.zeros(1, NUM_SEGMENTS, 3, 96, 96)

    def plant(_z, skip):
        planted = torch.zeros_like(skip)
        planted[1, 0, 2, 0] = 1.0  # segment 1, row 2, column 0
        return planted

    model.base_model.layer4[1].after = plant
    nn.init.zeros_(model.new_fc.weight)
    with torch.no_grad():
        model.new_fc.weight[1, 0], model.new_fc.weight[0, 0] = 1.0, -1.0
    found = grad_cam(model, blank, 1)
    assert np.argwhere(found > 0.5).tolist() == [[1, 2, 0]]
    assert not grad_cam(model, blank, 0).any()  # nothing raises the score of class 0
    assert not grad_cam(model, blank, 3).any()  # nor does anything matter to class 3


def test_strips_show_frames_and_what_raised_the_class(tmp_path):
    frames = np.full((NUM_SEGMENTS, 60, 60, 3), 100, np.uint8)
    heat = np.zeros((NUM_SEGMENTS, 2, 2), np.float32)
    heat[1, 0, 0] = 1.0
    path = draw_grad_cam(tmp_path / "cam.png", [("clip a", frames, None), ("what raises up", frames, heat)])
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] == 900
    half = len(pixels) // 2
    assert not ((pixels[:half].max(axis=2).astype(int) - pixels[:half].min(axis=2)) > 60).any()
    strong = np.argwhere((pixels[half:].max(axis=2).astype(int) - pixels[half:].min(axis=2)) > 60)
    assert len(strong)
    assert (strong[:, 1] // 300 == 1).all()  # the second of three frames
