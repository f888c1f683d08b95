"""The form of a network for inference: batch norms folded into the convolutions before them.

In eval mode a batch norm is an affine map of each channel, and so part of the convolution whose output it takes (Jacob et al.:
Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018, section 3.2,
https://arxiv.org/abs/1712.05877).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
    """The names of each convolution whose output only a batch norm takes, and of that norm, seen in one forward pass."""
    num_segments = getattr(model, "num_segments", None)
    if not isinstance(num_segments, int):
        raise ValueError(f"{type(model).__name__} does not say num_segments, so it is no network of create_model")
    reference, pixels = next(model.parameters()), int(getattr(model, "min_pixels", 1))
    clips = reference.new_zeros(1, num_segments, 3, pixels, pixels)
    with torch.no_grad(), _Takers(model) as seen:
        model(clips)
    return [(conv, norm) for conv, norm in seen.only_takers().items() if norm]


class _Takers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of a forward pass, and notes which ones take the output of a convolution."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (_ConvNd, _BatchNorm))]
        # By the identity of tensors, which operations get as they are; what is noted is kept, so that none is used twice.
        self._owners = {id(module.weight): (name, isinstance(module, _ConvNd)) for name, module in layers}
        self._outputs: dict[int, tuple[str, Tensor, list[str]]] = {}

    def only_takers(self) -> dict[str, str]:
        """For each convolution, the batch norm that alone took its output each time that it was asked, "" if there is none."""
        found: dict[str, str] = {}
        for conv, _, takers in self._outputs.values():
            norm = takers[0] if len(takers) == 1 else ""
            found[conv] = norm if found.get(conv, norm) == norm else ""
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        output = func(*args, **(kwargs or {}))
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        owners = [self._owners[id(tensor)] for tensor in taken if id(tensor) in self._owners]
        norms = [name for name, is_conv in owners if not is_conv]
        for tensor in taken:
            if id(tensor) in self._outputs:
                self._outputs[id(tensor)][2].append(norms[0] if norms else "")
        convs = [name for name, is_conv in owners if is_conv]
        if convs and isinstance(output, Tensor):
            self._outputs[id(output)] = (convs[0], output, [])
        return output
