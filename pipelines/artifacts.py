"""The store: finished outputs of stages, found by fingerprint.

    store/<stage>/<fingerprint>/            a finished artifact; artifact.json was written last; never changed again
    store/<stage>/<fingerprint>.partial/    work in progress or interrupted; the next run goes on from it
    store/<stage>/<fingerprint>.lock        held by the process that writes it

The store on disk is the truth, MLflow is the record: losing the MLflow database loses history, not work.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from infra.errors import PipelineError
from infra.storage import fsync_dir, sha256_file, write_json

FORMAT_VERSION = 1
MANIFEST = "artifact.json"
_LOCK_SECONDS = 0.5  # `sagsm store` tries each lock for a moment, to see whether it is held


@dataclass(frozen=True)
class Artifact:
    """A finished output of a stage: a folder and what `artifact.json` says of it.

    Attributes:
        stage: name of the stage.
        fingerprint: 16 hex digits that stand for code version, settings and inputs.
        path: the folder.
        manifest: the content of `artifact.json`.
    """

    stage: str
    fingerprint: str
    path: Path
    manifest: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage returned: small, JSON only."""
        summary: dict[str, Any] = self.manifest["summary"]
        return summary

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run that made it."""
        run_id: str | None = self.manifest.get("mlflow_run_id")
        return run_id


@dataclass(frozen=True)
class Provenance:
    """All that a fingerprint stands for; kept in `artifact.json`, and what `plan` compares to say why a stage must run."""

    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    raw: str | None = None


class Store:
    """The folder of artifacts of one work directory, on a local or shared disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, stage: str, fingerprint: str) -> Path:
        """Where the artifact is, or will be."""
        return self.root / stage / fingerprint

    def find(self, stage: str, fingerprint: str) -> tuple[Artifact | None, str]:
        """The finished artifact, or None and what is wrong with the one that is there ("" if there is none).

        Files are checked for presence and size, not for content: that would read every shard at every start.
        """
        folder = self.folder(stage, fingerprint)
        if not (folder / MANIFEST).is_file():
            return None, ""
        artifact = Artifact(stage, fingerprint, folder, _read_manifest(folder))
        for name, entry in artifact.manifest["files"].items():
            try:
                size = (folder / name).stat().st_size
            except OSError:
                return None, f"{name} is gone from the store"
            if size != entry["bytes"]:
                return None, f"{name} has {size} bytes in the store, {entry['bytes']} were written"
        return artifact, ""

    def require(self, stage: str, fingerprint: str) -> Artifact:
        """The finished artifact.

        Raises:
            PipelineError: if it is not there, or not whole.
        """
        artifact, problem = self.find(stage, fingerprint)
        if artifact is None:
            reason = problem or "it is not there"
            raise PipelineError(f"{stage} {fingerprint} in {self.root} cannot be used: {reason}; run its experiment again")
        return artifact

    def finished(self, stage: str) -> list[Artifact]:
        """All finished artifacts of a stage, the newest first; their files are not looked at."""
        found = []
        for manifest_path in (self.root / stage).glob(f"*/{MANIFEST}"):
            folder = manifest_path.parent
            if "." in folder.name:  # unfinished, or damaged and stepped aside
                continue
            artifact = Artifact(stage, folder.name, folder, _read_manifest(folder))
            found.append((manifest_path.stat().st_mtime_ns, artifact))
        return [artifact for _, artifact in sorted(found, key=lambda item: item[0], reverse=True)]

    def history(self, stage: str, experiment: str, variant: str = "") -> list[Artifact]:
        """Finished artifacts that `experiment` made of `stage`, for this variant or for all, the newest first."""
        return [
            artifact
            for artifact in self.finished(stage)
            if artifact.manifest["experiment"] == experiment and artifact.manifest.get("variant", "") in ("", variant)
        ]

    @contextmanager
    def work_on(self, stage: str, fingerprint: str) -> Iterator[Path]:
        """Lock the artifact and yield the folder to write into, with whatever an interrupted run has left there.

        Raises:
            PipelineError: if another process is writing the same artifact, or the folder cannot be made.
        """
        folder = self.folder(stage, fingerprint)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock"), timeout=_LOCK_SECONDS):
                partial = folder.with_suffix(".partial")
                partial.mkdir(exist_ok=True)
                for leftover in partial.rglob(".tmp-*"):  # a writer was killed between its first byte and its rename
                    leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)
                yield partial
        except Timeout as error:
            raise PipelineError(
                f"another process is already making {stage} {fingerprint} in {self.root}; wait for it, or use another --workdir"
            ) from error
        except PermissionError as error:
            raise PipelineError(f"cannot write to the store: {error}; choose another place with --workdir") from error

    def commit(self, partial: Path, provenance: Provenance, fingerprint: str, extra: dict[str, Any]) -> Artifact:
        """Write `artifact.json` last and rename the folder to its final name; a damaged artifact of that name steps aside."""
        files = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        manifest = {
            "format_version": FORMAT_VERSION,
            "stage": provenance.stage,
            "fingerprint": fingerprint,
            "version": provenance.version,
            "config": provenance.config,
            "inputs": provenance.inputs,
            "raw": provenance.raw,
            "files": files,
            **extra,
        }
        write_json(partial / MANIFEST, manifest)
        folder = self.publish(partial, provenance.stage, fingerprint)
        return Artifact(provenance.stage, fingerprint, folder, manifest)

    def publish(self, partial: Path, stage: str, fingerprint: str) -> Path:
        """Give a folder that is whole, with its `artifact.json`, its final name, which is returned."""
        folder = self.folder(stage, fingerprint)
        if folder.exists():
            folder.rename(folder.with_suffix(f".damaged-{os.getpid()}"))
        partial.rename(folder)
        fsync_dir(folder.parent)
        return folder


def is_artifact(folder: Path) -> bool:
    """Whether the folder is a finished artifact, of whichever store."""
    return (folder / MANIFEST).is_file()


def shards_place(shards: Artifact) -> str:
    """Where the shard set of the stage `shards` is: in the store, or where the setting `shards.output` has put it."""
    place: str | None = shards.summary["place"]
    return place or str(shards.path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if manifest["format_version"] != FORMAT_VERSION:
            raise PipelineError(
                f"{path} has format version {manifest['format_version']}, this program reads {FORMAT_VERSION}; "
                "use the program that wrote it, or another --workdir"
            )
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{path} is not a readable manifest ({error}); delete the folder {folder} and run again") from error
