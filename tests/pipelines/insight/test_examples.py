from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation.scores import ClipScores, Origin
from pipelines.insight.examples import examples_sections, judge, most_unsure, most_wrong
from pipelines.insight.subject import Subject


def scores_of(seed: int, num_clips: int, num_classes: int, *, coarse: bool = False) -> ClipScores:
    """Random scores; coarse ones tie often. Every seventh clip has no label."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(1, 4, (num_clips, num_classes)) if coarse else rng.exponential(size=(num_clips, num_classes))
    labels = np.where(np.arange(num_clips) % 7 == 6, -1, rng.integers(num_classes, size=num_clips))
    names = tuple(f"class {number}" for number in range(num_classes))
    keys = [f"v{number:03d}" for number in range(num_clips)]
    return ClipScores(keys, labels, raw / raw.sum(axis=1, keepdims=True), Origin(names, "validation", "centre"))


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 6), st.booleans())
def test_the_most_wrong_are_all_wrong_answers_the_surest_first(
    seed: int, num_clips: int, num_classes: int, coarse: bool
) -> None:
    scores = scores_of(seed, num_clips, num_classes, coarse=coarse)
    ranked = most_wrong(judge(scores, range(num_classes)))
    answers = scores.scores.argmax(axis=1)
    wrong = {key for key, answer, label in zip(scores.keys, answers, scores.labels, strict=True) if -1 != label != answer}
    assert {clip.key for clip in ranked} == wrong
    assert len(ranked) == len(wrong)
    sureness = [clip.answer_score for clip in ranked]
    assert sureness == sorted(sureness, reverse=True)
    for clip in ranked:
        row = scores.scores[scores.keys.index(clip.key)]
        assert clip.answer_score == row.max() == row[clip.answer]
        assert clip.true_score == row[clip.label] <= clip.answer_score


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 6), st.booleans())
def test_the_most_unsure_are_all_labelled_clips_the_narrowest_first(
    seed: int, num_clips: int, num_classes: int, coarse: bool
) -> None:
    scores = scores_of(seed, num_clips, num_classes, coarse=coarse)
    ranked = most_unsure(judge(scores, range(num_classes)))
    labelled = [key for key, label in zip(scores.keys, scores.labels, strict=True) if label >= 0]
    assert sorted(clip.key for clip in ranked) == labelled
    order = [(clip.margin, -clip.entropy) for clip in ranked]
    assert order == sorted(order)
    for clip in ranked:
        row = scores.scores[scores.keys.index(clip.key)]
        first, second = np.sort(row)[::-1][:2]
        assert clip.margin == pytest.approx(first - second)
        assert clip.entropy == pytest.approx(float(-(row * np.log(row)).sum()))
        assert clip.second != clip.answer


def test_only_clips_whose_true_class_was_chosen() -> None:
    scores = scores_of(1, 40, 4)
    assert {clip.label for clip in judge(scores, [1, 3])} == {1, 3}


def test_a_score_of_0_has_an_entropy() -> None:
    scores = ClipScores(["a"], np.array([0]), np.array([[1.0, 0.0]]), Origin(("x", "y"), "test", "centre"))
    (clip,) = judge(scores, [0, 1])
    assert (clip.entropy, clip.margin, clip.answer_score) == (0.0, 1.0, 1.0)


def test_the_sections_show_the_first_clips_and_list_all(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(num_examples=3)
    wrong, unsure = examples_sections(subject)
    judged = judge(subject.scores, subject.classes)
    assert wrong.sentence.startswith(f"{len(most_wrong(judged))} of 24 answers are wrong; the surest of them, at ")
    for section, ranked in ((wrong, most_wrong(judged)), (unsure, most_unsure(judged))):
        assert len(section.clips) == 3
        for clip, judgement in zip(section.clips, ranked, strict=False):
            assert clip.text.startswith(f"clip {judgement.key}")
            assert len(clip.frames) == 4
            assert clip.frames[0].shape == (40, 48, 3)
        (table,) = section.tables
        assert [row["key"] for row in table.rows] == [judgement.key for judgement in ranked]
        (sheet,) = section.pictures
        assert sheet.path.is_file()
        assert not sheet.on_page


def test_where_nothing_is_wrong_it_says_so(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    subject.scores.scores[:] = np.eye(2)[subject.scores.labels]
    wrong, unsure = examples_sections(subject)
    assert wrong.sentence == "None of 24 answers is wrong."
    assert not wrong.clips
    assert not wrong.tables
    assert not wrong.pictures
    assert unsure.sentence.startswith("In 0 of 24 clips")
