"""A run that is being written: every call is an entry of the spool and returns at once.

Entries name their run by an id: MLflow's own where it is known, else the key under which the run was asked for while the server
was away. `infra/tracking_client.py` sends them.
"""

import json
import math
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from infra.errors import PipelineError
from infra.tracking_spool import Spool

_PARAM_CHARACTERS = 250
_NOTE_CHARACTERS = 8000
_FLUSH_SECONDS = 10.0

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class TrackedRun:
    """A run that is being written; leaving its `with` block ends it.

    It ends as FINISHED, as FAILED after an error, or as KILLED after KeyboardInterrupt or SystemExit (Ctrl-C, SIGTERM).

    No method waits for the server but the end of the `with` block, and that only for one that answers. Every method raises
    PipelineError if the disk of the work directory is full.

    Args:
        key: under which the spool has been asked to start it.
        name: as the runs table shows it.
        spool: takes its entries.
        ids: MLflow's id for each key, filled by whoever sends.
    """

    def __init__(self, key: str, name: str, spool: Spool, ids: Mapping[str, str]) -> None:
        self.name = name
        self._key = key
        self._spool = spool
        self._ids = ids
        self._ended = False

    @property
    def run_id(self) -> str:
        """Of the MLflow run; of one that was started while the server was away, a key until it is back.

        `Tracker.start_run` takes either to go on with the run.
        """
        return self._ids.get(self._key, self._key)

    def __enter__(self) -> "TrackedRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.finish("FINISHED")
            self._spool.flush(_FLUSH_SECONDS)
            return
        with suppress(PipelineError):  # what went wrong first must reach the user, not that it could not be recorded
            self.finish("FAILED" if isinstance(error, Exception) else "KILLED")
            self._spool.flush(_FLUSH_SECONDS)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings: nested ones get dotted names, lists are joined by commas, and values are cut at 250 characters.

        MLflow never lets a parameter change, so names that the run already has are left alone.
        """
        self._append("params", values=dict(_flatten(params)))

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record finite numbers at a step; a (name, step) that the run already has is left alone, so a resume never doubles it.

        NaN and infinity are left out: MLflow turns infinity into 1.8e308, which ruins the axis of a chart.
        """
        values = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._append("metrics", values=values, step=step, time=now())

    def log_text(self, text: str, path: str) -> None:
        """Keep text as the file `path` of the run, such as "conf/config.yaml"."""
        folder, _, name = path.rpartition("/")
        self._append("file", file=self._spool.keep(name, text.encode()), folder=folder)

    def log_json(self, value: Any, path: str) -> None:
        """Keep a value as an indented JSON file of the run."""
        self.log_text(json.dumps(value, indent=2, sort_keys=True) + "\n", path)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Copy a file, as it is now, into a folder of the run ("figures", "tables", "report"); "" is the top."""
        self._append("file", file=self._spool.keep(path.name, path.read_bytes()), folder=folder)

    def log_image(self, path: Path, key: str, step: int = 0) -> None:
        """Show a picture as a tile among the run's charts, with a slider over steps; see `log_file` for the file itself.

        Args:
            path: a PNG, as it is now.
            key: of letters, digits, `_`, `-`, `.`, `/` and spaces; what stands before the `/` is the section of charts.
            step: pictures of one key are sorted by it.
        """
        self._append("image", file=self._spool.keep(path.name, path.read_bytes()), key=key, step=step, time=now())

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Record an input: shown as "name (digest) context" in the runs table.

        Args:
            name: of the dataset.
            digest: hash of its content; MLflow keeps 36 characters.
            source: the folder that was read, as an absolute path or a URL.
            context: what for, "train" or "evaluate".
        """
        place = source if "://" in source else Path(source).as_uri()
        self._append("dataset", name=name, digest=digest, source=place, context=context)

    def log_model(
        self, name: str, alias: str, files: Path, *, code: str, card: str, example: str, tags: Mapping[str, str]
    ) -> None:
        """Register a trained network, as a new version that gets the alias; see `infra/tracking_model.py`.

        Args:
            name: of the registered model.
            alias: letters, digits, `_` and `-`; not "latest" or "v1", which MLflow keeps for itself.
            files: the folder that training wrote; read when this is sent, so it must stay as it is.
            code: the script that makes an MLflow model of the files.
            card: the model card, as markdown.
            example: a value of the column `video`.
            tags: of the model and its version.
        """
        content = {"name": name, "alias": alias, "files": str(files.absolute()), "code": code, "card": card, "example": example}
        self._append("model", key=uuid.uuid4().hex, tags=dict(tags), **content)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or change tags."""
        self._append("tags", values={name: str(value) for name, value in tags.items()})

    def describe(self, markdown: str) -> None:
        """Set the description, which is the landing page of the run; only about three lines show at first."""
        self.set_tags({"mlflow.note.content": markdown[:_NOTE_CHARACTERS]})

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """End the run; the first status given stays."""
        if not self._ended:
            self._ended = True
            self._append("finish", status=status, time=now())

    def _append(self, kind: str, **content: Any) -> None:
        self._spool.append({"do": kind, "run": self.run_id, **content})


def now() -> int:
    """The time as MLflow counts it, in milliseconds: fixed when something is recorded, however late it is sent."""
    return int(time.time() * 1000)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield prefix + name, text if len(text) < _PARAM_CHARACTERS else text[: _PARAM_CHARACTERS - 4] + "..."
