import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from models.temporal import attention as attention_module
from models.temporal.attention import SCOPES, VALUES, SelfAttention

NUM_SEGMENTS = 3


def written_out_beta(attention, x):
    """Equations 1 and 2, with the map of all pairs written out, and 1 for the pairs that there are; i is the position that is
    looked at, j the one that looks.

    "bath" are the axes clip, segment, head and C/A; "xy" is the place of i and "uv" that of j, "s" and "t" their segments.
    """
    height, width = x.shape[2:]
    segments = attention.num_segments
    f, g = cut(attention, attention.key_conv(x)), cut(attention, attention.query_conv(x))
    scale = f.shape[3] ** -0.5 if attention.score_scale != 1 else 1.0
    s_ij = torch.einsum("bsacxy,btacuv->basxytuv", f, g) * scale
    if attention.scope in ("frame", "divided"):
        same = torch.eye(segments, dtype=torch.bool)[:, None, None, :, None, None]
    elif attention.scope == "temporal":
        same = torch.eye(height * width, dtype=torch.bool).view(1, height, width, 1, height, width)
    else:
        same = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool)
    s_ij = s_ij.masked_fill(~same, float("-inf"))
    return torch.softmax(s_ij.flatten(2, 4), dim=2).view(s_ij.shape), same.expand(s_ij.shape[2:])


def written_out(attention, x):
    """Equations 1 to 4; see above."""
    if attention.scope == "divided":
        x = written_out(attention.temporal, x)
    beta_ij, _ = written_out_beta(attention, x)
    found = torch.einsum("basxytuv,bsacxy->btacuv", beta_ij, cut(attention, attention.value_conv(x)))
    found = found.reshape(len(x), -1, *x.shape[2:])
    return attention.gamma * attention.output_conv(found) + x


def cut(attention, x):
    """Frames to [B, T, A, C/A, H, W]."""
    num_frames, _, height, width = x.shape
    segments, heads = attention.num_segments, attention.num_heads
    return x.reshape(num_frames // segments, segments, heads, -1, height, width)


def moving(channels=16, num_segments=NUM_SEGMENTS, **options):
    """A module whose gammas are not zero and whose softmax prefers some positions."""
    attention = SelfAttention(channels, num_segments, **options)
    for name, parameter in attention.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.7)
        elif name.endswith(("query_conv.weight", "key_conv.weight")):
            nn.init.normal_(parameter, std=0.3)
    return attention


@pytest.fixture(params=["flash", "one by one", "short"])
def path(request, monkeypatch):
    """All ways of computing: without the map, as for long groups, and with it, group by group or for all groups at once."""
    monkeypatch.setattr(attention_module, "_SHORT_GROUP", 10**9 if request.param == "short" else 0)
    monkeypatch.setattr(attention_module, "_MEDIUM_GROUP", 10**9 if request.param == "one by one" else 0)
    return request.param


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scaled, num_heads", [(False, 1), (True, 1), (False, 2), (True, 4)])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("scope", SCOPES)
def test_equals_the_equations(path, scope, value, scaled, num_heads, memory_format):
    attention = moving(32, scope=scope, value=value, scaled=scaled, num_heads=num_heads)
    x = torch.randn(2 * NUM_SEGMENTS, 32, 4, 5).contiguous(memory_format=memory_format)
    torch.testing.assert_close(attention(x), written_out(attention, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_its_gradients_are_those_of_the_equations(path, scope):
    attention = moving(scope=scope, value="bottleneck", num_heads=2).double()
    x = torch.randn(2 * NUM_SEGMENTS, 16, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2 * NUM_SEGMENTS, 16, 3, 4, dtype=torch.float64)
    wanted = [x, *attention.parameters()]
    ours = torch.autograd.grad((attention(x) * target).sum(), wanted)
    expected = torch.autograd.grad((written_out(attention, x) * target).sum(), wanted)
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


def peak_bytes(run):
    """The most memory that tensors made in `run` hold at once, by the profiler's record of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.filterwarnings("ignore::UserWarning")  # what the profiler says about itself
def test_joint_attention_at_slot_3a_needs_a_sixteenth_of_the_memory(monkeypatch):
    def extra(num_segments):
        attention = SelfAttention(64, num_segments, scope="joint")
        x = torch.randn(num_segments, 64, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()
        return peak_bytes(lambda: attention(x).sum().backward())

    ours, half_as_long = extra(8), extra(4)
    monkeypatch.setattr(attention_module, "_SHORT_GROUP", 10**9)
    materialised = extra(8)
    print(f"N = 6,272: {ours / 1e6:.1f} MB, materialised {materialised / 1e6:.1f} MB; N = 3,136: {half_as_long / 1e6:.1f} MB")
    assert materialised > 2 * 4 * 6272**2  # the map and its gradient: the measure sees them
    assert ours <= materialised / 16
    assert ours < 2.2 * half_as_long


@pytest.mark.filterwarnings("ignore::UserWarning")  # what the profiler says about itself
def test_of_many_medium_groups_one_map_exists_at_a_time():
    attention = SelfAttention(64, 8)

    def extra(num_frames):
        x = torch.randn(num_frames, 64, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()
        return peak_bytes(lambda: attention(x).sum().backward())

    few, many, one_map = extra(8), extra(32), 4 * 784**2
    print(f"8 frames {few / 1e6:.1f} MB, 32 frames {many / 1e6:.1f} MB, all maps of 32 frames {32 * one_map / 1e6:.1f} MB")
    assert few > one_map  # the measure sees it
    assert many - few < 24 * one_map / 2


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("scope", ["frame", "joint"])
def test_the_map_of_a_long_group_is_never_stored(scope, value, memory_format, num_heads, monkeypatch):
    monkeypatch.setattr(attention_module, "_MEDIUM_GROUP", 0)
    attention = SelfAttention(16, NUM_SEGMENTS, scope=scope, value=value, num_heads=num_heads)
    x = torch.randn(NUM_SEGMENTS, 16, 16, 17).contiguous(memory_format=memory_format).requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error if the flash path cannot take the tensors
        attention(x).sum().backward()


@pytest.mark.parametrize("scope", SCOPES)
def test_gamma_starts_at_zero_and_moves(scope):
    attention = SelfAttention(16, NUM_SEGMENTS, scope=scope)
    x = torch.randn(NUM_SEGMENTS, 16, 4, 4)
    assert torch.equal(attention(x), x)
    attention(x).square().sum().backward()
    gammas = [parameter.grad for name, parameter in attention.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == (2 if scope == "divided" else 1)
    assert all(gradient is not None and gradient.item() != 0 for gradient in gammas)


@pytest.mark.parametrize("segment, row, column", [(0, 0, 0), (1, 2, 1), (2, 1, 3)])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_a_position_reaches(scope, segment, row, column, path):
    """Change one position of the first clip; the scope says at which positions the output may and does change."""
    attention = moving(scope=scope)
    x = torch.randn(2 * NUM_SEGMENTS, 16, 3, 4)
    changed = x.clone()
    changed[segment, :, row, column] += 1.0
    differs = (attention(x) != attention(changed)).any(dim=1)
    expected = torch.zeros(2 * NUM_SEGMENTS, 3, 4, dtype=torch.bool)
    if scope == "frame":
        expected[segment] = True
    elif scope == "temporal":
        expected[:NUM_SEGMENTS, row, column] = True
    else:
        expected[:NUM_SEGMENTS] = True
    assert not (differs & ~expected).any()
    assert (differs == expected).float().mean() > 0.9  # a weight that is nearly zero may round away


@pytest.mark.parametrize("positions", [None, torch.tensor([3, 0, 3])])
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize(
    "scope, num_groups, group", [("frame", 6, 12), ("temporal", 24, 3), ("joint", 2, 36), ("divided", 6, 12)]
)
def test_rows_of_the_map(scope, num_groups, group, num_heads, positions):
    if positions is not None:
        positions = positions % group
    attention = moving(scope=scope, num_heads=num_heads, scaled=True)
    x = torch.randn(2 * NUM_SEGMENTS, 16, 3, 4)
    beta = attention.attention_rows(x, positions)
    assert beta.shape == (num_groups, num_heads, group if positions is None else 3, group)
    torch.testing.assert_close(beta.sum(dim=3), torch.ones(beta.shape[:3]))
    whole = attention.attention_rows(x)
    torch.testing.assert_close(beta, whole if positions is None else whole[:, :, positions])
    value = attention._grouped(attention.value_conv(attention.temporal(x)))
    y = attention.temporal(x) + attention.gamma * attention._ungrouped(whole @ value, x.shape)
    torch.testing.assert_close(attention(x), y)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_row_says_which_positions_by_their_place(scope):
    """All queries look for the position that carries a mark; the row's largest weight must stand at its number."""
    attention = SelfAttention(16, NUM_SEGMENTS, scope=scope)
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(attention.query_conv.bias)
    nn.init.ones_(attention.key_conv.weight)
    x = torch.zeros(NUM_SEGMENTS, 16, 3, 4)
    x[1, :, 2, 1] = 1.0
    place, clip_place = 2 * 4 + 1, (1 * 3 + 2) * 4 + 1
    group, number = {"frame": (1, place), "divided": (1, place), "temporal": (place, 1), "joint": (0, clip_place)}[scope]
    beta = attention.attention_rows(x, torch.tensor([0]))
    assert beta[group, 0, 0].argmax() == number
    assert beta[group, 0, 0, number] > 0.99


@pytest.mark.parametrize("numbers", [1, 50, 10**6])  # of the map at a time: a row, some rows, all
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_received_is_the_mean_of_the_columns(scope, num_heads, numbers, monkeypatch):
    monkeypatch.setattr(attention_module, "_MAP_NUMBERS", numbers)
    attention = moving(scope=scope, num_heads=num_heads)
    x = torch.randn(2 * NUM_SEGMENTS, 16, 3, 4)
    beta_ij, same = written_out_beta(attention, attention.temporal(x))
    shares = beta_ij.sum(dim=(5, 6, 7)) / same.sum(dim=(3, 4, 5))
    received = attention.attention_received(x)
    torch.testing.assert_close(received, shares.mean(dim=1).flatten(0, 1))
    groups = {"temporal": received.view(2, NUM_SEGMENTS, 3, 4).sum(dim=1), "joint": received.view(2, -1).sum(dim=1)}
    sums = groups.get(scope, received.sum(dim=(1, 2)))
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("scope", SCOPES)
def test_autocast_leaves_the_type_of_the_map(scope, value):
    x = torch.randn(2 * NUM_SEGMENTS, 16, 3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert SelfAttention(16, NUM_SEGMENTS, scope=scope, value=value)(x).dtype == torch.bfloat16


def test_the_softmax_is_float32_under_autocast(path):
    """With the same bf16 queries, keys and values we are as near to exact attention as rounding beta and the sums to bf16 (one
    part in 256 each) allows. Scores here reach 100; scores rounded to bf16 would be off by up to a quarter."""
    attention = moving()
    seen = []
    attention.output_conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = 3 * torch.randn(NUM_SEGMENTS, 16, 20, 20, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        attention(x)
        convs = (attention.query_conv, attention.key_conv, attention.value_conv)
        query, key, value = (attention._grouped(conv(x)).double() for conv in convs)
    score = query @ key.transpose(2, 3)
    exact = attention._ungrouped(score.softmax(dim=3) @ value, x.shape)
    coarse = attention._ungrouped(score.bfloat16().double().softmax(dim=3) @ value, x.shape)
    error, error_of_bf16 = (((other - exact).norm() / exact.norm()).item() for other in (seen[0].double(), coarse))
    print(f"largest score {score.abs().max():.0f}; error {error:.1e}; with scores rounded to bf16 {error_of_bf16:.1e}")
    assert error < 4e-3
    assert error_of_bf16 > 2 * error


def test_both_values_cost_the_same_weights():
    def count(value):
        attention = SelfAttention(64, NUM_SEGMENTS, value=value)
        return sum(parameter.numel() for name, parameter in attention.named_parameters() if name.endswith("weight"))

    assert count("fused") == count("bottleneck") == 64 * 64 * 5 // 4


def test_the_published_names_are_in_every_scope():
    published = {f"{conv}_conv.{kind}" for conv in ("query", "key", "value") for kind in ("weight", "bias")} | {"gamma"}
    names = {scope: set(SelfAttention(16, NUM_SEGMENTS, scope=scope, num_heads=2).state_dict()) for scope in SCOPES}
    assert names["frame"] == names["temporal"] == names["joint"] == published
    assert names["divided"] == published | {f"temporal.{name}" for name in published}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"channels": 12}, "SelfAttention got 12 channels, but needs a positive multiple of 8"),
        ({"num_segments": 0}, "SelfAttention got 0 segments, but needs at least 1"),
        ({"scope": "space"}, "attention scope 'space' is not known; known are: frame, temporal, joint, divided"),
        ({"value": "wide"}, "attention value 'wide' is not known; known are: fused, bottleneck"),
        ({"num_heads": 3}, "3 heads cannot share 2 channels of queries; give a divisor of 2"),
        ({"num_heads": 0}, "0 heads cannot share 2 channels of queries; give a divisor of 2"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention(**{"channels": 16, "num_segments": NUM_SEGMENTS} | arguments)


@pytest.mark.parametrize("scope", ["temporal", "joint", "divided"])
def test_a_clip_that_is_cut_short_is_refused(scope):
    with pytest.raises(ValueError, match="4 frames are no whole number of clips of 3 segments"):
        SelfAttention(16, NUM_SEGMENTS, scope=scope)(torch.randn(4, 16, 2, 2))


@pytest.mark.parametrize(
    "positions, message",
    [
        (torch.tensor([0, 9]), r"positions must be in \[0, 9\), but \[0, 9\] were given"),
        (torch.tensor([-1]), r"positions must be in \[0, 9\), but \[-1\] were given"),
        (torch.tensor(0), r"positions are torch.int64 of shape \[\], but must be a vector of integers"),
        (torch.tensor([0.0]), r"positions are torch.float32 of shape \[1\], but must be a vector of integers"),
    ],
)
def test_wrong_positions_are_refused(positions, message):
    with pytest.raises(ValueError, match=message):
        SelfAttention(16, NUM_SEGMENTS).attention_rows(torch.randn(3, 16, 3, 3), positions)
