"""The page of a comparison: the verdict, what to distrust in it, and all numbers and curves that it rests on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from infra.storage import write_json
from models import describe_model, model_options
from pipelines.artifacts import Artifact
from pipelines.config import ExperimentConfig
from pipelines.evaluation.comparison_figures import draw_top1, draw_variant_curves
from pipelines.evaluation.protocols import find_protocol
from pipelines.evaluation.significance import Hits, difference, read_hits, top1_interval
from pipelines.reports.page import data_uri, percent, write_page

if TYPE_CHECKING:
    from pipelines.comparison import Comparison, Trained

FILE_NAME = "index.html"


def compare_trained(comparison: "Comparison", trained: Sequence["Trained"]) -> dict[str, Any]:
    """Judge every variant, and every variant against the baseline.

    Args:
        comparison: what was compared.
        trained: every variant with every seed.

    Returns:
        plain data for JSON:
        `verdict`: in words; `passes`: whether all top-1 are as expected, None if nothing is; `baseline`, `split`, `num_clips`,
        `chance`;
        `variants`: by name `top1` (mean over seeds), `top1_interval`, `seeds` (by seed the metrics of the evaluation),
        `parameters`, `macs_per_clip`, `published_top1`, `published_source`, `expected`, `as_expected`, `settings` (those that
        differ from the baseline);
        `differences`: by name `top1`, `interval`, `mcnemar` (p-values by seed), `separable`, `sentence`.

    Raises:
        PipelineError: if the evaluations are not of the same clips.
    """
    hits = _read_hits(trained)
    settings = comparison.differences()
    num_classes = json.loads((trained[0].evaluate.path / "evaluation.json").read_bytes())["num_classes"]
    variants = {}
    for name, config in comparison.variants.items():
        by_seed = {
            str(item.training.seed): item.evaluate.summary["metrics"] for item in trained if item.training.variant == name
        }
        top1, expected = float(hits[name].mean()), comparison.expected.get(name)
        variants[name] = {
            "top1": top1,
            "top1_interval": list(top1_interval(hits[name])),
            "seeds": by_seed,
            **_facts(config, num_classes),
            "expected": None if expected is None else list(expected),
            "as_expected": None if expected is None else expected[0] <= top1 <= expected[1],
            "settings": settings[name],
        }
    judged = [row["as_expected"] for row in variants.values() if row["as_expected"] is not None]
    results: dict[str, Any] = {
        "passes": all(judged) if judged else None,
        "baseline": comparison.baseline,
        "split": comparison.config.evaluate.split,
        "num_clips": next(iter(hits.values())).shape[1],
        "chance": 1 / num_classes,
        "variants": variants,
        "differences": {name: _judge(name, comparison, hits) for name in comparison.variants if name != comparison.baseline},
    }
    return {"verdict": verdict(results), **results}


def verdict(results: Mapping[str, Any]) -> str:
    """The outcome in a few sentences, whether it is as expected first.

    Args:
        results: as `compare_trained` gives them.
    """
    numbers = ", ".join(f"{name} {percent(row['top1'])}" for name, row in results["variants"].items())
    found = f"top-1 on {results['num_clips']} {results['split']} clips: {numbers}."
    if results["passes"] is None:
        sentences = [row["sentence"] for row in results["differences"].values()]
        return f"{found[0].upper()}{found[1:]} {sentences[0] if len(sentences) == 1 else _sort_out(results)}"
    strangers = [
        f"{name} should have {percent(row['expected'][0])} to {percent(row['expected'][1])}"
        for name, row in results["variants"].items()
        if row["as_expected"] is False
    ]
    return f"Not as expected, {found} {'; '.join(strangers)}." if strangers else f"As expected, {found}"


def doubts(comparison: "Comparison", results: Mapping[str, Any]) -> list[str]:
    """Sentences on what the numbers do not show, the gravest first."""
    return list(_doubts(comparison, results))


def write_comparison(
    output_dir: Path, title: str, comparison: "Comparison", trained: Sequence["Trained"], results: Mapping[str, Any]
) -> Path:
    """Write the page `index.html` without scripts, which loads nothing, `comparison.json` and the pictures in `figures/`."""
    curves: dict[str, list[Any]] = {name: [] for name in comparison.variants}
    for item in trained:
        curves[item.training.variant].append(json.loads((item.train.path / "history.json").read_bytes()))
    (output_dir / "figures").mkdir(exist_ok=True)
    figures = {
        "top1": draw_top1(output_dir / "figures" / "top1.png", results["variants"], results["chance"]),
        "curves": draw_variant_curves(output_dir / "figures" / "curves.png", curves),
    }
    write_json(output_dir / "comparison.json", dict(results))
    values = {
        "title": title,
        "results": results,
        "doubts": doubts(comparison, results),
        "figures": {name: data_uri(path) for name, path in figures.items()},
        "trainings": [_training_row(item) for item in trained],
        "changed": list(_changed_rows(comparison, results)),
        "has_published": any(row["published_top1"] is not None for row in results["variants"].values()),
    }
    return write_page(output_dir / FILE_NAME, "comparison.html", values)


def _read_hits(trained: Sequence["Trained"]) -> dict[str, Hits]:
    """Whether each clip is right, by variant: bool [S, N], clips in the order of their keys."""
    found = read_hits({item.training.label: item.evaluate.path / "scores.parquet" for item in trained})
    rows: dict[str, list[npt.NDArray[np.bool_]]] = {}
    for item in trained:
        rows.setdefault(item.training.variant, []).append(found[item.training.label])
    return {name: np.stack(hits) for name, hits in rows.items()}


def _facts(config: ExperimentConfig, num_classes: int) -> dict[str, Any]:
    """What the network costs, and the published number if this is its dataset."""
    options = {name: getattr(config.model, name) for name in model_options(config.model.name)}
    facts = describe_model(config.model.name, num_classes, config.train.num_segments, **options)
    is_theirs = config.dataset.dataset_name == "something_v1" and config.dataset.synthetic is None
    return {
        "parameters": facts.parameters,
        "macs_per_clip": facts.macs_per_clip,
        "published_top1": facts.published_top1 if is_theirs else None,
        "published_source": facts.source if is_theirs else "",
    }


def _judge(name: str, comparison: "Comparison", hits: Mapping[str, Hits]) -> dict[str, Any]:
    found = difference(hits[name], hits[comparison.baseline])
    return {
        "top1": found.top1,
        "interval": list(found.interval),
        "mcnemar": {str(seed): p_value for seed, p_value in zip(comparison.seeds, found.mcnemar, strict=True)},
        "separable": found.separable,
        "sentence": found.sentence(name, comparison.baseline),
    }


def _sort_out(results: Mapping[str, Any]) -> str:
    """Which variants can be told from the baseline."""
    differences, baseline = results["differences"], results["baseline"]
    apart = [name for name, row in differences.items() if row["separable"]]
    alike = [name for name in differences if name not in apart]
    one_seed = all(len(row["seeds"]) == 1 for row in results["variants"].values())
    noise = "the noise of clips (one seed each, so that of seeds is not known)" if one_seed else "noise"
    return (
        f"Separable from {baseline} by more than {noise}: {', '.join(apart) or 'none'}; "
        f"not separable: {', '.join(alike) or 'none'}."
    )


def _doubts(comparison: "Comparison", results: Mapping[str, Any]) -> Iterator[str]:
    num_seeds, num_differences = len(comparison.seeds), len(results["differences"])
    if num_seeds == 1:
        yield (
            "One seed each. Intervals and tests cover the choice of clips; what another seed of the training would change is "
            "not in them, and may be larger."
        )
    elif num_seeds < 5:
        yield f"{num_seeds} seeds each: the spread between seeds is itself hardly known, which is why intervals are wide."
    if num_differences > 1:
        yield (
            f"{num_differences} differences are judged at 95 % each: where there is none, one in twenty such verdicts still "
            "says separable."
        )
    if results["split"] == "validation" or comparison.config.dataset.name == "diving48":
        yield "The same clips chose the best epoch of each training, so the numbers are somewhat too high for unseen clips."
    if results["split"] == "train":
        yield "The clips were trained on: this is memory, not skill."
    if comparison.config.dataset.synthetic is not None:
        yield "Generated videos: they show that a network sees motion, not how good it is on footage of the world."
    if any(row["published_top1"] is not None for row in results["variants"].values()):
        yield "Published numbers are of other trainings (ImageNet weights, their own number of frames): see the source column."
    for name in dict.fromkeys(config.evaluate.protocol for config in comparison.variants.values()):
        yield find_protocol(name).describe()


def _changed_rows(comparison: "Comparison", results: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Each setting that is not the same in all variants, with its value in each."""
    trees = [config.model_dump(mode="json") for config in comparison.variants.values()]
    for setting in sorted({name for row in results["variants"].values() for name in row["settings"]}):
        yield setting, [reduce(lambda branch, name: branch[name], setting.split("."), tree) for tree in trees]


def _training_row(item: "Trained") -> dict[str, Any]:
    train: Artifact = item.train
    return {
        "variant": item.training.variant,
        "seed": item.training.seed,
        **item.evaluate.summary["metrics"],
        "best_epoch": train.summary["best_epoch"] + 1,
        "epochs": train.summary["epochs"],
        "seconds": train.manifest["seconds"],
        "fingerprint": train.fingerprint,
    }
