import pytest
import torch
from torch import nn

from models.backbones.bn_inception import BLOCKS, BNInception
from models.placement import SLOTS

SLOT_MODULES = {
    "3a": ("1x1", 64),
    "3b": ("1x1", 64),
    "3c": ("3x3_reduce", 128),
    "4a": ("1x1", 224),
    "4b": ("1x1", 192),
    "4c": ("1x1", 160),
    "4d": ("1x1", 96),
    "4e": ("3x3_reduce", 128),
    "5a": ("1x1", 352),
    "5b": ("1x1", 352),
}


class Recorder(nn.Module):
    """Stands in a slot and remembers the map that passed."""

    def __init__(self, slot, channels):
        super().__init__()
        self.slot, self.channels, self.seen = slot, channels, None

    def forward(self, x):
        self.seen = x
        return x


def test_the_blocks_are_the_slots():
    assert tuple(BLOCKS) == SLOTS


def test_a_slot_lies_between_its_convolution_and_its_batch_norm():
    backbone = BNInception(Recorder).eval()
    inputs_of_norms = {}
    for slot, (branch, _) in SLOT_MODULES.items():
        norm = backbone.get_submodule(f"inception_{slot}_{branch}_bn")
        norm.register_forward_hook(lambda _, args, __, slot=slot: inputs_of_norms.__setitem__(slot, args[0]))
    backbone(torch.randn(1, 3, 224, 224))
    sides = {}
    for slot, (branch, channels) in SLOT_MODULES.items():
        recorder = backbone.get_submodule(f"gsm_inception_{slot}_{branch}")
        assert (recorder.slot, recorder.channels, recorder.seen.shape[1]) == (slot, channels, channels)
        assert inputs_of_norms[slot] is recorder.seen
        sides[slot] = recorder.seen.shape[-1]
    assert sides == {slot: {"3": 28, "4": 14, "5": 7}[slot[0]] for slot in SLOTS}


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (64, 96), (80, 100), (75, 229)])
def test_any_size_from_32_pixels_on(height, width):
    features = BNInception().eval()(torch.randn(2, 3, height, width))
    assert features.shape == (2, BNInception.num_features)
    assert features.isfinite().all()


def test_padding_an_odd_map_adds_nothing_to_max_pooling():
    """The padded pooling equals pooling with minus infinity outside, since what is pooled has passed a ReLU."""
    from models.backbones.bn_inception import _halve

    x = torch.randn(2, 4, 5, 7).relu()
    edge = nn.functional.pad(x, (0, 1, 0, 1), value=float("-inf"))
    assert torch.equal(_halve(x), nn.functional.max_pool2d(edge, 3, 2, ceil_mode=True))
    assert _halve(x).shape[2:] == (3, 4)


def test_channels_last_is_kept_throughout():
    backbone = BNInception(Recorder).eval()
    backbone(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    maps = [module.seen for module in backbone.modules() if isinstance(module, Recorder)]
    assert all(seen.is_contiguous(memory_format=torch.channels_last) for seen in maps)


def test_signals_keep_their_size_through_random_weights():
    """He initialisation: features neither vanish nor explode, in training mode with any seed."""
    features = BNInception()(torch.randn(8, 3, 64, 64))
    assert 0.1 < features.std() < 10
