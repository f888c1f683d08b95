"""The report: one page that says first what came out, then why to doubt it, then everything it rests on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.evaluation.protocols import find_protocol
from pipelines.reports.page import data_uri, percent, write_page
from pipelines.reproduction import card_rows

FILE_NAME = "index.html"
_FEW_CLIPS = 100
_ABSENT_NAMED = 5
_CAPTIONS = {
    "curves": "Loss, top-1, learning rate and the strength of attention by epoch.",
    "confusion": "Rows are true classes, columns the network's answers; colour is the share of the true class.",
    "search": "Left: what each trial reached. Right: which of BN-Inception's ten slots carried attention in the best trials.",
}


def verdict(evaluation: Mapping[str, Any]) -> str:
    """The result in one sentence.

    Args:
        evaluation: as `Scores.summarise` gives it, with `split` and `protocol` if they are known.

    Example:
        >>> verdict({"top1": 0.9, "split": "validation", "num_clips": 20, "num_classes": 8, "chance": 0.125})
        'Top-1 is 90.0 % on 20 validation clips of 8 classes; chance is 12.5 %.'
    """
    split = f"{evaluation['split']} " if evaluation.get("split") else ""
    return (
        f"Top-1 is {percent(evaluation['top1'])} on {evaluation['num_clips']} {split}clips "
        f"of {evaluation['num_classes']} classes; chance is {percent(evaluation['chance'])}."
    )


def doubts(evaluation: Mapping[str, Any], *, num_trials: int) -> list[str]:
    """Sentences on what the numbers do not show, the gravest first.

    Args:
        evaluation: as `Scores.summarise` gives it, with `split` and `protocol` if they are known.
        num_trials: of the search that chose the settings.
    """
    return list(_doubts(evaluation, num_trials))


def write_report(
    output_dir: Path,
    *,
    title: str,
    stages: Sequence[Mapping[str, Any]],
    dataset: Mapping[str, Any],
    search: Mapping[str, Any] | None,
    history: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    card: Mapping[str, Any],
    figures: Mapping[str, Path],
    config_yaml: str,
    links: Mapping[str, str],
) -> Path:
    """Write the report as one file without scripts, which loads nothing.

    Args:
        output_dir: an existing folder; the page is `index.html` in it.
        title: of the page.
        stages: dicts of `name`, `status`, `seconds` (None if it did not run), `fingerprint`.
        dataset: what to say of the data; nested dicts get dotted names.
        search: dict with `trials`, the rows of `tuning.leaderboard`; None if nothing was searched.
        history: epochs as `EpochMetrics.to_json` gives them.
        evaluation: as `Scores.summarise` gives it, with `split` and `protocol`.
        card: as `reproduction_card` gives it.
        figures: PNG files by name, in the order of the page; "curves", "confusion" and "search" get captions.
        config_yaml: all settings.
        links: addresses by name.

    Returns:
        the page.
    """
    trials = list(search["trials"]) if search else []
    gammas = history[-1]["gammas"] if history else {}
    strongest = max((abs(gamma) for gamma in gammas.values()), default=0.0) or 1.0
    values = {
        "title": title,
        "verdict": verdict(evaluation),
        "doubts": doubts(evaluation, num_trials=len(trials)),
        "evaluation": evaluation,
        "left_right": _left_right_sentence(evaluation["left_right"]),
        "card": card,
        "card_rows": card_rows(card),
        "figures": {name: data_uri(path) for name, path in figures.items()},
        "captions": {name: _CAPTIONS.get(name, "") for name in figures},
        "alts": {name: name for name in figures} | _alts(history, evaluation, trials),
        "trials": trials,
        "gammas": [(slot, gamma, abs(gamma) / strongest) for slot, gamma in gammas.items()],
        "stages": stages,
        "dataset": list(_dotted(dataset)),
        "links": links,
        "config_yaml": config_yaml,
    }
    return write_page(output_dir / FILE_NAME, "report.html", values)


def _doubts(evaluation: Mapping[str, Any], num_trials: int) -> Iterator[str]:
    low, high = evaluation["top1_interval"]
    split = evaluation.get("split", "")
    if low <= evaluation["chance"]:
        yield f"Guessing ({percent(evaluation['chance'])}) is inside the interval of top-1: this may be no better than chance."
    elif low <= evaluation["largest_class_share"]:
        yield (
            f"Always answering the commonest class would reach {percent(evaluation['largest_class_share'])}, "
            "which is inside the interval of top-1."
        )
    if split == "train":
        yield "The clips were trained on: this is memory, not skill."
    if split == "validation":
        chosen = f"the best of {num_trials} trials and the best epoch were" if num_trials > 1 else "the best epoch was"
        yield f"On this split {chosen} also chosen, so the number is somewhat too high for unseen clips."
    yield (
        f"One seed. The interval ({percent(low)} to {percent(high)}) covers the choice of clips, not what another seed of the "
        "training would change."
    )
    if evaluation["num_clips"] < _FEW_CLIPS:
        yield f"Only {evaluation['num_clips']} clips: one clip more or less is {percent(1 / evaluation['num_clips'])}."
    if absent := evaluation["absent_classes"]:
        names = ", ".join(absent[:_ABSENT_NAMED]) + (", ..." if len(absent) > _ABSENT_NAMED else "")
        yield f"Classes without a clip here, left out of the mean class accuracy: {len(absent)} ({names})."
    if evaluation["num_unlabelled"]:
        yield f"Clips without a label, left out: {evaluation['num_unlabelled']}."
    yield find_protocol(evaluation.get("protocol", "centre")).describe()


def _alts(
    history: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """What the pictures show, for those who do not see them; the page's tables have the numbers."""
    worst = next(iter(evaluation["worst_pairs"]), None)
    pair = f"; the commonest: {worst['true']} answered as {worst['answer']}, {worst['num_clips']} clips" if worst else ""
    return {
        "curves": f"{_CAPTIONS['curves'].removesuffix('.')}; {len(history)} epochs",
        "confusion": f"Confusions of {evaluation['num_classes']} classes{pair}",
        "search": f"What each of {len(trials)} trials reached, and the slots with attention in the best of them",
    }


def _left_right_sentence(found: Mapping[str, Any] | None) -> str:
    """Of `metrics.left_right_confusion`; "" if no class has a mirror twin."""
    if found is None:
        return ""
    return (
        f"Left and right: {len(found['classes'])} classes are the mirror image of another one. Of their {found['num_clips']} "
        f"clips {found['num_right']} are answered right, {found['num_twin']} ({percent(found['share'])}) with that other class."
    )


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
