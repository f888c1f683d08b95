"""Some clips through a trained network once more, for what it does not say in its scores: the vectors behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from infra import cluster
from infra.errors import DataError, PipelineError
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.insight.subject import Subject, take_rows
from pipelines.training.job import evaluation_loader, load_model
from pipelines.training.scoring import NUM_THREADS, plan_workers
from preprocessing.loader import Loader
from preprocessing.reader import open_shards

if TYPE_CHECKING:
    import torch

    from models.classifier import VideoClassifier
    from pipelines.training.precision import Precision


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


@dataclass(frozen=True)
class OpenNetwork:
    """A trained network where it computes, and the clips that it is shown.

    Attributes:
        model: in evaluation mode, on `device`, every weight from the file.
        loader: batches of the chosen clips, in the order of their rows.
        device: a GPU where this process has one.
        precision: the type in which convolutions are computed.
    """

    model: "VideoClassifier"
    loader: Loader
    device: "torch.device"
    precision: "Precision"


def open_network(model_dir: Path, shards_place: str, settings: EvaluateSettings, rows: Sequence[int]) -> OpenNetwork:
    """Load a network and open some clips of a split for it, in this process.

    Args:
        model_dir: as `save_model` wrote it.
        shards_place: of the clips.
        settings: `split`, `protocol`, and how many clips at a time.
        rows: of the split.

    Raises:
        DataError: as `load_model`, and if the network was trained for other labels.
    """
    import torch

    from pipelines.training.precision import resolve_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, train, facts = load_model(model_dir)
    split = open_shards(shards_place, settings.split)
    if split.label_passport != facts["label_passport"]:
        raise DataError(
            f"{model_dir} was trained for labels {facts['label_passport']}, {shards_place} has labels {split.label_passport}; "
            "explain it on shards with the same label list"
        )
    loader = evaluation_loader(take_rows(split, rows), train, settings)
    return OpenNetwork(model.to(device), loader, device, resolve_precision(train.precision, device))


def embed_clips(
    model_dir: Path, shards_place: str, settings: EvaluateSettings, rows: Sequence[int], num_threads: int | None = None
) -> ClipFeatures:
    """The vectors of some clips, in the order of their rows, computed in this process.

    Args:
        model_dir, shards_place, settings, rows: as `open_network` takes them; of one view a clip.
        num_threads: of torch; None leaves them alone.

    Raises:
        DataError: as `open_network`.
        PipelineError: if a vector is not finite; names the clip.
    """
    import torch

    from pipelines.training.precision import autocast

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    network = open_network(model_dir, shards_place, settings, rows)
    keys: list[str] = []
    vectors, labels = [], []
    with torch.inference_mode(), autocast(network.precision, network.device):
        for batch in network.loader:
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
