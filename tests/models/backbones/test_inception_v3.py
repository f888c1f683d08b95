import pytest
import torch
from torch import nn

from models.backbones.inception_v3 import BLOCKS, InceptionV3

SLOT_MODULES = {
    "mixed": ("mixed_conv", 64),
    "mixed_1": ("mixed_1_conv", 64),
    "mixed_2": ("mixed_2_conv", 64),
    "mixed_3": ("mixed_3_tower_conv", 64),
    "mixed_4": ("mixed_4_conv", 192),
    "mixed_5": ("mixed_5_conv", 192),
    "mixed_7": ("mixed_7_conv", 192),
    "mixed_8": ("mixed_8_tower_conv", 192),
    "mixed_9": ("mixed_9_conv", 320),
    "mixed_10": ("mixed_10_conv", 320),
}


class Recorder(nn.Module):
    """Stands in a slot and remembers the map that passed."""

    def __init__(self, slot, channels):
        super().__init__()
        self.slot, self.channels, self.seen = slot, channels, None

    def forward(self, x):
        self.seen = x
        return x


def test_the_slots_are_those_that_gsm_published():
    assert tuple(SLOT_MODULES) == InceptionV3.SLOTS
    assert set(BLOCKS) - set(SLOT_MODULES) == {"mixed_6"}


def test_a_slot_lies_between_its_convolution_and_its_batch_norm():
    backbone = InceptionV3(Recorder).eval()
    inputs_of_norms = {}
    for slot, (unit, _) in SLOT_MODULES.items():
        norm = backbone.get_submodule(f"{unit}_batchnorm")
        norm.register_forward_hook(lambda _, args, __, slot=slot: inputs_of_norms.__setitem__(slot, args[0]))
    with torch.inference_mode():
        backbone(torch.randn(1, 3, 229, 229).contiguous(memory_format=torch.channels_last))
    sides = {}
    for slot, (unit, channels) in SLOT_MODULES.items():
        recorder = backbone.get_submodule(f"gsm_{unit}_Conv2D")
        assert (recorder.slot, recorder.channels, recorder.seen.shape[1]) == (slot, channels, channels)
        assert inputs_of_norms[slot] is recorder.seen
        assert recorder.seen.is_contiguous(memory_format=torch.channels_last)
        sides[slot] = recorder.seen.shape[-1]
    assert list(sides.values()) == [27] * 4 + [13] * 4 + [6] * 2


@pytest.mark.parametrize("height, width", [(69, 69), (75, 80), (96, 101)])
def test_any_size_from_69_pixels_on(height, width):
    with torch.inference_mode():
        features = InceptionV3().eval()(torch.randn(1, 3, height, width))
    assert features.shape == (1, InceptionV3.num_features)
    assert features.isfinite().all()


def test_below_69_pixels_nothing_is_left_of_the_map():
    with pytest.raises(RuntimeError), torch.inference_mode():
        InceptionV3().eval()(torch.randn(1, 3, 68, 68))


def test_signals_keep_their_size_through_random_weights():
    with torch.no_grad():
        features = InceptionV3()(torch.randn(4, 3, 75, 75))
    assert 0.1 < features.std() < 10
