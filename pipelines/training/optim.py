"""The optimiser's groups and the schedule of the learning rate.

SGD with momentum as in GSM's published `main.py` and `ops/models.py` (`get_optim_policies`): weights have rate 1 and decay,
biases rate 2 and no decay, batch norms rate 1 and no decay. The published training sets these multipliers and never applies
them (PAPER_NOTES.md, D13), and leaves gamma out of every group, so that attention stays off (D1). Here they are applied, gamma
has a group of its own, and a tensor that is in no group or in two stops the training before it starts.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from infra.errors import PipelineError
from models import parameter_roles
from pipelines.training.settings import TrainSettings

_WARMUP_START = 0.1  # share of the peak at which the published warm-up begins


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.SGD:
    """SGD over all trainable tensors of `model`, a group for each role that the model has.

    A group carries its `role`, and the `multiplier` by which `set_learning_rate` multiplies the rate.

    Raises:
        PipelineError: if a trainable tensor is in no group or in several.
    """
    roles = {role: names for role, names in parameter_roles(model).items() if names}
    check_groups(model, roles)
    ignored = settings.compat.ignore_multipliers
    multipliers = {} if ignored else {"bias": settings.bias_multiplier, "gamma": settings.gamma_multiplier}
    parameters = dict(model.named_parameters())
    groups = [
        {
            "params": [(name, parameters[name]) for name in names],
            "role": role,
            "multiplier": multipliers.get(role, 1.0),
            "weight_decay": settings.weight_decay if ignored or role in ("weight", "gate") else 0.0,
        }
        for role, names in roles.items()
    ]
    optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    set_learning_rate(optimizer, settings.learning_rate)
    return optimizer


def check_groups(model: nn.Module, groups: Mapping[str, Sequence[str]]) -> None:
    """Check that each trainable tensor of `model` is named in exactly one group.

    Args:
        model: the network.
        groups: names of tensors by group.

    Raises:
        PipelineError: naming the tensors that are in no group, in several, or in a group without being trainable.
    """
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    counts = Counter(name for names in groups.values() for name in names)
    wrong = {
        "in no group": sorted(trainable - counts.keys()),
        "in several groups": sorted(name for name, count in counts.items() if count > 1),
        "in a group but not trainable": sorted(counts.keys() - trainable),
    }
    problems = [f"{', '.join(names)} ({problem})" for problem, names in wrong.items() if names]
    if problems:
        raise PipelineError(
            f"each trainable tensor must be in exactly one optimiser group, but these are not: {'; '.join(problems)}; "
            "give each of them one role in models.parameter_roles"
        )


def learning_rate_at(step: int, steps_per_epoch: int, settings: TrainSettings) -> float:
    """The learning rate of the optimiser step with this number, before multipliers.

    Linear from a tenth of the peak to the peak over `warmup_epochs`, then half a cosine down to 0 at the end of training, or,
    with restarts, at the end of each period.

    Args:
        step: from 0 to `epochs * steps_per_epoch`.
        steps_per_epoch: optimiser steps an epoch, at least 1.
        settings: gives `learning_rate`, `warmup_epochs`, `epochs`, the schedule and whether it goes by epoch.
    """
    epochs = step // steps_per_epoch if settings.compat.lr_by_epoch else step / steps_per_epoch
    if epochs < settings.warmup_epochs:
        return settings.learning_rate * (_WARMUP_START + (1 - _WARMUP_START) * epochs / settings.warmup_epochs)
    done, period = epochs - settings.warmup_epochs, settings.epochs - settings.warmup_epochs
    if settings.schedule == "sgdr":
        period = settings.sgdr_period_epochs
        while done >= period:
            done, period = done - period, period * settings.sgdr_growth
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (done / period)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give each group `learning_rate` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["multiplier"]
