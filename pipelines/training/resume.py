"""Going on: rank 0 alone sees the checkpoints, and tells the other ranks what is in them.

Workers may be on machines without a common disk, and there may be more or fewer of them than before. The steps an epoch stay
as they were when the training began, so that each step has the same clips in the same order and the schedule does not change;
only which worker takes which clips of a step does.
"""

import logging

import torch
import torch.distributed as dist

from pipelines.training import checkpoint
from pipelines.training.checkpoint import FILES, Progress
from pipelines.training.run import Run
from preprocessing.clip_ledger import ClipLedger

_LEDGER_BYTES = (8, 16)  # of the number of clips and of their sum

_log = logging.getLogger(__name__)


def resume(run: Run) -> Progress:
    """Put the newest good checkpoint into every rank's state; collective.

    Raises:
        ConfigError: on rank 0, if the checkpoints belong to another training; from the loader, if the steps of that training
            have too few clips for so many workers.
    """
    found = checkpoint.load_latest_verified(run.folder, run.identity) if run.folder is not None and run.rank == 0 else None
    files = _share({} if found is None else found.read(), run)
    if not files:
        return Progress(steps_per_epoch=run.steps_per_epoch)
    progress = checkpoint.restore(files, run.state)
    if progress.steps_per_epoch != run.steps_per_epoch:
        _log.info(
            "the training began with %d steps an epoch and goes on so; %d workers would by themselves take %d",
            progress.steps_per_epoch,
            run.world_size,
            run.steps_per_epoch,
        )
        run.train_loader.divide(progress.steps_per_epoch)
    return progress


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint on rank 0 and remove those that are no longer needed."""
    if run.folder is not None and run.rank == 0:
        checkpoint.save(run.folder, run.state, progress, run.identity)
        checkpoint.prune(run.folder)


def sums_for(run: Run, progress: Progress) -> list[float] | None:
    """The sums from which this rank goes on: its own, or, if there was another number of ranks, those of all on rank 0."""
    if len(progress.sums) == run.world_size:
        return progress.sums[run.rank]
    return [sum(column) for column in zip(*progress.sums, strict=True)] if run.rank == 0 and progress.sums else None


def ledger_for(run: Run, progress: Progress) -> ClipLedger:
    """The ledger from which this rank goes on: that of all ranks on rank 0."""
    return progress.ledger if run.rank == 0 else ClipLedger()


def gather_ledger(run: Run, own: ClipLedger) -> ClipLedger:
    """The sum of all ranks' ledgers; collective."""
    if run.world_size == 1:
        return own
    data = b"".join(value.to_bytes(size) for value, size in zip((own.num_clips, own.total), _LEDGER_BYTES, strict=True))
    parts = [torch.empty(len(data), dtype=torch.uint8, device=run.device) for _ in range(run.world_size)]
    dist.all_gather(parts, torch.frombuffer(bytearray(data), dtype=torch.uint8).to(run.device))
    total = ClipLedger()
    for part in (bytes(part.tolist()) for part in parts):
        total += ClipLedger(*(int.from_bytes(field) for field in (part[: _LEDGER_BYTES[0]], part[_LEDGER_BYTES[0] :])))
    return total


def _share(files: dict[str, bytes], run: Run) -> dict[str, bytes]:
    """Rank 0's files on all ranks, as bytes and not as pickles; collective."""
    if run.world_size == 1:
        return files
    sizes = torch.tensor([len(files.get(name, b"")) for name in FILES], device=run.device)
    dist.broadcast(sizes, src=0)
    shared = {}
    for name, size in zip(FILES, sizes.tolist(), strict=True):
        if size:
            own = (
                torch.frombuffer(bytearray(files[name]), dtype=torch.uint8)
                if run.rank == 0
                else torch.empty(size, dtype=torch.uint8)
            )
            data = own.to(run.device)
            dist.broadcast(data, src=0)
            shared[name] = data.cpu().numpy().tobytes()
    return shared
