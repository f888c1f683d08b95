"""Load weights that others published, or that a checkpoint of ours holds, by name."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.classifier import VideoClassifier


def load_published_weights(
    model: nn.Module,
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    *,
    class_order: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Fill every parameter and buffer of a network from a file or a state dict that names them all.

    Names are taken as GSM, SA-GSM, TSM and TRN published theirs: behind "module." (their `.pth.tar`), with TSM's `.conv1.net.`
    (its shift wraps the convolution) for `.conv1.`, and without the counters of batch norms (TRN's PyTorch had none; they count
    batches and are 0 then).

    Args:
        model: a network of this package; changed in place, and not at all if an error is raised.
        path_or_state_dict: a state dict, a `.safetensors` file, or a file of `torch.save` (`.pth`, `.pth.tar`), read with
            `weights_only=True`, so that nothing in it is run. The weights may lie under the key "state_dict".
        class_order: the labels in the order of the classes that the weights were trained with; needed with `label_names`.
        label_names: the labels in the order that the network shall have (that of the dataset): the rows of the classifier are
            put in that order. With neither, the caller vouches that both orders are one.

    Raises:
        ValueError: if the file is not such a file; if names are missing, unexpected, of another shape or of another kind than
            real numbers and counts (all in one message); if only one of `class_order` and `label_names` is given, or they are
            not the same labels, one a class.
    """
    if isinstance(path_or_state_dict, str | Path):
        source, content = str(path_or_state_dict), read_weights(Path(path_or_state_dict))
    else:
        source, content = "the state dict", path_or_state_dict
    given = _named_as_here(named_tensors(content, source), model.state_dict())
    problems = _differences(given, model.state_dict())
    if problems:
        raise ValueError(
            f"{source} does not fit the network; make the network that it was saved from (name, num_classes, options):\n"
            + "\n".join(problems)
        )
    if class_order is not None or label_names is not None:
        given |= _reordered_classes(model, given, class_order, label_names, source)
    model.load_state_dict(given)


def named_tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The state dict in what a file holds (under "state_dict" or bare), names without "module.".

    Raises:
        ValueError: if it holds other things than named tensors; the message names `source`.
    """
    nested = content.get("state_dict", content)
    if not isinstance(nested, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in nested.items()
    ):
        raise ValueError(f"{source} holds other things than named tensors; expected a state dict, or one under 'state_dict'")
    return {name.removeprefix("module."): tensor for name, tensor in nested.items()}


def _named_as_here(given: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {name.replace(".conv1.net.", ".conv1."): tensor for name, tensor in given.items()}
    if len(renamed) == len(given):
        given = renamed
    counters = {
        name: tensor for name, tensor in expected.items() if name.endswith(".num_batches_tracked") and name not in given
    }
    return given | {name: torch.zeros_like(tensor) for name, tensor in counters.items()}


def _reordered_classes(
    model: nn.Module,
    given: Mapping[str, Tensor],
    class_order: Sequence[str] | None,
    label_names: Sequence[str] | None,
    source: str,
) -> dict[str, Tensor]:
    """The classifier's tensors with their rows in the order of `label_names`."""
    if class_order is None or label_names is None:
        raise ValueError(
            "class_order (of the weights) and label_names (of the dataset) go together; only one of them was given"
        )
    if not isinstance(model, VideoClassifier):
        raise ValueError(f"classes can be put in order in a VideoClassifier only, not in a {type(model).__name__}")
    for what, labels in (("class_order", class_order), ("label_names", label_names)):
        if len(set(labels)) != len(labels) or len(labels) != model.num_classes:
            raise ValueError(
                f"{what} has {len(labels)} labels, {len(set(labels))} of them different; the network has {model.num_classes}"
            )
    unknown = sorted(set(label_names) - set(class_order))
    if unknown:
        raise ValueError(f"{source} was trained with other labels; it has no class for: {', '.join(map(repr, unknown[:5]))}")
    rows = torch.tensor([list(class_order).index(label) for label in label_names])
    return {name: given[name][rows] for name in model.class_tensors}


def read_weights(path: Path) -> Mapping[str, Any]:
    """What a `.safetensors` file or a file of `torch.save` holds; nothing in it is run (`weights_only=True`).

    Raises:
        ValueError: if the file is neither, or holds objects other than weights.
    """
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        content = torch.load(path, map_location="cpu", weights_only=True)
    # From EOFError on: what the reader of pickles raises for bytes that are none, or for a damaged pickle.
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as weights alone ({cause}); expected a .safetensors file or a state "
            "dict saved by torch.save; if you trust its source, save its state dict again as .safetensors"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict, or one under 'state_dict'")
    return content


def _differences(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """A line for each name that is missing, unexpected, of another shape or of another kind."""
    missing = [f"  missing: {name} {list(expected[name].shape)}" for name in expected if name not in given]
    unexpected = [f"  unexpected: {name} {list(given[name].shape)}" for name in given if name not in expected]
    misshapen = [
        f"  shape: {name} is {list(given[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    other_kind = [
        f"  kind: {name} is {_kind(given[name])}, expected {_kind(tensor)}"
        for name, tensor in expected.items()
        if name in given and _kind(given[name]) != _kind(tensor)
    ]
    return missing + unexpected + misshapen + other_kind


def _kind(tensor: Tensor) -> str:
    """What a tensor's numbers are; only tensors of one kind can be copied into one another without loss of sense."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return "sparse, quantised or without numbers"
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "whole numbers"
