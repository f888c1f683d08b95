"""The form of a network for inference: batch norms folded into the convolutions before them.

In eval mode a batch norm is an affine map of each channel, and so part of the convolution whose output it takes (Jacob et al.:
Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, section 3.2,
https://arxiv.org/abs/1712.05877).
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.utils.fusion import fuse_conv_bn_eval

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default)
_TRACED_PIXELS = 112


def fold_batch_norms(model: nn.Module, *, kernel_dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a network for inference, with fewer passes over its maps.

    A batch norm goes into a convolution where it takes that convolution's output and nothing else does. So the norms of
    `GateShift` stay (what they normalise is also what is shifted), and so do those behind a slot that is filled.

    The copy is in eval mode, needs no gradients, and has the kernels of its 2-D convolutions in channels_last memory. It can
    neither be trained nor load weights: the batch norms and their names are gone.

    Args:
        model: a network of `create_model`, on any device; not changed. Its own statistics are used, whatever its mode.
        kernel_dtype: the type of the kernels and biases of convolutions, float32 or bfloat16; None keeps theirs. With bfloat16
            the copy must run under bfloat16 autocast, which then need not round the weights anew for each batch; its logits
            are those that autocast gives without it.

    Returns:
        The copy. For the same clips its logits are the same but for rounding: relative error 2e-6 in float32 and 1e-14 in
        float64 where the statistics fit the data. Where they do not, maps grow and so does rounding (up to 1e-4 was seen).

    Raises:
        ValueError: if the network does not say `num_segments`, or `kernel_dtype` is another type.

    Example:
        >>> from models import create_model
        >>> model = create_model("tsn_bn_inception", num_classes=5, num_segments=2)
        >>> [sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) for net in (model, fold_batch_norms(model))]
        [69, 0]
    """
    if kernel_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"kernel_dtype is {kernel_dtype}, but must be torch.float32, torch.bfloat16 or None")
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for conv_name, norm_name in _pairs(folded):
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(norm_name)
        folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        folded.set_submodule(norm_name, nn.Identity())
    for module in folded.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.to(dtype=kernel_dtype)
    return folded.requires_grad_(False)


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """The names of each convolution whose output only a batch norm takes, and of that norm."""
    num_segments = getattr(model, "num_segments", None)
    if not isinstance(num_segments, int):
        raise ValueError(f"{type(model).__name__} does not say num_segments, so it is no network of create_model")
    reference = next(model.parameters())
    shape = (2, num_segments, 3, _TRACED_PIXELS, _TRACED_PIXELS)
    program = torch.export.export(model, (reference.new_zeros(shape),), strict=False)
    pairs = []
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.batch_norm.default:
            conv, weight = node.args[0], node.args[1]
            if conv.target in _CONVOLUTIONS and len(conv.users) == 1:
                pairs.append((_owner(program, conv.args[1]), _owner(program, weight)))
    return pairs


def _owner(program: ExportedProgram, parameter: Node) -> str:
    """The name of the module that a parameter belongs to."""
    name: str = program.graph_signature.inputs_to_parameters[parameter.name]
    return name.rpartition(".")[0]
