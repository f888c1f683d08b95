import pytest
import torch
from torch.nn import functional

from models.temporal.gate_shift import GateShift

NUM_SEGMENTS = 4


def open_gates(channels, sign=1.0, **options):
    """A module whose gates are wide open everywhere (tanh of a large number is 1), so that all of a group moves."""
    gate_shift = GateShift(channels, NUM_SEGMENTS, **options).eval()
    torch.nn.init.constant_(gate_shift.conv3D.bias, sign * 100.0)
    return gate_shift


def by_definition(gate_shift, x):
    """The equations of the class, one after the other, with PyTorch's own 3-D convolution."""
    num_segments, channels = gate_shift.num_segments, x.shape[1]
    x5 = x.view(-1, num_segments, *x.shape[1:]).transpose(1, 2)  # B, C, T, H, W
    bn = gate_shift.bn
    statistics = (bn.running_mean, bn.running_var)
    normal = functional.batch_norm(x5, *(s.clone() for s in statistics), bn.weight, bn.bias, training=gate_shift.training)
    gate = torch.tanh(gate_shift.conv3D(functional.relu(normal)))
    x1, x2 = x5.chunk(2, dim=1)
    y1, y2 = gate[:, :1] * x1, gate[:, 1:] * x2
    zero = torch.zeros_like(x1[:, :, :1])
    z1 = torch.cat((y1[:, :, 1:], zero), dim=2) + x1 - y1
    z2 = torch.cat((zero, y2[:, :, :-1]), dim=2) + x2 - y2
    order = torch.arange(channels).view(2, 2, channels // 4).transpose(1, 2).flatten()
    return torch.cat((z1, z2), dim=1)[:, order].transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_equations(training, memory_format):
    gate_shift = GateShift(8, NUM_SEGMENTS).train(training)
    torch.nn.init.normal_(gate_shift.conv3D.weight)
    torch.nn.init.normal_(gate_shift.conv3D.bias)
    torch.nn.init.normal_(gate_shift.bn.bias)
    x = torch.randn(3 * NUM_SEGMENTS, 8, 5, 6).contiguous(memory_format=memory_format)
    expected = by_definition(gate_shift, x)
    z = gate_shift(x)
    torch.testing.assert_close(z, expected)
    assert z.is_contiguous(memory_format=memory_format)


def test_a_fresh_module_only_interleaves():
    x = torch.randn(2 * NUM_SEGMENTS, 8, 7, 7)
    assert torch.equal(GateShift(8, NUM_SEGMENTS)(x), x[:, [0, 2, 1, 3, 4, 6, 5, 7]])
    assert torch.equal(GateShift(8, NUM_SEGMENTS, interleave=False)(x), x)


def test_open_gates_bring_the_future_to_the_first_half_and_the_past_to_the_second():
    x = torch.randn(2 * NUM_SEGMENTS, 8, 3, 3)
    z = open_gates(8, interleave=False)(x).view(2, NUM_SEGMENTS, 8, 3, 3)
    clips = x.view(2, NUM_SEGMENTS, 8, 3, 3)
    assert torch.equal(z[:, :-1, :4], clips[:, 1:, :4])
    assert torch.equal(z[:, 1:, 4:], clips[:, :-1, 4:])
    assert torch.count_nonzero(z[:, -1, :4]) == 0  # no future behind the last segment
    assert torch.count_nonzero(z[:, 0, 4:]) == 0  # no past before the first


def test_interleaving_is_a_permutation_of_the_channels_whatever_the_gates():
    x = torch.randn(2 * NUM_SEGMENTS, 8, 3, 3)
    plain = open_gates(8, sign=-1.0, interleave=False)(x)
    assert torch.equal(open_gates(8, sign=-1.0)(x), plain[:, [0, 2, 1, 3, 4, 6, 5, 7]])


def test_clips_do_not_mix():
    gate_shift = open_gates(8)
    x = torch.randn(2 * NUM_SEGMENTS, 8, 3, 3)
    together = gate_shift(x)
    alone = torch.cat([gate_shift(clip) for clip in x.split(NUM_SEGMENTS)])
    assert torch.equal(together, alone)


def test_one_segment_has_no_neighbours():
    gate_shift = GateShift(4, num_segments=1).eval()
    torch.nn.init.constant_(gate_shift.conv3D.bias, 100.0)
    assert torch.count_nonzero(gate_shift(torch.randn(3, 4, 2, 2))) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_leaves_the_type_of_the_map(dtype):
    x = torch.randn(2 * NUM_SEGMENTS, 8, 3, 3, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert GateShift(8, NUM_SEGMENTS)(x).dtype == dtype


def test_gates_that_are_shut_still_learn():
    gate_shift = GateShift(8, NUM_SEGMENTS)
    gate_shift(torch.randn(2 * NUM_SEGMENTS, 8, 5, 5)).square().sum().backward()
    assert torch.count_nonzero(gate_shift.conv3D.weight.grad) > 0


@pytest.mark.parametrize("channels", [0, -4, 6])
def test_channels_that_cannot_be_split_are_refused(channels):
    with pytest.raises(ValueError, match=rf"GateShift got {channels} channels, but needs a positive multiple of 4"):
        GateShift(channels, NUM_SEGMENTS)
