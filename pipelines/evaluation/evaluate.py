"""Scores of every video of a split, each video once: the network's consensus over segments, the mean over views.

Heavy imports are inside functions, since every command reads `EvaluateSettings`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from infra.errors import PipelineError
from infra.progress import OnProgress
from infra.settings import Settings
from infra.storage import atomic_path
from pipelines.evaluation.metrics import summarise

if TYPE_CHECKING:
    import torch

    from models.classifier import VideoClassifier
    from pipelines.training.precision import Precision
    from preprocessing.loader import Batch


class EvaluateSettings(Settings):
    """How a trained network is judged.

    Attributes:
        split: of the shard set; Something-Something's own test split has no labels, so "validation" is what papers report.
        batch_size: videos at a time; changes speed and memory, not results. Their views wait in memory together: 16 videos at
            30 views of 8 frames of 224 pixels are 578 MB.
        loader_threads: that read and decode frames.
        num_clips: of each video, spread over its time; scores are averaged over clips and crops.
        num_crops: of each clip: the centre; three of the full short side; corners and centre; these and their mirror images.
    """

    split: Literal["train", "validation", "test"] = "validation"
    batch_size: int = Field(default=16, ge=1)
    loader_threads: int = Field(default=2, ge=0)
    num_clips: Literal[1, 2, 10] = 1
    num_crops: Literal[1, 3, 5, 10] = 1


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

    def save(self, path: Path) -> None:
        """Write a parquet file with a row a clip: key, label (null if unlabelled), scores (list of K floats that sum to 1)."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        from scipy.special import softmax

        num_clips, num_classes = self.logits.shape
        offsets = pa.array(np.arange(num_clips + 1) * num_classes, pa.int32())
        table = pa.table(
            {
                "key": pa.array(self.keys, pa.string()),
                "label": pa.array(self.labels, pa.int32(), mask=self.labels < 0),
                "scores": pa.ListArray.from_arrays(offsets, pa.array(softmax(self.logits, axis=1).ravel())),
            }
        )
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)


def score_clips(
    model: "VideoClassifier",
    loader: Batches,
    device: "torch.device",
    precision: "Precision" = "fp32",
    on_progress: OnProgress | None = None,
) -> Scores:
    """Run a network over one epoch of a loader, and average the scores of each video's views.

    Args:
        model: on `device`; it is put in evaluation mode for the time being.
        loader: with train=False.
        device: where to compute.
        precision: the type in which convolutions are computed.
        on_progress: told after each batch.

    Raises:
        PipelineError: if a clip comes twice, or none comes.
    """
    import torch

    from pipelines.training.precision import autocast

    keys: list[str] = []
    labels, logits = [], []
    started = monotonic()
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(precision, device):
            for done, batch in enumerate(loader, start=1):
                # As many clips at a time as there are videos: memory of the device does not grow with the views.
                views = batch.clips.chunk(batch.num_views)
                answers = [model(model.prepare(part.to(device, non_blocking=True))).float() for part in views]
                logits.append(_average_views(torch.cat(answers), batch.num_views).cpu())
                labels.append(batch.labels)
                keys += batch.keys
                if on_progress:
                    on_progress(done, len(loader), f"{len(keys) / max(monotonic() - started, 1e-9):.0f} clips/s")
    finally:
        model.train(was_training)
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
