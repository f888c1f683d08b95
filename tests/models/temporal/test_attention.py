import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.temporal.attention import SelfAttention

NUM_SEGMENTS = 3


def by_definition(attention, x):
    """Equations 1 to 4, with the map of all pairs written out; i is the position that is looked at, j the one that looks."""
    group = attention.frames_per_group
    num_frames, _, height, width = x.shape

    def positions(map_NCHW):  # G, C, M
        return map_NCHW.view(num_frames // group, group, -1, height * width).transpose(1, 2).flatten(2)

    f, g, h = (positions(conv(x)) for conv in (attention.key_conv, attention.query_conv, attention.value_conv))
    s_ij = torch.einsum("gci,gcj->gij", f, g)
    beta_ij = torch.softmax(s_ij, dim=1)
    o = torch.einsum("gij,gci->gcj", beta_ij, h)
    o = o.view(num_frames // group, -1, group, height * width).transpose(1, 2).reshape(num_frames, -1, height, width)
    return attention.gamma * attention.output_conv(o) + x


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("value", ["fused", "bottleneck"])
@pytest.mark.parametrize("scope", ["frame", "joint"])
def test_equals_the_equations(scope, value, memory_format):
    attention = SelfAttention(16, NUM_SEGMENTS, scope=scope, value=value)
    torch.nn.init.constant_(attention.gamma, 0.7)
    x = torch.randn(2 * NUM_SEGMENTS, 16, 4, 5).contiguous(memory_format=memory_format)
    torch.testing.assert_close(attention(x), by_definition(attention, x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("value", ["fused", "bottleneck"])
def test_the_map_of_all_pairs_is_never_stored(value, memory_format):
    attention = SelfAttention(16, NUM_SEGMENTS, value=value)
    x = torch.randn(2 * NUM_SEGMENTS, 16, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error if the flash path cannot take the tensors
        attention(x).sum().backward()


def test_gamma_starts_at_zero_and_moves():
    attention = SelfAttention(16, NUM_SEGMENTS)
    x = torch.randn(NUM_SEGMENTS, 16, 4, 4)
    assert torch.equal(attention(x), x)
    attention(x).square().sum().backward()
    assert attention.gamma.grad is not None
    assert attention.gamma.grad.item() != 0


def test_scope_frame_sees_one_frame_and_joint_the_clip():
    x = torch.randn(2 * NUM_SEGMENTS, 16, 3, 3)
    changed = x.clone()
    changed[0] += 1.0
    differs = {}
    for scope in ("frame", "joint"):
        attention = SelfAttention(16, NUM_SEGMENTS, scope=scope)
        torch.nn.init.ones_(attention.gamma)
        differs[scope] = [not torch.equal(a, b) for a, b in zip(attention(x), attention(changed), strict=True)]
    assert differs == {"frame": [True] + [False] * 5, "joint": [True] * 3 + [False] * 3}


@pytest.mark.parametrize("value", ["fused", "bottleneck"])
def test_autocast_leaves_the_type_of_the_map(value):
    x = torch.randn(2 * NUM_SEGMENTS, 16, 3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert SelfAttention(16, NUM_SEGMENTS, value=value)(x).dtype == torch.bfloat16


def test_both_values_cost_the_same_weights():
    def count(value):
        attention = SelfAttention(64, NUM_SEGMENTS, value=value)
        return sum(parameter.numel() for name, parameter in attention.named_parameters() if name.endswith("weight"))

    assert count("fused") == count("bottleneck") == 64 * 64 * 5 // 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"channels": 12}, "SelfAttention got 12 channels, but needs a positive multiple of 8"),
        ({"channels": 16, "scope": "temporal"}, "attention scope 'temporal' is not known; known are: frame, joint"),
        ({"channels": 16, "value": "wide"}, "attention value 'wide' is not known; known are: fused, bottleneck"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention(num_segments=NUM_SEGMENTS, **arguments)
