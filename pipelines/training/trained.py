"""A trained network where it computes, and the split that it is shown."""

from dataclasses import dataclass
from pathlib import Path

import torch

from infra.errors import DataError
from models.classifier import VideoClassifier
from pipelines.training.job import load_model
from pipelines.training.precision import Precision, resolve_precision
from pipelines.training.settings import TrainSettings
from preprocessing.reader import ShardSplit, open_shards


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network where it computes, and the split that it is shown.

    Attributes:
        model: in evaluation mode, on `device`, every weight from the file.
        train: the settings of its training.
        shards: the split, of the labels that the network was trained for.
        device: a GPU where this process has one.
        precision: the type in which convolutions are computed.
    """

    model: VideoClassifier
    train: TrainSettings
    shards: ShardSplit
    device: torch.device
    precision: Precision


def open_network(model_dir: Path, shards_place: str, split: str, purpose: str = "evaluate") -> TrainedNetwork:
    """Load a network and open a split for it, in this process.

    Args:
        model_dir: as `save_model` wrote it.
        shards_place: a shard set, a folder or an `s3://` or `gs://` URL.
        split: of it.
        purpose: a verb for the error.

    Raises:
        DataError: as `load_model` and `open_shards`, and if the network was trained for other labels.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, train, facts = load_model(model_dir)
    shards = open_shards(shards_place, split)
    if shards.label_passport != facts["label_passport"]:
        raise DataError(
            f"{model_dir} was trained for labels {facts['label_passport']}, {shards_place} has labels {shards.label_passport}; "
            f"{purpose} on shards with the same label list"
        )
    return TrainedNetwork(model.to(device), train, shards, device, resolve_precision(train.precision, device))
