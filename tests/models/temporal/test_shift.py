import pytest
import torch

from models.temporal.shift import TemporalShift

NUM_SEGMENTS = 4


def test_an_eighth_sees_the_future_an_eighth_the_past_and_the_rest_stays():
    x = torch.randn(2 * NUM_SEGMENTS, 16, 3, 5)
    clips, shifted = x.view(2, NUM_SEGMENTS, 16, 3, 5), TemporalShift(NUM_SEGMENTS)(x).view(2, NUM_SEGMENTS, 16, 3, 5)
    assert torch.equal(shifted[:, :-1, :2], clips[:, 1:, :2])
    assert torch.equal(shifted[:, 1:, 2:4], clips[:, :-1, 2:4])
    assert torch.equal(shifted[:, :, 4:], clips[:, :, 4:])
    assert torch.count_nonzero(shifted[:, -1, :2]) == torch.count_nonzero(shifted[:, 0, 2:4]) == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_memory_is_kept(memory_format):
    x = torch.randn(2 * NUM_SEGMENTS, 16, 3, 5).contiguous(memory_format=memory_format)
    shifted = TemporalShift(NUM_SEGMENTS)(x)
    assert shifted.is_contiguous(memory_format=memory_format)
    assert torch.equal(shifted, TemporalShift(NUM_SEGMENTS)(x.contiguous()))


def test_clips_do_not_mix_and_one_segment_has_no_neighbours():
    shift = TemporalShift(NUM_SEGMENTS)
    x = torch.randn(2 * NUM_SEGMENTS, 8, 2, 2)
    assert torch.equal(shift(x), torch.cat([shift(clip) for clip in x.split(NUM_SEGMENTS)]))
    assert torch.count_nonzero(TemporalShift(1)(x)[:, :2]) == 0


def test_the_gradient_moves_the_other_way():
    x = torch.randn(NUM_SEGMENTS, 8, 1, 1, requires_grad=True)
    weight = torch.randn(NUM_SEGMENTS, 8, 1, 1)
    (TemporalShift(NUM_SEGMENTS)(x) * weight).sum().backward()
    assert torch.equal(x.grad[1:, 0], weight[:-1, 0])
    assert x.grad[0, 0].item() == x.grad[-1, 1].item() == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_segments": 0}, "TemporalShift got 0 segments, but needs at least 1"),
        ({"num_segments": 2, "fold_div": 1}, "TemporalShift got fold_div 1, but needs at least 2"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TemporalShift(**arguments)
