"""The page of a comparison: the verdict, what to distrust in it, and all numbers and curves that it rests on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from infra.storage import write_json
from pipelines.artifacts import Artifact
from pipelines.config import ExperimentConfig
from pipelines.evaluation.comparison_figures import draw_top1, draw_variant_curves
from pipelines.evaluation.protocols import find_protocol
from pipelines.evaluation.significance import Hits, difference, read_hits, top1_interval
from pipelines.reports.page import data_uri, percent, write_page
from pipelines.reports.trained import describe_data, found_numbers, network_facts, training_facts
from pipelines.reproduction import Band, card_rows, reproduction_card

if TYPE_CHECKING:
    from pipelines.comparison import Published, Trained

FILE_NAME = "index.html"


class Compared(Protocol):
    """What a page needs to know of a comparison; `pipelines.comparison.Comparison` says what the members are."""

    @property
    def variants(self) -> Mapping[str, ExperimentConfig]:
        """Whole configurations by name."""

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""

    @property
    def expected(self) -> Mapping[str, Sequence[Band]]:
        """Bands by variant."""

    @property
    def published(self) -> Mapping[str, "Published"]:
        """Numbers of papers by variant."""

    @property
    def config(self) -> ExperimentConfig:
        """The baseline's settings."""

    def differences(self) -> dict[str, dict[str, Any]]:
        """By variant, the dotted settings in which it differs from the baseline."""


def compare_trained(
    comparison: Compared,
    trained: Sequence["Trained"],
    *,
    experiment: str = "",
    changed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge every variant, and every variant against the baseline.

    Args:
        comparison: what was compared.
        trained: every variant with every seed that it has.
        experiment: its name, if a named experiment was run.
        changed: the dotted settings in which the run differs from that experiment.

    Returns:
        plain data for JSON:
        `verdict`: in words; `card`: as `reproduction_card` gives it, None without an experiment; `baseline`, `split`,
        `num_clips`, `chance`; `data`: as `describe_data` gives it;
        `variants`: by name `top1` (mean over seeds), `top1_interval`, `seeds` (by seed the metrics of the evaluation),
        `parameters`, `macs_per_clip`, `published_top1`, `published_source`, `expected_top1` (a band), `training`,
        `num_trials` and `videos_per_second` (as `training_facts` gives them), `settings` (those that differ from the baseline);
        `differences`: by name `top1`, `interval`, `mcnemar` (p-values by seed), `separable`, `sentence`.

    Raises:
        PipelineError: if the evaluations are not of the same dataset, labels, split and clips.
    """
    data = describe_data(trained)
    hits, seeds = _read_hits(trained)
    settings = comparison.differences()
    num_classes = json.loads((trained[0].evaluate.path / "evaluation.json").read_bytes())["num_classes"]
    variants: dict[str, dict[str, Any]] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, config in comparison.variants.items():
        own = [item for item in trained if item.training.variant == name]
        numbers[name] = _means([found_numbers(item.train, item.evaluate) for item in own])
        variants[name] = {
            "top1": float(hits[name].mean()),
            "top1_interval": list(top1_interval(hits[name])),
            "seeds": {str(item.training.seed): item.evaluate.summary["metrics"] for item in own},
            **network_facts(config, num_classes, comparison.published.get(name)),
            **training_facts(own),
            "expected_top1": _top1_band(comparison.expected.get(name, ())),
            "settings": settings[name],
        }
    results: dict[str, Any] = {
        "card": reproduction_card(experiment, comparison.expected, numbers, changed or {}) if experiment else None,
        "baseline": comparison.baseline,
        "split": comparison.config.evaluate.split,
        "num_clips": next(iter(hits.values())).shape[1],
        "chance": 1 / num_classes,
        "data": data,
        "variants": variants,
        "differences": {
            name: _judge(name, comparison.baseline, hits, seeds) for name in comparison.variants if name != comparison.baseline
        },
    }
    return {"verdict": verdict(results), **results}


def verdict(results: Mapping[str, Any]) -> str:
    """The outcome in a few sentences, whether it is as expected first.

    Args:
        results: as `compare_trained` gives them.
    """
    numbers = ", ".join(f"{name} {percent(row['top1'])}" for name, row in results["variants"].items())
    found = f"top-1 on {results['num_clips']} {results['split']} clips: {numbers}."
    sentences = [row["sentence"] for row in results["differences"].values()]
    apart = sentences[0] if len(sentences) == 1 else _sort_out(results)
    if not sentences:
        apart = "All are seeds of one configuration: there is nothing to tell apart."
    card = results["card"]
    if card is None or card["passes"] is None:
        return f"{found[0].upper()}{found[1:]} {apart}"
    strangers = [
        f"{line['variant']} has {line['metric']} {line['got_text']}, expected {line['expected']}"
        for line in card["lines"]
        if line["within"] is False
    ]
    return f"Not as expected, {found} {'; '.join(strangers)}. {apart}" if strangers else f"As expected, {found} {apart}"


def doubts(comparison: Compared, results: Mapping[str, Any]) -> list[str]:
    """Sentences on what the numbers do not show, the gravest first."""
    return list(_doubts(comparison, results))


def write_comparison(
    output_dir: Path, title: str, comparison: Compared, trained: Sequence["Trained"], results: Mapping[str, Any]
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
        "card": results["card"],
        "card_rows": card_rows(results["card"]) if results["card"] else [],
        "doubts": doubts(comparison, results),
        "figures": {name: data_uri(path) for name, path in figures.items()},
        "trainings": [_training_row(item) for item in trained],
        "changed": list(_changed_rows(comparison, results)),
        "has_published": any(row["published_top1"] is not None for row in results["variants"].values()),
    }
    return write_page(output_dir / FILE_NAME, "comparison.html", values)


def _read_hits(trained: Sequence["Trained"]) -> tuple[dict[str, Hits], dict[str, list[int]]]:
    """By variant, whether each clip is right (bool [S, N], clips in the order of their keys), and the S seeds."""
    found = read_hits({item.training.label: item.evaluate.path / "scores.parquet" for item in trained})
    seeds: dict[str, list[int]] = {}
    rows: dict[str, list[Hits]] = {}
    for item in trained:
        seeds.setdefault(item.training.variant, []).append(item.training.seed)
        rows.setdefault(item.training.variant, []).append(found[item.training.label])
    return {name: np.stack(hits) for name, hits in rows.items()}, seeds


def _means(by_seed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {metric: float(np.mean([numbers[metric] for numbers in by_seed])) for metric in by_seed[0]}


def _top1_band(bands: Sequence[Band]) -> list[float] | None:
    """The band of top-1 as the picture shows it, open ends at 0 and 1."""
    for band in bands:
        if band.metric == "top1":
            return [0.0 if band.low is None else band.low, 1.0 if band.high is None else band.high]
    return None


def _judge(name: str, baseline: str, hits: Mapping[str, Hits], seeds: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The difference of a variant to the baseline; the seeds that both have are paired, the others in their order."""
    common = [seed for seed in seeds[name] if seed in seeds[baseline]]
    ours, theirs = ([*common, *(seed for seed in seeds[variant] if seed not in common)] for variant in (name, baseline))
    found = difference(
        hits[name][[seeds[name].index(seed) for seed in ours]],
        hits[baseline][[seeds[baseline].index(seed) for seed in theirs]],
    )
    pairs = [str(seed) if seed == other else f"{seed}/{other}" for seed, other in zip(ours, theirs, strict=False)]
    return {
        "top1": found.top1,
        "interval": list(found.interval),
        "mcnemar": dict(zip(pairs, found.mcnemar, strict=True)),
        "separable": found.separable,
        "sentence": found.sentence(name, baseline),
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


def _doubts(comparison: Compared, results: Mapping[str, Any]) -> Iterator[str]:
    num_seeds = min(len(row["seeds"]) for row in results["variants"].values())
    num_differences = len(results["differences"])
    if num_seeds == 1:
        several = [name for name, row in results["variants"].items() if len(row["seeds"]) > 1]
        yield (
            f"{'One seed of some variants' if several else 'One seed each'}. Intervals and tests cover the choice of clips; "
            "what another seed of the training would change is not in them, and may be larger."
        )
    elif num_seeds < 5:
        yield f"{num_seeds} seeds each: the spread between seeds is itself hardly known, which is why intervals are wide."
    if num_differences > 1:
        yield (
            f"{num_differences} differences are judged at 95 % each: where there is none, one in twenty such verdicts still "
            "says separable."
        )
    searched = {name: row["num_trials"] for name, row in results["variants"].items() if row["num_trials"]}
    if searched:
        names = ", ".join(f"{name} (best of {number})" for name, number in searched.items())
        yield f"Settings that a search chose by accuracy look better than they are: {names}."
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


def _changed_rows(comparison: Compared, results: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
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
