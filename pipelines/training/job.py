"""A training job as data, the same for Ray Train's workers and for a trial; and the trained network as files.

model/model.safetensors   the weights of the best epoch
      model.json          all that is needed to use them: settings, label names and their passport, how videos were decoded
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import DataError, PipelineError
from infra.settings import Settings, apply_overrides
from infra.storage import atomic_path, sha256_file, sha256_json, write_json
from pipelines.training.metrics import EpochMetrics, StepStatus
from pipelines.training.settings import ModelSettings, TrainSettings, build_model
from preprocessing.augment import NO_AUGMENTATION, Augmentation
from preprocessing.decode import DecodeSettings
from preprocessing.index import read_dataset_info
from preprocessing.loader import Batch, Loader, make_loader
from preprocessing.reader import ShardSplit, open_shards
from preprocessing.shard_cache import ShardCache

if TYPE_CHECKING:
    import torch

    from models.classifier import VideoClassifier
    from pipelines.evaluation.evaluate import EvaluateSettings, Scores
    from pipelines.training.loop import TrainResult

MODEL_FORMAT_VERSION = 1


class _Sections(Settings):
    model: ModelSettings
    train: TrainSettings


@dataclass(frozen=True)
class TrainJob:
    """What to train on what.

    Attributes:
        name: shown by Ray; letters, digits, `-` and `_`.
        shards_place: a shard set: a folder that all workers see, or an `s3://` or `gs://` URL.
        model: the network.
        train: how to train it.
        train_split: the split to train on.
        val_split: the split to validate on.
    """

    name: str
    shards_place: str
    model: ModelSettings
    train: TrainSettings
    train_split: str = "train"
    val_split: str = "validation"

    def with_overrides(self, overrides: Mapping[str, Any]) -> "TrainJob":
        """The job with dotted settings changed, as a trial of the search names them (`train.learning_rate`)."""
        sections = apply_overrides(_Sections(model=self.model, train=self.train), overrides)
        return replace(self, model=sections.model, train=sections.train)


def train_job(
    job: TrainJob,
    *,
    checkpoint_dir: Path | None,
    device: "torch.device",
    rank: int = 0,
    world_size: int = 1,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    on_step: Callable[[StepStatus], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> "TrainResult":
    """Open the shards, build the network and the loaders of this rank, and train; see `loop.train` for arguments and errors."""
    import torch

    from pipelines.training.loop import train

    train_split, val_split = (open_shards(job.shards_place, split) for split in (job.train_split, job.val_split))
    names = train_split.label_names
    torch.manual_seed(job.train.seed)
    return train(
        build_model(job.model, num_classes=len(names), num_segments=job.train.num_segments, label_names=names),
        job_loader(job, train_split, is_train=True, rank=rank, world_size=world_size),
        job_loader(job, val_split, is_train=False, rank=rank, world_size=world_size),
        job.train,
        checkpoint_dir=checkpoint_dir,
        device=device,
        on_epoch=on_epoch,
        on_step=on_step,
        should_stop=should_stop,
        identity={
            "model": job.model.model_dump(mode="json"),
            "label_passport": train_split.label_passport,
            "clips": [sha256_json(shards.keys) for shards in (train_split, val_split)],
        },
    )


def save_model(folder: Path, job: TrainJob, weights: Path) -> None:
    """Write the trained network into `folder`: a copy of `weights` (safetensors) and model.json."""
    shards = open_shards(job.shards_place, job.train_split)
    folder.mkdir(exist_ok=True)
    with atomic_path(folder / "model.safetensors") as temporary:
        shutil.copyfile(weights, temporary)
    write_json(
        folder / "model.json",
        {
            "format_version": MODEL_FORMAT_VERSION,
            "sha256": sha256_file(folder / "model.safetensors"),
            "model": job.model.model_dump(mode="json", exclude={"weights", "weights_labels"}),
            "train": job.train.model_dump(mode="json"),
            "label_names": shards.label_names,
            "label_passport": shards.label_passport,
            "decoding": _decoding(job.shards_place),
        },
    )


def _decoding(shards_place: str) -> dict[str, Any] | None:
    """The settings under which the shards' frames were decoded; None of tars made elsewhere, where nobody knows them."""
    settings = read_dataset_info(shards_place).settings
    if settings.get("foreign"):
        return None
    return {name: settings[name] for name in DecodeSettings.model_fields if name in settings}


def load_model(folder: Path) -> "tuple[VideoClassifier, TrainSettings, dict[str, Any]]":
    """Read what `save_model` wrote: the network in evaluation mode, the settings it was trained with, and model.json.

    Nothing else is read, so that the folder can be taken elsewhere: the weights that training began with are not needed.

    Raises:
        DataError: if the files are not there, are of another version, or the weights are not those that were written.
    """
    path = folder / "model.json"
    try:
        facts = json.loads(path.read_bytes())
        found = sha256_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} holds no model: {error}; expected model.json and model.safetensors, as `train` writes"
        ) from error
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if version != MODEL_FORMAT_VERSION:
        raise DataError(f"{path} has format version {version!r}, this program reads {MODEL_FORMAT_VERSION}; train again")
    if found != facts["sha256"]:
        raise DataError(f"{folder / 'model.safetensors'} has SHA-256 {found}, model.json says {facts['sha256']}; train again")
    settings = TrainSettings.model_validate(facts["train"])
    network = ModelSettings.model_validate(facts["model"] | {"backbone_weights": None, "backbone_sha256": None})
    model = build_model(network, num_classes=len(facts["label_names"]), num_segments=settings.num_segments)
    _load_weights(model, folder / "model.safetensors")
    return model.eval(), settings, facts


def _load_weights(model: "VideoClassifier", path: Path) -> None:
    """Every weight from the file, and every weight of the file: a part left as it was drawn would pass for a trained one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except SafetensorError as error:
        raise DataError(
            f"{path} cannot be read as weights: {error}; expected safetensors, as `train` writes; train again"
        ) from error
    expected = model.state_dict()
    wrong = [f"without {name}" for name in expected if name not in found]
    wrong += [f"with {name}, which the network has not" for name in found if name not in expected]
    wrong += [
        f"with {name} of shape {list(found[name].shape)} in place of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        raise DataError(
            f"{path} is {wrong[0]} ({len(wrong)} of {len(expected)} weights are wrong); expected each weight of the network "
            "that model.json describes; train again"
        )
    model.load_state_dict(found)


def score_model(model_dir: Path, shards_place: str, settings: "EvaluateSettings", scores_path: Path) -> dict[str, Any]:
    """Score each clip of a split once, in this process; writes `scores_path` (parquet) and returns `Scores.summarise`.

    Raises:
        ConfigError, DataError: as `score_part`.
        PipelineError: as `keep_scores`.
    """
    return keep_scores(score_part(model_dir, shards_place, settings), shards_place, settings, scores_path)


def keep_scores(scores: "Scores", shards_place: str, settings: "EvaluateSettings", scores_path: Path) -> dict[str, Any]:
    """Write the scores of a split (parquet, with what they are of) and return `Scores.summarise`.

    Raises:
        PipelineError: if they are not of every clip once.
    """
    from pipelines.evaluation.scores import Origin

    shards = open_shards(shards_place, settings.split)
    if sorted(scores.keys) != sorted(shards.keys):
        raise PipelineError(
            f"found scores of {len(scores.keys)} clips of {len(set(scores.keys))} videos; expected each of the {len(shards)} "
            f"in split {settings.split} of {shards_place} once; run again"
        )
    scores.save(scores_path, Origin(tuple(shards.label_names), settings.split, settings.protocol))
    return scores.summarise(shards.label_names)


def score_part(
    model_dir: Path,
    shards_place: str,
    settings: "EvaluateSettings",
    part: int = 0,
    num_parts: int = 1,
    num_threads: int | None = None,
) -> "Scores":
    """Score one part of a split: some of the batches in which one process would see it, so that their numbers are the same.

    Args:
        model_dir: as `save_model` wrote it.
        shards_place: of the clips.
        settings: which split, how, and in what batches.
        part: from 0.
        num_parts: at most as many as there are batches.
        num_threads: of torch; None leaves them alone.

    Raises:
        ConfigError: if the protocol does not fit the labels.
        DataError: if the network was trained for other labels than those of the shards.
    """
    import torch

    from pipelines.evaluation.evaluate import score_clips
    from pipelines.evaluation.protocols import find_protocol
    from pipelines.training.trained import open_network
    from pipelines.training.validation import unnormalised

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    network = open_network(model_dir, shards_place, settings.split)
    model, loader = network.model, evaluation_loader(network.shards, network.train, settings)
    first, stop = (len(loader) * end // num_parts for end in (part, part + 1))
    as_published = find_protocol(settings.protocol).seed_code
    return score_clips(
        model,
        _Steps(loader, first, stop),
        network.device,
        network.precision,
        prepare=(lambda clips: unnormalised(model, model.prepare(clips))) if as_published else None,
    )


@dataclass(frozen=True)
class _Steps:
    """The batches `first` to before `stop` of a loader's first epoch."""

    loader: Loader
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first

    def __iter__(self) -> Iterator[Batch]:
        self.loader.seek(0, self.first)
        return islice(self.loader, len(self))


def evaluation_loader(shards: ShardSplit, train: TrainSettings, settings: "EvaluateSettings") -> Loader:
    """The views of a split's clips that a protocol shows to a network trained with these settings.

    Those of the published code are of training, and keep the label of a mirrored clip (D7).

    Raises:
        ConfigError: if the protocol does not fit the labels.
    """
    from pipelines.evaluation.protocols import find_protocol

    protocol = find_protocol(settings.protocol)
    protocol.require_fits(shards.label_names)
    return make_loader(
        shards,
        num_segments=train.num_segments,
        batch_size=settings.videos_at_a_time,
        train=protocol.seed_code,
        seed=train.seed,
        num_workers=settings.loader_threads,
        pixels=train.pixels,
        flip="naive" if protocol.seed_code else "swap",
        sampling=train.sampling,
        stride=train.stride,
        num_clips=protocol.num_clips,
        num_crops=protocol.num_crops,
        whole_frames=protocol.whole_frames,
        cache=_shard_cache(train),
    )


def job_loader(job: TrainJob, shards: ShardSplit, *, is_train: bool, rank: int, world_size: int) -> Loader:
    """The clips of one rank: a batch is its part of an optimiser step, or some of its validation clips."""
    settings = job.train
    return make_loader(
        shards,
        num_segments=settings.num_segments,
        batch_size=settings.batch_size * (settings.accumulation if is_train else 1),
        train=is_train or settings.compat.val_protocol == "seed_code",
        seed=settings.seed,
        num_workers=settings.loader_threads,
        pixels=settings.pixels,
        flip=settings.flip,
        rank=rank,
        world_size=world_size,
        subset=settings.subset if is_train else None,
        sampling=settings.sampling,
        stride=settings.stride,
        augmentation=_augmentation(settings) if is_train else NO_AUGMENTATION,
        shuffle_shards=settings.shuffle_shards,
        cache=_shard_cache(settings),
    )


def _augmentation(settings: TrainSettings) -> Augmentation:
    return Augmentation(settings.randaugment_ops, settings.randaugment_magnitude, settings.erase_probability)


def _shard_cache(settings: TrainSettings) -> ShardCache | None:
    return None if settings.shard_cache is None else ShardCache(settings.shard_cache.absolute(), settings.shard_cache_bytes)
