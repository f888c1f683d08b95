"""In which number type convolutions are computed."""

from typing import Literal

import torch
from torch import nn

from models.inference import fold_batch_norms

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """Decide what `auto` means: bf16 where the hardware multiplies in it.

    A training step of GoogLeNet (channels_last, 32 frames of 96 px) on two cores of an AMD EPYC with avx512_bf16 and no AMX
    took 0.19 s in bf16 and 0.36 s in fp32 (November 2026); with neither of them bf16 is emulated and slower.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return "bf16"
    return "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which a network computes in that type; nothing changes in it for `fp32`."""
    enabled = precision != "fp32"
    return torch.autocast(device.type, dtype=_DTYPES[precision] if enabled else None, enabled=enabled)


def make_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss in fp16, so that small gradients do not vanish; does nothing in the other types."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def for_inference(model: nn.Module, precision: Precision) -> nn.Module:
    """A copy that is only asked: batch norms folded, kernels in bfloat16 where it is asked under that autocast.

    All who judge or use a trained network ask this form, so that they say the same. Training validates the network as it is:
    in bfloat16 the two round differently, and a clip whose first two classes nearly tie may fall to either.

    Raises:
        ValueError: as `fold_batch_norms`.
    """
    return fold_batch_norms(model, kernel_dtype=torch.bfloat16 if precision == "bf16" else None)
