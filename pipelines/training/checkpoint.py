"""Checkpoints that are whole or absent, and are checked before use.

    <folder>/step-00000123/weights.safetensors   the network
                           optimizer.pt          the optimiser's state, loaded with weights_only=True
                           manifest.json         written last: all else that is needed to go on, and the hashes of the two
    <folder>/damaged-step-00000123-1a2b3c4d/     set aside when its hashes did not fit

A checkpoint is written under a temporary name, flushed and renamed; nothing is ever written over an old one (torch's own
distributed checkpoints do, and can lose both). The manifest carries its own hash, so that one flipped bit anywhere is found.
Random states are not stored: each step draws from a generator that is seeded by its number (see loop.py).
"""

import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from infra.errors import ConfigError, DataError, PipelineError
from infra.storage import fsync_dir, fsync_file, require_free_space, sha256_file, sha256_json, write_json
from pipelines.training.metrics import EpochMetrics, best_epoch

FORMAT_VERSION = 1
WEIGHTS, OPTIMIZER, MANIFEST = "weights.safetensors", "optimizer.pt", "manifest.json"
_NUM_LATEST_KEPT = 2  # the newest may be torn, so that there must be another

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a training is; with weights and optimiser, all that is needed to go on.

    Attributes:
        epoch: the epoch that is under way, from 0.
        step_in_epoch: how many of its steps are done.
        global_step: optimiser steps done since the start.
        seconds: spent so far in this epoch's training steps.
        sums: of this epoch so far, four for each rank (see `metrics.Sums`); empty at an epoch's start.
        history: the epochs that are done.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    seconds: float = 0.0
    sums: list[list[float]] = field(default_factory=list)
    history: list[EpochMetrics] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose hashes have been checked."""

    path: Path
    progress: Progress

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put weights and optimiser state into `model` and `optimizer`, on the devices where they are."""
        model.load_state_dict(load_file(self.path / WEIGHTS))
        optimizer.load_state_dict(torch.load(self.path / OPTIMIZER, map_location="cpu", weights_only=True))


def checkpoint_path(folder: Path, global_step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return folder / f"step-{global_step:08d}"


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, identity: Mapping[str, Any]
) -> Path:
    """Write a checkpoint.

    Args:
        folder: of all checkpoints of this training; made if it is missing.
        model: the network, not wrapped for distributed training.
        optimizer: its optimiser.
        progress: how far training is.
        identity: JSON of all that a training must agree on to go on from here: settings, label passport, tensors.

    Returns:
        The checkpoint's folder.

    Raises:
        PipelineError: if there is no space, the disk fails, or another training writes to the same folder.
    """
    path = checkpoint_path(folder, progress.global_step)
    temporary = folder / f".tmp-{uuid.uuid4().hex[:8]}-{path.name}"
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        temporary.mkdir(parents=True)
        require_free_space(folder, 2 * sum(tensor.nbytes for tensor in weights.values()), "a checkpoint")
        save_file(weights, temporary / WEIGHTS)
        torch.save(optimizer.state_dict(), temporary / OPTIMIZER)
        for name in (WEIGHTS, OPTIMIZER):
            fsync_file(temporary / name)
        write_json(temporary / MANIFEST, _make_manifest(temporary, progress, identity))
        temporary.rename(path)
        fsync_dir(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise PipelineError(
            f"checkpoint {path} cannot be written: {error}; expected a disk with free space to which no other training writes"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def load_latest_verified(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """Find the newest checkpoint whose hashes fit; set damaged ones aside with a warning that says what is lost.

    Only one process may call it at a time. It also removes what a killed writer left.

    Args:
        folder: of all checkpoints of this training.
        identity: what `save` was given.

    Returns:
        None if there is no good checkpoint: training begins at step 0.

    Raises:
        ConfigError: if the newest good checkpoint is one of another training; the differences are named.
        PipelineError: if it was written by another version of this program.
    """
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)
    damaged: list[str] = []
    found: Checkpoint | None = None
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = verify(path)
        except DataError as error:
            path.rename(folder / f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
            damaged.append(str(error))
            continue
        _require_same_training(path, manifest["identity"], identity)
        found = Checkpoint(path, _progress_of(manifest))
        break
    for problem in damaged:
        _log.warning("%s; set aside, training goes on from step %d", problem, found.progress.global_step if found else 0)
    return found


def verify(path: Path) -> dict[str, Any]:
    """Check a checkpoint against its own hashes and return its manifest.

    Raises:
        DataError: if anything is missing, cut or changed.
        PipelineError: if it was written by another version of this program.
    """
    manifest = _read_manifest(path)
    for name, written in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise DataError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != written["bytes"]:
            raise DataError(f"checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, not {written['bytes']}")
        if sha256_file(file) != written["sha256"]:
            raise DataError(f"checkpoint {path} is damaged: the content of {name} has changed since it was written")
    return manifest


def prune(folder: Path) -> None:
    """Remove all checkpoints but the two newest and the one with the best validation top-1."""
    paths = sorted(folder.glob("step-*"))
    best = best_epoch(read_history(folder))
    kept = {*paths[-_NUM_LATEST_KEPT:], *([checkpoint_path(folder, best.step)] if best else [])}
    for path in paths:
        if path not in kept:
            doomed = path.rename(folder / f".tmp-{path.name}")  # a kill while files go must not leave a torn checkpoint
            shutil.rmtree(doomed)


def read_history(folder: Path) -> list[EpochMetrics]:
    """The epochs that the newest readable checkpoint says are done; safe to call while training writes and prunes."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return _progress_of(_read_manifest(path)).history
        except DataError:
            continue
    return []


def _make_manifest(folder: Path, progress: Progress, identity: Mapping[str, Any]) -> dict[str, Any]:
    best = best_epoch(progress.history)
    manifest = {
        "format_version": FORMAT_VERSION,
        "epoch": progress.epoch,
        "step_in_epoch": progress.step_in_epoch,
        "global_step": progress.global_step,
        "seconds": progress.seconds,
        "sums": progress.sums,
        "history": [epoch.to_json() for epoch in progress.history],
        "best": best.to_json() if best else None,
        "identity": dict(identity),
        "fingerprint": sha256_json(identity),
        "label_passport": identity.get("label_passport"),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
            for name in (WEIGHTS, OPTIMIZER)
        },
    }
    return {**manifest, "sha256": sha256_json(manifest)}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        written = manifest.pop("sha256")
        intact = sha256_json(manifest) == written
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if not intact:
        raise DataError(f"checkpoint {path} is damaged: the content of {MANIFEST} has changed since it was written")
    if manifest["format_version"] != FORMAT_VERSION:
        raise PipelineError(
            f"checkpoint {path} has format version {manifest['format_version']}, this program reads {FORMAT_VERSION}; "
            "go on with the program that wrote it, or delete the folder to train anew"
        )
    return manifest


def _progress_of(manifest: Mapping[str, Any]) -> Progress:
    return Progress(
        epoch=manifest["epoch"],
        step_in_epoch=manifest["step_in_epoch"],
        global_step=manifest["global_step"],
        seconds=manifest["seconds"],
        sums=manifest["sums"],
        history=[EpochMetrics(**epoch) for epoch in manifest["history"]],
    )


def _require_same_training(path: Path, written: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    there, now = _flatten(written), _flatten(json.loads(json.dumps(wanted)))
    names = sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name))
    if names:
        changes = ", ".join(f"{name} {there.get(name)!r} there and {now.get(name)!r} now" for name in names)
        raise ConfigError(
            f"checkpoint {path} belongs to another training: {changes}; "
            f"set them back to go on, or delete {path.parent} to train anew"
        )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value})
    return flat
