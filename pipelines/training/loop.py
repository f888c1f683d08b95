"""The training loop: one function, torch only. A test runs it on one CPU, Ray Train on many workers, a trial inside Ray Tune.

    resume -> for each epoch: steps -> validate -> measure -> checkpoint -> report

Where torch.distributed is initialised, all its processes train one network: each calls `train` with loaders for its own rank.

Every step is a pure function of the weights, the optimiser's state, the batch and (seed, step, rank): the generator of torch is
seeded anew for each step and the learning rate is computed from its number. So a resumed run continues bit for bit (on the same
CPUs and threads) without any stored random state.

Against the published code (PAPER_NOTES.md): the mean loss is the true one (D5), the gradient is clipped once, before the step
(D15), no micro batch leaks into the next epoch (D16), each epoch is validated (D17), and a resumed run has all its state (D19).
"""

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from infra.errors import PipelineError
from infra.storage import sha256_json
from pipelines.training import checkpoint
from pipelines.training.checkpoint import Progress
from pipelines.training.metrics import EpochMetrics, Means, Sums, best_epoch
from pipelines.training.optim import build_optimizer, learning_rate_at, set_learning_rate
from pipelines.training.settings import TrainSettings

if TYPE_CHECKING:
    from preprocessing.loader import Batch

# What does not change the numbers: a run may go on with other values of these.
_OPERATIONAL = frozenset({"num_workers", "loader_threads", "checkpoint_every_steps", "max_failures"})
_MAX_NAMED_CLIPS = 8


class ClipLoader(Protocol):
    """What the loop needs of a loader; `preprocessing.make_loader` makes one."""

    def __len__(self) -> int:
        """Steps an epoch, equal on every rank."""

    def __iter__(self) -> Iterator["Batch"]:
        """The batches of one epoch."""

    def seek(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration start at this step of this epoch."""


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        history: all its epochs, also those before it was resumed.
        best: the epoch with the highest validation top-1, the first of equals; None if no epoch was validated.
        best_weights: its weights (safetensors), checked against their hash; None without checkpoints.
        last_weights: the weights at the end; None without checkpoints.
        completed: False if `should_stop` ended it early.
        resumed_from_step: 0 if it started anew.
    """

    history: list[EpochMetrics]
    best: EpochMetrics | None
    best_weights: Path | None
    last_weights: Path | None
    completed: bool
    resumed_from_step: int


@dataclass(frozen=True)
class _Run:
    """What stays the same while a network is trained; `network` is `model`, wrapped if there are several ranks."""

    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    settings: TrainSettings
    device: torch.device
    precision: Literal["fp32", "bf16"]
    rank: int
    world_size: int
    steps_per_epoch: int
    folder: Path | None
    identity: dict[str, Any]

    def logits(self, network: nn.Module, batch: "Batch") -> tuple[Tensor, Tensor]:
        """Logits in float32 [B, num_classes], and labels [B], on the device."""
        clips = batch.clips.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        inputs = self.model.prepare(clips)  # type: ignore[operator]  # "Tensor" not callable: nn.Module knows no methods
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            logits: Tensor = network(inputs)
        return logits.float(), labels


def train(
    model: nn.Module,
    train_loader: ClipLoader,
    val_loader: ClipLoader,
    settings: TrainSettings,
    *,
    checkpoint_dir: Path | None,
    device: torch.device,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train `model` in place, from the newest good checkpoint in `checkpoint_dir` if there is one.

    Args:
        model: a network with `prepare`, such as `models.create_model` gives; moved to `device`.
        train_loader: this rank's training batches.
        val_loader: this rank's validation batches; all ranks together show each clip once.
        settings: how to train.
        checkpoint_dir: on a disk that all ranks share; None writes no checkpoint and resumes nothing.
        device: where to compute.
        on_epoch: called on rank 0 after each epoch that this call trains, when its checkpoint is safe.
        should_stop: asked on each rank after each step; when one says True, all write a checkpoint and return.
        identity: JSON of what else a checkpoint must agree on: the model's settings, `label_passport`, the data.

    Returns:
        The epochs, and where the weights are.

    Raises:
        PipelineError: if a loss or gradient is not finite (before it changes a weight), a trainable tensor is in no optimiser
            group, or a checkpoint cannot be written.
        ConfigError: if the checkpoints there belong to another training.
        DataError: if the best weights were damaged after they were written.
    """
    run = _set_up(model, settings, device, len(train_loader), checkpoint_dir, identity or {})
    progress = resumed = _resume(run)
    interrupted = False
    while progress.epoch < settings.epochs and not interrupted:
        progress, interrupted = _train_epoch(run, train_loader, progress, should_stop)
        if progress.step_in_epoch < len(train_loader):
            break
        metrics = _measure_epoch(run, val_loader, progress)
        progress = Progress(epoch=progress.epoch + 1, global_step=progress.global_step, history=[*progress.history, metrics])
        _save(run, progress)
        if on_epoch is not None and run.rank == 0:
            on_epoch(metrics)
    return _make_result(run, progress, resumed.global_step)


def resolve_precision(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """Decide what `auto` means: bf16 where the hardware multiplies in it.

    A training step of GoogLeNet (channels_last, 32 frames of 96 px) on two cores of an AMD EPYC with avx512_bf16 and no AMX
    took 0.19 s in bf16 and 0.36 s in fp32 (November 2026); with neither of them bf16 is emulated and slower.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bf16"
    return "fp32"


def attention_gammas(model: nn.Module) -> dict[str, float]:
    """The gammas of all attention modules, by slot ("3a") or, in networks without slots, by parameter name."""
    gammas = {name: parameter.item() for name, parameter in model.named_parameters() if name.split(".")[-1] == "gamma"}
    slots = {name: re.search(r"inception_(\d[a-z])_", name) for name in gammas}
    return {match.group(1) if (match := slots[name]) else name: gamma for name, gamma in gammas.items()}


def _set_up(
    model: nn.Module,
    settings: TrainSettings,
    device: torch.device,
    steps_per_epoch: int,
    folder: Path | None,
    identity: Mapping[str, Any],
) -> _Run:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.to(device)
    precision = resolve_precision(settings.precision, device)
    tensors = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in model.state_dict().items()}
    return _Run(
        model=model,
        network=DistributedDataParallel(model) if world_size > 1 else model,
        optimizer=build_optimizer(model, settings),
        settings=settings,
        device=device,
        precision=precision,
        rank=rank,
        world_size=world_size,
        steps_per_epoch=steps_per_epoch,
        folder=folder,
        identity={
            **identity,
            "train": settings.model_dump(mode="json", exclude=set(_OPERATIONAL)) | {"precision": precision},
            "num_workers": world_size,
            "steps_per_epoch": steps_per_epoch,
            "tensors": sha256_json(tensors),
        },
    )


def _resume(run: _Run) -> Progress:
    """Load the newest good checkpoint on every rank; rank 0 alone decides which, since it sets damaged ones aside."""
    if run.folder is None:
        return Progress()
    found = [checkpoint.load_latest_verified(run.folder, run.identity) if run.rank == 0 else None]
    if run.world_size > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return Progress()
    found[0].restore(run.model, run.optimizer)
    return found[0].progress


def _train_epoch(
    run: _Run, loader: ClipLoader, progress: Progress, should_stop: Callable[[], bool] | None
) -> tuple[Progress, bool]:
    """Take the steps that are left of an epoch; return how far it got and whether it was told to stop."""
    sums = Sums(run.device, progress.sums[run.rank] if progress.sums else None)
    every = run.settings.checkpoint_every_steps
    run.network.train()
    loader.seek(progress.epoch, progress.step_in_epoch)
    started = time.perf_counter() - progress.seconds
    stop = False
    for batch in loader:
        stop = _take_step(run, batch, progress.global_step, sums, should_stop)
        progress = replace(progress, step_in_epoch=progress.step_in_epoch + 1, global_step=progress.global_step + 1)
        is_last = progress.step_in_epoch == run.steps_per_epoch  # then the checkpoint is written after validation
        if not is_last and (stop or (every and progress.global_step % every == 0)):
            _save(run, replace(progress, seconds=time.perf_counter() - started, sums=sums.gather()))
        if stop:
            break
    return replace(progress, seconds=time.perf_counter() - started, sums=sums.gather()), stop


def _take_step(run: _Run, batch: "Batch", step: int, sums: Sums, should_stop: Callable[[], bool] | None) -> bool:
    """One optimiser update; returns whether any rank wants to stop."""
    torch.manual_seed(_step_seed(run.settings.seed, step, run.rank))
    set_learning_rate(run.optimizer, learning_rate_at(step, run.steps_per_epoch, run.settings))
    logits, labels = run.logits(run.network, batch)
    losses = cross_entropy(logits, labels, reduction="none", label_smoothing=run.settings.label_smoothing)
    run.optimizer.zero_grad()
    # Ranks' gradients are averaged, so this is the mean over the clips of all ranks, however they are divided.
    (losses.sum() * (run.world_size / batch.num_global)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.settings.gradient_clip)
    is_finite = bool(losses.isfinite().all() & norm.isfinite())
    broken, stop = _any_rank([not is_finite, should_stop is not None and should_stop()], run.device)
    if broken:
        _refuse_step(run, batch, step, losses, norm)
    run.optimizer.step()
    sums.add(losses, logits, labels)
    return stop


def _refuse_step(run: _Run, batch: "Batch", step: int, losses: Tensor, norm: Tensor) -> None:
    """Raise the same error on all ranks, naming the clips of all ranks whose loss is not finite."""
    own_keys = [key for key, finite in zip(batch.keys, losses.isfinite().tolist(), strict=True) if not finite]
    keys_by_rank = [own_keys] * run.world_size
    if run.world_size > 1:
        dist.all_gather_object(keys_by_rank, own_keys)
    keys = [key for rank_keys in keys_by_rank for key in rank_keys]
    more = f" and {len(keys) - _MAX_NAMED_CLIPS} more" if len(keys) > _MAX_NAMED_CLIPS else ""
    what = f"the loss of clips {', '.join(keys[:_MAX_NAMED_CLIPS])}{more}" if keys else f"the gradient (norm {norm.item()})"
    raise PipelineError(
        f"{what} is not finite in step {step} (epoch {step // run.steps_per_epoch}); the weights of the step before were kept. "
        f"Look at these clips, lower train.learning_rate={run.settings.learning_rate:g} or set train.precision=fp32"
    )


def _any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag, True if it is True on any rank; collective."""
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.all_reduce(votes, dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest())


def _measure_epoch(run: _Run, val_loader: ClipLoader, progress: Progress) -> EpochMetrics:
    """Validate if it is due, and put together what the epoch gave."""
    started = time.perf_counter()
    is_due = (progress.epoch + 1) % run.settings.validate_every_epochs == 0 or progress.epoch + 1 == run.settings.epochs
    val = _validate(run, val_loader) if is_due else None
    trained = Sums(run.device, progress.sums[run.rank]).means()
    return EpochMetrics(
        epoch=progress.epoch,
        step=progress.global_step,
        train_loss=trained.loss,
        train_top1=trained.top1,
        val_loss=val.loss if val else None,
        val_top1=val.top1 if val else None,
        val_top5=val.top5 if val else None,
        learning_rate=learning_rate_at(progress.global_step - 1, run.steps_per_epoch, run.settings),
        seconds=progress.seconds + time.perf_counter() - started,
        clips_per_second=trained.num_clips / progress.seconds,
        gammas=attention_gammas(run.model),
    )


@torch.inference_mode()
def _validate(run: _Run, loader: ClipLoader) -> Means:
    """Loss and accuracy over the clips of all ranks, each counted once."""
    if run.world_size > 1:
        for (
            buffer
        ) in run.model.buffers():  # batch statistics: those of rank 0 count, as in checkpoints and in each training step
            dist.broadcast(buffer, src=0)
    run.model.eval()
    sums = Sums(run.device)
    for batch in loader:
        logits, labels = run.logits(run.model, batch)
        sums.add(cross_entropy(logits, labels, reduction="none"), logits, labels)
    means = sums.means()
    if not math.isfinite(means.loss):
        raise PipelineError(
            f"the validation loss is {means.loss}; expected a number. The training diverged: lower "
            f"train.learning_rate={run.settings.learning_rate:g}"
        )
    return means


def _save(run: _Run, progress: Progress) -> None:
    if run.folder is not None and run.rank == 0:
        checkpoint.save(run.folder, run.model, run.optimizer, progress, run.identity)
        checkpoint.prune(run.folder)


def _make_result(run: _Run, progress: Progress, resumed_from_step: int) -> TrainResult:
    best = best_epoch(progress.history)
    best_path = checkpoint.checkpoint_path(run.folder, best.step) if run.folder and best else None
    if best_path and run.rank == 0:
        checkpoint.verify(best_path)
    return TrainResult(
        history=progress.history,
        best=best,
        best_weights=best_path / checkpoint.WEIGHTS if best_path else None,
        last_weights=checkpoint.checkpoint_path(run.folder, progress.global_step) / checkpoint.WEIGHTS if run.folder else None,
        completed=progress.epoch >= run.settings.epochs,
        resumed_from_step=resumed_from_step,
    )
