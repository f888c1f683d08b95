"""One optimiser update: forward and backward of its micro batches, clipping once, and the check that comes before the weights.

The gradient is that of the mean loss over all clips of the step, on all ranks and in all micro batches, however they are
divided: each micro batch adds the sum of its losses over the number of clips of the whole step.
"""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision import tv_tensors

from infra.errors import PipelineError
from models import attend_only, attention_slots
from pipelines.training.metrics import Sums
from pipelines.training.optim import learning_rate_at, set_learning_rate
from pipelines.training.precision import autocast
from pipelines.training.run import Run

if TYPE_CHECKING:
    from preprocessing.loader import Batch

_BITS = 8
_MAX_NAMED_CLIPS = 8
_LEAST_LOSS_SCALE = 1.0  # a scaled loss below the loss itself: then it is not fp16's range that the gradient leaves


def take_step(run: Run, batch: "Batch", step: int, sums: Sums) -> Tensor:
    """Update weights, optimiser and average by this rank's part of one step; collective.

    Args:
        run: of this training.
        batch: this rank's clips of the step.
        step: its number, from 0, since the start of training.
        sums: loss and hits of the clips are added to it.

    Returns:
        The loss of each clip of this rank.

    Raises:
        PipelineError: on all ranks, if a loss or the gradient is not finite on any; nothing has been updated then.
    """
    torch.manual_seed(_step_seed(run.settings.seed, step, run.rank))
    optimizer, scaler = run.state.optimizer, run.state.scaler
    set_learning_rate(optimizer, learning_rate_at(step, run.steps_per_epoch, run.settings))
    optimizer.zero_grad()
    if run.settings.random_placement:
        attend_only(run.state.model, placement_of_step(run.settings.seed, step, attention_slots(run.state.model)))  # type: ignore[arg-type]  # VideoClassifier
    losses = _accumulate_gradient(run, batch, sums)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.state.model.parameters(), run.settings.gradient_clip)
    _require_finite(run, batch, step, losses, norm)
    scaler.step(optimizer)
    scaler.update()
    if run.state.average is not None:
        run.state.average.update_parameters(run.state.model)
    return losses


def forward(run: Run, network: nn.Module, inputs: Tensor) -> Tensor:
    """Logits in float32 of prepared clips, computed in the run's precision."""
    with autocast(run.precision, run.device):
        logits: Tensor = network(inputs)
    return logits.float()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is True on any rank; collective."""
    vote = torch.tensor(flag, dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.all_reduce(vote, dist.ReduceOp.MAX)
    return bool(vote.item())


def placement_of_step(seed: int, step: int, slots: Sequence[str]) -> str:
    """The slots that have attention in a step of `random_placement`: every subset of `slots` is equally likely.

    A pure function, so that all ranks agree and a resumed training goes on with the same placements.

    Example:
        >>> [placement_of_step(0, step, ("3a", "4e", "5b")) for step in range(3)]
        ['3a,5b', '5b', '4e']
    """
    digest = hashlib.blake2b(f"placement {seed} {step}".encode(), digest_size=-(-len(slots) // _BITS)).digest()
    mask = int.from_bytes(digest)
    return ",".join(slot for bit, slot in enumerate(slots) if mask >> bit & 1) or "none"


def attend_everywhere(run: Run) -> None:
    """Switch attention on in all slots in which the network has it."""
    attend_only(run.state.model, ",".join(attention_slots(run.state.model)) or "none")  # type: ignore[arg-type]  # as above


def _accumulate_gradient(run: Run, batch: "Batch", sums: Sums) -> Tensor:
    """Forward and backward of each micro batch; ranks exchange gradients after the last."""
    num_micro = -(-len(batch.labels) // run.settings.batch_size)
    parts = zip(batch.clips.tensor_split(num_micro), batch.labels.tensor_split(num_micro), strict=True)
    all_losses = []
    for index, (clips, labels) in enumerate(parts):
        is_last = index == num_micro - 1
        with nullcontext() if is_last or run.world_size == 1 else run.network.no_sync():  # type: ignore[operator]  # DDP's
            logits, losses, labels = _forward_losses(run, clips, labels)
            # Ranks' gradients are averaged, so this is the mean over the clips of all ranks, however they are divided.
            run.state.scaler.scale(losses.sum() * (run.world_size / batch.num_global)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if run.settings.compat.clip_each_micro_batch and not is_last:
            nn.utils.clip_grad_norm_(run.state.model.parameters(), run.settings.gradient_clip)
        # The published loop reports what a step has accumulated so far, after each micro batch: the first counts each time.
        reported = losses * ((num_micro - index) / num_micro) if run.settings.compat.logged_loss else losses
        sums.add(reported, logits, labels)
        all_losses.append(losses.detach())
    return torch.cat(all_losses)


def _forward_losses(run: Run, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, K], losses [B] and labels [B] of clips, on the device."""
    labels = labels.to(run.device, non_blocking=True)
    inputs: Tensor = run.state.model.prepare(clips.to(run.device, non_blocking=True))  # type: ignore[operator]  # nn.Module knows no methods
    targets = labels
    if run.mix is not None:
        mixed, targets = run.mix(tv_tensors.Video(inputs), labels)
        inputs.copy_(mixed.as_subclass(Tensor))  # back into the memory layout in which networks are fast
    logits = forward(run, run.network, inputs)
    losses = cross_entropy(logits, targets, reduction="none", label_smoothing=run.settings.label_smoothing)
    return logits, losses, labels


def _require_finite(run: Run, batch: "Batch", step: int, losses: Tensor, norm: Tensor) -> None:
    """Raise the same error on all ranks, naming the clips of all ranks whose loss is not finite.

    In fp16 a gradient may leave the range of numbers: the scaler then leaves out the step and scales less.
    """
    is_out_of_range = run.precision == "fp16" and run.state.scaler.get_scale() > _LEAST_LOSS_SCALE
    is_finite = losses.isfinite().all() & (norm.isfinite() | is_out_of_range)
    if not any_rank(not bool(is_finite), run.device):
        return
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


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest())
