"""The clips on which a network was most wrong, and those of which it was least sure, from the scores that `evaluate` kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.evaluation.figures import draw_contact_sheet
from pipelines.evaluation.scores import ClipScores
from pipelines.insight.section import Column, Picture, Section, ShownClip, Table
from pipelines.insight.subject import Subject
from pipelines.reports.page import percent
from preprocessing.reader import FrameReader
from preprocessing.segments import segment_indices

_MAX_FRAMES = 8
_COLUMNS = (
    Column("rank", "", "count"),
    Column("key", "clip"),
    Column("true", "true class"),
    Column("answer", "answer"),
    Column("answer_score", "its score", "percent"),
    Column("true_score", "score of the true class", "percent"),
    Column("second", "second answer"),
    Column("margin", "ahead of it", "percent"),
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
    judged = judge(subject.scores, subject.classes)
    wrong, unsure = most_wrong(judged), most_unsure(judged)
    name_of = partial(_name, subject.split.label_names)
    if wrong:
        first = wrong[0]
        sentence = (
            f"{len(wrong):,} of {len(judged):,} answers are wrong; the surest of them, at {percent(first.answer_score)}, takes "
            f"{name_of(first.label)!r} for {name_of(first.answer)!r}."
        )
    else:
        sentence = f"None of {len(judged):,} answers is wrong."
    narrow = sum(clip.margin < 0.1 for clip in judged)
    return [
        _section(subject, "most_wrong", "Most wrong", sentence, "The wrong answers that the network was surest of.", wrong),
        _section(
            subject,
            "most_unsure",
            "Most unsure",
            f"In {narrow:,} of {len(judged):,} clips the answer is less than 10 points ahead of the next one.",
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
    shown = [_show(subject, clip) for clip in ranked[: subject.settings.num_examples]]
    pictures = []
    if shown:
        path = draw_contact_sheet(
            subject.figures / f"{name}.png", [(f"{clip.title}   {clip.text}", clip.frames) for clip in shown]
        )
        alt = "; ".join(clip.title for clip in shown)
        pictures.append(Picture(path, f"contact_sheet/{name}", alt, on_page=False))
    rows = [_row(subject, rank, clip) for rank, clip in enumerate(ranked, start=1)]
    table = Table(name, f"{len(rows):,} clips, the {title.lower()} first", _COLUMNS, rows)
    return Section(title, sentence, text, pictures, shown, [table] if rows else [])


def _show(subject: Subject, clip: Judgement) -> ShownClip:
    name_of = partial(_name, subject.split.label_names)
    title = f"{name_of(clip.label)}, answered {name_of(clip.answer)} at {percent(clip.answer_score)}"
    others = [] if clip.answer == clip.label else [f"the true class has {percent(clip.true_score)}"]
    if clip.second is not None and clip.second != clip.label:
        others.append(f"second is {name_of(clip.second)}, {100 * clip.margin:.1f} points behind")
    return ShownClip(title, "; ".join([f"clip {clip.key}", *others]), _frames(subject, clip.key))


def _row(subject: Subject, rank: int, clip: Judgement) -> Mapping[str, Any]:
    name_of = partial(_name, subject.split.label_names)
    names = {"true": name_of(clip.label), "answer": name_of(clip.answer)}
    names["second"] = "" if clip.second is None else name_of(clip.second)
    scores = {"answer_score": clip.answer_score, "true_score": clip.true_score, "margin": clip.margin}
    return {"rank": rank, "key": clip.key, **names, **scores}


def _frames(subject: Subject, key: str) -> list[npt.NDArray[np.uint8]]:
    """The centre frame of each segment, uncropped; of more than eight segments, of eight."""
    video = subject.split.video(subject.row_of[key])
    frame_indices = segment_indices(len(video.frame_sizes), min(_MAX_FRAMES, subject.num_segments))
    return FrameReader(subject.split).read_frames(video, frame_indices.tolist())


def _name(names: Sequence[str], label: int) -> str:
    return names[label]
