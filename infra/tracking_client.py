"""What is asked of MLflow, and how the spool's entries reach it; besides `tracking_model.py` the only file that imports mlflow.

It does so inside functions, since that takes a second or two. Runs are addressed by their id through `MlflowClient`: the fluent
`mlflow.start_run` keeps a global active run and marks it FINISHED at exit, even of a worker that was stopped.
"""

import json
import logging
import os
import re
import socket
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock

from infra.errors import PipelineError
from infra.secrets import redact
from infra.tracking_model import CLIENT_ENVIRONMENT, send_model
from infra.tracking_query import newest_run
from infra.tracking_spool import AwayError, Entry

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_DATASET_DIGEST_CHARACTERS = 36
_CONNECT_SECONDS = 5.0
_DATABASE_LOCK_SECONDS = 120.0
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")
_DOUBTFUL = ("BAD_REQUEST", "INTERNAL_ERROR")  # what MLflow says of a lost database as well as of a value it cannot store
_DOUBTFUL_TRIES = 4
_ERROR_CHARACTERS = 160
_ASKED_AS = "asked_as"  # tag: the key of the entry that started the run

# Above the runs table, which shows one line of it at first.
_EXPERIMENT_NOTE = (
    'Open p01, p02, ...: each says what came out.\n\nTrials of searches: `tags.stage = "trial"`, sorted by a metric.'
)

KEY_PATTERN = r"local-[0-9a-f]{32}"  # a run that was asked for, whether MLflow has made it or not

T = TypeVar("T")


class Sender:
    """Sends entries of the spool to MLflow, in its thread; an entry that comes a second time changes nothing.

    Attributes:
        ids: MLflow's id of each run that was asked for under a key.
    """

    def __init__(self, client: "MlflowClient", uri: str, experiment_id: str, folder: Path) -> None:
        self.ids: dict[str, str] = {}
        self._client = client
        self._uri = uri
        self._experiment_id = experiment_id
        self._folder = folder
        self._is_away = False
        self._doubted: Entry | None = None
        self._num_doubts = 0
        self._params: dict[str, set[str]] = {}
        self._steps: dict[tuple[str, str], set[int]] = {}
        self._made_here: set[str] = set()

    def send(self, entries: Sequence[Entry]) -> int:
        """Send the first entry, of metrics also those that follow of the same run; how many were sent.

        Raises:
            AwayError: if the server or the database cannot be used now.
        """
        first = entries[0]
        try:
            if self._is_away:  # MLflow's client would try for a minute, and a hanging server do everything as often, later
                require_server(self._uri)
            if first["do"] == "metrics":
                group = list(takewhile(lambda entry: (entry["do"], entry["run"]) == ("metrics", first["run"]), entries))
                self._send_metrics(group)
            else:
                group = [first]
                _SENDERS[first["do"]](self, first)
        except Exception as error:
            self._is_away = _means_away(error) and not (_is_doubtful(error) and self._is_at_fault(first))
            if self._is_away:
                raise AwayError(_first_line(error)[:_ERROR_CHARACTERS]) from error
            raise
        self._is_away = False
        return len(group)

    def _is_at_fault(self, entry: Entry) -> bool:
        """Whether the entry has failed several times on end, and each time MLflow could write something else right after."""
        if entry["do"] in ("file", "image"):
            return False
        try:
            self._client.set_experiment_tag(self._experiment_id, "write_test", entry["do"])
        except Exception:
            self._doubted = None  # a database that comes back just before this test has no word against the entry
            return False
        self._num_doubts = self._num_doubts + 1 if entry is self._doubted else 1
        self._doubted = entry
        return self._num_doubts >= _DOUBTFUL_TRIES

    def _start(self, entry: Entry) -> None:
        require_server(self._uri)  # see `send`
        tags = {name: self._resolved(text) for name, text in entry["tags"].items()}
        run = self._find(entry)
        if run is None:
            tags[_ASKED_AS] = entry["run"]
            made = self._client.create_run(entry["experiment"], start_time=entry["time"], tags=tags, run_name=entry["name"])
            self._made_here.add(made.info.run_id)
            self.ids[entry["run"]] = made.info.run_id
        else:
            run_id = run.info.run_id
            self._client.update_run(run_id, status="RUNNING", name=entry["name"])
            self._tag(run_id, {**tags, _ASKED_AS: entry["run"]})
            self.ids[entry["run"]] = run_id

    def _find(self, entry: Entry) -> "Run | None":
        """The run that the entry has started already, or the one that it asks to go on with."""
        experiment = entry["experiment"]
        found: Run | None = newest_run(self._client, experiment, {_ASKED_AS: entry["run"]})
        if not found and entry["resume_tags"]:
            tags = {name: self._resolved(text) for name, text in entry["resume_tags"].items()}
            found = newest_run(self._client, experiment, tags)
        if found or entry["resume_tags"] or not entry["resume_id"]:
            return found
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(self._resolved(entry["resume_id"]))
        except MlflowException as error:
            if not _means_away(error):
                return None  # the database no longer has it
            raise
        return run if run.info.lifecycle_stage == "active" and run.info.experiment_id == experiment else None

    def _send_params(self, entry: Entry) -> None:
        from mlflow.entities import Param

        run_id = self._resolved(entry["run"])
        if run_id not in self._params:
            self._params[run_id] = set(self._client.get_run(run_id).data.params)
        new = [Param(name, text) for name, text in entry["values"].items() if name not in self._params[run_id]]
        for batch in _batches(new, _PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=batch)
            self._params[run_id] |= {param.key for param in batch}

    def _send_metrics(self, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        run_id = self._resolved(entries[0]["run"])
        new: dict[tuple[str, int], Metric] = {}
        for entry in entries:
            for name, value in entry["values"].items():
                if entry["step"] not in self._steps_of(run_id, name):
                    new.setdefault((name, entry["step"]), Metric(name, value, entry["time"], entry["step"]))
        for batch in _batches(list(new.values()), _METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=batch)
            for metric in batch:
                self._steps[run_id, metric.key].add(metric.step)

    def _steps_of(self, run_id: str, name: str) -> set[int]:
        """Steps at which the run has the metric, asked once: a resumed run has those of its earlier life."""
        if (run_id, name) not in self._steps:
            history = [] if run_id in self._made_here else self._client.get_metric_history(run_id, name)
            self._steps[run_id, name] = {metric.step for metric in history}
        return self._steps[run_id, name]

    def _send_tags(self, entry: Entry) -> None:
        self._tag(self._resolved(entry["run"]), {name: self._resolved(text) for name, text in entry["values"].items()})

    def _tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(name, text) for name, text in tags.items()])

    def _send_file(self, entry: Entry) -> None:
        path = self._folder / entry["file"]
        self._client.log_artifact(self._resolved(entry["run"]), str(path), entry["folder"] or None)

    def _send_image(self, entry: Entry) -> None:
        """MLflow's names of images are random, so that one that was sent before is looked for by its key, step and time."""
        from PIL import Image

        run_id, facts = self._resolved(entry["run"]), {name: entry[name] for name in ("key", "step")}
        sent = [Path(file.path).name for file in self._client.list_artifacts(run_id, "images")]
        parts = (entry["key"].replace("/", "~"), f"step+{entry['step']}+", f"timestamp+{entry['time']}+", "compressed")
        if not any(all(part in name for part in parts) for name in sent):  # the compressed copy is written last
            with Image.open(self._folder / entry["file"]) as image:
                self._client.log_image(run_id, image, timestamp=entry["time"], synchronous=True, **facts)

    def _send_dataset(self, entry: Entry) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        digest = entry["digest"][:_DATASET_DIGEST_CHARACTERS]
        dataset = Dataset(entry["name"], digest, source_type="local", source=json.dumps({"uri": entry["source"]}))
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", entry["context"])])]
        self._client.log_inputs(self._resolved(entry["run"]), inputs)

    def _send_model(self, entry: Entry) -> None:
        send_model(self._client, self._experiment_id, self._resolved(entry["run"]), entry)

    def _finish(self, entry: Entry) -> None:
        self._client.set_terminated(self._resolved(entry["run"]), entry["status"], entry["time"])

    def _resolved(self, text: str) -> str:
        """The text with MLflow's id in place of each key."""
        return re.sub(KEY_PATTERN, lambda match: self._id_of(match[0]), text)

    def _id_of(self, key: str) -> str:
        if key not in self.ids and (run := newest_run(self._client, self._experiment_id, {_ASKED_AS: key})):
            self.ids[key] = run.info.run_id
        return self.ids.get(key, key)


_SENDERS: dict[str, Callable[[Sender, Entry], None]] = {
    "start": Sender._start,
    "params": Sender._send_params,
    "tags": Sender._send_tags,
    "file": Sender._send_file,
    "image": Sender._send_image,
    "dataset": Sender._send_dataset,
    "model": Sender._send_model,
    "finish": Sender._finish,
}


def machine_sampler() -> Callable[[], dict[str, float]]:
    """A function that measures CPU, memory, disk, network and GPU of this machine, named as MLflow's own monitor names them.

    That monitor itself asks the server before each sample, and ends when there is no answer.
    """
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor]
    monitors = []
    for kind in kinds:
        with suppress(Exception):  # GPUMonitor: nvidia-ml-py is not installed, or there is no GPU
            monitors.append(kind())

    def sample() -> dict[str, float]:
        measured: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            measured |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": value for name, value in measured.items()}

    sample()  # the use of a CPU is counted from one call to the next
    return sample


def connect(uri: str) -> "MlflowClient":
    """A client for `uri`; whatever is wrong is found out in seconds."""
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        _require_sqlite(path)
        # MLflow's own lock leaves a gap: of three processes that made one database, one died of "duplicate column name".
        with FileLock(f"{path}.lock", timeout=_DATABASE_LOCK_SECONDS):
            return _make_client(uri)
    require_server(uri)
    return _make_client(uri)


def _make_client(uri: str) -> "MlflowClient":
    from mlflow.tracking import MlflowClient

    for name in ("mlflow.store.db.utils", "urllib3.connectionpool"):  # each try would be told, with a traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(uri)


def _require_sqlite(path: Path) -> None:
    """Find out at once what MLflow would find out after ten tries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=20.0)
    try:
        connection.execute("pragma schema_version").fetchone()
    finally:
        connection.close()


def require_server(uri: str) -> None:
    """Raise an OSError, within seconds, if `uri` is that of a server and it does not answer or says that it cannot."""
    if not uri.startswith(("http://", "https://")):
        _require_database(uri)
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_CONNECT_SECONDS):  # noqa: S310 (looked at above)
            pass
    except urllib.error.HTTPError as answer:
        answer.close()
        if answer.code >= 500:
            raise
        # else it may ask who we are; it is there


def _require_database(uri: str) -> None:
    """As `require_server`, for a database server; MLflow would try for minutes."""
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or _DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    except ValueError:  # which shows a part of a password with a "/" in it
        raise OSError(
            "its host and port cannot be told; characters such as / and @ in a password are written %2F and %40"
        ) from None
    if host and port:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()


def find_or_create_experiment(client: "MlflowClient", uri: str, name: str, artifact_root: Path) -> str:
    """Id of the experiment."""
    from mlflow.exceptions import MlflowException

    location = None if uri.startswith("http") else artifact_root.resolve().as_uri()
    try:
        return client.create_experiment(name, artifact_location=location, tags={"mlflow.note.content": _EXPERIMENT_NOTE})
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
def explained(uri: str) -> Iterator[None]:
    """Turn whatever MLflow, SQLAlchemy, SQLite or the network raise into a PipelineError that names the tracking URI."""
    try:
        yield
    except Exception as error:
        foreign = type(error).__module__.startswith(("mlflow.", "sqlalchemy."))
        if foreign or isinstance(error, OSError | sqlite3.Error):  # OSError: refused, timed out, no permission, disk full
            raise _tracking_error(uri, error) from error
        raise


def _means_away(error: Exception) -> bool:
    """Whether an entry can be sent later, as against one that MLflow, the artifact store or our own code will never take."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        # A proxy that has lost its server also says "not found" and "bad request", but not in MLflow's words.
        return error.error_code not in _REFUSALS or str(error).startswith("API request to")
    if isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError):
        return False
    return isinstance(error, OSError) or type(error).__module__ != "builtins"  # those of SQLAlchemy, boto3 and so on


def _is_doubtful(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return False
    by_proxy = str(error).startswith("API request to") and "500 error responses" not in str(error)
    return error.error_code in _DOUBTFUL and not by_proxy


def _tracking_error(uri: str, error: Exception) -> PipelineError:
    if uri.startswith("http"):
        advice = (
            "expected a running MLflow server there; start it, or unset MLFLOW_TRACKING_URI to record in the work directory"
        )
    else:
        advice = "expected a database that can be read and written; check its disk, or choose another place with --workdir"
    return PipelineError(f"tracking at {redact(uri)} failed: {_first_line(error)}; {advice}")


def _first_line(error: Exception) -> str:
    return (redact(str(error)).strip() or type(error).__name__).splitlines()[0][:300]


def _batches(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
