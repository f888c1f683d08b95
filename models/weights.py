"""Load weights that others published, or that a checkpoint of ours holds, by name."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def load_published_weights(model: nn.Module, path_or_state_dict: str | Path | Mapping[str, Tensor]) -> None:
    """Fill every parameter and buffer of a network from a file or a state dict that names them all.

    Args:
        model: a network of this package; changed in place, and not at all if an error is raised.
        path_or_state_dict: a state dict, a `.safetensors` file, or a file of `torch.save` (`.pth`, `.pth.tar`), read with
            `weights_only=True`, so that nothing in it is run. The weights may lie under the key "state_dict", and their names
            behind "module.", as in the checkpoints that GSM and SA-GSM released.

    Raises:
        ValueError: if the file is not such a file, or names are missing, unexpected or of another shape (all in one message).
    """
    if isinstance(path_or_state_dict, str | Path):
        source, content = str(path_or_state_dict), _read(Path(path_or_state_dict))
    else:
        source, content = "the state dict", path_or_state_dict
    nested = content.get("state_dict", content)
    if not isinstance(nested, Mapping) or not all(isinstance(tensor, Tensor) for tensor in nested.values()):
        raise ValueError(f"{source} holds other things than named tensors; expected a state dict, or one under 'state_dict'")
    given = {name.removeprefix("module."): tensor for name, tensor in nested.items()}
    problems = _differences(given, model.state_dict())
    if problems:
        raise ValueError(
            f"{source} does not fit the network; make the network that it was saved from (name, num_classes, options):\n"
            + "\n".join(problems)
        )
    model.load_state_dict(given)


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as weights alone ({cause}); expected a .safetensors file or a state "
            "dict saved by torch.save; if you trust its source, save its state dict again as .safetensors"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict, or one under 'state_dict'")
    return content


def _differences(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """A line for each name that is missing, unexpected or of another shape."""
    missing = [f"  missing: {name} {list(expected[name].shape)}" for name in expected if name not in given]
    unexpected = [f"  unexpected: {name} {list(given[name].shape)}" for name in given if name not in expected]
    misshapen = [
        f"  shape: {name} is {list(given[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    return missing + unexpected + misshapen
