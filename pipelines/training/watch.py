"""Gates and gammas under observation: their strength by slot, and an alarm for those that training does not move.

In the published SA-GSM gamma is in no optimiser group, so that attention never did anything, and no curve told (PAPER_NOTES.md,
D1). Here each epoch measures every gamma and gate, and names those that are dead.
"""

import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.temporal.attention import SelfAttention
from models.temporal.gate_shift import GateShift

_GATE_KERNEL = "conv3D.weight"
_SLOT = re.compile(r"gsm_inception_(\d[a-z])_|gsm_(mixed(?:_\d+)?)_|(layer\d\.\d+)\.gsm")  # BN-Inception, Inception v3, ResNet
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024

B = TypeVar("B")


def freeze_gammas(model: nn.Module) -> None:
    """Freeze all gammas, and with a gamma of 0 the other weights of its attention, which get no gradient then."""
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] == "gamma":
            parameter.requires_grad_(False)
    for attention in (module for module in model.modules() if isinstance(module, SelfAttention)):
        if attention.gamma.item() == 0:
            for name, child in attention.named_children():
                if name != "temporal":  # an attention of its own, with its own gamma
                    child.requires_grad_(False)


def gates_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The gammas of attention and the kernels of gates, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-1] == "gamma" or name.endswith(_GATE_KERNEL)
    }


def attention_gammas(model: nn.Module) -> dict[str, float]:
    """The gammas of all attention modules, by slot ("3a") or, in networks without slots, by parameter name."""
    return {slot_of(name): gate.item() for name, gate in gates_of(model).items() if name.split(".")[-1] == "gamma"}


def gate_norms(model: nn.Module) -> dict[str, float]:
    """The norm of each gate's kernel as `<slot>_weight_norm`; 0 is a gate that is closed everywhere but for its bias."""
    gates = {name: gate for name, gate in gates_of(model).items() if name.endswith(_GATE_KERNEL)}
    return {f"{slot_of(name.removesuffix('.' + _GATE_KERNEL))}_weight_norm": gate.norm().item() for name, gate in gates.items()}


@contextmanager
def mean_gates(model: nn.Module, found: dict[str, float]) -> Iterator[None]:
    """Within it, the first forward pass of `model` puts the mean of |gate| into `found`, as `<slot>_mean_abs`."""

    def look(module: GateShift, inputs: tuple[Tensor, ...], name: str) -> None:
        if name not in found:
            found[name] = module.gate(inputs[0]).abs().mean().item()

    handles = [
        module.register_forward_pre_hook(partial(look, name=f"{slot_of(name)}_mean_abs"))
        for name, module in model.named_modules()
        if isinstance(module, GateShift)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dead_gates(
    model: nn.Module, optimizer: torch.optim.Optimizer, start: Mapping[str, Tensor], *, gamma_is_frozen: bool
) -> list[str]:
    """Name the gammas and gates that are not trained, each with the reason.

    Args:
        model: after a step, with the gradients of that step.
        optimizer: its optimiser.
        start: the gates before training, by name.
        gamma_is_frozen: on purpose, so that a gamma is no cause for alarm.
    """
    bypassed = [module for module in model.modules() if isinstance(module, SelfAttention) and module.bypassed]
    left_out = {id(parameter) for module in bypassed for parameter in module.parameters()}
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    dead = []
    for name, gate in gates_of(model).items():
        if gamma_is_frozen and name.split(".")[-1] == "gamma":
            continue
        if id(gate) not in grouped:
            dead.append(f"{name} is in no optimiser group")
        elif id(gate) in left_out:
            continue  # what this step left out may have had no turn yet
        elif not optimizer.state.get(gate):
            dead.append(f"{name} has no optimiser state")
        elif gate.grad is None or not gate.grad.any():
            dead.append(f"{name} has no gradient")
        elif torch.equal(gate, start[name]):
            dead.append(f"{name} has not moved since training began")
    return dead


def slot_of(name: str) -> str:
    """The slot ("3a", "layer1.0", "mixed_3") in the name of a module or parameter; the name itself if there is none.

    The first of two attentions in one slot (scope "divided") is told apart, as in "3a_temporal".
    """
    match = _SLOT.search(name)
    if match is None:
        return name
    return f"{match.group(match.lastindex or 0)}{'_temporal' if '.attn.temporal.' in name else ''}"


def peak_memory_bytes() -> int:
    """The most main memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


class Stopwatch:
    """The time of an epoch's training, and the part of it that was spent waiting for batches.

    Args:
        seconds: of the epoch before it was resumed.
        waited: of these, spent waiting.
    """

    def __init__(self, seconds: float, waited: float) -> None:
        self._started = time.perf_counter() - seconds
        self.waited = waited

    @property
    def seconds(self) -> float:
        """Since the epoch began, without the time between an interruption and the resumption."""
        return time.perf_counter() - self._started

    def waiting_for(self, batches: Iterable[B]) -> Iterator[B]:
        """The same batches; the time that each takes to come counts as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - asked
            yield batch
