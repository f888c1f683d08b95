import doctest

import pytest
import torch
from torch import nn

from models import attend_only, attention_maps, classify_map, gate_activity, insight, last_map
from models.factory import build_model
from models.switch import slot_attentions, slot_gates
from models.temporal.attention import SCOPES

NUM_SEGMENTS = 3


def opened(name="sa_gsm_bn_inception", **options):
    """Gates and attention at work."""
    model = build_model(name, num_classes=3, num_segments=NUM_SEGMENTS, **options).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("conv3D.weight"):
            nn.init.normal_(parameter, std=0.05)
        elif parameter_name.endswith("gamma"):
            nn.init.constant_(parameter, -0.5)
    nn.init.normal_(model.new_fc.weight)
    return model


@pytest.fixture
def clips():
    return torch.randn(2, NUM_SEGMENTS, 3, 64, 64)


@pytest.mark.parametrize("name, placement", [("sa_gsm_bn_inception", "3a,5b"), ("sa_gsm_resnet18", "layer4.1")])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_maps_are_those_of_what_each_attention_got(scope, name, placement, clips):
    model = opened(name, scope=scope, placement=placement)
    entered = {}
    for slot, attention in slot_attentions(model).items():
        attention.register_forward_pre_hook(lambda _, inputs, slot=slot: entered.update({slot: inputs[0]}))
    with torch.no_grad():
        expected = model(clips)
        logits, maps = attention_maps(model, clips)
        assert torch.equal(logits, expected)
        in_time = ["_temporal", ""] if scope == "divided" else [""]
        assert [found.name for found in maps] == [f"{slot}{part}" for slot in placement.split(",") for part in in_time]
        for found in maps:
            slot = found.name.removesuffix("_temporal")
            attention = slot_attentions(model)[slot]
            attention = attention.temporal if found.name.endswith("_temporal") else attention
            received = attention.attention_received(entered[slot])
            assert torch.equal(found.received.flatten(0, 1), received)
            assert found.received.shape[:2] == (2, NUM_SEGMENTS)
            # The rows of a group are one looking position each, so that even attention of gamma 1 has weight 1 everywhere.
            assert found.num_positions == attention.attention_rows(entered[slot], torch.tensor([0])).shape[3]
            torch.testing.assert_close(found.weight.mean(), torch.tensor(0.5))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_planted_mark_is_where_the_map_is_bright(scope):
    """Keys see channel 0 alone, and all queries ask for it; channel 0 of the slot's input has one bright place."""
    model = opened(scope=scope, placement="4a")
    attention = slot_attentions(model)["4a"]
    for layer in (attention, attention.temporal):
        if scope == "divided" or layer is attention:
            nn.init.zeros_(layer.query_conv.weight)
            nn.init.ones_(layer.query_conv.bias)
            nn.init.zeros_(layer.key_conv.weight)
            nn.init.ones_(layer.key_conv.weight[:, 0])

    def plant(module, inputs):
        marked = torch.zeros_like(inputs[0])
        marked[1, 0, 2, 1] = 1.0
        return (marked,)

    attention.register_forward_pre_hook(plant)
    maps = attention_maps(model, torch.randn(1, NUM_SEGMENTS, 3, 64, 64))[1]
    for found in maps:
        assert found.received.shape == (1, NUM_SEGMENTS, 4, 4)
        assert divmod(int(found.received.argmax()), 16) == (1, 2 * 4 + 1)
        assert found.received[0, 1, 2, 1] > 0.99
        even = found._replace(received=torch.full((2, 3, 4, 4), 1 / found.num_positions))
        torch.testing.assert_close(even.spread, torch.ones(2))
        one_place = found._replace(received=torch.eye(48)[:2].view(2, 3, 4, 4))
        torch.testing.assert_close(one_place.spread, torch.full((2,), 1 / 48))


def test_gamma_zero_weighs_nothing_and_what_is_switched_off_has_no_map(clips):
    model = opened(placement="5a,5b", scope="divided")
    nn.init.zeros_(slot_attentions(model)["5a"].gamma)
    weights = {found.name: found.weight for found in attention_maps(model, clips)[1]}
    assert not weights["5a"].any()
    assert all(weights[name].any() for name in ("5a_temporal", "5b_temporal", "5b"))
    attend_only(model, "5b")
    logits, maps = attention_maps(model, clips)
    assert [found.name for found in maps] == ["5b_temporal", "5b"]
    assert torch.equal(logits, model(clips))


def test_under_autocast_shares_are_float32_and_logits_those_of_the_network(clips):
    model = opened(placement="5b", scope="joint")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, (found,) = attention_maps(model, clips)
        assert torch.equal(logits, model(clips))
    assert found.received.dtype == torch.float32
    torch.testing.assert_close(found.received.sum(dim=(1, 2, 3)), torch.ones(2))


def test_gates_open_as_far_as_their_tanh_says(clips):
    model = opened()
    nn.init.zeros_(slot_gates(model)["4b"].conv3D.weight)
    entered = {}
    for slot, gate in slot_gates(model).items():
        gate.register_forward_pre_hook(lambda _, inputs, slot=slot: entered.update({slot: inputs[0]}))
    activity = gate_activity(model, clips)
    assert list(activity) == list(model.base_model.SLOTS)
    for slot, gate in slot_gates(model).items():
        x = entered[slot].view(2, NUM_SEGMENTS, *entered[slot].shape[1:])
        z = torch.relu(gate.bn(x.flatten(0, 1))).view(x.shape).transpose(1, 2)
        expected = torch.tanh(gate.conv3D(z)).abs().mean(dim=(1, 3, 4))
        torch.testing.assert_close(activity[slot], expected, rtol=1e-4, atol=1e-6)
    assert not activity["4b"].any()
    assert activity["4c"].min() > 0


def test_other_networks_have_neither_and_a_network_in_training_is_refused(clips):
    model = opened("tsn_resnet18")
    assert attention_maps(model, clips)[1] == []
    assert gate_activity(model, clips) == {}
    for look in (attention_maps, gate_activity):
        with pytest.raises(ValueError, match=r"the network is in training mode, .*: call eval\(\)"):
            look(opened().train(), clips)


@pytest.mark.parametrize("looks", [attention_maps, gate_activity])
def test_no_hook_stays_behind_when_the_network_fails(looks):
    model = opened(placement="5b")
    with pytest.raises(ValueError, match="the network got clips"):
        looks(model, torch.randn(1, NUM_SEGMENTS + 1, 3, 64, 64))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "name", ["trn_bn_inception", "tsn_inception_v3", "gsm_resnet50", "tsm_resnet18", "c3d", "r2plus1d_18", "mc3_18", "s3d"]
)
def test_the_last_map_and_the_rest_are_the_whole_network(name):
    model = opened(name)
    clips = torch.randn(2, NUM_SEGMENTS, 3, 75, 75)
    with torch.no_grad():
        map_BCTHW = last_map(model, clips)
        assert map_BCTHW.shape[0] == 2
        assert map_BCTHW.shape[2] <= NUM_SEGMENTS
        assert model.takes_clips or map_BCTHW.shape[2] == NUM_SEGMENTS
        torch.testing.assert_close(classify_map(model, map_BCTHW), model(clips), rtol=1e-5, atol=1e-6)


def test_the_examples():
    assert doctest.testmod(insight) == (0, 3)
