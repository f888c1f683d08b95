"""What `sagsm plan` says of the training to come: the learning rate by epoch, the clips a step, the steps an epoch."""

from collections.abc import Sequence
from typing import Any

from pipelines.config import ExperimentConfig
from pipelines.graph import PlannedStage
from pipelines.training.optim import learning_rate_at

_MOST_SHOWN = 8  # epochs


def preview(config: ExperimentConfig, planned: Sequence[PlannedStage]) -> dict[str, Any]:
    """How the experiment will train, as plain data.

    Args:
        config: its settings; a search may still change the peak of the learning rate.
        planned: its stages; finished shards tell the number of clips, as do the settings of a generated dataset.

    Returns:
        `preset`; `learning_rates` of each epoch's first step; `micro_batch`, `accumulation`, `num_workers` (0: one a GPU);
        `effective_batch` and `steps_per_epoch`, None while the number of workers or of clips is not known; and
        `peak_is_searched`.
    """
    train = config.train
    num_clips = _num_clips(config, planned)
    effective = train.batch_size * train.accumulation * train.num_workers or None
    return {
        "preset": config.preset,
        "learning_rates": [learning_rate_at(epoch, 1, train) for epoch in range(train.epochs)],
        "micro_batch": train.batch_size,
        "accumulation": train.accumulation,
        "num_workers": train.num_workers,
        "effective_batch": effective,
        "steps_per_epoch": -(-num_clips // effective) if num_clips and effective else None,
        "peak_is_searched": config.search.num_trials > 0,
    }


def preview_text(training: dict[str, Any]) -> str:
    """Two lines of what `preview` gave."""
    rates: list[float] = training["learning_rates"]
    shown = ", ".join(f"{epoch + 1}: {rates[epoch]:.3g}" for epoch in _shown_epochs(rates))
    searched = "; the search may choose another peak" if training["peak_is_searched"] else ""
    parts = f"micro batch {training['micro_batch']} x accumulation {training['accumulation']}"
    if training["effective_batch"] is None:
        clips = f"{training['micro_batch'] * training['accumulation']} clips a step for each worker ({parts})"
    else:
        clips = f"{training['effective_batch']} clips a step ({parts} x workers {training['num_workers']})"
    steps = "" if training["steps_per_epoch"] is None else f", {training['steps_per_epoch']:,} steps an epoch"
    return f"learning rate by epoch: {shown}{searched}\nbatch: {clips}{steps}; preset {training['preset']}"


def _shown_epochs(rates: Sequence[float]) -> list[int]:
    """The first, the last and the highest, and some between, evenly spread."""
    last = len(rates) - 1
    spread = {round(last * part / (_MOST_SHOWN - 2)) for part in range(_MOST_SHOWN - 1)}
    return sorted(spread | {list(rates).index(max(rates))})


def _num_clips(config: ExperimentConfig, planned: Sequence[PlannedStage]) -> int | None:
    """Of an epoch; None while the shards are not written and the dataset is not a generated one."""
    shards = next((item.artifact for item in planned if item.stage.name == "shards" and item.artifact), None)
    found: int | None = config.dataset.synthetic.num_train if config.dataset.synthetic else None
    if shards is not None:
        found = shards.summary["by_split"]["train"]["kept"] if "train" in shards.summary["by_split"] else None
    subset = config.train.subset
    return found if found is None or subset is None else min(found, subset)
