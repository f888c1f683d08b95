import pytest
import torch
from torch import nn

from models.backbones.bn_inception import BLOCKS, BNInception, average_3x3
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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("height, width", [(1, 1), (5, 7), (14, 14)])
def test_the_average_and_its_gradient_are_those_of_pytorch(height, width, memory_format):
    x = torch.randn(2, 4, height, width, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    target = torch.randn_like(x)
    expected = nn.functional.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
    averaged = average_3x3(x)
    assert torch.equal(averaged, expected)
    assert averaged.is_contiguous(memory_format=memory_format)
    [mine], [other] = (torch.autograd.grad((y * target).sum(), [x]) for y in (averaged, expected))
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_average_is_computed_by_averaging():
    """PyTorch's own backward pass is five times as slow in bfloat16; see `average_3x3`."""
    y = BNInception()(torch.randn(2, 3, 32, 32)).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        y.backward()
    names = {event.key for event in recorded.key_averages()}
    assert "aten::avg_pool2d" in names
    assert "aten::avg_pool2d_backward" not in names


def test_channels_last_is_kept_throughout():
    backbone = BNInception(Recorder).eval()
    backbone(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    maps = [module.seen for module in backbone.modules() if isinstance(module, Recorder)]
    assert all(seen.is_contiguous(memory_format=torch.channels_last) for seen in maps)


def test_signals_keep_their_size_through_random_weights():
    """He initialisation: features neither vanish nor explode, in training mode with any seed."""
    features = BNInception()(torch.randn(8, 3, 64, 64))
    assert 0.1 < features.std() < 10
