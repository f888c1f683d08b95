"""What one process of a training does, in a Ray worker or in the driver: fetch checkpoints, train, copy checkpoints."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from infra.errors import PipelineError
from infra.filesystems import Folder
from infra.progress import OnProgress
from pipelines.training.board import Listener, Reporter
from pipelines.training.checkpoint_mirror import CheckpointMirror, fetch
from pipelines.training.job import TrainJob, train_job
from pipelines.training.loop import TrainResult
from pipelines.training.metrics import EpochMetrics, StepStatus

CHECKPOINTS = "checkpoints"

_log = logging.getLogger(__name__)


def train_rank(
    job: TrainJob,
    *,
    storage_dir: Path,
    mirror: Folder | None,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    must_resume: bool = False,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    on_step: Callable[[StepStatus], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train as one of `world_size` processes, from the newest checkpoint in `storage_dir` or `mirror`; see `loop.train`.

    Args:
        mirror: the folder that gets copies of the checkpoints; None makes none.
        must_resume: refuse to start anew, since it is known that there were checkpoints.

    Raises:
        PipelineError: if the place of the copies cannot be read at the start or not be written at the end, or the
            checkpoints that must be there are not.
    """
    folder = storage_dir / CHECKPOINTS
    with contextlib.ExitStack() as stack:
        if rank == 0:
            if mirror is not None:
                fetch(mirror, folder)
            if must_resume and not any(folder.glob("step-*")):
                raise PipelineError(
                    f"training {job.name} has checkpoints, but not in {folder} on this node, where rank 0 now runs; put the "
                    "work directory on a disk that all nodes see, or set train.checkpoints to an s3:// URL"
                )
            if mirror is not None:
                stack.enter_context(CheckpointMirror(folder, mirror))
        return train_job(
            job,
            checkpoint_dir=folder,
            device=device,
            rank=rank,
            world_size=world_size,
            on_epoch=on_epoch,
            on_step=on_step,
            should_stop=should_stop,
        )


def train_locally(
    job: TrainJob,
    *,
    storage_dir: Path,
    mirror: Folder | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Train in this process, where a debugger can follow: the same loop, checkpoints and (with as many threads) bits as one
    Ray worker gives. For arguments and errors see `worker.train_on_cluster`.
    """
    listener = Listener(job.train.epochs, on_epoch, on_progress)
    reporter = Reporter(storage_dir / CHECKPOINTS, listener.hear_status, listener.hear_epochs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _log.info("%s: trains in this process, on %s with %d threads", job.name, device, torch.get_num_threads())
    result = train_rank(
        job,
        storage_dir=storage_dir.resolve(),
        mirror=mirror,
        device=device,
        on_epoch=reporter.on_epoch,
        on_step=reporter.on_step,
    )
    listener.hear_epochs(result.history)
    return result
