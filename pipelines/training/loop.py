"""The training loop: one function, torch only. A test runs it on one CPU, Ray Train on many workers, a trial inside Ray Tune.

    resume -> for each epoch: steps -> ledger -> validate -> measure -> checkpoint -> report

Where torch.distributed is initialised, all its processes train one network: each calls `train` with loaders for its own rank.

Every step is a pure function of the weights, the optimiser's state, the batch and (seed, step, rank): the generator of torch is
seeded anew for each step and the learning rate is computed from its number. So a resumed run continues bit for bit (on the same
CPUs and threads) without any stored random state. With another number of ranks the steps have the same clips as before, and
only rounding, batch statistics and dropout differ.

Against the published code (PAPER_NOTES.md): the mean loss is the true one (D5), the gradient is clipped once, before the step
(D15), no micro batch leaks into the next epoch, since each step has its own clips and cuts them into equal parts (D16), each
epoch is validated (D17), and a resumed run has all its state (D19). `train.compat` brings back what can be wanted of it.

    run.py         what stays the same        resume.py      checkpoints in, checkpoints out, for all ranks
    step.py        one optimiser update       validation.py  the means over the validation clips
    batch_norm.py  what is frozen             watch.py       gates, gammas, the stopwatch
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.errors import PipelineError
from pipelines.training import checkpoint
from pipelines.training.batch_norm import set_training_mode
from pipelines.training.checkpoint import Progress
from pipelines.training.metrics import EpochMetrics, StepStatus, Sums, best_epoch
from pipelines.training.optim import learning_rate_at
from pipelines.training.resume import gather_ledger, ledger_for, resume, save, sums_for
from pipelines.training.run import ClipLoader, Run, set_up
from pipelines.training.settings import TrainSettings
from pipelines.training.step import any_rank, attend_everywhere, take_step
from pipelines.training.validation import validate
from pipelines.training.watch import Stopwatch, attention_gammas, dead_gates, gate_norms, peak_memory_bytes
from preprocessing.clip_ledger import ClipLedger

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        history: all its epochs, also those before it was resumed.
        best: the epoch with the highest validation top-1, the first of equals; None if no epoch was validated.
        best_weights: what was validated then (safetensors; the average if training keeps one), checked against its hash; None
            without checkpoints. On other ranks than 0 it is where rank 0 has it.
        last_weights: the weights at the end, not averaged; None without checkpoints.
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
class _Callbacks:
    on_step: Callable[[StepStatus], None] | None
    should_stop: Callable[[], bool] | None


def train(
    model: nn.Module,
    train_loader: ClipLoader,
    val_loader: ClipLoader,
    settings: TrainSettings,
    *,
    checkpoint_dir: Path | None,
    device: torch.device,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    on_step: Callable[[StepStatus], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train `model` in place, from the newest good checkpoint in `checkpoint_dir` if there is one.

    Args:
        model: a network with `prepare`, such as `models.create_model` gives, in its initial state; moved to `device`.
        train_loader: this rank's training clips; a batch is this rank's part of a step, `settings.accumulation` times
            `settings.batch_size` clips (fewer, or more if the training was begun by another number of ranks).
        val_loader: this rank's validation batches; all ranks together show each clip once.
        settings: how to train.
        checkpoint_dir: where rank 0 reads and writes checkpoints, and no other rank; None writes none and resumes nothing.
        device: where to compute.
        on_epoch: called on rank 0 after each epoch that this call trains, when its checkpoint is safe.
        on_step: called on rank 0 after each step.
        should_stop: asked on each rank after each step; when one says True, all write a checkpoint and return.
        identity: JSON of what else a checkpoint must agree on: the model's settings, `label_passport`, the data.

    Returns:
        The epochs, and where the weights are.

    Raises:
        PipelineError: if a loss or gradient is not finite (before it changes a weight), a trainable tensor is in no optimiser
            group, an epoch lost or doubled a clip, or a checkpoint cannot be written.
        ConfigError: if the checkpoints there belong to another training, or a setting is not possible on this device.
        DataError: if the best weights were damaged after they were written.
    """
    run = set_up(model, train_loader, settings, device, checkpoint_dir, identity or {})
    progress = resumed = resume(run)
    _log_batches(run)
    interrupted = False
    while progress.epoch < settings.epochs and not interrupted:
        progress, interrupted = _train_epoch(run, progress, _Callbacks(on_step, should_stop))
        if progress.step_in_epoch < run.steps_per_epoch:
            break
        _check_ledger(run, progress)
        metrics = _measure_epoch(run, val_loader, progress)
        progress = Progress(
            epoch=progress.epoch + 1,
            global_step=progress.global_step,
            steps_per_epoch=progress.steps_per_epoch,
            history=[*progress.history, metrics],
        )
        save(run, progress)
        if on_epoch is not None and run.rank == 0:
            on_epoch(metrics)
    return _make_result(run, progress, resumed.global_step)


def _train_epoch(run: Run, progress: Progress, callbacks: _Callbacks) -> tuple[Progress, bool]:
    """Take the steps that are left of an epoch; return how far it got and whether it was told to stop."""
    sums, ledger = Sums(run.device, sums_for(run, progress)), ledger_for(run, progress)
    watch, num_clips, before = Stopwatch(progress.seconds, progress.waited), 0, progress.seconds
    every = run.settings.checkpoint_every_steps
    set_training_mode(run.network, run.settings.batch_norm)
    run.train_loader.seek(progress.epoch, progress.step_in_epoch)
    stop = False

    def so_far() -> Progress:
        all_sums, all_clips = sums.gather(), gather_ledger(run, ledger)
        return replace(progress, seconds=watch.seconds, waited=watch.waited, sums=all_sums, ledger=all_clips)

    for batch in watch.waiting_for(run.train_loader):
        losses = take_step(run, batch, progress.global_step, sums)
        ledger = ledger.add(batch.keys)
        progress = replace(progress, step_in_epoch=progress.step_in_epoch + 1, global_step=progress.global_step + 1)
        num_clips += batch.num_global
        if callbacks.on_step is not None and run.rank == 0:
            rate = num_clips / (watch.seconds - before)
            callbacks.on_step(_status(run, progress, losses.mean().item(), rate, watch.waited / watch.seconds))
        stop = any_rank(callbacks.should_stop is not None and callbacks.should_stop(), run.device)
        is_last = progress.step_in_epoch == run.steps_per_epoch  # then the checkpoint is written after validation
        if not is_last and (stop or (every and progress.global_step % every == 0)):
            save(run, so_far())
        if stop:
            break
    return so_far(), stop


def _status(run: Run, progress: Progress, loss: float, clips_per_second: float, data_wait: float) -> StepStatus:
    return StepStatus(
        epoch=progress.epoch,
        step_in_epoch=progress.step_in_epoch,
        steps_per_epoch=run.steps_per_epoch,
        epochs=run.settings.epochs,
        loss=loss,
        clips_per_second=clips_per_second,
        data_wait=data_wait,
    )


def _check_ledger(run: Run, progress: Progress) -> None:
    """Stop if an epoch has not shown each clip exactly as often as it should."""
    expected = ClipLedger().add(run.train_loader.epoch_keys(progress.epoch))
    if progress.ledger != expected:
        raise PipelineError(
            f"epoch {progress.epoch} has shown clips {progress.ledger}, but should have shown {expected}: a clip was lost or "
            "doubled. This is a defect of the loader or of the resumption; please report it with the two ledgers"
        )


def _measure_epoch(run: Run, val_loader: ClipLoader, progress: Progress) -> EpochMetrics:
    """Validate if it is due, and put together what the epoch gave."""
    watch = Stopwatch(progress.seconds, progress.waited)
    settings, model = run.settings, run.state.model
    dead = dead_gates(model, run.state.optimizer, run.start, gamma_is_frozen=settings.compat.freeze_gamma)
    if settings.random_placement:
        attend_everywhere(run)
    is_due = (progress.epoch + 1) % settings.validate_every_epochs == 0 or progress.epoch + 1 == settings.epochs
    val, gates = validate(run, val_loader, progress.epoch) if is_due else (None, {})
    trained = Sums(run.device, progress.sums[run.rank]).means()
    if run.rank == 0:
        _log.info("epoch %d has shown clips %s", progress.epoch, progress.ledger)
        for gate in dead:
            _log.warning("dead gate after epoch %d: %s; it adds nothing to the network", progress.epoch, gate)
    return EpochMetrics(
        epoch=progress.epoch,
        step=progress.global_step,
        train_loss=trained.loss,
        train_top1=trained.top1,
        val_loss=val.loss if val else None,
        val_top1=val.top1 if val else None,
        val_top5=val.top5 if val else None,
        learning_rate=learning_rate_at(progress.global_step - 1, run.steps_per_epoch, settings),
        effective_batch=trained.num_clips / run.steps_per_epoch,
        world_size=run.world_size,
        seconds=watch.seconds,
        clips_per_second=trained.num_clips / progress.seconds,
        data_wait=progress.waited / progress.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        ledger=str(progress.ledger),
        gammas=attention_gammas(model),
        gates=gate_norms(model) | gates,
        dead_gates=dead,
    )


def _log_batches(run: Run) -> None:
    if run.rank == 0:
        _log.info(
            "%d workers, micro batches of up to %d clips, %d steps an epoch, peak learning rate %g",
            run.world_size,
            run.settings.batch_size,
            run.steps_per_epoch,
            run.settings.learning_rate,
        )


def _make_result(run: Run, progress: Progress, resumed_from_step: int) -> TrainResult:
    best = best_epoch(progress.history)
    best_path = checkpoint.checkpoint_path(run.folder, best.step) if run.folder and best else None
    if best_path and run.rank == 0:
        checkpoint.verify(best_path)
    name = checkpoint.WEIGHTS if run.state.average is None else checkpoint.AVERAGE
    return TrainResult(
        history=progress.history,
        best=best,
        best_weights=best_path / name if best_path else None,
        last_weights=checkpoint.checkpoint_path(run.folder, progress.global_step) / checkpoint.WEIGHTS if run.folder else None,
        completed=progress.epoch >= run.settings.epochs,
        resumed_from_step=resumed_from_step,
    )
