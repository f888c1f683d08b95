"""Reproduction cards: what a named experiment says its numbers will be, what they are, and what was changed in it.

An experiment states bands; the card judges them after the run. A number outside its band is no error: the card also names the
settings that differ from the experiment as it is written, for which the band may not hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from infra.settings import Settings

Metric = Literal["top1", "top5", "mean_class_accuracy", "largest_gamma"]

CARD_HEADER = ("number", "expected", "got", "within", "source")

_WORDS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class accuracy",
    "largest_gamma": "largest |gamma|",
}
_NAMED_SETTINGS = 6


class Band(Settings):
    """Where a number must lie.

    Attributes:
        metric: of the evaluation, a fraction; or `largest_gamma`, the largest size of a gamma of attention in the last epoch.
        low: the least; None if any number below `high` will do.
        high: the most; None likewise.
        source: who says so: a paper with its table, or the run that was seen.
    """

    metric: Metric = "top1"
    low: float | None = None
    high: float | None = None
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("low and high are both null; expected at least one of them")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}; expected low not above high")
        return self

    def holds(self, number: float) -> bool:
        """Whether the number is in the band; its ends belong to it."""
        return (self.low is None or number >= self.low) and (self.high is None or number <= self.high)

    def __str__(self) -> str:
        """The band in words.

        Example:
            >>> str(Band(low=0.8, source="seen")), str(Band(metric="largest_gamma", low=0.0, high=0.0, source="D1"))
            ('at least 80.0 %', '0')
        """
        low, high = (None if end is None else number_in_words(self.metric, end) for end in (self.low, self.high))
        if low is None:
            return f"at most {high}"
        if high is None:
            return f"at least {low}"
        return low if low == high else f"{low} to {high}"


class Expected(Settings):
    """What an experiment of one network must reach; a comparison has bands for each of its variants instead."""

    bands: tuple[Band, ...] = ()


def reproduction_card(
    experiment: str,
    bands: Mapping[str, Sequence[Band]],
    found: Mapping[str, Mapping[str, float]],
    changed: Mapping[str, Any],
) -> dict[str, Any]:
    """Judge the bands of an experiment; plain data for JSON.

    Args:
        experiment: its name.
        bands: by variant; "" is the only network of an experiment that compares nothing.
        found: metrics by variant; one that was not measured is left out.
        changed: the dotted settings in which the run differs from the experiment as it is written, with their new values.

    Returns:
        `experiment`, `changed`; `lines`: dicts of `variant`, `metric` and `expected` (in words), `got` (a number or None),
        `got_text`, `within` (None if there is no number), `source`; `passes`: whether all are within, None if nothing is
        judged; `sentence`.
    """
    lines = []
    for variant, stated in bands.items():
        for band in stated:
            got = found[variant].get(band.metric)
            lines.append(
                {
                    "variant": variant,
                    "metric": _WORDS[band.metric],
                    "expected": str(band),
                    "got": got,
                    "got_text": "not measured" if got is None else number_in_words(band.metric, got),
                    "within": None if got is None else band.holds(got),
                    "source": band.source,
                }
            )
    judged = [bool(line["within"]) for line in lines if line["within"] is not None]
    return {
        "experiment": experiment,
        "lines": lines,
        "changed": dict(changed),
        "passes": all(judged) if judged else None,
        "sentence": _sentence(experiment, judged, len(lines), changed),
    }


def card_markdown(card: Mapping[str, Any]) -> str:
    """The card as a text for MLflow: the sentence, and a table if there is anything to judge."""
    rows = [f"| {' | '.join(_escape(cell) for cell in row)} |" for row in card_rows(card)]
    table = ["", f"| {' | '.join(CARD_HEADER)} |", "|---" * len(CARD_HEADER) + "|", *rows] if rows else []
    return "\n".join([card["sentence"], *table])


def card_rows(card: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row a band, as people read it; see `CARD_HEADER`."""
    answers = {True: "yes", False: "no", None: "-"}
    return [
        (
            f"{line['metric']} of {line['variant']}" if line["variant"] else line["metric"],
            line["expected"],
            line["got_text"],
            answers[line["within"]],
            line["source"],
        )
        for line in card["lines"]
    ]


def number_in_words(metric: str, number: float) -> str:
    """A fraction as a percentage; a gamma as it is."""
    return f"{number:.3g}" if metric == "largest_gamma" else f"{100 * number:.1f} %"


def _sentence(experiment: str, judged: Sequence[bool], num_stated: int, changed: Mapping[str, Any]) -> str:
    if not num_stated:
        outcome = f"{experiment} states no number to reach"
    elif not judged:
        outcome = f"Not judged: nothing that {experiment} states was measured"
    elif all(judged):
        outcome = f"As expected: {len(judged)} of {_count(len(judged), 'number')} of {experiment}"
    else:
        outcome = f"Not as expected: {judged.count(False)} of {_count(len(judged), 'number')} of {experiment}"
    if not changed:
        return f"{outcome}; all settings are those of {experiment}."
    named = ", ".join(list(changed)[:_NAMED_SETTINGS]) + (", ..." if len(changed) > _NAMED_SETTINGS else "")
    doubt = ", for which no number is stated" if num_stated else ""
    return f"{outcome}; {_count(len(changed), 'setting')} changed{doubt} ({named})."


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _escape(cell: str) -> str:
    """No text of an experiment makes a new column."""
    return cell.replace("|", "\\|").replace("\n", " ")
