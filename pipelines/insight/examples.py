"""The clips on which a network was most wrong, and those of which it was least sure, from the scores that `evaluate` kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.evaluation.figures import draw_contact_sheet, plain_name
from pipelines.evaluation.scores import ClipScores
from pipelines.insight.section import Column, Picture, Section, ShownClip, Table
from pipelines.insight.subject import Subject
from pipelines.reports.page import percent
from preprocessing.segments import segment_indices

_NARROW = 0.1
_MAX_FRAMES = 8
_SHEET_CHARACTERS = 44  # of a name: two of them fit beside each other
_COLUMNS = (
    Column("rank", "rank", "count"),
    Column("key", "clip"),
    Column("true", "true class"),
    Column("answer", "answer"),
    Column("answer_score", "score", "percent"),
    Column("true_score", "true score", "percent"),
    Column("second", "second"),
    Column("margin", "ahead", "percent"),
    Column("entropy", "entropy", "number"),
)


@dataclass(frozen=True)
class Judgement:
    """What a network said of one labelled clip.

    Attributes:
        key: of the video.
        label: the true class.
        answer: the class with the highest score; of equal ones the lower id.
        second: the next one; None if there is only one class.
        answer_score: of the answer, in [0, 1].
        true_score: of the true class, in [0, 1].
        margin: how far the answer is ahead of the second one, in [0, 1].
        entropy: of the scores, in nats.
    """

    key: str
    label: int
    answer: int
    second: int | None
    answer_score: float
    true_score: float
    margin: float
    entropy: float


def judge(scores: ClipScores, classes: Sequence[int]) -> list[Judgement]:
    """What was said of each labelled clip of some classes, in the order of the scores."""
    return [
        _judge(scores.keys[row], int(scores.labels[row]), scores.scores[row])
        for row in np.flatnonzero(np.isin(scores.labels, classes))
    ]


def most_wrong(judged: Sequence[Judgement]) -> list[Judgement]:
    """The wrong answers, that with the highest score first; of equal ones that with the lower score of the true class."""
    wrong = [clip for clip in judged if clip.answer != clip.label]
    return sorted(wrong, key=lambda clip: (-clip.answer_score, clip.true_score, clip.key))


def most_unsure(judged: Sequence[Judgement]) -> list[Judgement]:
    """All answers, right or wrong, that with the smallest margin first; of equal ones that with the higher entropy."""
    return sorted(judged, key=lambda clip: (clip.margin, -clip.entropy, clip.key))


def examples_sections(subject: Subject) -> list[Section]:
    """The most wrong answers and the least sure ones, each with its clips, a contact sheet and a table of all."""
    names, judged = subject.split.label_names, judge(subject.scores, subject.classes)
    wrong, unsure = most_wrong(judged), most_unsure(judged)
    sentence = f"None of {len(judged):,} answers is wrong."
    if wrong:
        first = wrong[0]
        sentence = (
            f"{len(wrong):,} of {len(judged):,} answers are wrong; the surest of them, at {percent(first.answer_score)}, takes "
            f"{names[first.label]!r} for {names[first.answer]!r}."
        )
    num_narrow = sum(clip.margin < _NARROW for clip in judged)
    narrow = (
        f"In {num_narrow:,} of {len(judged):,} clips the answer is less than {100 * _NARROW:.0f} points ahead of the next one."
    )
    most_wrong_section = _section(
        subject, "most_wrong", "Most wrong", sentence, "The wrong answers that the network was surest of.", wrong
    )
    return [
        replace(most_wrong_section, numbers=[(f"{len(wrong):,} of {len(judged):,}", "answers wrong")]),
        _section(
            subject,
            "most_unsure",
            "Most unsure",
            narrow,
            "The answers, right or wrong, that were least ahead of the second one.",
            unsure,
        ),
    ]


def _judge(key: str, label: int, scores: npt.NDArray[np.float64]) -> Judgement:
    order = np.argsort(-scores, kind="stable")
    answer, second = int(order[0]), int(order[1]) if len(order) > 1 else None
    above_zero = scores[scores > 0]
    return Judgement(
        key=key,
        label=label,
        answer=answer,
        second=second,
        answer_score=float(scores[answer]),
        true_score=float(scores[label]),
        margin=float(scores[answer] - (0.0 if second is None else scores[second])),
        entropy=float(-(above_zero * np.log(above_zero)).sum()),
    )


def _section(subject: Subject, name: str, title: str, sentence: str, text: str, ranked: Sequence[Judgement]) -> Section:
    if not ranked:
        return Section(title, sentence)
    names, first = subject.split.label_names, ranked[: subject.settings.num_examples]
    clips = [ShownClip(_title(names, clip), _text(names, clip), _frames(subject, clip.key)) for clip in first]
    short_names = [plain_name(label_name, _SHEET_CHARACTERS) for label_name in names]
    rows_of_frames = [(_title(short_names, clip), shown.frames) for clip, shown in zip(first, clips, strict=True)]
    path = draw_contact_sheet(subject.figures / f"{name}.png", rows_of_frames)
    sheet = Picture(path, f"contact_sheet/{name}", "; ".join(clip.title for clip in clips), on_page=False)
    rows = [_row(names, rank, clip) for rank, clip in enumerate(ranked, start=1)]
    table = Table(name, f"{len(rows):,} clips, the {title.lower()} first", _COLUMNS, rows, num_shown=50)
    return Section(title, sentence, text, [sheet], clips, [table])


def _title(names: Sequence[str], clip: Judgement) -> str:
    if clip.answer == clip.label:
        return f"{names[clip.label]}, rightly answered at {percent(clip.answer_score)}"
    return f"{names[clip.label]}, answered {names[clip.answer]} at {percent(clip.answer_score)}"


def _text(names: Sequence[str], clip: Judgement) -> str:
    parts = [f"clip {clip.key}"]
    if clip.answer != clip.label:
        parts.append(f"the true class has {percent(clip.true_score)}")
    if clip.second is not None and clip.second != clip.label:
        parts.append(f"second is {names[clip.second]}, {100 * clip.margin:.1f} points behind")
    return "; ".join(parts)


def _row(names: Sequence[str], rank: int, clip: Judgement) -> Mapping[str, Any]:
    classes = {"true": names[clip.label], "answer": names[clip.answer]}
    second = "" if clip.second is None else names[clip.second]
    scores = {"answer_score": clip.answer_score, "true_score": clip.true_score, "margin": clip.margin}
    return {"rank": rank, "key": clip.key, **classes, "second": second, **scores, "entropy": clip.entropy}


def _frames(subject: Subject, key: str) -> list[npt.NDArray[np.uint8]]:
    """The centre frame of each segment, uncropped; of more than eight segments, of eight."""
    video = subject.split.video(subject.row_of[key])
    frame_indices = segment_indices(len(video.frame_sizes), min(_MAX_FRAMES, subject.num_segments))
    return subject.reader.read_frames(video, frame_indices.tolist())
