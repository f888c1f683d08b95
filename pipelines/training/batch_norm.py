"""What training does with batch norms: which it freezes, and how their statistics are measured anew.

Partial: Wang et al.: Temporal Segment Networks, ECCV 2016, section 3.2, as TSN's and GSM's published `models.py` do it, where
the norms in gates are 3-D ones that the freezing does not see. Precise: Wu, Johnson: Rethinking "Batch" in BatchNorm, 2021,
https://arxiv.org/abs/2105.07576, section 3.
"""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from infra.errors import ConfigError
from models.temporal.gate_shift import GateShift
from pipelines.training.precision import Precision, autocast

BatchNormKind = Literal["train", "sync", "partial", "frozen"]


def prepare_norms(model: nn.Module, kind: BatchNormKind, device: torch.device) -> None:
    """Freeze scale and shift of the norms that `kind` freezes, or let all norms work over all ranks; before the optimiser.

    Raises:
        ConfigError: for `sync` on anything but a GPU.
    """
    if kind == "sync":
        if device.type != "cuda":
            raise ConfigError(
                f"train.batch_norm=sync works on GPUs only, and this worker computes on {device.type}; use batch_norm=train "
                "or partial, or precise_bn_batches"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for norm in frozen_norms(model, kind):
        norm.requires_grad_(False)


def frozen_norms(model: nn.Module, kind: BatchNormKind) -> list[nn.Module]:
    """Norms that keep statistics, scale and shift: all (frozen), all but the first and those of gates (partial), or none."""
    norms: list[nn.Module] = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if kind == "frozen":
        return norms
    if kind == "partial":
        gates = {norm for gate in model.modules() if isinstance(gate, GateShift) for norm in gate.modules()}
        return [norm for norm in norms if norm not in gates][1:]
    return []


def set_training_mode(model: nn.Module, kind: BatchNormKind) -> None:
    """`model.train()`, but frozen norms go on with the statistics that they have."""
    model.train()
    for norm in frozen_norms(model, kind):
        norm.eval()


def measure_statistics(model: nn.Module, inputs: Iterable[Tensor], precision: Precision, device: torch.device) -> None:
    """Replace the moving averages of all norms by the means over `inputs`, every batch counting the same; collective.

    Ranks measure their own batches, and the means over ranks are what all of them keep.

    Args:
        model: not wrapped for distributed training.
        inputs: prepared clips, [B, T, 3, H, W], on `device`.
        precision: as in training.
        device: where the network is.
    """
    with autocast(precision, device):
        update_bn(inputs, model)
    if dist.is_initialized():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                for statistic in (module.running_mean, module.running_var):
                    assert statistic is not None
                    dist.all_reduce(statistic)
                    statistic /= dist.get_world_size()
