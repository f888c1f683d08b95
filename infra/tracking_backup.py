"""The embedded MLflow in a backup: a copy of its database while runs write to it, and that copy's way into a work directory.

MLflow keeps absolute addresses of files; those that lead into the old work directory are made to lead into the new one.
"""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

from infra.errors import DataError, PipelineError
from infra.tracking_spool import decode, encode

ARTIFACTS = "mlflow-artifacts"
_LOCKED_SECONDS = 120.0
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def copy_database(source: Path, target: Path) -> int:
    """Copy a SQLite database as it is at one moment, whoever writes to it; returns its number of runs.

    Args:
        source: an existing database.
        target: a new file.

    Raises:
        PipelineError: if others keep it locked for two minutes, or it cannot be read.
    """
    give_up = time.monotonic() + _LOCKED_SECONDS

    def on_step(status: int, remaining: int, total: int) -> None:  # noqa: ARG001
        if remaining and time.monotonic() > give_up:
            raise PipelineError(f"{source} is locked by another program for {_LOCKED_SECONDS:.0f} s; end it, then run again")

    try:
        with closing(sqlite3.connect(source, timeout=1.0)) as there, closing(sqlite3.connect(target)) as here:
            there.backup(here, progress=on_step)
        return check_database(target)
    except sqlite3.Error as error:
        raise PipelineError(
            f"{source} cannot be copied: {error}; check it with `sqlite3 {source} 'pragma quick_check'`"
        ) from error


def check_database(database: Path) -> int:
    """Check a copy of the database; returns its number of runs.

    Raises:
        DataError: if it is damaged.
    """
    try:
        with closing(sqlite3.connect(database)) as connection:
            [(verdict,), *_] = connection.execute("pragma quick_check(1)").fetchall()
            if verdict == "ok":
                return int(connection.execute("select count(*) from runs").fetchone()[0])
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    raise DataError(
        f"{database} is a damaged copy of MLflow's database ({verdict}); expected a whole one; take an older backup"
    )


def relocate_database(database: Path, old: Path, new: Path) -> None:
    """Let a copied database serve another work directory; runs that were at work are KILLED, since nobody goes on with them.

    Args:
        database: the copy, in which nobody writes.
        old: the work directory that it was copied from.
        new: the one that it is for.
    """
    before, after = ((workdir / ARTIFACTS).as_uri() for workdir in (old, new))
    with closing(sqlite3.connect(database)) as connection, connection:
        for table, column in _ADDRESSES:
            connection.execute(
                f"update {table} set {column} = ? || substr({column}, ?) "  # noqa: S608 (our own names)
                f"where {column} = ? or substr({column}, 1, ?) = ?",
                (after, len(before) + 1, before, len(before) + 1, f"{before}/"),
            )
        connection.execute(
            "update runs set status = 'KILLED', end_time = ? where status = 'RUNNING'", (int(time.time() * 1000),)
        )


def relocate_journal(data: bytes, old: Path, new: Path) -> bytes:
    """The journal of what was not sent yet, with the networks that it names in the new work directory."""
    entries = decode(data)[0]
    for entry in entries:
        if "files" in entry and Path(entry["files"]).is_relative_to(old):
            entry["files"] = str(new / Path(entry["files"]).relative_to(old))
    return b"".join(map(encode, entries))
