import pytest
import torch
import torchvision
from torch import nn

from models.backbones.resnet import ResNet, resnet_slots


class Recorder(nn.Module):
    """Stands in a slot and remembers the map that passed."""

    def __init__(self, slot, channels):
        super().__init__()
        self.slot, self.channels, self.seen = slot, channels, None

    def forward(self, x):
        self.seen = x
        return x


@pytest.mark.parametrize("depth", [18, 50])
def test_names_and_function_are_torchvisions(depth):
    published = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    published.fc = nn.Identity()
    backbone = ResNet(depth).eval()
    assert list(backbone.state_dict()) == list(published.state_dict())
    backbone.load_state_dict(published.state_dict())
    frames = torch.randn(2, 3, 64, 48)
    with torch.inference_mode():
        assert torch.equal(backbone(frames), published(frames))
        assert backbone(frames).shape == (2, backbone.num_features)


def test_all_depths_have_their_blocks_as_slots():
    assert [len(resnet_slots(depth)) for depth in (18, 50, 101)] == [8, 16, 33]
    with torch.device("meta"):
        for depth in (18, 50, 101):
            backbone = ResNet(depth)
            assert resnet_slots(depth) == backbone.SLOTS
            assert all(isinstance(backbone.get_submodule(f"{slot}.gsm"), nn.Identity) for slot in backbone.SLOTS)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_slot_lies_in_the_residual_branch_around_its_first_convolution(depth):
    backbone = ResNet(depth, Recorder, make_branch_input=Recorder).eval()
    backbone(torch.randn(1, 3, 64, 64))
    sides = {}
    for slot in backbone.SLOTS:
        block = backbone.get_submodule(slot)
        assert (block.gsm.slot, block.gsm.channels) == (slot, block.conv1.out_channels)
        assert (block.branch_input.slot, block.branch_input.channels) == (slot, block.conv1.in_channels)
        torch.testing.assert_close(block.gsm.seen, block.conv1(block.branch_input.seen))
        sides[slot] = block.branch_input.seen.shape[-1]
    assert [sides["layer1.0"], sides["layer2.1"], sides["layer3.1"], sides["layer4.1"]] == [16, 8, 4, 2]


def test_the_skip_connection_passes_the_slot_by():
    class Nothing(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    block = ResNet(50, lambda slot, channels: Nothing()).eval().get_submodule("layer1.1")
    frames = torch.rand(1, 256, 8, 8)
    torch.testing.assert_close(block(frames), frames)  # a fresh batch norm of zeros is zero


@pytest.mark.parametrize("height, width", [(32, 32), (33, 47), (80, 100)])
def test_any_size_from_32_pixels_on(height, width):
    features = ResNet(18).eval()(torch.randn(2, 3, height, width))
    assert features.shape == (2, 512)
    assert features.isfinite().all()


def test_channels_last_is_kept():
    backbone = ResNet(18, Recorder).eval()
    backbone(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    maps = [module.seen for module in backbone.modules() if isinstance(module, Recorder)]
    assert all(seen.is_contiguous(memory_format=torch.channels_last) for seen in maps)


def test_another_depth_is_refused():
    with pytest.raises(ValueError, match="there is no ResNet of depth 34 here; known are: 18, 50, 101"):
        ResNet(34)
