"""Experiments by name: functions that return a whole configuration; the docstrings say what they show and what it takes."""

from collections.abc import Callable

from infra.errors import ConfigError
from infra.settings import nearest
from pipelines.config import ExperimentConfig
from pipelines.experiments.demo import demo
from pipelines.experiments.diving48 import diving48, diving48_smoke
from pipelines.experiments.folder import folder
from pipelines.experiments.something_v1 import something_v1, something_v1_smoke

EXPERIMENTS: dict[str, Callable[[], ExperimentConfig]] = {
    function.__name__: function for function in (demo, something_v1, something_v1_smoke, diving48, diving48_smoke, folder)
}


def find_experiment(name: str) -> Callable[[], ExperimentConfig]:
    """The experiment of that name.

    Raises:
        ConfigError: if there is none; the nearest names are given.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"{name!r} is not an experiment; {nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]
