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
    """

    output_dir: Path
    run: TrackedRun
    tracker: Tracker
    on_progress: OnProgress
    experiment: str
    config: ExperimentConfig


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
    """

    name: str
    function: Callable[..., dict[str, Any]]
    needs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    version: int = 1
    raw: Callable[[ExperimentConfig], str] | None = None


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its fingerprint, and whether it is there already (`artifact`) or must run (`reason`)."""

    stage: Stage
    provenance: Provenance
    fingerprint: str
    artifact: Artifact | None
    reason: str


@dataclass(frozen=True)
class StageResult:
    """What became of a stage: "ran", "cached", "failed" or "skipped"."""

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


def plan(stages: Sequence[Stage], config: ExperimentConfig, experiment: str, store: Store) -> list[PlannedStage]:
    """Say for every stage whether its artifact is in the store, and if not, why it must run."""
    planned: dict[str, PlannedStage] = {}
    for stage in check_stages(stages):
        provenance = Provenance(
            stage=stage.name,
            version=stage.version,
            config={section: getattr(config, section).model_dump(mode="json") for section in stage.settings},
            inputs={need: planned[need].fingerprint for need in stage.needs},
            raw=stage.raw(config) if stage.raw else None,
        )
        fingerprint = sha256_json(asdict(provenance))[:16]
        artifact, problem = store.find(stage.name, fingerprint)
        reason = "" if artifact else problem or _why(provenance, fingerprint, experiment, store)
        planned[stage.name] = PlannedStage(stage, provenance, fingerprint, artifact, reason)
    return list(planned.values())


def select(planned: Sequence[PlannedStage], only: str | None) -> list[PlannedStage]:
    """All stages, or just the stage `only` and those it needs, directly or through others.

    Raises:
        ConfigError: if there is no stage of that name.
    """
    if only is None:
        return list(planned)
    by_name = {item.stage.name: item for item in planned}
    if only not in by_name:
        raise ConfigError(f"--only got {only!r}, which is no stage; {nearest(only, by_name)}")
    wanted, todo = set(), [only]
    while todo:
        name = todo.pop()
        wanted.add(name)
        todo += by_name[name].stage.needs
    return [item for item in planned if item.stage.name in wanted]


RunStage = Callable[[PlannedStage, Mapping[str, Artifact]], Artifact]


def run_graph(
    planned: Sequence[PlannedStage], run_stage: RunStage, on_result: Callable[[StageResult], None]
) -> list[StageResult]:
    """Run what is not cached, independent stages at the same time; a failed stage stops only those that need it.

    Stages run in daemon threads of this process, since Ray does the work; the caller's thread waits, so that it can be
    interrupted by a signal.
    """
    sorter = TopologicalSorter({item.stage.name: set(item.stage.needs) for item in planned})
    sorter.prepare()
    by_name = {item.stage.name: item for item in planned}
    results: dict[str, StageResult] = {}
    finished: queue.Queue[StageResult] = queue.Queue()

    def execute(item: PlannedStage) -> None:
        finished.put(_execute(item, run_stage, results))

    while sorter.is_active():
        for name in sorter.get_ready():
            item = by_name[name]
            blocked = any(results[need].artifact is None for need in item.stage.needs)
            if blocked:
                finished.put(StageResult(name, "skipped", 0.0, item.fingerprint, None, None))
            elif item.artifact is not None:
                run_id = item.artifact.mlflow_run_id
                finished.put(StageResult(name, "cached", 0.0, item.fingerprint, item.artifact, run_id))
            else:
                threading.Thread(target=execute, args=(item,), name=f"stage-{name}", daemon=True).start()
        result = finished.get()
        results[result.name] = result
        on_result(result)
        sorter.done(result.name)
    return [results[item.stage.name] for item in planned]


def _execute(item: PlannedStage, run_stage: RunStage, results: Mapping[str, StageResult]) -> StageResult:
    started = time.monotonic()
    inputs = {need: artifact for need in item.stage.needs if (artifact := results[need].artifact) is not None}
    name, fingerprint = item.stage.name, item.fingerprint
    try:
        artifact = run_stage(item, inputs)
        return StageResult(name, "ran", time.monotonic() - started, fingerprint, artifact, artifact.mlflow_run_id)
    except Exception as error:
        # Handed to the caller, who shows our own errors as messages and re-raises all others.
        return StageResult(name, "failed", time.monotonic() - started, fingerprint, None, None, error)


def _why(provenance: Provenance, fingerprint: str, experiment: str, store: Store) -> str:
    """The difference to the newest artifact that this experiment has made of the stage."""
    if store.folder(provenance.stage, fingerprint).with_suffix(".partial").exists():
        return "was interrupted; goes on from where it was"
    history = store.history(provenance.stage, experiment)
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
    reasons += [f"needs {name}, which changed" for name, new in provenance.inputs.items() if before["inputs"].get(name) != new]
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
