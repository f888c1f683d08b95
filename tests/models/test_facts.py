import functools

import pytest

from models import describe_model, slot_macs

MILLION = 10**6


@functools.cache
def facts(name="sa_gsm_bn_inception", num_segments=8, **options):
    return describe_model(name, num_classes=174, num_segments=num_segments, **options)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("tsn_bn_inception", 10_448_590),
        ("gsm_bn_inception", 10_499_650),
        ("sa_gsm_bn_inception", 11_015_140),
        ("gsm_inception_v3", 22_207_586),
        ("tsn_resnet50", 23_864_558),
        ("tsm_resnet50", 23_864_558),
    ],
)
def test_parameters_are_as_many_as_published(name, parameters):
    assert facts(name).parameters == parameters


@pytest.mark.parametrize("scope, maps", [("frame", 1_708), ("joint", 13_664)])
def test_attention_costs_what_the_notes_on_the_paper_say(scope, maps):
    """PAPER_NOTES.md: convolutions 585 MMAC; maps 1,708 MMAC frame-wise, 13,664 joint."""
    added = facts(scope=scope).macs_per_clip - facts(placement="none").macs_per_clip
    assert round(added / MILLION) == 585 + maps
    assert facts(placement="none").macs_per_clip == facts("gsm_bn_inception").macs_per_clip


def test_maps_of_one_slot():
    """18.8 MB frame-wise and 150 MB joint at 3a (in units of 2^20 bytes), for 8 frames of 28 x 28."""
    frame, joint = facts(placement="3a"), facts(placement="3a", scope="joint")
    assert frame.attention_map_bytes == 4 * 8 * 784**2
    assert joint.attention_map_bytes == 4 * 6272**2
    assert (round(frame.attention_map_bytes / 2**20, 1), round(joint.attention_map_bytes / 2**20)) == (18.8, 150)
    assert facts(placement="3a", scope="temporal").attention_map_bytes == 4 * 784 * 8**2
    assert facts(placement="none").attention_map_bytes == 0


def test_the_three_slots_of_the_largest_maps_are_83_percent_of_the_cost_of_maps():
    def maps(placement):
        joint, frame = (facts(placement=placement, scope=scope).macs_per_clip for scope in ("joint", "frame"))
        return joint - frame  # seven times the maps of single frames: all else is alike

    assert round(maps("stage3") / maps("all"), 2) == 0.83


def test_divided_attention_is_frame_and_temporal_one_behind_the_other():
    none, *costs = (facts(placement="3a", scope=scope).macs_per_clip for scope in ("frame", "frame", "temporal", "divided"))
    without = facts(placement="none").macs_per_clip
    frame, temporal, divided = (cost - without for cost in costs)
    assert divided == frame + temporal
    assert none == without + frame


def test_known_costs_of_torchvisions_networks():
    """torchvision's tables, in GMAC: ResNet-50 4.09 a frame of 224 x 224, R3D-18 40.70 a clip of 16 x 112 x 112."""
    assert facts("tsn_resnet50", num_segments=1).macs_per_clip / 1e9 == pytest.approx(4.09, abs=0.01)
    assert facts("r3d_18", num_segments=16).macs_per_clip / 1e9 == pytest.approx(40.70, abs=0.01)


def test_published_numbers_carry_their_source():
    published = {
        "tsn_bn_inception": 0.1752,
        "trn_bn_inception": 0.3444,
        "tsm_resnet50": 0.456,
        "gsm_bn_inception": 0.4956,
        "gsm_inception_v3": 0.5063,
        "gsm_resnet18": None,
    }
    assert {name: facts(name).published_top1 for name in published} == published
    assert facts("tsm_resnet50").source == "8 frames; TSM, arXiv 1811.08383"
    assert facts().published_top1 is None
    assert facts().source == ""


def test_describing_says_nothing_of_random_weights(caplog):
    facts()
    assert caplog.text == ""


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="'9z' is not a slot"):
        facts(placement="9z")


@pytest.mark.parametrize("network", ["sa_gsm_bn_inception", "sa_gsm_resnet18"])
@pytest.mark.parametrize("scope", ["frame", "joint"])
def test_a_placement_costs_the_sum_of_its_slots(network, scope):
    base, added = slot_macs(network, 8, 4, pixels=64, scope=scope)
    slots = list(added)
    for placement in ((), (slots[0],), (slots[1], slots[-1]), tuple(slots)):
        facts = describe_model(network, 8, 4, pixels=64, scope=scope, placement=",".join(placement) or "none")
        assert facts.macs_per_clip == base + sum(added[slot] for slot in placement)
