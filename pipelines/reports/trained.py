"""What a comparison says of what it compares, beside accuracy: the data, the network, the clips of the training, the speed."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from infra.errors import DataError, PipelineError
from infra.filesystems import Folder
from infra.storage import sha256_json
from models import describe_model, model_options
from pipelines.artifacts import Artifact, shards_place
from pipelines.config import ExperimentConfig
from preprocessing.index import read_index

if TYPE_CHECKING:
    from pipelines.comparison import Published, Trained

_HASH_DIGITS = 12
_MEASURED = ("top1", "top5", "mean_class_accuracy")


def describe_data(trained: Sequence["Trained"]) -> dict[str, Any]:
    """The dataset, the labels and the clips on which all were judged.

    Returns:
        `dataset` (of Diving48 with its version), `label_passport`, `split`, `num_clips` and `clips_hash`: of the keys and
        labels of the clips.

    Raises:
        PipelineError: if they are not the same for all; everything that differs is named.
    """
    all_facts = [_judged_on(item) for item in trained]
    for item, facts in zip(trained, all_facts, strict=True):
        wrong = [
            f"{name.replace('_', ' ')} {facts[name]} instead of {value}"
            for name, value in all_facts[0].items()
            if facts[name] != value
        ]
        if wrong:
            raise PipelineError(
                f"{item.training.label} cannot be compared with {trained[0].training.label}: it was judged on other clips or "
                f"labels ({'; '.join(wrong)}); expected the same, since differences are taken clip by clip"
            )
    return all_facts[0]


def network_facts(config: ExperimentConfig, num_classes: int, published: "Published | None") -> dict[str, Any]:
    """What the network costs, and the published number if this is its dataset.

    Args:
        config: of the variant.
        num_classes: of the dataset.
        published: a number that goes before the one that `models.describe_model` knows.
    """
    options = {name: getattr(config.model, name) for name in model_options(config.model.name)}
    facts = describe_model(config.model.name, num_classes, config.train.num_segments, **options)
    is_theirs = config.dataset.dataset_name == "something_v1" and config.dataset.synthetic is None
    top1, source = (facts.published_top1, facts.source) if published is None else (published.top1, published.source)
    return {
        "parameters": facts.parameters,
        "macs_per_clip": facts.macs_per_clip,
        "published_top1": top1 if is_theirs else None,
        "published_source": source if is_theirs else "",
    }


def training_facts(trained: Sequence["Trained"]) -> dict[str, Any]:
    """On what a variant was trained, and how fast it was judged.

    Args:
        trained: the variant with each of its seeds, which trained on the same clips.

    Returns:
        `training`: `num_clips`, `fraction` of the split and `clips_hash` of their keys in the order of the index, None if the
        shards are gone; `num_trials`: the most of any search that chose the settings; `videos_per_second`: of the whole stage
        `evaluate`, all seeds together, None if it is not known.
    """
    first = trained[0]
    num_kept: int = first.shards.summary["by_split"]["train"]["kept"]
    subset = first.training.config.train.subset
    num_clips = num_kept if subset is None else min(subset, num_kept)
    try:
        keys = read_index(Folder(shards_place(first.shards)), "train", ["key"])["key"].to_pylist()
        clips_hash = sha256_json(keys[:num_clips])[:_HASH_DIGITS]
    except DataError:  # to compare finished evaluations takes their scores alone
        clips_hash = None
    seconds = [float(item.evaluate.manifest.get("seconds", 0.0)) for item in trained]
    num_judged = sum(item.evaluate.summary["num_clips"] for item in trained)
    return {
        "training": {"num_clips": num_clips, "fraction": num_clips / num_kept, "clips_hash": clips_hash},
        "num_trials": max(item.num_trials for item in trained),
        "videos_per_second": num_judged / sum(seconds) if all(seconds) else None,
    }


def found_numbers(train: Artifact, evaluate: Artifact) -> dict[str, float]:
    """What bands may be stated of one training (`reproduction.Metric`); what was not measured is left out."""
    numbers = {name: float(evaluate.summary["metrics"][name]) for name in _MEASURED}
    history = json.loads((train.path / "history.json").read_bytes())
    if gammas := history[-1].get("gammas"):
        numbers["largest_gamma"] = max(abs(gamma) for gamma in gammas.values())
    return numbers


def _judged_on(item: "Trained") -> dict[str, Any]:
    import pyarrow.parquet as pq

    table = pq.read_table(item.evaluate.path / "scores.parquet", columns=["key", "label"]).sort_by("key")
    shards = item.shards.summary
    return {
        "dataset": shards["dataset"],
        "label_passport": shards["label_passport"],
        "split": item.training.config.evaluate.split,
        "num_clips": table.num_rows,
        "clips_hash": sha256_json([table["key"].to_pylist(), table["label"].to_pylist()])[:_HASH_DIGITS],
    }
