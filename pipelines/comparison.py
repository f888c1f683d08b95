"""Experiments that compare: named variants, some seeds, and one graph in which what they share is made once.

    index -> shards -> audit
                    -> search:tsn:s0 -> train:tsn:s0 -> evaluate:tsn:s0 --.
                    -> search:tsn:s1 -> train:tsn:s1 -> evaluate:tsn:s1 ---> compare
                    -> search:gsm:s0 -> train:gsm:s0 -> evaluate:gsm:s0 --'

A node's name is that of its stage, of the variant and, with several seeds, of the seed; nodes of all variants have the stage's.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from pydantic import Field, model_validator

from infra.errors import ConfigError
from infra.settings import Settings, apply_overrides, changed_settings
from pipelines.artifacts import Artifact, Provenance, Store
from pipelines.config import ExperimentConfig
from pipelines.graph import PlannedStage, Stage, StageContext, plan, plan_stage
from pipelines.presets import apply_preset
from pipelines.reproduction import Band, card_markdown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_COMPARED_ON = ("dataset", "shards")
_OWN = ("seeds", "at_once")
# Pages about one network: the comparison has its own, and to explain each of ten networks would take minutes.
_LEFT_OUT = ("insight", "report")
_COMPARE_VERSION = 2


class Published(Settings):
    """A number in a paper.

    Attributes:
        top1: a fraction.
        source: the frames of a clip and the paper.
    """

    top1: float = Field(ge=0, le=1)
    source: str


class Comparison(Settings):
    """What an experiment that compares returns, in place of one configuration.

    Attributes:
        variants: whole configurations by name, in the order of tables. Data and split are the same in all, since differences
            are taken clip by clip; nothing is searched.
        seeds: each variant is trained with each of them, in place of its `train.seed`; `--set seeds=[0,1,2]` changes them.
        at_once: so many variants are trained at the same time, each with an equal part of the CPUs and GPUs; `--set at_once=4`
            changes it. Small networks train faster so: two with a thread each did 67 clips/s where one with two did 50.
        baseline: the variant that the others are compared with.
        expected: for a variant the bands in which its numbers, means over seeds, must lie for the comparison to pass.
        published: for a variant the number to stand beside ours, where that which `models.describe_model` knows of its network
            is of another setting.
    """

    variants: dict[str, ExperimentConfig] = Field(min_length=2)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    at_once: int = Field(default=1, ge=1)
    baseline: str
    expected: dict[str, tuple[Band, ...]] = Field(default_factory=dict)
    published: dict[str, Published] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in (*self.variants, self.baseline, *self.expected, *self.published):
            if not _NAME.fullmatch(name):
                raise ValueError(f"the variant {name!r} cannot be part of a run's name; expected letters, digits and _.+-")
            if name not in self.variants:
                raise ValueError(f"there is no variant {name}; expected one of {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are {list(self.seeds)}; expected different whole numbers from 0")
        first_name, first = next(iter(self.variants.items()))
        seen: dict[str, str] = {}
        for name, config in self.variants.items():
            if config.search.num_trials:
                raise ValueError(
                    f"variant {name} has search.num_trials={config.search.num_trials}; expected 0: search in an experiment of "
                    "its own, and compare with what it found"
                )
            for section in _COMPARED_ON:
                if getattr(config, section) != getattr(first, section):
                    raise ValueError(f"variants {first_name} and {name} differ in {section}; expected the same clips for all")
            if self.at_once > 1 and config.train.local:
                raise ValueError(f"at_once is {self.at_once}, but variant {name} trains in this process; leave train.local out")
            if config.evaluate.split != first.evaluate.split:
                raise ValueError(
                    f"variants {first_name} and {name} are judged on different splits; expected one evaluate.split"
                )
            twin = seen.setdefault(config.model_dump_json(), name)
            if twin != name:
                raise ValueError(f"variants {twin} and {name} have the same settings; expected a difference to look for")
        return self

    def with_overrides(self, overrides: Mapping[str, Any]) -> "Comparison":
        """A copy in which each dotted setting, and a preset, is applied to all variants; but `seeds` and `at_once` to itself.

        Raises:
            ConfigError: as `apply_preset`, and if the variants can no longer be compared.
        """
        if "train.seed" in overrides:
            raise ConfigError(
                f"train.seed is {overrides['train.seed']}, but a comparison trains each variant with seeds={list(self.seeds)}; "
                "set that: --set seeds=[0,1,2]"
            )
        own = {name: value for name, value in overrides.items() if name in _OWN}
        shared = {name: value for name, value in overrides.items() if name not in _OWN}
        variants = {name: apply_preset(config, shared).model_dump() for name, config in self.variants.items()}
        return apply_overrides(self, {**own, "variants": variants})

    @property
    def config(self) -> ExperimentConfig:
        """The baseline's settings, for what all variants share: the data and the split."""
        return self.variants[self.baseline]

    def differences(self) -> dict[str, dict[str, Any]]:
        """By variant, the dotted settings in which it differs from the baseline."""
        return {name: changed_settings(self.config, config) for name, config in self.variants.items()}

    def changed_from(self, named: "Comparison") -> dict[str, Any]:
        """The overrides, as in `with_overrides`, that make this comparison of the one that an experiment has."""
        seeds = {} if self.seeds == named.seeds else {"seeds": list(self.seeds)}
        changes = [changed_settings(named.variants[name], config) for name, config in self.variants.items()]
        return {**seeds, **{setting: value for change in changes for setting, value in change.items()}}

    def trainings(self) -> "Iterator[Training]":
        """Each variant with each seed, in the order in which they are trained."""
        for variant, config in self.variants.items():
            for seed in self.seeds:
                label = variant if len(self.seeds) == 1 else f"{variant}:s{seed}"
                yield Training(variant, seed, label, apply_overrides(config, {"train.seed": seed}))


@dataclass(frozen=True)
class Training:
    """One variant with one seed; `label` is the end of its nodes' names."""

    variant: str
    seed: int
    label: str
    config: ExperimentConfig


@dataclass(frozen=True)
class Trained:
    """What was made of one variant with one seed.

    `num_trials` is that of the search that chose its settings.
    """

    training: Training
    train: Artifact
    evaluate: Artifact
    shards: Artifact
    num_trials: int = 0


def plan_comparison(stages: Sequence[Stage], comparison: Comparison, experiment: str, store: Store) -> list[PlannedStage]:
    """Plan every variant with every seed, once what has one fingerprint, and the stage that compares them."""
    table = [_reading_raw_data_once(stage) for stage in stages if stage.name not in _LEFT_OUT]
    plans = {
        training.label: plan(table, training.config, experiment, store, training.label) for training in comparison.trainings()
    }
    num_users = Counter((item.stage.name, item.fingerprint) for planned in plans.values() for item in planned)
    nodes: dict[tuple[str, str], PlannedStage] = {}
    for label, planned in plans.items():
        key_of = {item.stage.name: (item.stage.name, item.fingerprint) for item in planned}
        for item in planned:
            key = key_of[item.stage.name]
            if key not in nodes:
                of_all = num_users[key] == len(plans)
                name = item.stage.name if of_all else f"{item.stage.name}:{label}"
                needs = {need: nodes[key_of[need]].name for need in item.needs}
                nodes[key] = replace(item, name=name, needs=needs, variant="" if of_all else label)
    made = {
        label: {item.stage.name: nodes[item.stage.name, item.fingerprint] for item in planned}
        for label, planned in plans.items()
    }
    return [*nodes.values(), _plan_compare(comparison, made, experiment, store)]


def _reading_raw_data_once(stage: Stage) -> Stage:
    """The stage with a memory: to list a hundred thousand videos for each variant again would take minutes."""
    read = stage.raw
    if read is None:
        return stage
    found: dict[str, str] = {}

    def raw(config: ExperimentConfig) -> str:
        key = "".join(getattr(config, section).model_dump_json() for section in stage.settings)
        if key not in found:
            found[key] = read(config)
        return found[key]

    return replace(stage, raw=raw)


def _plan_compare(
    comparison: Comparison, made: Mapping[str, Mapping[str, PlannedStage]], experiment: str, store: Store
) -> PlannedStage:
    nodes = {node.name: node for stages in made.values() for node in (stages["shards"], stages["train"], stages["evaluate"])}
    names = {label: (stages["train"].name, stages["evaluate"].name) for label, stages in made.items()}
    provenance = Provenance(
        stage="compare",
        version=_COMPARE_VERSION,
        config={
            "comparison": {
                "seeds": list(comparison.seeds),
                "baseline": comparison.baseline,
                **comparison.model_dump(mode="json", include={"expected", "published"}),
                "differences": comparison.differences(),
            }
        },
        inputs={name: node.fingerprint for name, node in nodes.items()},
    )
    stage = Stage("compare", partial(_compare, comparison=comparison, names=names), needs=tuple(nodes))
    return plan_stage(stage, comparison.config, {name: name for name in nodes}, provenance, experiment, store)


def _compare(
    context: StageContext, comparison: Comparison, names: Mapping[str, tuple[str, str]], **made: Artifact
) -> dict[str, Any]:
    """All evaluations -> a table, pictures and the verdict; `made` holds the artifacts by the names of their nodes."""
    from pipelines.experiments import find_experiment
    from pipelines.reports.comparison import compare_trained, write_comparison

    trained = [
        Trained(training, made[train], made[evaluate], made["shards"])
        for training in comparison.trainings()
        for train, evaluate in [names[training.label]]
    ]
    named = find_experiment(context.experiment)()
    assert isinstance(named, Comparison)
    results = compare_trained(comparison, trained, experiment=context.experiment, changed=comparison.changed_from(named))
    page = write_comparison(context.output_dir, f"sagsm: {context.experiment}", comparison, trained, results)
    context.run.log_file(page, "report")
    for figure in sorted((context.output_dir / "figures").iterdir()):
        context.run.log_file(figure, "figures")
    context.run.log_file(context.output_dir / "comparison.json", "tables")
    context.run.log_metrics({f"test_top1/{name}": row["top1"] for name, row in results["variants"].items()})
    shards = made["shards"].summary
    context.run.set_tags({"dataset": shards["dataset"], "label_passport": shards["label_passport"]})
    picture = f"![top-1](get-artifact?path=figures/top1.png&run_uuid={context.run.run_id})"
    curves = f"![curves](get-artifact?path=figures/curves.png&run_uuid={context.run.run_id})"
    card = card_markdown(results["card"])
    markdown = f"{results['verdict']}\n\n{card}\n\n{picture}\n\n{curves}\n\nThe page: Artifacts, report/index.html."
    context.run.describe(markdown)
    return {"results": results, "markdown": markdown, "text": results["verdict"]}
