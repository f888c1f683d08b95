"""Ensembles: the mean of any sets of scores, from their files alone, without a network.

The members may be of different networks, numbers of frames, protocols and runs; clips and label passport must be the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError, DataError
from pipelines.evaluation.scores import ClipScores, Origin, read_scores
from pipelines.lookup import find_evaluated

SCORES = "scores.parquet"
HEADLINES = ("top1", "top5", "mean_class_accuracy")


@dataclass(frozen=True)
class Member:
    """One set of scores; `name` is what the user calls it, `weight` its part of the mean, above 0."""

    name: str
    scores: ClipScores
    weight: float = 1.0


def find_scores(text: str, workdir: Path) -> Path:
    """The file of scores that the user means.

    Args:
        text: a file, a folder that holds `scores.parquet`, or an evaluation as `find_evaluated` takes it.
        workdir: where evaluations are looked up.

    Raises:
        ConfigError: if there is none, or more than one.
        PipelineError: as `find_evaluated`.
    """
    path = Path(text)
    if path.is_file():
        return path
    if (path / SCORES).is_file():
        return path / SCORES
    return find_evaluated(workdir, text).path / SCORES


def read_members(texts: Sequence[str], weights: Sequence[float] | None, workdir: Path) -> list[Member]:
    """Read the scores of each member.

    Args:
        texts: see `find_scores`.
        weights: one each, above 0; None for equal ones.
        workdir: see `find_scores`.

    Raises:
        ConfigError, PipelineError: if the weights do not fit, and as `find_scores`.
        DataError: as `read_scores`.
    """
    if weights is not None and (len(weights) != len(texts) or not all(0 < weight < float("inf") for weight in weights)):
        raise ConfigError(
            f"found weights {', '.join(f'{weight:g}' for weight in weights)}; expected {len(texts)} numbers above 0, one for "
            "each set of scores"
        )
    paths = [find_scores(text, workdir) for text in texts]
    return [
        Member(text, read_scores(path), weight)
        for text, path, weight in zip(texts, paths, weights or [1.0] * len(texts), strict=True)
    ]


def average_scores(members: Sequence[Member]) -> ClipScores:
    """The weighted mean of the members' scores; clips in the order of the first member.

    It is computed as the first member's scores plus the mean of what the others differ by, so that equal members give exactly
    their own scores.

    Raises:
        DataError: if members are not of the same labels, split or clips; names two that differ.
    """
    first = members[0]
    total = sum(member.weight for member in members)
    change = np.zeros_like(first.scores.scores)
    for member in members[1:]:
        change += member.weight / total * (_aligned(first, member) - first.scores.scores)
    protocol = " + ".join(dict.fromkeys(member.scores.origin.protocol for member in members))
    origin = Origin(first.scores.origin.label_names, first.scores.origin.split, protocol)
    scores = np.maximum(first.scores.scores + change, 0.0)  # rounding may go below by 1e-17
    return ClipScores(first.scores.keys, first.scores.labels, scores, origin)


def describe_ensemble(members: Sequence[Member], together: ClipScores) -> dict[str, Any]:
    """The members' headline numbers and the whole summary of the ensemble, as plain data for JSON.

    Args:
        members: of the ensemble.
        together: as `average_scores` gives it.

    Returns:
        `members`: a row each: `name`, `weight`, `protocol`, top-1, top-5, mean class accuracy with their intervals; `ensemble`:
        as `evaluation.json`, with `split`, `protocol` and `label_passport`.
    """
    rows = []
    for member in members:
        summary = member.scores.summarise()
        numbers = {name: summary[name] for headline in HEADLINES for name in (headline, f"{headline}_interval")}
        rows.append({"name": member.name, "weight": member.weight, "protocol": member.scores.origin.protocol, **numbers})
    origin = together.origin
    facts = {"split": origin.split, "protocol": origin.protocol, "label_passport": origin.label_passport}
    return {"members": rows, "ensemble": {**together.summarise(), **facts}}


def _aligned(first: Member, other: Member) -> npt.NDArray[np.float64]:
    """The other's scores in the first's order of clips."""
    _require_same_labels(first, other)
    place = {key: row for row, key in enumerate(other.scores.keys)}
    ours, theirs = set(first.scores.keys), place.keys()
    if ours != theirs:
        stranger = min(ours ^ theirs)
        raise DataError(
            f"{first.name} has {len(ours)} clips and {other.name} has {len(theirs)}, {len(ours & theirs)} are the same; "
            f"{stranger} is only in {(first if stranger in ours else other).name}; average scores of the same clips"
        )
    rows = np.array([place[key] for key in first.scores.keys])
    differ = np.flatnonzero(other.scores.labels[rows] != first.scores.labels)
    if len(differ):
        raise DataError(
            f"{other.name} has other labels than {first.name} for {len(differ)} clips, such as "
            f"{first.scores.keys[differ[0]]}; average scores of one version of the annotations"
        )
    scores: npt.NDArray[np.float64] = other.scores.scores[rows]
    return scores


def _require_same_labels(first: Member, other: Member) -> None:
    for what in ("label_passport", "split"):
        ours, theirs = (getattr(member.scores.origin, what) for member in (first, other))
        if ours != theirs:
            raise DataError(
                f"{first.name} has {what.replace('_', ' ')} {ours} and {other.name} has {theirs}; expected the same: average "
                "scores of one label list and one split"
            )
