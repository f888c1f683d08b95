"""The record of what was done, in MLflow: pipeline run -> stage runs -> trial runs.

The only file that imports mlflow, and only inside functions, since that takes a second or two. Runs are addressed by their id
through `MlflowClient`: the fluent `mlflow.start_run` keeps a global active run and marks it FINISHED at exit, even of a worker
that was stopped. Each run has one writer.
"""

import json
import math
import os
import re
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from filelock import FileLock

from infra.errors import PipelineError
from infra.provenance import git_commit, has_ended, this_process, user_name

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_PARAM_CHARACTERS = 250
_NOTE_CHARACTERS = 8000
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_DATASET_DIGEST_CHARACTERS = 36
_CONNECT_SECONDS = 5.0
_DATABASE_LOCK_SECONDS = 120.0

# Set where the user has not: by default MLflow retries a dead server for four minutes, sends telemetry, and tells the terminal
# of each database made and each run ended.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

T = TypeVar("T")
_WRITER = "writer"

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


def tracking_uri(workdir: Path) -> str:
    """Where runs are recorded: `MLFLOW_TRACKING_URI` if it is set, else a SQLite file in the work directory."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"sqlite:///{workdir.resolve() / 'mlflow.db'}"


def experiment_ids(uri: str) -> dict[str, str]:
    """Id by name of the experiments that are recorded at `uri`, the newest first, without MLflow's own empty one.

    Raises:
        PipelineError: if the database or the server cannot be used.
    """
    with _explained(uri):
        found = _connect(uri).search_experiments(order_by=["creation_time DESC"])
    return {experiment.name: experiment.experiment_id for experiment in found if experiment.experiment_id != "0"}


class Tracker:
    """An MLflow experiment to which runs are written; it is made if it does not exist.

    Args:
        uri: as `tracking_uri` gives it; `sqlite:////absolute/path.db` or `http(s)://...`.
        experiment: name of the experiment.
        artifact_root: folder for the files of runs. A server ignores it and keeps files where it was told to.

    Raises:
        PipelineError: within seconds, if the database or the server cannot be used.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: Path) -> None:
        self.uri = uri
        self._runs: list[TrackedRun] = []
        self._is_closed = False
        self._starting = threading.Lock()
        with _explained(uri):
            self._client = _connect(uri)
            self.experiment_id = _find_or_create_experiment(self._client, uri, experiment, artifact_root)

    def start_run(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None, resume_id: str | None = None
    ) -> "TrackedRun":
        """Start a run, or go on with an earlier one, to be used as a context manager.

        Args:
            name: shown in the runs table, whose column is narrow: the distinguishing part first ("t012 3a+4e").
            parent: id of the run above it in the tree.
            tags: stage, fingerprint, dataset and so on, besides those that say who ran which commit.
            resume_id: id of a run to go on with, so that a resumed stage draws one continuous curve. If the database no longer
                has it, a new run is started: losing the database loses history, not work.

        Raises:
            PipelineError: also after `finish_open_runs`.
        """
        everywhere = {"mlflow.source.name": "sagsm", "mlflow.source.type": "LOCAL", "mlflow.user": user_name()}
        everywhere[_WRITER] = this_process()
        if commit := git_commit():
            everywhere["mlflow.source.git.commit"] = commit
        if parent is not None:
            everywhere["mlflow.parentRunId"] = parent
        with self._starting, _explained(self.uri):
            if self._is_closed:
                raise PipelineError(f"the run {name!r} was not started, since everything is being stopped")
            earlier = self._find(resume_id) if resume_id else None
            if earlier is None:
                made = self._client.create_run(self.experiment_id, run_name=name, tags={**everywhere, **(tags or {})})
                run = TrackedRun(self._client, self.uri, made.info.run_id, name, set())
            else:
                self._client.update_run(earlier.info.run_id, status="RUNNING", name=name)
                run = TrackedRun(self._client, self.uri, earlier.info.run_id, name, set(earlier.data.params))
                run.set_tags({**everywhere, **(tags or {})})
            self._runs.append(run)
        return run

    def finish_open_runs(self, status: RunStatus) -> None:
        """End all runs that this tracker started and nobody has ended, children first; for when a signal stops everything.

        Other threads may still be at work then: no run can be started any more, or one would be left open.
        """
        with self._starting:
            self._is_closed = True
        for run in reversed(self._runs):
            with suppress(PipelineError):  # the others must be tried as well
                run.finish(status)

    def close_abandoned_runs(self) -> None:
        """End as KILLED the runs whose writer is gone without a word, as after SIGKILL or a power loss of this machine."""
        with _explained(self.uri):
            running = self._client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
            for run in running:
                if has_ended(run.data.tags.get(_WRITER, "")):
                    self._client.set_terminated(run.info.run_id, "KILLED")

    def next_name(self, prefix: str, text: str) -> str:
        """A short name that counts up, "p07 wide search" after "p06 demo": the column of names shows about eight letters."""
        condition = f"attributes.run_name LIKE '{prefix}%'"
        with _explained(self.uri):
            newest = self._client.search_runs([self.experiment_id], condition, order_by=["start_time DESC"], max_results=100)
        numbers = [re.match(rf"{prefix}(\d+)\b", run.info.run_name) for run in newest]
        return f"{prefix}{max((int(number[1]) for number in numbers if number), default=0) + 1:02d} {text}"

    def find_run(self, tags: Mapping[str, str]) -> str | None:
        """Id of the newest run that carries all of `tags`, or None."""
        condition = " and ".join(f"tags.`{name}` = {_quoted(value)}" for name, value in tags.items())
        with _explained(self.uri):
            found = self._client.search_runs([self.experiment_id], condition, order_by=["start_time DESC"], max_results=1)
        return found[0].info.run_id if found else None

    def describe(self, markdown: str) -> None:
        """Set the experiment's description; only its first line shows above the runs table."""
        with _explained(self.uri):
            self._client.set_experiment_tag(self.experiment_id, "mlflow.note.content", markdown[:_NOTE_CHARACTERS])

    def _find(self, run_id: str) -> "Run | None":
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" and run.info.experiment_id == self.experiment_id else None


class TrackedRun:
    """A run that is being written; leaving its `with` block ends it.

    Attributes:
        run_id: of the MLflow run.
        name: as the runs table shows it.

    It ends as FINISHED, as FAILED after an error, or as KILLED after KeyboardInterrupt or SystemExit (Ctrl-C, SIGTERM).

    Every method raises PipelineError if the database or the server cannot be used.
    """

    def __init__(self, client: "MlflowClient", uri: str, run_id: str, name: str, params: set[str]) -> None:
        self.run_id = run_id
        self.name = name
        self._client = client
        self._uri = uri
        self._params = params
        self._steps: dict[str, set[int]] = {}
        self._ended = False

    def __enter__(self) -> "TrackedRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.finish("FINISHED")
            return
        with suppress(PipelineError):  # what went wrong first must reach the user, not that it could not be recorded
            self.finish("FAILED" if isinstance(error, Exception) else "KILLED")

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings: nested ones get dotted names, lists are joined by commas, and values are cut at 250 characters.

        MLflow never lets a parameter change, so names that the run already has are left alone.
        """
        from mlflow.entities import Param

        new = {name: text for name, text in _flatten(params) if name not in self._params}
        self._params.update(new)
        with _explained(self._uri):
            for batch in _batches([Param(name, text) for name, text in new.items()], _PARAMS_PER_BATCH):
                self._client.log_batch(self.run_id, params=batch)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record finite numbers at a step; a (name, step) that the run already has is left alone, so a resume never doubles it.

        NaN and infinity are left out: MLflow turns infinity into 1.8e308, which ruins the axis of a chart.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [
            Metric(name, float(value), now, step)
            for name, value in metrics.items()
            if math.isfinite(value) and step not in self._steps_of(name)
        ]
        with _explained(self._uri):
            for batch in _batches(new, _METRICS_PER_BATCH):
                self._client.log_batch(self.run_id, metrics=batch)
        for metric in new:
            self._steps[metric.key].add(step)

    def log_text(self, text: str, path: str) -> None:
        """Keep text as the file `path` of the run, such as "conf/config.yaml"."""
        with _explained(self._uri):
            self._client.log_text(self.run_id, text, path)

    def log_json(self, value: Any, path: str) -> None:
        """Keep a value as an indented JSON file of the run."""
        self.log_text(json.dumps(value, indent=2, sort_keys=True) + "\n", path)

    def log_file(self, path: Path, folder: str = "") -> None:
        """Copy a file into a folder of the run ("figures", "tables", "report"); "" is the top."""
        with _explained(self._uri):
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Record an input: shown as "name (digest) context" in the runs table.

        Args:
            name: of the dataset.
            digest: hash of its content; MLflow keeps 36 characters.
            source: the folder that was read, as an absolute path or a URL.
            context: what for, "train" or "evaluate".
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        place = json.dumps({"uri": source if "://" in source else Path(source).as_uri()})
        dataset = Dataset(name=name, digest=digest[:_DATASET_DIGEST_CHARACTERS], source_type="local", source=place)
        with _explained(self._uri):
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or change tags."""
        from mlflow.entities import RunTag

        with _explained(self._uri):
            self._client.log_batch(self.run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def describe(self, markdown: str) -> None:
        """Set the description, which is the landing page of the run; only about three lines show at first."""
        self.set_tags({"mlflow.note.content": markdown[:_NOTE_CHARACTERS]})

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """End the run; the first status given stays."""
        if not self._ended:
            self._ended = True
            with _explained(self._uri):
                self._client.set_terminated(self.run_id, status)

    def _steps_of(self, name: str) -> set[int]:
        """Steps at which the run has the metric, asked once: a resumed run has those of its earlier life."""
        if name not in self._steps:
            with _explained(self._uri):
                self._steps[name] = {metric.step for metric in self._client.get_metric_history(self.run_id, name)}
        return self._steps[name]


def _connect(uri: str) -> "MlflowClient":
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        _require_sqlite(path)
        # MLflow's own lock leaves a gap: of three processes that made one database, one died of "duplicate column name".
        with FileLock(f"{path}.lock", timeout=_DATABASE_LOCK_SECONDS):
            return _make_client(uri)
    if uri.startswith(("http://", "https://")):
        _require_server(uri)
    return _make_client(uri)


def _make_client(uri: str) -> "MlflowClient":
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def _require_sqlite(path: Path) -> None:
    """Find out at once what MLflow would find out after ten tries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=20.0)
    try:
        connection.execute("pragma schema_version").fetchone()
    finally:
        connection.close()


def _require_server(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_CONNECT_SECONDS):  # noqa: S310 (the caller looked at the scheme)
            pass
    except urllib.error.HTTPError as answer:  # it may ask who we are; it is there
        answer.close()


def _find_or_create_experiment(client: "MlflowClient", uri: str, name: str, artifact_root: Path) -> str:
    from mlflow.exceptions import MlflowException

    location = None if uri.startswith("http") else artifact_root.resolve().as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise PipelineError(
            f"the experiment {name} was deleted in {uri}, where its name stays taken; expected an active one; "
            "restore it on the MLflow page or with `mlflow experiments restore`"
        )
    return found.experiment_id


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn whatever MLflow, SQLAlchemy, SQLite or the network raise into a PipelineError that names the tracking URI."""
    try:
        yield
    except Exception as error:
        foreign = type(error).__module__.startswith(("mlflow.", "sqlalchemy."))
        if foreign or isinstance(error, OSError | sqlite3.Error):  # OSError: refused, timed out, no permission, disk full
            raise _tracking_error(uri, error) from error
        raise


def _tracking_error(uri: str, error: Exception) -> PipelineError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if uri.startswith("http"):
        advice = (
            "expected a running MLflow server there; start it, or unset MLFLOW_TRACKING_URI to record in the work directory"
        )
    else:
        advice = "expected a database that can be read and written; check its disk, or choose another place with --workdir"
    return PipelineError(f"tracking at {uri} failed: {first_line}; {advice}")


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield prefix + name, text if len(text) < _PARAM_CHARACTERS else text[: _PARAM_CHARACTERS - 4] + "..."


def _batches(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _quoted(text: str) -> str:
    """A string of MLflow's search language, which knows no escape for a quote of its own kind."""
    return f'"{text}"' if "'" in text else f"'{text}'"
