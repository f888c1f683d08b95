"""Some clips through a trained network once more, for what it does not say in its scores: the vectors behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from infra import cluster
from infra.errors import PipelineError
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.insight.subject import Subject, take_rows
from pipelines.training.job import evaluation_loader
from pipelines.training.scoring import NUM_THREADS, plan_workers


@dataclass(frozen=True)
class ClipFeatures:
    """What a network's classifier is given of each clip.

    Attributes:
        keys: of the videos.
        labels: class ids. Shape: [N].
        vectors: float32, finite; see `VideoClassifier.embed`. Shape: [N, D].
    """

    keys: list[str]
    labels: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]


def embed_clips(
    model_dir: Path, shards_place: str, settings: EvaluateSettings, rows: Sequence[int], num_threads: int | None = None
) -> ClipFeatures:
    """The vectors of some clips, in the order of their rows, computed in this process.

    Args:
        model_dir: as `save_model` wrote it.
        shards_place: of the clips.
        settings: `split`, `protocol` (of one view a clip), and how many clips at a time.
        rows: of the split.
        num_threads: of torch; None leaves them alone.

    Raises:
        DataError: as `open_network`.
        PipelineError: if a vector is not finite; names the clip.
    """
    import torch

    from pipelines.training.precision import autocast
    from pipelines.training.trained import open_network

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    network = open_network(model_dir, shards_place, settings.split, purpose="explain it")
    loader = evaluation_loader(take_rows(network.shards, rows), network.train, settings)
    keys: list[str] = []
    vectors, labels = [], []
    with torch.inference_mode(), autocast(network.precision, network.device):
        for batch in loader:
            clips = network.model.prepare(batch.clips.to(network.device, non_blocking=True))
            vectors.append(network.model.embed(clips).float().cpu())
            labels.append(batch.labels)
            keys += batch.keys
    found = ClipFeatures(keys, torch.cat(labels).numpy(), torch.cat(vectors).numpy())
    _require_finite(found)
    return found


def embed_on_cluster(subject: Subject) -> ClipFeatures:
    """As `embed_clips`, the clips that are looked at, by a worker of the cluster to which this process is connected.

    Raises:
        ClusterError: as `cluster.call`; and what `embed_clips` raises.
    """
    worker = plan_workers(cluster.node_resources(), num_batches=1)
    what = {"model_dir": subject.model_dir, "shards_place": subject.shards_place, "settings": subject.one_view}
    arguments = what | {"rows": subject.rows, "num_threads": NUM_THREADS}
    return cluster.call(embed_clips, num_cpus=worker.num_cpus, num_gpus=worker.num_gpus, arguments=arguments)


def _require_finite(found: ClipFeatures) -> None:
    bad = np.flatnonzero(~np.isfinite(found.vectors).all(axis=1))
    if len(bad):
        raise PipelineError(
            f"the features of {len(bad)} of {len(found.keys)} clips, the first is {found.keys[int(bad[0])]}, are not finite; "
            "expected numbers; the training has diverged: train again with a smaller train.learning_rate"
        )
