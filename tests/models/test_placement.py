import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import SLOTS, Placement, parse_placement

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


def test_a_placement_cannot_be_changed():
    with pytest.raises(AttributeError):
        Placement(("3a",)).slots = ("3b",)
