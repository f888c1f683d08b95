"""The passport of a label list, and mirrored labels."""

from hypothesis import given
from hypothesis import strategies as st

from preprocessing.labels import label_passport, mirror_labels


@given(st.lists(st.text(min_size=1, max_size=5), unique=True, min_size=2, max_size=5))
def test_the_passport_knows_names_and_order(names: list[str]) -> None:
    passport = label_passport(names)
    assert len(passport) == 16
    assert passport == label_passport(tuple(names))
    assert len({passport, label_passport(names[::-1]), label_passport(names[1:]), label_passport(["".join(names)])}) == 4


def test_mirror_labels_swap_whole_words_only() -> None:
    names = [
        "Pulling something from left to right",
        "Pulling something from right to left",
        "Turning something clockwise",
        "Turning something counterclockwise",
        "Turning the camera left",
        "Putting something upright",
        "Pulling it right out",
        "Left turn",
        "Right turn",
    ]
    assert mirror_labels(names) == [1, 0, 3, 2, -1, 5, 6, 8, 7]


WORDS = st.sampled_from(["left", "right", "Left", "RIGHT", "clockwise", "counterclockwise", "out", "from", "bright"])


@given(st.lists(st.lists(WORDS, min_size=1, max_size=4).map(" ".join), unique=True, max_size=30))
def test_mirroring_twice_gives_the_label_back(names: list[str]) -> None:
    mirrored = mirror_labels(names)
    assert all(mirrored[other] == label for label, other in enumerate(mirrored) if other >= 0)
