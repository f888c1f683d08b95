"""The record of what was done, in MLflow: pipeline run -> stage runs -> trial runs. Each run has one writer.

Once a `Tracker` is there, work does not wait for the server: all is written to a journal in the work directory and sent by a
thread (`infra/tracking_spool.py`), now or when the server is back.
"""

import hashlib
import os
import re
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ConfigError, PipelineError
from infra.provenance import git_commit, has_ended, this_process, user_name
from infra.secrets import redact, split_userinfo
from infra.tracking_client import Sender, connect, explained, find_or_create_experiment
from infra.tracking_model import fetch_model
from infra.tracking_query import all_runs, newest_run
from infra.tracking_run import RunStatus, TrackedRun, now
from infra.tracking_spool import Spool, decode, has_entries

__all__ = [
    "RecordedRun",
    "RunStatus",
    "TrackedRun",
    "Tracker",
    "download_model",
    "embedded_uri",
    "experiment_ids",
    "has_runs",
    "is_all_sent",
    "recorded_runs",
    "spool_folder",
    "tracking_uri",
    "unsent_files",
]

_WRITER = "writer"
_REPLAY_SECONDS = 60.0
_START_SECONDS = 5.0
_CLOSE_SECONDS = 30.0


def tracking_uri(workdir: Path) -> str:
    """Where runs are recorded: `MLFLOW_TRACKING_URI` if it is set, else a SQLite file in the work directory.

    A user name and a password in the address of a server go from there into the variables in which MLflow's client looks for
    them, since addresses are shown in messages.

    Raises:
        ConfigError: if those variables name somebody else.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri.startswith(("http://", "https://")):
        return uri or embedded_uri(workdir)
    uri, *given = split_userinfo(uri)
    for name, value in zip(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), given, strict=True):
        if value and os.environ.setdefault(name, value) != value:
            raise ConfigError(
                f"MLFLOW_TRACKING_URI and {name} differ in who asks; expected one of them: leave it out of the URI"
            )
    os.environ["MLFLOW_TRACKING_URI"] = uri
    return uri


def embedded_uri(workdir: Path) -> str:
    """The SQLite file in the work directory."""
    return f"sqlite:///{workdir.resolve() / 'mlflow.db'}"


def experiment_ids(uri: str) -> dict[str, str]:
    """Id by name of the experiments that are recorded at `uri`, the newest first, without MLflow's own empty one.

    Raises:
        PipelineError: if the database or the server cannot be used.
    """
    with explained(uri):
        found = connect(uri).search_experiments(order_by=["creation_time DESC"])
    return {experiment.name: experiment.experiment_id for experiment in found if experiment.experiment_id != "0"}


@dataclass(frozen=True)
class RecordedRun:
    """A run as MLflow has it."""

    run_id: str
    name: str
    tags: Mapping[str, str]


def recorded_runs(uri: str, stage: str) -> list[RecordedRun]:
    """Runs with this tag `stage`, of all experiments at `uri`, the newest first; none if there is no database.

    Raises:
        PipelineError: if the database or the server cannot be used.
    """
    if _is_missing(uri):
        return []
    numbers = list(experiment_ids(uri).values())
    with explained(uri):
        found = all_runs(connect(uri), numbers, {"stage": stage})
    return [RecordedRun(run.info.run_id, run.info.run_name, run.data.tags) for run in found]


def has_runs(uri: str, experiment_id: str, stage: str) -> bool:
    """Whether an experiment at `uri` has a run with this tag `stage`.

    Raises:
        PipelineError: if the database or the server cannot be used.
    """
    with explained(uri):
        return newest_run(connect(uri), experiment_id, {"stage": stage}) is not None


def download_model(uri: str, model: str, folder: Path) -> Path:
    """Fetch the files of a registered network, as training wrote them.

    Args:
        uri: as `tracking_uri` gives it.
        model: models:/NAME@ALIAS or models:/NAME/VERSION.
        folder: an existing one, for the files.

    Returns:
        Where they are.

    Raises:
        ConfigError: if nothing is registered so.
        PipelineError: if the database or the server cannot be used.
    """
    if _is_missing(uri):
        raise ConfigError(f"--model {model}: there is no {uri}, where it would be registered; give the right --workdir")
    with explained(uri):
        return fetch_model(connect(uri), uri, model, folder)


def is_all_sent(uri: str, artifact_root: Path) -> bool:
    """Whether no earlier process has left anything that the next `Tracker` would send."""
    return not has_entries(spool_folder(uri, artifact_root))


def unsent_files(workdir: Path) -> list[Path]:
    """Folders outside the journals that records which are still to be sent name: networks to be registered."""
    journals = (workdir / "mlflow-spool").glob("*/*.journal")
    return [Path(entry["files"]) for path in journals for entry in decode(path.read_bytes())[0] if "files" in entry]


class Tracker:
    """An MLflow experiment to which runs are written; it is made if it does not exist.

    What an earlier process could not send any more is sent first.

    Args:
        uri: as `tracking_uri` gives it; `sqlite:////absolute/path.db` or `http(s)://...`.
        experiment: name of the experiment.
        artifact_root: folder for the files of runs. A server ignores it and keeps files where it was told to. Beside it lies
            `mlflow-spool`, what has not been sent yet.

    Raises:
        PipelineError: within seconds, if the database or the server cannot be used.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: Path) -> None:
        self.uri = uri
        self._runs: list[TrackedRun] = []
        self._is_closed = False
        self._starting = threading.Lock()
        folder = spool_folder(uri, artifact_root)
        with explained(uri):
            self._client = connect(uri)
            self.experiment_id = find_or_create_experiment(self._client, uri, experiment, artifact_root)
            self._sender = Sender(self._client, uri, self.experiment_id, folder)
            self._spool = Spool(folder, self._sender.send, f"MLflow at {redact(uri)}")
        self._spool.flush(_REPLAY_SECONDS)

    def start_run(
        self,
        name: str,
        *,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        resume_id: str | None = None,
        resume_tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """Start a run, or go on with an earlier one, to be used as a context manager.

        If the server has gone away, the run is started when it is back, and can be used as if it were there.

        Args:
            name: shown in the runs table, whose column is narrow: the distinguishing part first ("t012 3a+4e").
            parent: id of the run above it in the tree.
            tags: stage, fingerprint, dataset and so on, besides those that say who ran which commit.
            resume_id: id of a run to go on with, so that a resumed stage draws one continuous curve. If the database no longer
                has it, a new run is started: losing the database loses history, not work.
            resume_tags: go on with the newest run that carries all of these, if there is any.

        Raises:
            PipelineError: if MLflow will not have it; also after `finish_open_runs`.
        """
        everywhere = {"mlflow.source.name": "sagsm", "mlflow.source.type": "LOCAL", "mlflow.user": user_name()}
        everywhere[_WRITER] = this_process()
        if commit := git_commit():
            everywhere["mlflow.source.git.commit"] = commit
        if parent is not None:
            everywhere["mlflow.parentRunId"] = parent
        key = f"local-{uuid.uuid4().hex}"
        entry = {"do": "start", "run": key, "experiment": self.experiment_id, "name": name, "time": now()}
        entry |= {"tags": {**everywhere, **(tags or {})}, "resume_id": resume_id, "resume_tags": dict(resume_tags or {})}
        with self._starting:
            if self._is_closed:
                raise PipelineError(f"the run {name!r} was not started, since everything is being stopped")
            number = self._spool.append(entry)
            run = TrackedRun(key, name, self._spool, self._sender.ids)
            self._runs.append(run)
        if self._spool.wait(number, _START_SECONDS) and key not in self._sender.ids:
            raise PipelineError(
                f"the run {name!r} was not started, since MLflow at {redact(self.uri)} refused it; the log says why"
            )
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

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Wait until all is sent, but not longer than `seconds`; what then is left is kept on the disk, and a line says so."""
        self._spool.close(seconds)

    def close_abandoned_runs(self) -> None:
        """End as KILLED the runs whose writer is gone without a word, as after SIGKILL or a power loss of this machine."""
        with explained(self.uri):
            running = self._client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
            for run in running:
                if has_ended(run.data.tags.get(_WRITER, "")):
                    self._client.set_terminated(run.info.run_id, "KILLED")

    def next_name(self, prefix: str, text: str) -> str:
        """A short name that counts up, "p07 wide search" after "p06 demo": the column of names shows about eight letters."""
        condition = f"attributes.run_name LIKE '{prefix}%'"
        with explained(self.uri):
            newest = self._client.search_runs([self.experiment_id], condition, order_by=["start_time DESC"], max_results=100)
        numbers = [re.match(rf"{prefix}(\d+)\b", run.info.run_name) for run in newest]
        return f"{prefix}{max((int(number[1]) for number in numbers if number), default=0) + 1:02d} {text}"


def _is_missing(uri: str) -> bool:
    """Whether it is a database that nobody has made yet; who only asks must not make it."""
    return uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()


def spool_folder(uri: str, artifact_root: Path) -> Path:
    """Of the journals; one for each server, since what was meant for one must not reach another."""
    return artifact_root.absolute().parent / "mlflow-spool" / hashlib.sha256(uri.encode()).hexdigest()[:8]
