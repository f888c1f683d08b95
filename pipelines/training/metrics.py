"""What training reports: sums over clips and ranks that are divided once, and the metrics of an epoch.

A mean of batch means weights the clips of a short last batch more; a mean of rank means does the same. So each rank adds up
loss, hits and clips, the sums of all ranks are added, and only then is there a division.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from preprocessing.clip_ledger import ClipLedger

TOP5 = 5


class Sums:
    """Sums of loss, top-1 hits, top-5 hits and clips on one rank, in float64, on the device so that adding never waits for it.

    Args:
        device: where the batches are.
        values: the four sums to go on from, as `tolist` gave them.
    """

    def __init__(self, device: torch.device, values: list[float] | None = None) -> None:
        self._values = torch.tensor(values or [0.0] * 4, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            losses: of each clip. Shape: [B].
            logits: Shape: [B, num_classes]; of equal ones the first class counts as the higher, as in evaluation; with fewer
                than five classes every clip is a top-5 hit.
            labels: int64. Shape: [B].
        """
        best = logits.detach().argsort(dim=1, descending=True, stable=True)[:, :TOP5]  # topk takes any of equal ones
        hits = best == labels[:, None]
        batch = (losses.detach().sum(dtype=torch.float64), hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels)))
        self._values += torch.stack([value.to(self._values) for value in batch])

    def tolist(self) -> list[float]:
        """The four sums of this rank."""
        values: list[float] = self._values.tolist()
        return values

    def gather(self) -> list[list[float]]:
        """The sums of every rank, in the order of the ranks; collective."""
        if not dist.is_initialized():
            return [self.tolist()]
        parts = [torch.empty_like(self._values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self._values)
        return [part.tolist() for part in parts]

    def means(self) -> "Means":
        """Mean loss, top-1 and top-5 over the clips of all ranks; collective."""
        loss, top1, top5, num_clips = (sum(column) for column in zip(*self.gather(), strict=True))
        return Means(loss / num_clips, top1 / num_clips, top5 / num_clips, round(num_clips))


@dataclass(frozen=True)
class Means:
    """Means over `num_clips` clips; `top1` and `top5` are fractions."""

    loss: float
    top1: float
    top5: float
    num_clips: int


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """What one epoch gave.

    Attributes:
        epoch: from 0.
        step: optimiser updates since the start of training, after this epoch.
        train_loss: mean over the epoch's clips of the loss that was optimised, each as it was when its clip was shown.
        train_top1: fraction, measured likewise; with mixup or cutmix against the label of the clip that was mixed into.
        val_loss: mean cross-entropy over the validation clips, without label smoothing; None if the epoch was not validated.
        val_top1: fraction; None if the epoch was not validated.
        val_top5: fraction; None if the epoch was not validated.
        learning_rate: of the epoch's last step.
        effective_batch: mean number of clips of a step, over all workers and micro batches (D14).
        world_size: workers at the epoch's end.
        seconds: of training and validation.
        clips_per_second: training clips of all workers over the seconds of training.
        data_wait: share of these seconds that rank 0 spent waiting for batches.
        peak_memory_bytes: the most main memory that rank 0's process has had so far.
        ledger: which clips were shown, as a `ClipLedger` prints itself; equal in two runs that showed the same clips.
        gammas: strength of attention by slot.
        gates: `<slot>_weight_norm` of the gates' kernels and, if the epoch was validated, `<slot>_mean_abs` of their output
            over the first validation batch.
        dead_gates: gammas and gates that are not trained, with the reason; not empty is a defect.
    """

    epoch: int
    step: int
    train_loss: float
    train_top1: float
    val_loss: float | None
    val_top1: float | None
    val_top5: float | None
    learning_rate: float
    effective_batch: float
    world_size: int
    seconds: float
    clips_per_second: float
    data_wait: float
    peak_memory_bytes: int
    ledger: str
    gammas: dict[str, float] = field(default_factory=dict)
    gates: dict[str, float] = field(default_factory=dict)
    dead_gates: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, float]:
        """Names as MLflow shows them: `train/loss`, `val/top1`, `weights/gamma_3a`; without what was not measured.

        What is before the slash is a section of its charts. Sections go by the alphabet: what is looked at first comes first.
        `work/ledger` is the ledger's upper 52 bits, which a float holds exactly.
        """
        named = {
            "train/loss": self.train_loss,
            "train/top1": self.train_top1,
            "train/lr": self.learning_rate,
            "work/effective_batch": self.effective_batch,
            "work/workers": self.world_size,
            "work/clips_per_second": self.clips_per_second,
            "work/epoch_seconds": self.seconds,
            "work/data_wait": self.data_wait,
            "work/peak_memory_bytes": self.peak_memory_bytes,
            "work/ledger": float(ClipLedger.parse(self.ledger).total >> 76),
            "weights/dead_gates": len(self.dead_gates),
            "val/loss": self.val_loss,
            "val/top1": self.val_top1,
            "val/top5": self.val_top5,
            **{f"weights/gamma_{slot}": gamma for slot, gamma in self.gammas.items()},
            **{f"weights/gate_{name}": value for name, value in self.gates.items()},
        }
        return {name: value for name, value in named.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Plain data from which `EpochMetrics(**data)` makes an equal value."""
        return asdict(self)


@dataclass(frozen=True)
class StepStatus:
    """How far a training is after a step.

    Attributes:
        epoch: the epoch that is under way, from 0.
        step_in_epoch: how many of its steps are done, at least 1.
        steps_per_epoch: how many it has.
        epochs: how many epochs the training has.
        loss: mean over rank 0's clips of this step.
        clips_per_second: of all ranks, in this epoch, since training was begun or resumed.
        data_wait: share of this epoch's time that was spent waiting for batches.
    """

    epoch: int
    step_in_epoch: int
    steps_per_epoch: int
    epochs: int
    loss: float
    clips_per_second: float
    data_wait: float


def best_epoch(history: list[EpochMetrics]) -> EpochMetrics | None:
    """The epoch with the highest validation top-1, the first of equals; None if none was validated."""
    validated = [epoch for epoch in history if epoch.val_top1 is not None]
    return max(validated, key=lambda epoch: epoch.val_top1 or 0.0, default=None)
