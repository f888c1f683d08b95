"""What tests of tracking share."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.tracking import Tracker


@pytest.fixture
def make_tracker(empty_database: Path, tmp_path: Path) -> Iterator[Callable[[], Tracker]]:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    made: list[Tracker] = []

    def make() -> Tracker:
        made.append(Tracker(f"sqlite:///{tmp_path}/mlflow.db", "demo", tmp_path / "artifacts"))
        return made[-1]

    yield make
    for tracker in made:
        tracker.close(0)


@pytest.fixture
def tracker(make_tracker: Callable[[], Tracker]) -> Tracker:
    return make_tracker()
