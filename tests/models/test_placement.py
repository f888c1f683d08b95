import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import SLOTS, Placement, model_slots, parse_placement

slot_sets = st.sets(st.sampled_from(SLOTS))


@given(slot_sets, st.randoms(use_true_random=False), st.sampled_from([",", "+", ", ", " + "]))
def test_all_spellings_of_a_set_are_equal(slots, random, separator):
    shuffled = sorted(slots)
    random.shuffle(shuffled)
    mask = sum(2 ** SLOTS.index(slot) for slot in slots)
    text = separator.join(shuffled) or "none"
    spellings = [text, text.upper(), mask, str(mask), f"0b{mask:010b}", Placement(shuffled)]
    placements = [parse_placement(spelling) for spelling in spellings]
    assert set(placements) == {Placement(slots)}
    assert placements[0].mask == mask
    assert set(placements[0]) == slots
    assert len(placements[0]) == len(slots)
    assert all((slot in placements[0]) == (slot in slots) for slot in SLOTS)


@given(st.integers(0, 1023))
def test_a_printed_placement_reads_back(mask):
    placement = parse_placement(mask)
    assert parse_placement(str(placement)) == placement
    assert parse_placement(placement) is placement


@given(slot_sets)
def test_printed_form_is_canonical(slots):
    expected = {0: "none", 10: "all"}.get(len(slots), ",".join(sorted(slots)))
    assert str(Placement(slots)) == expected


@pytest.mark.parametrize(
    "text, slots",
    [
        ("all", SLOTS),
        ("none", ()),
        ("stage3", ("3a", "3b", "3c")),
        ("stage4", ("4a", "4b", "4c", "4d", "4e")),
        ("stage5", ("5a", "5b")),
        ("stage5,3a", ("3a", "5a", "5b")),
        ("3a,3a", ("3a",)),
    ],
)
def test_named_groups(text, slots):
    assert parse_placement(text).slots == slots


@pytest.mark.parametrize(
    "value, found",
    [
        ("3a,3d", "'3d' is not a slot"),
        ("", "'' is not a slot"),
        ("3a,", "'' is not a slot"),
        ("0b", "'0b' is not a slot"),
        ("-1", "'-1' is not a slot"),
        (-1, "the bit mask -1 names slots that do not exist"),
        (1024, "the bit mask 1024 names slots that do not exist"),
        ("1024", "the bit mask 1024 names slots that do not exist"),
        (True, "cannot be read from True of type bool"),
        (None, "cannot be read from None of type NoneType"),
    ],
)
def test_an_illegal_placement_is_refused_with_the_legal_slots(value, found):
    with pytest.raises(ValueError) as refused:
        parse_placement(value)
    message = str(refused.value)
    assert found in message
    assert "the slots are 3a, 3b, 3c, 4a, 4b, 4c, 4d, 4e, 5a, 5b" in message
    assert "all, none, stage3, stage4, stage5" in message
    assert "0 to 1023" in message


@pytest.mark.parametrize("name", ["gsm_inception_v3", "gsm_resnet18", "gsm_resnet101"])
@given(st.data())
def test_every_backbone_has_its_own_slots(name, data):
    slots = model_slots(name)
    chosen = data.draw(st.sets(st.sampled_from(slots)))
    placement = Placement(chosen, slots)
    spellings = ["+".join(chosen) or "none", placement.mask, f"0b{placement.mask:b}", str(placement), placement]
    assert {parse_placement(spelling, slots) for spelling in spellings} == {placement}
    assert set(placement) == chosen


@pytest.mark.parametrize(
    "name, group, slots",
    [
        ("gsm_resnet18", "stage2", ("layer1.0", "layer1.1")),
        ("gsm_resnet50", "stage5", ("layer4.0", "layer4.1", "layer4.2")),
        ("gsm_inception_v3", "stage3", ("mixed", "mixed_1", "mixed_2", "mixed_3")),
        ("gsm_inception_v3", "stage4", ("mixed_4", "mixed_5", "mixed_7", "mixed_8")),
        ("gsm_inception_v3", "stage5", ("mixed_9", "mixed_10")),
    ],
)
def test_named_groups_of_other_backbones(name, group, slots):
    assert parse_placement(group, model_slots(name)).slots == slots
    assert str(parse_placement("all", model_slots(name))) == "all"


def test_slots_of_another_backbone_are_refused_with_those_of_this_one():
    resnet18 = model_slots("gsm_resnet18")
    with pytest.raises(
        ValueError, match=r"'3a' is not a slot: the slots are layer1\.0, .* all, none, stage2, stage3, stage4, stage5"
    ):
        parse_placement("3a", resnet18)
    with pytest.raises(ValueError, match=r"the bit mask 256 names slots that do not exist: .* from 0 to 255"):
        parse_placement(256, resnet18)
    with pytest.raises(ValueError, match=r"the placement 3a was made for a backbone of other slots: the slots are layer1\.0"):
        parse_placement(Placement(("3a",)), resnet18)
    assert parse_placement("none") != parse_placement("none", resnet18)


def test_a_placement_cannot_be_changed():
    with pytest.raises(AttributeError):
        Placement(("3a",)).slots = ("3b",)
