import doctest

import pytest
import torch
from torch import nn

from models import Placement, attend_only, attention_slots, each_placement, model_slots, walk
from models.backbones.slotted import pass_slots
from models.factory import build_model

NUM_SEGMENTS = 2


def opened(name, **options):
    """Gates and attention at work, so that every slot matters."""
    model = build_model(name, num_classes=3, num_segments=NUM_SEGMENTS, **options).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("conv3D.weight"):
            nn.init.normal_(parameter, std=0.05)
        elif parameter_name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    nn.init.normal_(model.new_fc.weight)
    return model


def some_clips(num_clips=3, pixels=32):
    frames = torch.randn(num_clips * NUM_SEGMENTS, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    return frames.view(num_clips, NUM_SEGMENTS, 3, pixels, pixels)


def seen(backbone, slot):
    """How many maps come into the block of a slot."""
    calls = []
    before = backbone.before
    backbone.before = lambda name, x: (calls.append(name) if name == slot else None, before(name, x))[1]
    return calls


@pytest.mark.parametrize(
    "name, options, pixels",
    [
        ("sa_gsm_resnet18", {"scope": "divided", "placement": "layer1.0,layer2.0,layer4.1"}, 32),
        ("sa_gsm_resnet50", {"placement": "layer1.0,layer4.2"}, 32),
        ("sa_gsm_bn_inception", {"placement": "3a,3c,4e,5b", "scope": "joint", "value": "bottleneck"}, 40),
        ("sa_gsm_inception_v3", {"placement": "mixed_3,mixed_5,mixed_8"}, 75),
    ],
)
@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_every_placement_is_that_of_a_forward_pass_bit_for_bit(name, options, pixels, in_bfloat16):
    model, clips = opened(name, **options), some_clips(pixels=pixels)
    slots = attention_slots(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        found = {str(placement): logits for placement, logits in each_placement(model, clips)}
        assert len(found) == 2 ** len(slots)
        for placement, logits in found.items():
            attend_only(model, placement)
            assert torch.equal(logits, model(clips)), placement
    different = {tuple(logits.flatten().tolist()) for logits in found.values()}
    assert len(different) == len(found)


def test_a_network_without_attention_has_one_answer_and_it_is_its_own():
    model = opened("gsm_resnet18")
    clips = some_clips()
    with torch.inference_mode():
        [(placement, logits)] = each_placement(model, clips)
        assert (str(placement), torch.equal(logits, model(clips))) == ("none", True)


@pytest.mark.parametrize("name", ["tsn_bn_inception", "tsm_resnet50", "gsm_inception_v3"])
def test_the_chain_of_a_backbone_is_its_forward_pass(name):
    backbone = build_model(name, num_classes=3, num_segments=NUM_SEGMENTS).base_model.eval()
    frames = torch.randn(4, 3, 75, 75)
    with torch.inference_mode():
        assert torch.equal(pass_slots(backbone, frames), backbone(frames))


def test_slot_k_is_computed_for_two_to_the_k_maps_and_switched_off_slots_stay_off():
    model = opened("sa_gsm_resnet18")
    calls = {slot: seen(model.base_model, slot) for slot in ("layer1.0", "layer2.0", "layer4.1")}
    with torch.inference_mode():
        placements = [placement for placement, _ in each_placement(model, some_clips(1))]
        assert {slot: len(of_slot) for slot, of_slot in calls.items()} == {"layer1.0": 1, "layer2.0": 4, "layer4.1": 128}
        assert len(set(placements)) == len(placements) == 256
        assert [placement.mask for placement in placements[:3]] == [0, 128, 64]
        attend_only(model, "layer4.1,layer1.1")
        assert {str(placement) for placement, _ in each_placement(model, some_clips(1))} == {
            "none",
            "layer1.1",
            "layer4.1",
            "layer1.1,layer4.1",
        }


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"the network is in training mode; .* call eval\(\)"):
        next(each_placement(opened("sa_gsm_resnet18").train(), some_clips()))
    for name in ("tsn_resnet18", "tsn_bn_inception", "r3d_18"):
        with pytest.raises(ValueError, match="no gates in its slots"):
            next(each_placement(build_model(name, num_classes=3, num_segments=NUM_SEGMENTS).eval(), some_clips()))


@pytest.mark.slow
def test_all_1024_placements_of_bn_inception():
    model, clips = opened("sa_gsm_bn_inception"), some_clips(2)
    gsm = build_model("gsm_bn_inception", num_classes=3, num_segments=NUM_SEGMENTS).eval()
    gsm.load_state_dict({name: model.state_dict()[name] for name in gsm.state_dict()})
    slots = model_slots("sa_gsm_bn_inception")
    with torch.inference_mode():
        found = {placement.mask: logits for placement, logits in each_placement(model, clips)}
        assert sorted(found) == list(range(1024))
        assert torch.equal(found[0], gsm(clips))
        for mask in (1, 129, 512, 700, 1023):
            attend_only(model, mask)
            assert torch.equal(found[mask], model(clips)), Placement((), slots)


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(walk).failed == 0
