"""The model card: what a trained network is, what it was trained on, how good it is, where not to trust it, how to use it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.reports.page import percent
from pipelines.reports.report import doubts, verdict

_SHOWN_CLASSES = 12
_SETTINGS = (
    "epochs", "batch_size", "accumulation", "learning_rate", "schedule", "label_smoothing", "flip", "pixels", "num_segments",
    "sampling", "precision", "seed",
)  # fmt: skip


def model_card(
    *,
    name: str,
    alias: str,
    facts: Mapping[str, Any],
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    dataset: Mapping[str, Any],
    num_trials: int,
    command: str,
    folder: Path,
) -> str:
    """The card as markdown.

    Args:
        name: of the registered model.
        alias: under which this version is found.
        facts: the content of model.json.
        training: the summary of the stage `train`.
        evaluation: as `Scores.summarise` gives it, with `split`.
        dataset: the summary of the stage `shards`.
        num_trials: of the search that chose the settings.
        command: the shell command that trains it again.
        folder: of the train artifact, the place of the weights.
    """
    network, names = facts["model"], facts["label_names"]
    parts = [
        f"# {name}",
        verdict(evaluation),
        "## What it is",
        f"A `{network['name']}` that tells {len(names)} actions apart in short videos ({_placement(network)}), trained for "
        f"{training['epochs']} epochs; the weights are those of epoch {training['best_epoch'] + 1}, the best on validation.",
        "## Data",
        f"Dataset `{dataset['dataset']}`: {dataset['kept']:,} videos, {dataset['rejected']:,} more were rejected as broken. "
        f"Label passport `{facts['label_passport']}`. Classes: {_classes(names)}.",
        "## Numbers",
        _numbers(evaluation),
        "## Settings",
        "\n".join(f"- `train.{setting}`: {facts['train'][setting]}" for setting in _SETTINGS),
        f"Frames: {_decoding(facts.get('decoding'))}. All settings are in `model.json`. Again: `{command}`",
        "## Limits",
        "\n".join(f"- {sentence}" for sentence in [*doubts(evaluation, num_trials=num_trials), *_LIMITS]),
        "## Use",
        _use(name, alias, folder),
    ]
    return "\n\n".join(parts) + "\n"


_LIMITS = (
    "It always names one of its classes, also for a video that shows none of them; its probabilities were not calibrated.",
    "One clip of the whole video is judged, the centre crop: cut longer videos to the action first.",
    "Served, it reads any path that its process may read; let only those ask who may.",
)


def _placement(network: Mapping[str, Any]) -> str:
    attends = network["name"].startswith("sa_gsm")
    return f"attention at: {network['placement']}, scope {network['scope']}" if attends else "no attention"


def _classes(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_CLASSES} more" if len(names) > _SHOWN_CLASSES else ""
    return ", ".join(names[:_SHOWN_CLASSES]) + more


def _numbers(evaluation: Mapping[str, Any]) -> str:
    rows = [
        ("top-1", percent(evaluation["top1"])),
        ("top-5", percent(evaluation["top5"])),
        ("mean class accuracy", percent(evaluation["mean_class_accuracy"])),
        ("loss", f"{evaluation['loss']:.3f}"),
        ("clips", f"{evaluation['num_clips']:,} of split {evaluation['split']}"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {word} | {value} |" for word, value in rows)])


def _decoding(decoding: Mapping[str, Any] | None) -> str:
    if decoding is None:
        return "decoded by another program"
    side = "stored size" if decoding["short_side"] is None else f"short side {decoding['short_side']} pixels"
    rate = "every frame" if decoding["fps"] is None else f"{decoding['fps']:g} frames/s"
    return f"JPEG of quality {decoding['jpeg_quality']}, {side}, {rate}"


def _use(name: str, alias: str, folder: Path) -> str:
    request = json.dumps({"dataframe_records": [{"video": "PATH OR BASE64"}]})
    lines = (
        f"sagsm predict --model models:/{name}@{alias} clip.mp4",
        f"sagsm predict --model {folder} clip.mp4",
        f"mlflow models serve -m models:/{name}@{alias} --env-manager local -p 5001",
        f"curl localhost:5001/invocations -H 'Content-Type: application/json' -d '{request}'",
    )
    return "\n".join(f"    {line}" for line in lines)
