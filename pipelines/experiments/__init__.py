"""Experiments by name: functions that return a whole configuration, or a comparison of several.

The docstrings say what they reproduce or show, the command, the hardware, and the number to reach.
"""

from collections.abc import Callable

from infra.errors import ConfigError
from infra.settings import nearest
from pipelines.comparison import Comparison
from pipelines.config import ExperimentConfig
from pipelines.experiments.ablations import attention_kinds, curves, frames, gamma
from pipelines.experiments.compare import compare
from pipelines.experiments.demo import demo
from pipelines.experiments.diving48 import diving48, diving48_rates, diving48_smoke
from pipelines.experiments.folder import folder
from pipelines.experiments.paper import table2, test_time
from pipelines.experiments.placement import placement, placement_supernet
from pipelines.experiments.something_v1 import something_v1, something_v1_smoke

_ALL: tuple[Callable[[], ExperimentConfig | Comparison], ...] = (
    demo,
    compare,
    placement,
    placement_supernet,
    something_v1,
    something_v1_smoke,
    curves,
    frames,
    attention_kinds,
    gamma,
    table2,
    test_time,
    diving48,
    diving48_smoke,
    diving48_rates,
    folder,
)
EXPERIMENTS = {function.__name__: function for function in _ALL}


def find_experiment(name: str) -> Callable[[], ExperimentConfig | Comparison]:
    """The experiment of that name.

    Raises:
        ConfigError: if there is none; the nearest names are given.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"{name!r} is not an experiment; {nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]
