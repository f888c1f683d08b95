"""What the process of a trial does: it calls the objective and reports its epochs to Ray Tune."""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import tune

from tuning.schedulers import BEST

Report = Callable[[dict[str, float]], None]
Objective = Callable[[dict[str, Any], Report, Path], None]
"""Called as `objective(overrides, report, trial_dir)` in a process that trains one trial at a time, and after it another one.

It comes from an importable module (a `functools.partial` of such a function will do) and calls `report(metrics)` once after
each epoch, which raises when the trial shall go on no more. It keeps its files in `trial_dir`: those that nobody needs once it
has ended, such as checkpoints, in the folder `SCRATCH` there.
"""

NUMBER = "number"
OVERRIDES = "overrides"
METRICS = "metrics"
STOP = "stop"
"""A file in the trial's folder: the driver wants it to end."""


class StoppedError(Exception):
    """The scheduler has seen enough of the trial."""


def run_objective(config: dict[str, Any], *, objective: Objective, metric: str, trials_dir: Path) -> None:
    """Run one trial to its end, or until it is asked to stop.

    Args:
        config: the dotted settings and the number of the trial, as `Searcher` gives them.
        objective: trains.
        metric: must be in each report, finite.
        trials_dir: holds the folders of the trials.

    Raises:
        ValueError: if the metric is not reported or not finite.
        RuntimeError: if nothing is reported.
    """
    best = -math.inf

    def report(metrics: dict[str, float]) -> None:
        nonlocal best
        if metric not in metrics:
            raise ValueError(f"the objective reported {sorted(metrics)}; expected {metric} among them")
        value = float(metrics[metric])
        if not math.isfinite(value):
            raise ValueError(f"{metric} is {value}; expected a finite number, so the trial has diverged")
        best = max(best, value)
        tune.report({BEST: best, METRICS: {name: float(number) for name, number in metrics.items()}})  # waits for the driver
        if (trial_dir / STOP).exists():
            raise StoppedError

    trial_dir = trial_dir_of(trials_dir, config[NUMBER])
    trial_dir.mkdir(parents=True, exist_ok=True)
    with suppress(StoppedError):
        objective(config[OVERRIDES], report, trial_dir)
    if best == -math.inf:
        raise RuntimeError(f"the objective returned without a report of {metric}")


def trial_dir_of(trials_dir: Path, number: int) -> Path:
    """The folder of a trial."""
    return trials_dir / f"{number:05d}"
