import pytest
import torch

from models.backbones import slotted
from models.backbones.bn_inception import BNInception
from models.backbones.slotted import first_map


@pytest.fixture
def stem_calls(monkeypatch):
    """How many frames each call of the stem got; five frames of 32 pixels are as much as goes through it at a time."""
    calls = []
    monkeypatch.setattr(slotted, "_STEM_PIXELS", 5 * 32 * 32)
    stem = BNInception.stem
    monkeypatch.setattr(BNInception, "stem", lambda self, x: (calls.append(len(x)), stem(self, x))[1])
    return calls


def test_in_parts_the_stem_gives_the_same_map(stem_calls):
    backbone, frames = BNInception().eval(), torch.randn(12, 3, 32, 32).to(memory_format=torch.channels_last)
    whole = first_map(backbone, frames).detach()
    with torch.no_grad():
        parts = first_map(backbone, frames)
    assert stem_calls == [12, 5, 5, 2]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6 * whole.abs().max().item())
    assert parts.is_contiguous(memory_format=torch.channels_last)


def test_frames_larger_than_a_part_go_one_by_one(stem_calls):
    with torch.no_grad():
        first_map(BNInception().eval(), torch.randn(3, 3, 96, 96))
    assert stem_calls == [1, 1, 1]


def test_a_network_that_trains_sees_all_frames_at_once(stem_calls):
    backbone, frames = BNInception(), torch.randn(12, 3, 32, 32)
    first_map(backbone, frames)
    with torch.no_grad():
        first_map(backbone, frames)  # statistics may be gathered without gradients
    assert stem_calls == [12, 12]
