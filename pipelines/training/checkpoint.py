"""Checkpoints that are whole or absent, and are checked before use.

    <folder>/step-00000123/weights.safetensors   the network
                           average.safetensors   the average of its weights, if training keeps one
                           optimizer.pt          the state of optimiser and loss scaler, loaded with weights_only=True
                           manifest.json         written last: all else that is needed to go on, and the hashes of the others
    <folder>/damaged-step-00000123-1a2b3c4d/     set aside when its hashes did not fit

A checkpoint is written under a temporary name, flushed and renamed; nothing is ever written over an old one (torch's own
distributed checkpoints do, and can lose both). The manifest carries its own hash, so that one flipped bit anywhere is found.
Random states are not stored: each step draws from a generator that is seeded by its number (see loop.py).
"""

import io
import json
import logging
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import AveragedModel

from infra.errors import ConfigError, DataError, PipelineError
from infra.storage import fsync_dir, fsync_file, require_free_space, sha256_file, sha256_json, write_json
from pipelines.training.metrics import EpochMetrics, best_epoch
from preprocessing.clip_ledger import ClipLedger

FORMAT_VERSION = 2
WEIGHTS, AVERAGE, OPTIMIZER, MANIFEST = "weights.safetensors", "average.safetensors", "optimizer.pt", "manifest.json"
FILES = (WEIGHTS, AVERAGE, OPTIMIZER, MANIFEST)
_NUM_LATEST_KEPT = 2  # the newest may be torn, so that there must be another

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """All that a training step changes.

    Attributes:
        model: the network, not wrapped for distributed training.
        optimizer: its optimiser.
        average: the moving average of its weights; None if training keeps none.
        scaler: of the loss; disabled but in fp16.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    scaler: torch.amp.GradScaler


@dataclass(frozen=True)
class Progress:
    """How far a training is; with its `State`, all that is needed to go on.

    Attributes:
        epoch: the epoch that is under way, from 0.
        step_in_epoch: how many of its steps are done.
        global_step: optimiser steps done since the start.
        steps_per_epoch: of the training as it was begun; another number of workers keeps it, and so the effective batch.
        seconds: spent so far in this epoch's training steps.
        waited: of these, spent waiting for batches.
        sums: of this epoch so far, four for each rank (see `metrics.Sums`); empty at an epoch's start.
        ledger: of the clips that all ranks have shown in this epoch so far.
        history: the epochs that are done.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    steps_per_epoch: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    sums: list[list[float]] = field(default_factory=list)
    ledger: ClipLedger = field(default_factory=ClipLedger)
    history: list[EpochMetrics] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose hashes have been checked."""

    path: Path
    progress: Progress

    def read(self) -> dict[str, bytes]:
        """Its files by name, for `restore`, here or in another process."""
        return {name: (self.path / name).read_bytes() for name in FILES if (self.path / name).is_file()}


def restore(files: Mapping[str, bytes], state: State) -> Progress:
    """Put what `Checkpoint.read` gave into `state`, on the devices where its tensors are.

    Raises:
        RuntimeError: if they are of another network.
    """
    progress = _progress_of(json.loads(files[MANIFEST]))
    state.model.load_state_dict(safetensors.torch.load(files[WEIGHTS]))
    stored = torch.load(io.BytesIO(files[OPTIMIZER]), map_location="cpu", weights_only=True)
    state.optimizer.load_state_dict(stored["optimizer"])
    state.scaler.load_state_dict(stored["scaler"])
    if state.average is not None:
        state.average.module.load_state_dict(safetensors.torch.load(files[AVERAGE]))
        state.average.n_averaged.fill_(progress.global_step)
    return progress


def checkpoint_path(folder: Path, global_step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return folder / f"step-{global_step:08d}"


def save(folder: Path, state: State, progress: Progress, identity: Mapping[str, Any]) -> Path:
    """Write a checkpoint.

    Args:
        folder: of all checkpoints of this training; made if it is missing.
        state: what to write.
        progress: how far training is.
        identity: JSON of all that a training must agree on to go on from here: settings, label passport, tensors.

    Returns:
        The checkpoint's folder.

    Raises:
        PipelineError: if there is no space, the disk fails, or another training writes to the same folder.
    """
    path = checkpoint_path(folder, progress.global_step)
    temporary = folder / f".tmp-{uuid.uuid4().hex[:8]}-{path.name}"
    networks = {WEIGHTS: state.model, **({} if state.average is None else {AVERAGE: state.average.module})}
    try:
        temporary.mkdir(parents=True)
        num_bytes = sum(tensor.nbytes for network in networks.values() for tensor in network.state_dict().values())
        require_free_space(folder, 2 * num_bytes, "a checkpoint")
        for name, network in networks.items():
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
            safetensors.torch.save_file(tensors, temporary / name)
        torch.save({"optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict()}, temporary / OPTIMIZER)
        for name in (*networks, OPTIMIZER):
            fsync_file(temporary / name)
        write_json(temporary / MANIFEST, _make_manifest(temporary, (*networks, OPTIMIZER), progress, identity))
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


def _make_manifest(folder: Path, files: Sequence[str], progress: Progress, identity: Mapping[str, Any]) -> dict[str, Any]:
    best = best_epoch(progress.history)
    manifest = {
        "format_version": FORMAT_VERSION,
        "epoch": progress.epoch,
        "step_in_epoch": progress.step_in_epoch,
        "global_step": progress.global_step,
        "steps_per_epoch": progress.steps_per_epoch,
        "seconds": progress.seconds,
        "waited": progress.waited,
        "sums": progress.sums,
        "ledger": str(progress.ledger),
        "history": [epoch.to_json() for epoch in progress.history],
        "best": best.to_json() if best else None,
        "identity": dict(identity),
        "fingerprint": sha256_json(identity),
        "label_passport": identity.get("label_passport"),
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in files},
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
        steps_per_epoch=manifest["steps_per_epoch"],
        seconds=manifest["seconds"],
        waited=manifest["waited"],
        sums=manifest["sums"],
        ledger=ClipLedger.parse(manifest["ledger"]),
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
