"""What stays the same while a network is trained, put together before the first step."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from infra.errors import ConfigError
from infra.storage import sha256_json
from models import attention_slots
from pipelines.training.batch_norm import prepare_norms
from pipelines.training.checkpoint import State
from pipelines.training.optim import build_optimizer
from pipelines.training.precision import Precision, make_scaler, resolve_precision
from pipelines.training.settings import TrainSettings
from pipelines.training.watch import freeze_gammas, gates_of

if TYPE_CHECKING:
    from preprocessing.loader import Batch

OPERATIONAL = frozenset(
    {
        *("num_workers", "min_workers", "wait_seconds", "local", "checkpoints"),
        *("loader_threads", "checkpoint_every_steps", "max_failures", "shard_cache", "shard_cache_bytes"),
    }
)
"""What does not change the numbers, or does so by rounding only: a run may go on with other values of these."""

_log = logging.getLogger(__name__)


class ClipLoader(Protocol):
    """What the loop needs of a loader; `preprocessing.make_loader` makes one.

    A batch is this rank's part of one optimiser step. The loop cuts it into micro batches.
    """

    def __len__(self) -> int:
        """Steps an epoch, equal on every rank."""

    def __iter__(self) -> Iterator["Batch"]:
        """The batches of one epoch."""

    def seek(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration start at this step of this epoch."""

    def divide(self, num_steps: int) -> None:
        """Divide epochs into so many steps, whatever the number of ranks: a training that another number of ranks began."""

    def epoch_keys(self, epoch: int) -> list[str]:
        """The keys of all clips that the ranks together show in this epoch."""


@dataclass(frozen=True)
class Run:
    """What stays the same while a network is trained.

    Attributes:
        state: all that a step changes.
        network: `state.model`, wrapped if there are several ranks.
        settings: how to train.
        device: where to compute.
        precision: never `auto`.
        rank: of this process.
        world_size: number of processes.
        train_loader: this rank's training clips.
        folder: of checkpoints; matters on rank 0 only.
        identity: what a checkpoint must agree on.
        mix: mixup or cutmix of prepared clips and labels; None for neither.
        start: gammas and gates as they were before any training, by name.
    """

    state: State
    network: nn.Module
    settings: TrainSettings
    device: torch.device
    precision: Precision
    rank: int
    world_size: int
    train_loader: ClipLoader
    folder: Path | None
    identity: dict[str, Any]
    mix: nn.Module | None
    start: dict[str, Tensor]

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps an epoch."""
        return len(self.train_loader)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated: the average of the weights if there is one."""
        return self.state.model if self.state.average is None else self.state.average.module


def set_up(
    model: nn.Module,
    train_loader: ClipLoader,
    settings: TrainSettings,
    device: torch.device,
    folder: Path | None,
    identity: Mapping[str, Any],
) -> Run:
    """Move the network to its device, freeze what is to be frozen, and make optimiser, average and scaler.

    Raises:
        ConfigError: if a setting is not possible on this device, with this network or with several workers.
        PipelineError: if a trainable tensor is in no optimiser group or in several.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if settings.compat.clip_each_micro_batch and world_size > 1:
        raise ConfigError(
            f"train.compat.clip_each_micro_batch with {world_size} workers: no worker has the whole gradient before its last "
            "micro batch, and the published code has one process; set train.num_workers=1"
        )
    if settings.random_placement and not attention_slots(model):  # type: ignore[arg-type]  # VideoClassifier
        raise ConfigError(
            "train.random_placement needs a network with attention, and this one has none; set model.name to an SA-GSM network "
            "and model.placement=all"
        )
    model.to(device)
    prepare_norms(model, settings.batch_norm, device)
    if settings.compat.freeze_gamma:
        freeze_gammas(model)
    precision = resolve_precision(settings.precision, device)
    tensors = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in model.state_dict().items()}
    train = settings.model_dump(mode="json", exclude=set(OPERATIONAL)) | {"precision": precision}
    average = None
    if settings.ema_decay is not None:
        mean = get_ema_multi_avg_fn(settings.ema_decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        average = AveragedModel(model, multi_avg_fn=mean)
    return Run(
        state=State(
            model=model,
            optimizer=build_optimizer(model, settings),
            average=average,
            scaler=make_scaler(precision, device),
        ),
        network=_make_network(model, settings, world_size),
        settings=settings,
        device=device,
        precision=precision,
        rank=rank,
        world_size=world_size,
        train_loader=train_loader,
        folder=folder,
        identity={**identity, "train": train, "tensors": sha256_json(tensors)},
        mix=_make_mix(model, settings),
        start={name: gate.detach().clone() for name, gate in gates_of(model).items()},
    )


def _make_network(model: nn.Module, settings: TrainSettings, world_size: int) -> nn.Module:
    """What training steps call: `model` itself, compiled and wrapped as asked for; its tensors stay those of `model`."""
    network: nn.Module = torch.compile(model) if settings.compile else model  # type: ignore[assignment]  # a Module if given one
    if world_size == 1:
        return network
    # The attention that a step leaves out has no gradient on any rank; so it stays None, as on one rank.
    return DistributedDataParallel(network, find_unused_parameters=settings.random_placement)


def _make_mix(model: nn.Module, settings: TrainSettings) -> nn.Module | None:
    """Torchvision's mixup and cutmix; their draws come from torch's generator, which each step seeds."""
    kinds = [(v2.MixUp, settings.mixup_alpha), (v2.CutMix, settings.cutmix_alpha)]
    mixes = [kind(alpha=alpha, num_classes=model.num_classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(mixes) if mixes else None
