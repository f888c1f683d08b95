"""Training on a Ray cluster: finds room for the workers, starts them, and starts them again when one is lost or more fit.

    <storage_dir>/checkpoints/   written by rank 0; the truth about how far training is
                  ray/           Ray Train's own files; removed at the end

Ray Train runs one attempt, with a fixed number of workers; how many, and whether there is another attempt, is decided here:

- Its own elasticity kills the workers to change their number, which loses the steps since the last checkpoint; it looks at the
  nodes every 20 s, and counts CPUs that others hold as free. Here workers are asked to stop: they save a checkpoint and return.
- Its own restarts wait for the same number of workers as before, silently and for ever; here the wait is told and ends.
- It is given no checkpoints: it rewrites its snapshot of them in place, so that a kill at the wrong moment makes a run that
  cannot be resumed (RELIABILITY.md, F5). Each attempt has a fresh name there, and goes on from our newest good checkpoint.

What stops an attempt and is no failure: SIGTERM to a worker, a node that is drained, room for more workers.
"""

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infra.cluster import describe_use, node_resources
from infra.errors import ClusterError, PipelineError, SagsmError
from infra.filesystems import Folder
from infra.progress import OnProgress
from pipelines.training.board import Board, Listener, Reporter, Watch
from pipelines.training.checkpoint_mirror import fetch
from pipelines.training.job import TrainJob
from pipelines.training.loop import TrainResult
from pipelines.training.metrics import EpochMetrics, StepStatus
from pipelines.training.preemption import catch_sigterm, is_asked_to_end
from pipelines.training.rank import CHECKPOINTS, train_rank
from pipelines.training.room import WorkerPlan, count_places, find_room
from pipelines.training.settings import TrainSettings

_RAY = "ray"
_COLLECTIVE_TIMEOUT_SECONDS = 300
_RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Ray's own 2 s is how long a lost worker, or the end, would go unnoticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",  # there was room a moment before
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
_MAX_FAILED_STARTS = 3  # in a row: others may take what was free, a node may die
_SECONDS_BETWEEN_RESIZES = 30.0  # starting workers again takes about half of that
_SECONDS_BETWEEN_LOOKS = 2.0  # for more room, after that

_log = logging.getLogger(__name__)


def train_on_cluster(
    job: TrainJob,
    *,
    storage_dir: Path,
    mirror: Folder | None = None,
    plan: WorkerPlan | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train on the Ray cluster to which this process is connected, going on from what an interrupted run left.

    Args:
        job: what to train on what.
        storage_dir: for checkpoints, on a disk that all workers see, unless there is a `mirror`; made if it is missing. One
            training at a time.
        mirror: gets a copy of each checkpoint, from which training goes on where `storage_dir` has none.
        plan: train with just these workers; None has as many as `job.train` says, with all the CPUs that the cluster has.
        on_epoch: called in this process, from a thread of its own, once for each epoch in order, soon after it ended. The
            epochs that an earlier, interrupted run had done come first.
        on_progress: told the steps, at most twice a second, and what is waited for.
        should_stop: asked twice a second; when it says True, the workers write a checkpoint, end, and the result is not
            `completed`.

    Raises:
        ClusterError: if the cluster cannot hold the workers, or others held it for longer than `train.wait_seconds`.
        PipelineError: if workers were lost more than `train.max_failures` times or failed in a way that is a defect.
        SagsmError: what a worker raised, with its own class and message; it is not tried again.
    """
    import ray

    storage_dir = storage_dir.resolve()
    storage_dir.mkdir(parents=True, exist_ok=True)
    listener = Listener(job.train.epochs, on_epoch, on_progress)
    board = _make_board()
    try:
        result = _attempt_until_done(job, storage_dir, mirror, plan, listener, board, should_stop or (lambda: False))
    finally:
        ray.kill(board)
        shutil.rmtree(storage_dir / _RAY, ignore_errors=True)
    listener.hear_epochs(result.history)
    _bring_home(result, storage_dir / CHECKPOINTS, mirror)
    return result


def _attempt_until_done(
    job: TrainJob,
    storage_dir: Path,
    mirror: Folder | None,
    fixed: WorkerPlan | None,
    listener: Listener,
    board: Any,
    should_stop: Callable[[], bool],
) -> TrainResult:
    import ray.train

    num_failures = num_failed_starts = 0
    result: TrainResult | None = None
    plan: WorkerPlan | None = None
    while result is None or not (result.completed or should_stop()):
        plan = find_room(job.train, listener.say, is_restart=plan is not None, fixed=fixed)
        _log.info("%s: %s", job.name, plan)
        listener.say(f"starting {plan}")
        try:
            result = _attempt(job, plan, storage_dir, mirror, listener, board, should_stop)
            num_failed_starts = 0
        except ray.train.ControllerError as error:
            num_failed_starts += 1
            if num_failed_starts > _MAX_FAILED_STARTS:
                raise ClusterError(
                    f"{plan} could not be started for {job.name}: {error.controller_failure}. {describe_use()}. "
                    "Run again: training goes on from its last checkpoint"
                ) from error
        except ray.train.PreemptionError as error:
            _log.warning("%s: %s", job.name, error)
        except ray.train.WorkerGroupError as error:
            num_failed_starts = 0
            causes = _causes(error.worker_failures)
            num_failures += not any(_is_preempted(cause) for cause in error.worker_failures.values())
            if num_failures > job.train.max_failures:
                raise PipelineError(
                    f"training {job.name} failed more than train.max_failures={job.train.max_failures} times, last with "
                    f"{causes or error}. Run again to go on from the last checkpoint"
                ) from error
            _log.warning("%s: lost workers (%s), starts again from its last checkpoint", job.name, causes)
    return result


def _attempt(
    job: TrainJob,
    plan: WorkerPlan,
    storage_dir: Path,
    mirror: Folder | None,
    listener: Listener,
    board: Any,
    should_stop: Callable[[], bool],
) -> TrainResult:
    """Train with these workers until the end, or until they were asked to stop."""
    import ray.train

    must_resume = bool(listener.history) or any((storage_dir / CHECKPOINTS).glob("step-*"))
    config = {"job": job, "storage_dir": storage_dir, "mirror": mirror, "must_resume": must_resume}
    trainer = _make_trainer(job.name, plan, storage_dir, config | {"num_threads": plan.cpus, "board": board})
    growth = _Growth(board, plan, job.train)

    def look() -> None:
        if should_stop():
            board.ask_to_stop.remote()
        else:
            growth.look()

    ray.get(board.begin.remote())
    try:
        with Watch(partial(_read_board, board), listener, look):
            result: TrainResult = trainer.fit().return_value
    except ray.train.WorkerGroupError as error:
        for cause in error.worker_failures.values():
            if isinstance(cause, SagsmError):
                raise cause from error
        raise
    return result


def _make_trainer(name: str, plan: WorkerPlan, storage_dir: Path, config: dict[str, Any]) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.training.meeting import GuardedTorchConfig

    for variable, value in _RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    return TorchTrainer(
        _run_worker,  # type: ignore[arg-type]  # the stubs are those of Train V1: no return value
        train_loop_config=config,
        torch_config=GuardedTorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_SECONDS),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.num_workers, use_gpu=plan.use_gpu, resources_per_worker=plan.bundle
        ),
        run_config=ray.train.RunConfig(
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage_dir / _RAY),
            failure_config=ray.train.FailureConfig(
                max_failures=0,
                controller_failure_limit=0,  # type: ignore[call-arg]  # V1's stub
                max_preemption_failures=0,
            ),
        ),
    )


def _run_worker(config: dict[str, Any]) -> TrainResult:
    """What each worker process runs."""
    import ray
    import ray.train.torch
    from ray.train.v2._internal.execution.context import get_train_context

    # This is a thread; signals are handled in the main thread, which takes calls to Ray Train's actor.
    ray.get(ray.get_runtime_context().current_actor.execute.remote(catch_sigterm))
    torch.set_num_threads(config["num_threads"])
    context = ray.train.get_context()
    teller = _BoardTeller(config["board"])
    reporter = Reporter(config["storage_dir"] / CHECKPOINTS, teller.tell_status, teller.tell_epochs)

    # `ray.train.get_preemption_info` is a collective through Ray in each step; the loop puts the answers of all ranks together.
    preemption = get_train_context().preemption_context

    def should_stop() -> bool:
        return teller.told_to_stop or is_asked_to_end() or preemption.preemption_info is not None

    return train_rank(
        config["job"],
        storage_dir=config["storage_dir"],
        mirror=config["mirror"],
        device=ray.train.torch.get_device(),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        must_resume=config["must_resume"],
        on_epoch=reporter.on_epoch,
        on_step=reporter.on_step,
        should_stop=should_stop,
    )


class _BoardTeller:
    """Writes on the board without waiting for it; what it answered to the last status is seen at the next."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._answer: Any = None
        self.told_to_stop = False

    def tell_status(self, status: StepStatus) -> None:
        import ray

        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            try:
                self.told_to_stop = ray.get(self._answer)
            except ray.exceptions.RayActorError as error:
                _log.warning("the progress of this step was not told: %s", error)
        self._answer = self._board.write_status.remote(asdict(status))

    def tell_epochs(self, history: Sequence[EpochMetrics]) -> None:
        self._board.write_history.remote([metrics.to_json() for metrics in history])


class _Growth:
    """Looks now and then whether there is room for one more worker; if so, asks training to stop and start again with it."""

    def __init__(self, board: Any, plan: WorkerPlan, settings: TrainSettings) -> None:
        has_more = plan.num_workers < settings.num_workers or (settings.num_workers == 0 and plan.use_gpu)
        self._may_grow = settings.min_workers is not None and has_more
        self._board, self._plan = board, plan
        self._next = time.monotonic() + _SECONDS_BETWEEN_RESIZES

    def look(self) -> None:
        """For `Watch`."""
        if not self._may_grow or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _SECONDS_BETWEEN_LOOKS
        if count_places(self._plan, node_resources(free=True)):
            _log.info("there is room for one more worker; training saves a checkpoint and starts again with it")
            self._board.ask_to_stop.remote()
            self._may_grow = False


def _make_board() -> Any:
    """The board as an actor on this node, where it lives as long as the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_restarts=-1)(Board).options(scheduling_strategy=here).remote()


def _read_board(board: Any) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    import ray

    try:
        found: tuple[dict[str, Any] | None, list[dict[str, Any]]] = ray.get(board.read.remote())
    except ray.exceptions.RayActorError:  # it starts again, and rank 0 tells it all anew
        return None, []
    return found


def _bring_home(result: TrainResult, folder: Path, mirror: Folder | None) -> None:
    """See that the weights are on this machine's disk, from the mirror if rank 0 ran elsewhere."""
    if result.best_weights is None or result.best_weights.exists():
        return
    if mirror is not None:
        fetch(mirror, folder)
    if not result.best_weights.exists():
        raise PipelineError(
            f"training ended, but {result.best_weights} is not on this machine: rank 0 ran on another node. Put the work "
            "directory on a disk that all nodes see, or set train.checkpoints to an s3:// URL, and run again"
        )


def _is_preempted(cause: Exception) -> bool:
    """Whether a worker died with a node that was being drained (Ray wraps that error in one of its own)."""
    return bool(getattr(getattr(cause, "health_check_failure", cause), "preempted", False))


def _causes(failures: Mapping[int, Exception]) -> str:
    """What happened to which rank, the likeliest cause first."""
    # When a rank is lost, the others fail in their collectives with a RuntimeError.
    causes = sorted(failures.items(), key=lambda item: (isinstance(item[1], RuntimeError), item[0]))
    real = [(rank, getattr(cause, "health_check_failure", cause)) for rank, cause in causes]  # Ray's own is pages long
    return "; ".join(f"rank {rank}: {type(cause).__name__}: {_first_line(cause)}" for rank, cause in real)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
