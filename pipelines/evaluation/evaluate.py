"""Scores of every video of a split, each video once: the network's consensus over segments, the mean over views.

Heavy imports are inside functions, since every command reads `EvaluateSettings`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from infra.errors import ConfigError, PipelineError
from infra.progress import OnProgress
from infra.settings import Settings
from pipelines.evaluation.metrics import summarise
from pipelines.evaluation.protocols import find_protocol
from pipelines.evaluation.scores import ClipScores, Origin

if TYPE_CHECKING:
    import torch

    from models.classifier import VideoClassifier
    from pipelines.training.precision import Precision
    from preprocessing.loader import Batch

_CLIPS_ON_A_CPU = 4
"""At a time: SA-GSM on BN-Inception took 0.163 s a clip in twos, 0.162 in fours, 0.175 in sixteens (bf16, two cores)."""


class EvaluateSettings(Settings):
    """How a trained network is judged.

    Attributes:
        split: of the shard set; Something-Something's own test split has no labels, so "validation" is what papers report.
        batch_size: videos at a time; changes speed and memory, not results. Their views wait in memory together, some batches
            for each worker: 16 videos at 30 views of 8 frames of 224 pixels are 578 MB. Whole frames come one by one.
        loader_threads: that read and decode frames, of each worker.
        protocol: which views of a video are shown, whose scores are averaged; see `protocols`.
    """

    split: Literal["train", "validation", "test"] = "validation"
    batch_size: int = Field(default=16, ge=1)
    loader_threads: int = Field(default=2, ge=0)
    protocol: str = "centre"

    @field_validator("protocol")
    @classmethod
    def _one_way_to_say_it(cls, name: str) -> str:
        try:
            return find_protocol(name).name
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @property
    def videos_at_a_time(self) -> int:
        """`batch_size`, or 1 where each video has a size of its own."""
        return 1 if find_protocol(self.protocol).whole_frames else self.batch_size


class Batches(Protocol):
    """What `preprocessing.make_loader(train=False)` gives."""

    def __len__(self) -> int: ...

    def __iter__(self) -> "Iterator[Batch]": ...


@dataclass(frozen=True)
class Scores:
    """What a network says of each video.

    Attributes:
        keys: of the videos.
        labels: class ids, -1 if unlabelled. Shape: [N].
        logits: float32, before softmax; of several views the logarithms of their mean scores. Shape: [N, K].
    """

    keys: list[str]
    labels: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]

    def summarise(self, label_names: list[str]) -> dict[str, Any]:
        """Accuracies, confusions and tables; see `metrics.summarise`."""
        return summarise(self.logits, self.labels, label_names)

    def save(self, path: Path, origin: Origin) -> None:
        """Write a parquet file; see `scores`. In float64, so that the order of classes stays that of the logits."""
        from scipy.special import softmax

        ClipScores(self.keys, self.labels, softmax(self.logits.astype(np.float64), axis=1), origin).save(path)


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of all parts of a split, one after another."""
    keys = [key for part in parts for key in part.keys]
    labels, logits = np.concatenate([part.labels for part in parts]), np.concatenate([part.logits for part in parts])
    return Scores(keys, labels, logits)


def score_clips(
    model: "VideoClassifier",
    loader: Batches,
    device: "torch.device",
    precision: "Precision" = "fp32",
    on_progress: OnProgress | None = None,
    prepare: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
) -> Scores:
    """Run a network over one epoch of a loader, and average the scores of each video's views.

    Args:
        model: on `device`; not changed: a copy for inference is asked.
        loader: with train=False.
        device: where to compute.
        precision: the type in which convolutions are computed.
        on_progress: told after each batch.
        prepare: what makes the network's input of bytes; None for the network's own.

    Raises:
        PipelineError: if a clip comes twice, or none comes.
    """
    import torch

    from pipelines.training.precision import autocast, for_inference

    prepare = prepare or model.prepare
    network = for_inference(model, precision)
    keys: list[str] = []
    labels, logits = [], []
    started = monotonic()
    with torch.inference_mode(), autocast(precision, device):
        for done, batch in enumerate(loader, start=1):
            # As many clips at a time as there are videos: memory of the device does not grow with the views.
            parts = torch.split(batch.clips, _CLIPS_ON_A_CPU if device.type == "cpu" else len(batch.labels))
            answers = [network(prepare(part.to(device, non_blocking=True))).float() for part in parts]
            logits.append(_average_views(torch.cat(answers), batch.num_views).cpu())
            labels.append(batch.labels)
            keys += batch.keys
            if on_progress:
                on_progress(done, len(loader), f"{len(keys) / max(monotonic() - started, 1e-9):.0f} clips/s")
    if not keys or len(set(keys)) != len(keys):
        raise PipelineError(
            f"found {len(keys)} clips of {len(set(keys))} videos; expected one clip of each video, at least one; "
            "evaluate with a loader of train=False and world_size=1"
        )
    return Scores(keys, torch.cat(labels).numpy(), torch.cat(logits).numpy())


def _average_views(logits: "torch.Tensor", num_views: int) -> "torch.Tensor":
    """Logits whose scores are the mean of those of a video's views: [B * V, K] -> [B, K]; of one view just its own."""
    import torch

    if num_views == 1:
        return logits
    log_scores = torch.log_softmax(logits, dim=1).view(-1, num_views, logits.shape[1])
    return torch.logsumexp(log_scores, dim=1) - math.log(num_views)
