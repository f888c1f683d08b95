import doctest

import pytest
import torch
from torch import nn

from models import attend_only, model_slots, switch
from models.factory import build_model


def opened(name, **options):
    model = build_model(name, num_classes=3, num_segments=3, dropout=0.0, **options)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("conv3D.weight"):
            nn.init.normal_(parameter, std=0.05)
        elif parameter_name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    nn.init.normal_(model.new_fc.weight)
    return model


@pytest.mark.parametrize(
    "name, scope, chosen",
    [
        ("sa_gsm_bn_inception", "frame", "3a,5b"),
        ("sa_gsm_resnet18", "divided", "stage3"),
        ("sa_gsm_inception_v3", "temporal", "mixed_7"),
    ],
)
def test_slots_left_out_have_gammas_of_zero_bit_for_bit(name, scope, chosen):
    model, other = opened(name, scope=scope), opened(name, scope=scope)
    other.load_state_dict(model.state_dict())
    placement = attend_only(model, chosen)
    without = build_model(name, num_classes=3, num_segments=3, dropout=0.0, scope=scope, placement=placement)
    without.load_state_dict({key: model.state_dict()[key] for key in without.state_dict()})
    kept = {parameter for parameter, _ in without.named_parameters()}
    for parameter_name, parameter in other.named_parameters():
        if parameter_name.endswith("gamma") and parameter_name not in kept:
            nn.init.zeros_(parameter)
    clips = torch.randn(2, 3, 3, 75, 75)
    logits = model(clips)
    assert torch.equal(logits, other(clips))
    assert torch.equal(logits, without(clips))
    logits.sum().backward()
    assert {parameter for parameter, values in model.named_parameters() if values.grad is not None} == kept


def test_without_any_slot_it_is_gsm_and_all_slots_come_back():
    model = opened("sa_gsm_bn_inception").eval()
    gsm = build_model("gsm_bn_inception", num_classes=3, num_segments=3).eval()
    gsm.load_state_dict({key: model.state_dict()[key] for key in gsm.state_dict()})
    clips = torch.randn(1, 3, 3, 32, 32)
    with torch.inference_mode():
        before = model(clips)
        attend_only(model, "none")
        assert torch.equal(model(clips), gsm(clips))
        attend_only(model, "all")
        assert torch.equal(model(clips), before)
    assert not torch.equal(before, gsm(clips))


def test_slots_without_attention_are_refused_and_nothing_is_switched():
    model = opened("sa_gsm_resnet18", placement="layer1.0,layer2.1")
    with pytest.raises(ValueError, match=r"no attention in layer1\.1, .* the network was made with it in layer1\.0, layer2\.1"):
        attend_only(model, "all")
    with pytest.raises(ValueError, match="'3a' is not a slot: the slots are layer1"):
        attend_only(model, "3a")
    with pytest.raises(ValueError, match=r"no attention in layer1\.0; the network was made with it in no slot"):
        attend_only(build_model("tsm_resnet18", num_classes=3, num_segments=3), "layer1.0")
    assert not any(getattr(module, "bypassed", False) for module in model.modules())
    assert str(attend_only(model, "layer2.1")) == "layer2.1"
    assert len(model_slots("sa_gsm_resnet18")) == 8


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(switch).failed == 0
