"""The DAG: stages in a checked table, what of it must run and why, and running it.

A stage is a plain function `stage(context, <needs>, <settings>) -> summary`. Its parameters must be named as the stages that it
needs and the sections of the experiment that it reads; this is checked when the table is built. A stage's fingerprint hashes
its code version, those sections, its inputs' fingerprints and, for the first stage, the raw data; the fingerprint alone
decides whether it runs.
"""

import inspect
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from infra.errors import ConfigError, PipelineError
from infra.progress import OnProgress
from infra.settings import nearest
from infra.storage import sha256_json
from infra.tracking import TrackedRun, Tracker
from pipelines.artifacts import Artifact, Provenance, Store
from pipelines.config import ExperimentConfig

_MAX_INPUTS_NAMED = 3


@dataclass(frozen=True)
class StageContext:
    """What a stage gets beside its inputs and settings.

    Attributes:
        output_dir: the folder to write into; it may hold what an interrupted run has left.
        run: the stage's MLflow run.
        tracker: makes further runs below it.
        on_progress: call it as `on_progress(done, total, text)`.
        experiment: name of the experiment.
        config: the whole configuration, for those who print it; what a stage computes with comes as its own arguments.
        at_once: so many stages that take the cluster run at the same time; each takes this part of it.
        earlier: what this stage has made for this experiment before, by the same code from the same inputs with other settings,
            the newest first; a search goes on from there.
    """

    output_dir: Path
    run: TrackedRun
    tracker: Tracker
    on_progress: OnProgress
    experiment: str
    config: ExperimentConfig
    at_once: int = 1
    earlier: Sequence[Artifact] = ()


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    Attributes:
        name: shown to people, and the folder in the store.
        function: `function(context, **needs, **settings) -> summary` (JSON only).
        needs: stages whose artifacts it takes.
        settings: sections of the experiment that it reads.
        version: raise it when the code gives other results for the same input.
        raw: for stages that read raw data, a hash of that data.
        takes_cluster: it takes as much of the cluster as there is, so that only `at_once` of such stages run at a time.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    needs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    version: int = 1
    raw: Callable[[ExperimentConfig], str] | None = None
    takes_cluster: bool = False


@dataclass(frozen=True)
class PlannedStage:
    """A node of the graph that runs: a stage with its settings and inputs.

    Attributes:
        name: of the node; a pipeline has one for each stage, named as the stage, a comparison has one for each variant.
        stage: the row of the table.
        config: the experiment whose sections it reads.
        needs: the node that gives each of the stage's inputs.
        provenance: what its fingerprint stands for.
        fingerprint: decides whether it runs.
        artifact: what is there already, or None.
        reason: why it must run; "" if it must not.
        variant: of a comparison; "" where the node belongs to no single one.
    """

    name: str
    stage: Stage
    config: ExperimentConfig
    needs: Mapping[str, str]
    provenance: Provenance
    fingerprint: str
    artifact: Artifact | None
    reason: str
    variant: str = ""


@dataclass(frozen=True)
class StageResult:
    """What became of a node of the graph: "ran", "cached", "failed" or "skipped"."""

    name: str
    status: str
    seconds: float
    fingerprint: str
    artifact: Artifact | None
    mlflow_run_id: str | None
    error: BaseException | None = None


def check_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Check the table and return it in an order in which every stage comes after what it needs.

    Raises:
        PipelineError: duplicate or unknown names, a cycle, or a function whose parameters are not its needs and settings.
    """
    by_name = {stage.name: stage for stage in stages}
    if len(by_name) != len(stages):
        raise PipelineError("two stages have the same name")
    for stage in stages:
        unknown = [need for need in stage.needs if need not in by_name]
        if unknown:
            raise PipelineError(f"stage {stage.name} needs {unknown[0]}, which is no stage; {nearest(unknown[0], by_name)}")
        expected = ["context", *stage.needs, *stage.settings]
        found = list(inspect.signature(stage.function).parameters)
        if found != expected:
            raise PipelineError(f"stage {stage.name}: its function takes {found}, its row in the table says {expected}")
        wrong = [section for section in stage.settings if section not in ExperimentConfig.model_fields]
        if wrong:
            raise PipelineError(f"stage {stage.name} reads section {wrong[0]}, which no experiment has")
    try:
        order = list(TopologicalSorter({stage.name: stage.needs for stage in stages}).static_order())
    except CycleError as error:
        raise PipelineError(f"the stages need each other in a circle: {' -> '.join(error.args[1])}") from error
    return sorted(stages, key=lambda stage: order.index(stage.name))


def plan(
    stages: Sequence[Stage], config: ExperimentConfig, experiment: str, store: Store, variant: str = ""
) -> list[PlannedStage]:
    """Say for every stage whether its artifact is in the store, and if not, why it must run.

    Args:
        stages: the table.
        config: the settings of all stages.
        experiment: its name.
        store: where artifacts are.
        variant: the name of `config` in a comparison; a reason is the difference to what was made for it before.
    """
    planned: dict[str, PlannedStage] = {}
    for stage in check_stages(stages):
        provenance = Provenance(
            stage=stage.name,
            version=stage.version,
            config={section: getattr(config, section).model_dump(mode="json") for section in stage.settings},
            inputs={need: planned[need].fingerprint for need in stage.needs},
            raw=stage.raw(config) if stage.raw else None,
        )
        needs = {need: need for need in stage.needs}
        planned[stage.name] = plan_stage(stage, config, needs, provenance, experiment, store, variant)
    return list(planned.values())


def plan_stage(
    stage: Stage,
    config: ExperimentConfig,
    needs: Mapping[str, str],
    provenance: Provenance,
    experiment: str,
    store: Store,
    variant: str = "",
) -> PlannedStage:
    """Look up one node of the graph in the store; see `plan` and `PlannedStage`."""
    fingerprint = sha256_json(asdict(provenance))[:16]
    artifact, problem = store.find(stage.name, fingerprint)
    reason = "" if artifact else problem or _why(provenance, fingerprint, store, experiment, variant)
    return PlannedStage(stage.name, stage, config, needs, provenance, fingerprint, artifact, reason, variant)


def select(planned: Sequence[PlannedStage], only: str | None) -> list[PlannedStage]:
    """All nodes, or just those called `only` (or all of that stage) and those they need, directly or through others.

    Raises:
        ConfigError: if nothing has that name.
    """
    if only is None:
        return list(planned)
    by_name = {item.name: item for item in planned}
    todo = [item.name for item in planned if only in (item.name, item.stage.name)]
    if not todo:
        known = [*by_name, *(item.stage.name for item in planned)]
        raise ConfigError(f"--only got {only!r}, which is no stage; {nearest(only, known)}")
    wanted = set()
    while todo:
        name = todo.pop()
        wanted.add(name)
        todo += by_name[name].needs.values()
    return [item for item in planned if item.name in wanted]


RunStage = Callable[[PlannedStage, Mapping[str, Artifact]], Artifact]


def run_graph(
    planned: Sequence[PlannedStage], run_stage: RunStage, on_result: Callable[[StageResult], None], at_once: int = 1
) -> list[StageResult]:
    """Run what is not cached, independent nodes at the same time; a failed one stops only those that need it.

    Of the stages that take the whole cluster `at_once` run at a time, those which come first in the plan: a variant of a
    comparison is evaluated before the next is trained. Stages run in daemon threads of this process, since Ray does the work;
    the caller's thread waits, so that it can be interrupted by a signal.
    """
    sorter = TopologicalSorter({item.name: set(item.needs.values()) for item in planned})
    sorter.prepare()
    results: dict[str, StageResult] = {}
    finished: queue.Queue[StageResult] = queue.Queue()
    ready: set[str] = set()
    on_cluster: set[str] = set()  # running nodes that have the cluster for themselves
    while sorter.is_active():
        ready |= set(sorter.get_ready())
        for item in [item for item in planned if item.name in ready]:
            result = _without_running(item, results)
            if result is not None:
                finished.put(result)
            elif item.stage.takes_cluster and len(on_cluster) >= at_once:
                continue
            else:
                on_cluster |= {item.name} if item.stage.takes_cluster else set()
                arguments = (item, run_stage, dict(results), finished)
                threading.Thread(target=_execute, args=arguments, name=f"stage-{item.name}", daemon=True).start()
            ready.remove(item.name)
        result = finished.get()
        on_cluster.discard(result.name)
        results[result.name] = result
        on_result(result)
        sorter.done(result.name)
    return [results[item.name] for item in planned]


def _without_running(item: PlannedStage, results: Mapping[str, StageResult]) -> StageResult | None:
    """The result of a node that is cached, or whose inputs could not be made; None if it must run."""
    if any(results[need].artifact is None for need in item.needs.values()):
        return StageResult(item.name, "skipped", 0.0, item.fingerprint, None, None)
    if item.artifact is None:
        return None
    return StageResult(item.name, "cached", 0.0, item.fingerprint, item.artifact, item.artifact.mlflow_run_id)


def _execute(
    item: PlannedStage, run_stage: RunStage, results: Mapping[str, StageResult], finished: "queue.Queue[StageResult]"
) -> None:
    started = time.monotonic()
    inputs = {need: artifact for need, node in item.needs.items() if (artifact := results[node].artifact) is not None}
    try:
        artifact = run_stage(item, inputs)
        result = StageResult(item.name, "ran", time.monotonic() - started, item.fingerprint, artifact, artifact.mlflow_run_id)
    except Exception as error:
        # Handed to the caller, who shows our own errors as messages and re-raises all others.
        result = StageResult(item.name, "failed", time.monotonic() - started, item.fingerprint, None, None, error)
    finished.put(result)


def _why(provenance: Provenance, fingerprint: str, store: Store, experiment: str, variant: str) -> str:
    """The difference to the newest artifact that this experiment, or this variant of it, has made of the stage."""
    if store.folder(provenance.stage, fingerprint).with_suffix(".partial").exists():
        return "was interrupted; goes on from where it was"
    history = store.history(provenance.stage, experiment, variant)
    if not history:
        return "never ran"
    before = history[0].manifest
    reasons = [
        f"{section}.{name} {_short(old)} -> {_short(new)}"
        for section, values in provenance.config.items()
        for name, old, new in _differences(before["config"].get(section, {}), values)
    ]
    if before["version"] != provenance.version:
        reasons.append(f"code version {before['version']} -> {provenance.version}")
    if before["raw"] != provenance.raw:
        reasons.append("raw data changed")
    changed = [name for name, new in provenance.inputs.items() if before["inputs"].get(name) != new]
    reasons += [f"needs {name}, which changed" for name in changed[:_MAX_INPUTS_NAMED]]
    if len(changed) > _MAX_INPUTS_NAMED:
        reasons.append(f"{len(changed) - _MAX_INPUTS_NAMED} more inputs changed")
    return "; ".join(reasons) or "not in the store"


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    rows: list[tuple[str, Any, Any]] = []
    for name in [*new, *(name for name in old if name not in new)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            rows += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            rows.append((prefix + name, before, after))
    return rows


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
