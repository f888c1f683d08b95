"""Training on a Ray cluster: starts the workers, restarts them when one is lost, and tells the driver of each epoch.

    <storage_dir>/checkpoints/   written by rank 0, read by all; the truth about how far training is
                  failure.json   an error that a restart cannot cure, left by a worker
                  ray/           Ray Train's own files; removed at the end

Ray Train is given no checkpoints: it rewrites its snapshot of them in place, so that a kill at the wrong moment makes a run
that cannot be resumed (RELIABILITY.md, F5). Each start has a fresh name there, and the workers go on from our newest good
checkpoint. So that the two never disagree, epochs reach the driver through the manifests too, not through `ray.train.report`.
"""

import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infra import errors
from infra.errors import ClusterError, PipelineError, SagsmError
from infra.storage import write_json
from pipelines.training.checkpoint import read_history
from pipelines.training.job import TrainJob, train_job
from pipelines.training.loop import TrainResult
from pipelines.training.metrics import EpochMetrics

_CHECKPOINTS, _FAILURE, _RAY = "checkpoints", "failure.json", "ray"
_SECONDS_BETWEEN_LOOKS = 0.5
_HEALTH_CHECK_SECONDS = 0.2  # Ray's own 2 s is how long a short run would wait at its end, and a lost worker go unnoticed
_COLLECTIVE_TIMEOUT_SECONDS = 300
_MAX_STARTS = 10  # of the worker group, each given Ray's 60 s: time for other stages to give back what they hold

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers there are, and what each one reserves."""

    num_workers: int
    cpus: int
    use_gpu: bool


def train_on_cluster(
    job: TrainJob, *, storage_dir: Path, on_epoch: Callable[[EpochMetrics], None] | None = None
) -> TrainResult:
    """Train on the Ray cluster to which this process is connected, going on from what an interrupted run left.

    Args:
        job: what to train on what.
        storage_dir: for checkpoints, on a disk that all workers see; made if it is missing. One training at a time.
        on_epoch: called in this process, from a thread of its own, once for each epoch in order, soon after it ended. The
            epochs that an earlier, interrupted run had done come first.

    Raises:
        ClusterError: if the cluster cannot hold the workers.
        PipelineError: if workers were lost more than `train.max_failures` times or failed in a way that is a defect.
        SagsmError: what a worker raised, with its own class and message; it is not tried again.
    """
    import ray.train

    alive_nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray leaves it
    plan = plan_workers(job.train.num_workers, alive_nodes)
    gpu = " and a GPU" if plan.use_gpu else ""
    _log.info("%s: %d workers, each with %d CPUs%s", job.name, plan.num_workers, plan.cpus, gpu)
    storage_dir = storage_dir.resolve()
    storage_dir.mkdir(parents=True, exist_ok=True)
    (storage_dir / _FAILURE).unlink(missing_ok=True)
    try:
        with _deliver_epochs(storage_dir / _CHECKPOINTS, on_epoch):
            result: TrainResult | None = _make_trainer(job, plan, storage_dir).fit().return_value
    except ray.train.TrainingFailedError as error:
        _raise_failure(storage_dir / _FAILURE)
        raise _explain(job, plan, error) from error
    finally:
        shutil.rmtree(storage_dir / _RAY, ignore_errors=True)
    _raise_failure(storage_dir / _FAILURE)
    assert result is not None
    return result


def plan_workers(num_workers: int, nodes: Sequence[Mapping[str, float]]) -> WorkerPlan:
    """Divide the cluster's CPUs and GPUs over the workers.

    Args:
        num_workers: as asked for; 0 means one a GPU, or one without GPUs.
        nodes: `CPU` and `GPU` of each node, in use or not.

    Returns:
        A plan in which each worker has as many whole CPUs as all can have, and one GPU if the cluster has any.

    Raises:
        ClusterError: if the cluster could never hold so many workers, with what was asked for and what there is.
    """
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    use_gpu = sum(gpus) > 0
    num_workers = num_workers or sum(gpus) or 1
    for each in range(max(1, sum(cpus) // num_workers), 0, -1):
        places = [min(cpu // each, gpu) if use_gpu else cpu // each for cpu, gpu in zip(cpus, gpus, strict=True)]
        if sum(places) >= num_workers:
            return WorkerPlan(num_workers, each, use_gpu)
    there = "; ".join(f"{cpu} CPUs, {gpu} GPUs" for cpu, gpu in zip(cpus, gpus, strict=True))
    raise ClusterError(
        f"train.num_workers asks for {num_workers} workers with 1 CPU{' and 1 GPU' if use_gpu else ''} each; "
        f"the cluster has {len(nodes)} nodes ({there}). Lower train.num_workers or add nodes"
    )


def _make_trainer(job: TrainJob, plan: WorkerPlan, storage_dir: Path) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_HEALTH_CHECK_SECONDS))
    return TorchTrainer(
        _run_worker,  # type: ignore[arg-type]  # the stubs are those of Train V1: no return value
        train_loop_config={"job": job, "storage_dir": storage_dir, "num_threads": plan.cpus},
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_SECONDS),
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.use_gpu,
            resources_per_worker={"CPU": plan.cpus, **({"GPU": 1} if plan.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"{job.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage_dir / _RAY),
            failure_config=ray.train.FailureConfig(
                max_failures=job.train.max_failures,
                controller_failure_limit=_MAX_STARTS,  # type: ignore[call-arg]  # V1's stub
            ),
        ),
    )


def _run_worker(config: dict[str, Any]) -> TrainResult | None:
    """What each worker process runs; after an error that a restart cannot cure, the restarted group ends at once."""
    import ray.train
    import ray.train.torch

    failure_path: Path = config["storage_dir"] / _FAILURE
    if failure_path.exists():
        return None
    torch.set_num_threads(config["num_threads"])
    context = ray.train.get_context()
    try:
        return train_job(
            config["job"],
            checkpoint_dir=config["storage_dir"] / _CHECKPOINTS,
            device=ray.train.torch.get_device(),
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
        )
    except SagsmError as error:
        write_json(failure_path, {"class": type(error).__name__, "message": str(error)})
        raise


@contextmanager
def _deliver_epochs(checkpoint_dir: Path, on_epoch: Callable[[EpochMetrics], None] | None) -> Iterator[None]:
    """Call `on_epoch` for each epoch in order, from a thread, while the `with` block runs, and for the rest at its end."""
    if on_epoch is None:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        num_delivered = 0
        is_last_look = False
        while not is_last_look:
            is_last_look = ended.wait(_SECONDS_BETWEEN_LOOKS)
            for metrics in read_history(checkpoint_dir)[num_delivered:]:
                on_epoch(metrics)
                num_delivered += 1

    with ThreadPoolExecutor(1, thread_name_prefix="epochs") as pool:
        watching = pool.submit(watch)
        try:
            yield
        finally:
            ended.set()
        watching.result()


def _raise_failure(path: Path) -> None:
    """Raise what a worker raised, if it left an error."""
    if path.exists():
        failure = json.loads(path.read_bytes())
        kind: type[SagsmError] = getattr(errors, failure["class"])
        raise kind(failure["message"])


def _explain(job: TrainJob, plan: WorkerPlan, error: Exception) -> SagsmError:
    """Turn Ray Train's error into ours, the likeliest cause first."""
    controller_failure = getattr(error, "controller_failure", None)
    if controller_failure is not None:
        return ClusterError(
            f"{plan.num_workers} workers of {job.name} with {plan.cpus} CPUs each could not be started: {controller_failure}. "
            "Look with `ray status` what holds the cluster's CPUs, and run again: training goes on from its last checkpoint"
        )
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    # When a rank is lost, the others fail in their collectives with a RuntimeError.
    causes = sorted(failures.items(), key=lambda item: (isinstance(item[1], RuntimeError), item[0]))
    text = "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, cause in causes) or str(error)
    return PipelineError(
        f"training {job.name} failed more than train.max_failures={job.train.max_failures} times, last with {text}. "
        "Run again to go on from the last checkpoint"
    )
