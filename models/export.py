"""Networks as files for other programs: torch.export and ONNX.

Both hold the network in eval mode with its weights, for any number of clips but for one number of segments and one frame size.
What goes in is what `forward` takes, float clips made by `prepare`; the bytes of frames are not part of the file.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram


def export_program(model: nn.Module, path: str | Path, *, pixels: int | tuple[int, int] = 224) -> ExportedProgram:
    """Write a network as a program of PyTorch (`torch.export`), which runs without the code of this package.

    Read it with `torch.export.load(path).module()`. Batch norms may be folded before (`fold_batch_norms`).

    Args:
        model: a network of `create_model`; not changed.
        path: the file to write, by custom with the ending .pt2; what stands there is replaced.
        pixels: side of the frames, or (height, width).

    Returns:
        The program: float [B, T, 3, H, W] to logits [B, K], for every B of at least 1.

    Raises:
        ValueError: if the network does not say `num_segments`, or a side is under 32.
    """
    network, clips = _prepare(model, pixels)
    program = torch.export.export(network, (clips,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)
    torch.export.save(program, path)
    return program


def export_onnx(model: nn.Module, path: str | Path, *, pixels: int | tuple[int, int] = 224) -> None:
    """Write a network as ONNX, weights included: input "clips", float32 [batch, T, 3, H, W], output "logits" [batch, K].

    Needs the packages onnx and onnxscript (the extra `dev`), which only this function uses.

    Args:
        model: a network of `create_model` with float32 weights; not changed.
        path: the file to write, by custom with the ending .onnx; what stands there is replaced.
        pixels: side of the frames, or (height, width).

    Raises:
        ValueError: if the network does not say `num_segments`, or a side is under 32.
        ImportError: if onnx or onnxscript is not installed.
    """
    network, clips = _prepare(model, pixels)
    torch.onnx.export(
        network,
        (clips,),
        path,
        dynamo=True,
        dynamic_shapes=({0: Dim("batch", min=1)},),
        input_names=["clips"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def _prepare(model: nn.Module, pixels: int | tuple[int, int]) -> tuple[nn.Module, Tensor]:
    """A copy in eval mode without gradients, and clips to trace it with: two, since a batch of one would be taken as fixed."""
    height, width = (pixels, pixels) if isinstance(pixels, int) else pixels
    if height < 32 or width < 32:
        raise ValueError(f"frames of {height} x {width} pixels are too small; give at least 32 x 32")
    num_segments = getattr(model, "num_segments", None)
    if not isinstance(num_segments, int):
        raise ValueError(f"{type(model).__name__} does not say num_segments, so it is no network of create_model")
    network = copy.deepcopy(model).eval().requires_grad_(False)
    return network, next(network.parameters()).new_zeros(2, num_segments, 3, height, width)
