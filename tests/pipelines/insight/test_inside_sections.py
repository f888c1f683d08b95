"""Sentences, pictures and tables of what was seen inside a network."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pipelines.evaluation.films import SlotFilm
from pipelines.insight.inside import ClipInside, Inside
from pipelines.insight.inside_sections import inside_sections
from pipelines.insight.subject import Subject
from preprocessing.decode import DecodeSettings, decode_video

FRAMES = np.full((4, 64, 64, 3), 90, np.uint8)
LATE = np.array([0.0, 0.0, 1.0, 3.0], np.float32).reshape(4, 1, 1)


def clip(key: str, label: int, answer: int) -> ClipInside:
    slots = [
        SlotFilm("3a", 0.02, np.full((4, 4, 4), 0.02, np.float32)),
        SlotFilm("5b", -0.3, np.full((4, 2, 2), 0.3, np.float32)),
    ]
    return ClipInside(key, label, answer, 0.9, FRAMES, slots, LATE / 3, LATE / 3)


@pytest.fixture
def inside() -> Inside:
    gates = {"3a": np.array([0.1, 0.1, 0.1, 0.1]), "5b": np.array([0.2, 0.4, 0.4, 0.2])}
    attention = {"3a": (0.02, 0.5), "5b": (-0.3, 0.125)}
    return Inside([[clip("a", 0, 0), clip("b", 0, 1)], [clip("c", 1, 1)]], 24, gates, attention)


def test_what_is_said_is_what_was_seen(make_subject: Callable[..., Subject], inside: Inside) -> None:
    subject = make_subject()
    attention, gates, cam = inside_sections(subject, inside)
    assert attention.sentence == (
        "Attention at 5b counts most (gamma -0.3); its looks are spread over 12.5 % of the places of a clip, where 100 % is "
        "all alike."
    )
    assert attention.metrics == {"insight/attention_spread": 0.125}
    assert [row["gamma"] for row in attention.tables[0].rows] == [0.02, -0.3]
    assert gates.sentence == ("The gate at 5b opens farthest (mean of |tanh gate| 0.3 over 24 clips), that at 3a least (0.1).")
    assert gates.metrics == {"insight/gate/3a": pytest.approx(0.1), "insight/gate/5b": pytest.approx(0.3)}
    assert gates.tables[0].rows[1]["segment_2"] == 0.4
    assert cam.sentence == "Of what raised the answers in 3 clips, 75.0 % lies in part 4 of 4 of the clip."
    assert (
        "getting darker, answered getting darker at 90.0 %; getting darker, answered getting brighter" in attention.films[0].alt
    )
    for section in (attention, gates, cam):
        names = {column.name for table in section.tables for column in table.columns}
        assert names == {name for table in section.tables for row in table.rows for name in row}
        assert all(picture.path.is_file() and picture.path.parent == subject.figures for picture in section.pictures)


def test_a_film_a_pair_in_both_kinds(make_subject: Callable[..., Subject], inside: Inside) -> None:
    films = inside_sections(make_subject(), inside)[0].films
    assert [(film.gif.name, film.mp4.name) for film in films] == [
        ("attention_1.gif", "attention_1.mp4"),
        ("attention_2.gif", "attention_2.mp4"),
    ]
    sizes = [decode_video(film.mp4, DecodeSettings()).width for film in films]
    assert sizes == [960, 720]
    assert all(film.gif.read_bytes().startswith(b"GIF89a") for film in films)


def test_a_network_says_only_what_it_has(make_subject: Callable[..., Subject], inside: Inside) -> None:
    subject = make_subject()

    def titles(**changes: object) -> list[str]:
        return [section.title for section in inside_sections(subject, replace(inside, **changes))]  # type: ignore[arg-type]

    assert titles(attention={}) == ["How far gates open", "What raised the answer"]
    assert titles(attention={}, gates={}) == ["What raised the answer"]
    assert titles(pairs=[]) == ["Where attention looks", "How far gates open"]
    zero = replace(inside, attention={"3a": (0.0, 0.5), "5b": (0.0, 1.0)}, gates={"3a": np.zeros(4), "5b": np.zeros(4)})
    attention, gates, _ = inside_sections(subject, zero)
    assert attention.sentence == "Every gamma is 0: attention, at 3a, 5b, adds nothing."
    assert gates.sentence == "All gates are closed on 24 clips: nothing moves between segments."
