"""Comparing what is in the store, whichever experiments made it: `sagsm compare`.

Evaluations that differ in the seed of the training alone are seeds of one variant; the first that is named gives the baseline.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import ConfigError
from infra.settings import apply_overrides, changed_settings
from infra.storage import sha256_json
from pipelines.comparison import Published, Trained, Training
from pipelines.config import ExperimentConfig
from pipelines.evaluations import Evaluation, find_evaluation, make_page_folder
from pipelines.leases import in_use
from pipelines.reproduction import Band

_SEED = re.compile(r":s\d+$")
_HASH_DIGITS = 12


@dataclass(frozen=True)
class StoredComparison:
    """Variants that were not planned together; see `comparison.Comparison` for the members.

    Seeds are taken out of the variants' settings. Nothing is expected of them, and published numbers are those of the networks.
    """

    variants: dict[str, ExperimentConfig]
    baseline: str
    expected: dict[str, tuple[Band, ...]] = field(default_factory=dict)
    published: dict[str, Published] = field(default_factory=dict)

    @property
    def config(self) -> ExperimentConfig:
        """The baseline's settings."""
        return self.variants[self.baseline]

    def differences(self) -> dict[str, dict[str, Any]]:
        """By variant, the dotted settings in which it differs from the baseline."""
        return {name: changed_settings(self.config, config) for name, config in self.variants.items()}


@dataclass
class _Variant:
    """Evaluations of equal settings, each with a seed of its own."""

    config: ExperimentConfig
    members: dict[int, Evaluation]

    @property
    def name(self) -> str:
        """As the comparison calls it that made the first of them, else the name of the experiment."""
        manifest = next(iter(self.members.values())).evaluate.manifest
        return _SEED.sub("", manifest.get("variant", "")) or str(manifest["experiment"])


def compare_runs(workdir: Path, runs: Sequence[str], output_dir: Path | None = None) -> tuple[dict[str, Any], Path]:
    """Compare finished evaluations, and write the page; the store and MLflow are left as they are.

    Args:
        workdir: whose store is searched.
        runs: as `find_evaluation` takes them; the first gives the baseline.
        output_dir: a folder for the page; None makes one in `workdir`, whose name depends on the evaluations alone.

    Returns:
        what `compare_trained` gives, and the page.

    Raises:
        ConfigError: if there are fewer than two evaluations, or the folder cannot be made.
        PipelineError: as `find_evaluation`, and if they are not of the same dataset, labels, split and clips.
    """
    from pipelines.reports.comparison import compare_trained, write_comparison

    evaluations = [find_evaluation(workdir, run) for run in runs]
    fingerprints = [evaluation.evaluate.fingerprint for evaluation in evaluations]
    if len(set(fingerprints)) < max(2, len(runs)):
        raise ConfigError(f"RUNs are the evaluations {', '.join(fingerprints)}; expected at least two, each of them once")
    comparison, trained = gather(evaluations)
    with in_use([evaluation.evaluate.path for evaluation in evaluations], "sagsm compare"):
        results = compare_trained(comparison, trained)
        folder = make_page_folder(output_dir or workdir.absolute() / "comparisons" / sha256_json(fingerprints)[:_HASH_DIGITS])
        return results, write_comparison(folder, f"sagsm: {', '.join(comparison.variants)}", comparison, trained, results)


def gather(evaluations: Sequence[Evaluation]) -> tuple[StoredComparison, list[Trained]]:
    """Variants and their seeds.

    A variant is named as the comparison that made it calls it, else as its experiment; where two have one name, the fingerprint
    of the first evaluation tells them apart.
    """
    found: list[_Variant] = []
    for evaluation in evaluations:
        seed = evaluation.config.train.seed
        config = apply_overrides(evaluation.config, {"train.seed": 0})
        alike = [variant for variant in found if variant.config == config and seed not in variant.members]
        if alike:
            alike[0].members[seed] = evaluation
        else:
            found.append(_Variant(config, {seed: evaluation}))
    names = [variant.name for variant in found]
    variants = {
        name if names.count(name) == 1 else f"{name}-{next(iter(variant.members.values())).evaluate.fingerprint[:6]}": variant
        for name, variant in zip(names, found, strict=True)
    }
    trained = [
        Trained(
            Training(name, seed, name if len(variant.members) == 1 else f"{name}:s{seed}", evaluation.config),
            evaluation.train,
            evaluation.evaluate,
            evaluation.shards,
            evaluation.num_trials,
        )
        for name, variant in variants.items()
        for seed, evaluation in variant.members.items()
    ]
    return StoredComparison({name: variant.config for name, variant in variants.items()}, next(iter(variants))), trained
