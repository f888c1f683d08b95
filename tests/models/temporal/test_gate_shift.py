import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_its_gradients_are_those_of_the_equations(training, memory_format):
    gate_shift = GateShift(8, NUM_SEGMENTS).train(training).double()
    torch.nn.init.normal_(gate_shift.conv3D.weight)
    x = torch.randn(2 * NUM_SEGMENTS, 8, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    target = torch.randn_like(x)
    wanted = [x, *gate_shift.parameters()]
    ours = torch.autograd.grad((gate_shift(x) * target).sum(), wanted)
    expected = torch.autograd.grad((by_definition(gate_shift, x) * target).sum(), wanted)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=25)
@given(num_segments=st.integers(2, 6), channels=st.sampled_from([4, 8, 16]), seed=st.integers(0, 2**16))
def test_shifting_the_input_by_one_segment_shifts_the_output(num_segments, channels, seed):
    """The clip one segment later (its first segment gone, a zero one behind): gates, and with them outputs, are one segment
    earlier. Where a neighbour differs, that is at both ends, they are what the equations say.

    Batch norm is the identity here (eval mode, fresh statistics), and a zero segment keeps the gates of its neighbours as the
    zero padding does; so only what leaves the clip with its first segment is missing."""
    torch.manual_seed(seed)
    gate_shift = GateShift(channels, num_segments, interleave=False).eval()
    torch.nn.init.normal_(gate_shift.conv3D.weight)
    clip = torch.randn(num_segments, channels, 3, 3)
    clip[0] = 0  # what leaves the clip at the front
    later = torch.cat((clip[1:], torch.zeros_like(clip[:1])))
    gate, gate_of_later = gate_shift.gate(clip)[0], gate_shift.gate(later)[0]
    torch.testing.assert_close(gate_of_later[:-1], gate[1:])
    half = channels // 2
    z, z_of_later = gate_shift(clip), gate_shift(later)
    torch.testing.assert_close(z_of_later[:-1], z[1:])
    y1, y2 = gate[1, 0] * clip[1, :half], gate[-1, 1] * clip[-1, half:]
    torch.testing.assert_close(z[0, :half], y1)  # the first segment was empty and received what the second sent back
    assert torch.count_nonzero(z[0, half:]) == 0  # nothing comes from before the clip
    torch.testing.assert_close(z[-1, :half], clip[-1, :half] - gate[-1, 0] * clip[-1, :half])  # nothing from behind it
    torch.testing.assert_close(z_of_later[-1, half:], y2)  # the empty last segment received what the one before sent forward
    assert torch.count_nonzero(z_of_later[-1, :half]) == 0


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


def test_no_segments_are_refused():
    with pytest.raises(ValueError, match="GateShift got 0 segments, but needs at least 1"):
        GateShift(8, 0)


def test_a_clip_that_is_cut_short_is_refused():
    with pytest.raises(ValueError, match="6 frames are no whole number of clips of 4 segments"):
        GateShift(8, NUM_SEGMENTS)(torch.randn(6, 8, 2, 2))
