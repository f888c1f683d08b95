"""Loss and accuracy over the validation clips of all ranks, each counted once."""

import math
from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from infra.errors import PipelineError
from pipelines.training.batch_norm import measure_statistics
from pipelines.training.metrics import Means, Sums
from pipelines.training.run import ClipLoader, Run
from pipelines.training.step import forward
from pipelines.training.watch import mean_gates

_BYTE = 255.0


def validate(run: Run, loader: ClipLoader, epoch: int) -> tuple[Means, dict[str, float]]:
    """Validate the network, or the average of its weights if training keeps one; collective.

    Returns:
        The means over all clips, and the mean of |gate| by slot over rank 0's first batch.

    Raises:
        PipelineError: if the mean loss is not finite.
    """
    network = run.evaluated
    if run.settings.precise_bn_batches:
        measure_statistics(network, _prepared_training_clips(run, epoch), run.precision, run.device)
    elif run.world_size > 1:
        for buffer in network.buffers():  # batch statistics: those of rank 0 count, as in checkpoints and in each training step
            dist.broadcast(buffer, src=0)
    network.eval()
    sums, gates = Sums(run.device), dict[str, float]()
    loader.seek(epoch)
    with torch.inference_mode(), mean_gates(network, gates):
        for batch in loader:
            labels = batch.labels.to(run.device, non_blocking=True)
            logits = forward(run, network, _inputs(run, batch.clips.to(run.device, non_blocking=True)))
            sums.add(cross_entropy(logits, labels, reduction="none"), logits, labels)
    means = sums.means()
    if not math.isfinite(means.loss):
        raise PipelineError(
            f"the validation loss is {means.loss}; expected a number. The training diverged: lower "
            f"train.learning_rate={run.settings.learning_rate:g}"
        )
    return means, gates


def unnormalised(model: nn.Module, inputs: Tensor) -> Tensor:
    """Prepared clips as the published validation saw them: without mean and deviation (D3)."""
    pixels = inputs * model.std + model.mean  # type: ignore[operator]  # buffers of VideoClassifier
    return pixels / _BYTE if model.input_format == "unit_rgb" else pixels


def _inputs(run: Run, clips: Tensor) -> Tensor:
    """Prepared clips, under the published protocol without mean and deviation."""
    inputs: Tensor = run.state.model.prepare(clips)  # type: ignore[operator]  # nn.Module knows no methods
    if run.settings.compat.val_protocol == "standard":
        return inputs
    return unnormalised(run.state.model, inputs)


def _prepared_training_clips(run: Run, epoch: int) -> Iterator[Tensor]:
    """The first clips of this epoch again, in micro batches."""
    run.train_loader.seek(epoch)
    micro_batches = (
        part
        for batch in run.train_loader
        for part in batch.clips.tensor_split(-(-len(batch.labels) // run.settings.batch_size))
    )
    for clips in islice(micro_batches, run.settings.precise_bn_batches):
        yield run.state.model.prepare(clips.to(run.device, non_blocking=True))  # type: ignore[operator]  # as above
