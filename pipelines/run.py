"""Running an experiment: plan, cluster, MLflow runs, stages, and what is left when a signal comes in between."""

import importlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from infra import cluster
from infra.cluster_check import require_fit
from infra.errors import PipelineError
from infra.links import run_url
from infra.progress import StageProgress
from infra.settings import parse_assignments
from infra.storage import MINIMUM_FREE_BYTES, require_free_space, write_json
from infra.system_metrics import watch_machine
from infra.tracking import TrackedRun, Tracker, is_all_sent, tracking_uri
from pipelines.artifacts import MANIFEST, Artifact, Store
from pipelines.comparison import Comparison, plan_comparison
from pipelines.config import ExperimentConfig
from pipelines.experiments import find_experiment
from pipelines.graph import PlannedStage, StageContext, StageResult, plan, run_graph, select
from pipelines.leases import lease
from pipelines.lookup import EVALUATIONS
from pipelines.node_needs import stage_needs
from pipelines.presets import apply_preset
from pipelines.stages import STAGES, config_yaml

_STOP_SECONDS = 5.0  # who sends SIGTERM may send SIGKILL soon after
_WATCHED = ("shards", "train")  # stages during which the load of this machine is recorded
# Imported before stages run side by side: threads that import one package at the same time can each see half of it.
_USED_BY_STAGES = (
    "pipelines.explaining",
    "pipelines.reports.audit",
    "pipelines.reports.card",
    "pipelines.reports.comparison",
    "pipelines.reports.report",
    "pipelines.serving",
    "pipelines.training.trial",
    "pipelines.training.worker",
    "preprocessing.tasks",
    "tuning.search",
)


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        experiment: its name.
        config: its settings, overrides applied; of a comparison those of its baseline.
        workdir: absolute folder of the store and of the embedded MLflow.
        address: of a running Ray cluster; None starts one on this machine.
        only: name of the one stage that is wanted, with what it needs.
        comparison: what is compared, overrides applied; None for a plain pipeline.
    """

    experiment: str
    config: ExperimentConfig
    workdir: Path
    address: str | None = None
    only: str | None = None
    comparison: Comparison | None = None

    @property
    def at_once(self) -> int:
        """How many trainings share the cluster."""
        return 1 if self.comparison is None else self.comparison.at_once


@dataclass(frozen=True)
class Outcome:
    """What became of every stage, the headline numbers, and where MLflow shows them.

    Attributes:
        stages: of the pipeline, or of all variants.
        numbers: metrics of the evaluation by name; of a comparison what `compare_trained` gives.
        mlflow_path: of the pipeline's run; None if nothing ran.
    """

    stages: list[StageResult]
    numbers: dict[str, Any]
    mlflow_path: str | None

    @property
    def error(self) -> BaseException | None:
        """The first failure."""
        return next((result.error for result in self.stages if result.error), None)

    @property
    def card(self) -> dict[str, Any] | None:
        """The reproduction card (`reproduction.reproduction_card`); None before there is a report or a comparison."""
        compared, report = _artifact(self.stages, "compare"), _artifact(self.stages, "report")
        found: dict[str, Any] | None = self.numbers["card"] if compared else report.summary["card"] if report else None
        return found


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def make_request(
    experiment: str, assignments: Sequence[str], workdir: Path, only: str | None = None, address: str | None = None
) -> Request:
    """The request of a command line.

    Args:
        experiment: its name.
        assignments: of `--set`, as "NAME=VALUE".
        workdir: may be relative.
        only: see `Request`.
        address: see `Request`.

    Raises:
        ConfigError: if there is no such experiment or setting, or a value is not allowed.
    """
    found, overrides = find_experiment(experiment)(), parse_assignments(assignments)
    if isinstance(found, Comparison):
        comparison = found.with_overrides(overrides)
        return Request(experiment, comparison.config, workdir.absolute(), address, only, comparison)
    return Request(experiment, apply_preset(found, overrides), workdir.absolute(), address, only)


def plan_experiment(request: Request) -> list[PlannedStage]:
    """What of the experiment is cached and what must run; touches no cluster and writes nothing."""
    store = Store(request.workdir / "store")
    if request.comparison is None:
        planned = plan(STAGES, request.config, request.experiment, store)
    else:
        planned = plan_comparison(STAGES, request.comparison, request.experiment, store)
    return select(planned, request.only)


def run_experiment(request: Request, progress: StageProgress) -> Outcome:
    """Run all that is not cached; call it in a block of `interruptible`.

    Raises:
        SagsmError: the plan itself is impossible (raw data, settings, workdir); a failed stage is in the outcome instead.
        Interrupted: a signal came; workers are stopped, MLflow runs are closed as KILLED, the next run goes on from there.
    """
    planned = plan_experiment(request)
    if all(item.artifact for item in planned):
        results = run_graph(planned, _must_not_run, _teller(progress, planned))
        _send_what_is_left(request, progress)
        return Outcome(results, _headline(results), None)
    _prepare_workdir(request.workdir)
    store = Store(request.workdir / "store")
    needed = [(item.stage.name, item.fingerprint) for item in planned]
    to_run = [item for item in planned if item.artifact is None]
    needed += [(found.stage, found.fingerprint) for item in to_run for found in _earlier(store, item, request.experiment)]
    with lease(store.root, needed, f"sagsm run {request.experiment}"):
        _require_kept(planned)
        return _run_planned(request, planned, progress)


def _run_planned(request: Request, planned: Sequence[PlannedStage], progress: StageProgress) -> Outcome:
    for module in _USED_BY_STAGES:
        importlib.import_module(module)
    tracker = _open_tracker(request)
    tracker.close_abandoned_runs()
    with cluster.session(request.address), _killed_on_interrupt(tracker):
        if request.address is not None:
            _require_fit(request, planned, progress)
        tags = {"stage": "pipeline", "experiment": request.experiment, "preset": request.config.preset}
        judged = [item.fingerprint for item in planned if item.stage.name == "evaluate"]
        tags |= {EVALUATIONS: " ".join(judged)} if judged else {}
        pipeline = tracker.start_run(tracker.next_name("p", request.experiment), parent=None, tags=tags)
        pipeline.log_text(config_yaml(request.comparison or request.config), "conf/config.yaml")
        run_stage = _stage_runner(request, tracker, pipeline, progress)
        results = run_graph(planned, run_stage, _teller(progress, planned), request.at_once)
        numbers = _headline(results)
        _close_pipeline(pipeline, results, numbers)
    return Outcome(results, numbers, run_url("", tracker.experiment_id, pipeline.run_id))


def _require_fit(request: Request, planned: Sequence[PlannedStage], progress: StageProgress) -> None:
    """The short form of `sagsm cluster check`: seconds, where a worker that imports old code may cost a night."""
    assert request.address is not None
    stages = {item.stage.name for item in planned if item.artifact is None}
    for finding in require_fit(stage_needs(request.config, request.workdir, stages), request.address):
        progress.say(f"  {finding}")


def _require_kept(planned: Sequence[PlannedStage]) -> None:
    """What the plan counts on may have been removed before there was a lease on it."""
    for item in planned:
        if item.artifact is not None and not (item.artifact.path / MANIFEST).is_file():
            raise PipelineError(
                f"{item.artifact.path} was removed while this run was starting, as by `sagsm store gc`; run again"
            )


def _open_tracker(request: Request) -> Tracker:
    experiment = f"sagsm-{request.config.dataset.name}"
    return Tracker(tracking_uri(request.workdir), experiment, request.workdir / "mlflow-artifacts")


def _send_what_is_left(request: Request, progress: StageProgress) -> None:
    """An earlier run may have done all the work while the MLflow server was away."""
    if is_all_sent(tracking_uri(request.workdir), request.workdir / "mlflow-artifacts"):
        return
    try:
        _open_tracker(request).close()
    except PipelineError as error:
        progress.say(f"  an earlier run's records are still to be sent: {error}")


def _stage_runner(request: Request, tracker: Tracker, pipeline: TrackedRun, progress: StageProgress) -> Any:
    store = Store(request.workdir / "store")

    def run_stage(item: PlannedStage, inputs: Mapping[str, Artifact]) -> Artifact:
        stage = item.stage
        with store.work_on(stage.name, item.fingerprint) as output_dir:
            finished, _ = store.find(stage.name, item.fingerprint)
            if finished:
                return finished
            run_file = output_dir.with_suffix(".run")
            tags = {"stage": stage.name, "fingerprint": item.fingerprint, "experiment": request.experiment}
            tags |= {"pipeline": pipeline.name, "preset": item.config.preset}
            tags |= {"variant": item.variant} if item.variant else {}
            words = [item.variant.replace(":", " "), stage.name, pipeline.name.split()[0]]
            resumed = json.loads(run_file.read_bytes())["run_id"] if run_file.exists() else None
            with tracker.start_run(" ".join(words).strip(), parent=pipeline.run_id, tags=tags, resume_id=resumed) as run:
                about = {"experiment": request.experiment, "variant": item.variant, "run_id": run.run_id}
                write_json(run_file, {**asdict(item.provenance), **about})  # what `sagsm store` knows of unfinished work
                run.log_params(item.provenance.config)
                context = StageContext(
                    output_dir,
                    run,
                    tracker,
                    progress.for_stage(item.name),
                    request.experiment,
                    item.config,
                    request.at_once,
                    earlier=_earlier(store, item, request.experiment),
                )
                sections = {section: getattr(item.config, section) for section in stage.settings}
                started = time.monotonic()
                try:
                    with watch_machine(run) if stage.name in _WATCHED else nullcontext():
                        summary = stage.function(context, **inputs, **sections)
                except Exception as error:
                    run.set_tags({"error": f"{type(error).__name__}: {error}"})
                    raise
                extra = {
                    "experiment": request.experiment,
                    "variant": item.variant,
                    "summary": summary,
                    "mlflow_run_id": run.run_id,
                    "seconds": round(time.monotonic() - started, 3),
                }
                artifact = store.commit(output_dir, item.provenance, item.fingerprint, extra)
            run_file.unlink()
            return artifact

    return run_stage


def _earlier(store: Store, item: PlannedStage, experiment: str) -> list[Artifact]:
    """See `StageContext.earlier`."""
    wanted = item.provenance
    return [
        artifact
        for artifact in store.history(wanted.stage, experiment, item.variant)
        if (artifact.manifest["version"], artifact.manifest["inputs"]) == (wanted.version, wanted.inputs)
    ]


def _must_not_run(item: PlannedStage, inputs: Mapping[str, Artifact]) -> Artifact:
    raise AssertionError(f"{item.name} is cached, and so are {list(inputs)}")


def _prepare_workdir(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PipelineError(f"cannot make the work directory {workdir}: {error}; choose another one with --workdir") from error
    require_free_space(workdir, MINIMUM_FREE_BYTES, "a run")


def _headline(results: list[StageResult]) -> dict[str, Any]:
    compared = _artifact(results, "compare")
    if compared is not None:
        found: dict[str, Any] = compared.summary["results"]
        return found
    evaluated = _artifact(results, "evaluate")
    return (
        {} if evaluated is None else {name: value for name, value in evaluated.summary["metrics"].items() if value is not None}
    )


def _close_pipeline(pipeline: TrackedRun, results: list[StageResult], numbers: dict[str, Any]) -> None:
    compared = _artifact(results, "compare")
    described = compared or _artifact(results, "report")
    if compared is not None:
        pipeline.log_metrics({f"test_top1/{name}": row["top1"] for name, row in numbers["variants"].items()}, step=0)
        pipeline.log_file(compared.path / "index.html", "report")
        for figure in sorted((compared.path / "figures").iterdir()):
            pipeline.log_file(figure, "figures")
    else:
        pipeline.log_metrics({f"test/{name}": value for name, value in numbers.items()}, step=0)
    if described is not None:
        pipeline.describe(described.summary["markdown"])
    pipeline.finish("FAILED" if any(result.status == "failed" for result in results) else "FINISHED")


def _artifact(results: list[StageResult], name: str) -> Artifact | None:
    """What the stage of this name made, if it is there."""
    return next((result.artifact for result in results if result.name == name and result.artifact), None)


def _teller(progress: StageProgress, planned: Sequence[PlannedStage]) -> Callable[[StageResult], None]:
    """Prints a line for each result, in columns."""
    width = max(9, *(len(item.name) for item in planned))

    def tell(result: StageResult) -> None:
        progress.close_stage(result.name)
        text = result.artifact.summary.get("text", "") if result.artifact else ""
        if result.error is not None:
            text = f"{type(result.error).__name__}: {result.error}"
        seconds = f"{result.seconds:6.1f} s" if result.status in ("ran", "failed") else " " * 8
        progress.say(f"  {result.name:<{width}} {result.status:<8} {seconds}   {text}".rstrip())

    return tell


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted` in the block, SIGINT even where a shell started us with `&`, which has it ignored.

    Signal handlers belong to the main thread; in others nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    is_interrupted = False

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal is_interrupted
        if not is_interrupted:  # `timeout` and impatient people send two; the second must not break off the cleaning up
            is_interrupted = True
            raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not is_interrupted:  # else the process is about to end, and stays deaf until then
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _killed_on_interrupt(tracker: Tracker) -> Iterator[None]:
    """Stages run in threads that a signal does not reach, so their MLflow runs are closed here."""
    with interruptible():  # again, since starting Ray has put its own SIGTERM handler in place
        try:
            yield
        except KeyboardInterrupt:
            tracker.finish_open_runs("KILLED")
            tracker.close(_STOP_SECONDS)
            raise
        except BaseException:
            tracker.finish_open_runs("FAILED")
            tracker.close()
            raise
        tracker.close()
