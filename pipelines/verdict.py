"""Is the gain of a search's winner real? The winner and the same settings without attention, trained anew with paired seeds.

A search reports the luckiest of many trials. The verdict trains again, with seeds that no trial had, and takes the difference
clip by clip. It is as long as the trials were, since that is where the winner won. A winner without attention is compared with
the best trial that has some, so that the question is always what attention adds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from infra.progress import OnProgress
from infra.storage import sha256_json, write_json
from pipelines.evaluation.significance import Difference, difference, read_hits
from pipelines.training.job import TrainJob
from tuning.search import run_search
from tuning.settings import Choice, SearchSettings
from tuning.space import PLACEMENT
from tuning.trials import SearchResult, TrialEvent, TrialRecord, rank_records

SEED = "train.seed"
_NONE = "none"
_FEW_SEEDS = 3


@dataclass(frozen=True)
class Question:
    """What the verdict compares: `placement` against none.

    Attributes:
        placement: canonical spelling of the slots with attention.
        trial: number of the trial that had it.
        others: the dotted settings that both networks share.
        won: whether that trial won the search; else its winner has no attention.
    """

    placement: str
    trial: int
    others: dict[str, Any]
    won: bool


def pose_question(result: SearchResult, configured: str) -> Question | None:
    """What to compare after a search; None if no trial with attention has come to an end.

    Args:
        result: of the search.
        configured: placement of the trials if the search does not choose it.
    """
    ranked = [record for record in rank_records(result.trials) if record.state != "failed"]
    for record in ranked:
        placement = record.overrides.get(PLACEMENT, configured)
        if placement != _NONE:
            others = {name: value for name, value in record.overrides.items() if name not in (PLACEMENT, SEED)}
            return Question(
                placement, record.number, others, won=result.best is not None and result.best.number == record.number
            )
    return None


def verdict_settings(search: SearchSettings, question: Question, first_seed: int) -> SearchSettings:
    """The grid of the verdict: with and without attention, each with every seed; nothing is stopped early.

    Args:
        search: the settings of the search.
        question: what to compare.
        first_seed: the seeds are this one and those that follow.
    """
    seeds = tuple(range(first_seed, first_seed + search.verdict_seeds))
    return SearchSettings.model_validate(
        search.model_dump()
        | {
            "method": "trials",
            "num_trials": 2 * len(seeds),
            "sampler": "grid",
            "scheduler": "none",
            "placement": "fixed",
            "space": {SEED: Choice(values=seeds), PLACEMENT: Choice(values=(question.placement, _NONE))},
            "fixed": question.others,
            "baselines": False,
            "cost": None,
            "seeds_per_trial": 1,
            "workers_per_trial": 1,
            "max_hours": None,
            "max_gpu_hours": None,
        }
    )


def reach_verdict(
    question: Question,
    search: SearchSettings,
    job: TrainJob,
    storage_dir: Path,
    *,
    on_event: Callable[[TrialEvent], None] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train what the question compares, and judge it; goes on from what an earlier run has trained.

    Args:
        question: what to compare.
        search: the settings of the search; at least one verdict seed.
        job: of a trial.
        storage_dir: gets a folder for this question, with Optuna's study and the scores of each training.
        on_event: as in `run_search`.
        on_progress: as in `run_search`.

    Returns:
        as `judge`.
    """
    from pipelines.training.final import run_final

    settings = verdict_settings(search, question, first_seed=job.train.seed + search.seeds_per_trial)
    folder = storage_dir / sha256_json([question.placement, question.others, list(settings.space[SEED].values)])[:12]  # type: ignore[union-attr]  # a Choice
    result = run_search(
        partial(run_final, job=job, num_threads=search.cpus_per_trial),
        settings,
        storage_dir=folder,
        network=job.model.name,
        on_event=on_event,
        on_progress=on_progress,
    )
    verdict = judge(question, result.trials, folder / "trials")
    write_json(folder / "verdict.json", verdict)
    return verdict


def judge(question: Question, records: Sequence[TrialRecord], trials_dir: Path) -> dict[str, Any]:
    """Compare the networks of the verdict over the seeds with which both were trained.

    Args:
        question: what is compared.
        records: the trainings.
        trials_dir: the scores of training 3 are `00003/scores.parquet` in it.

    Returns:
        plain data for JSON: `tested`, `sentence`, `placement`, `trial`, `others`, `top1` (the difference), `interval`,
        `mcnemar` (p-values by seed), `separable`, `seeds`, `by_seed` (top-1 with and without attention), `num_clips`,
        `num_failed`. If no seed has both, `tested` is false and the numbers are missing.
    """
    paths: dict[tuple[int, str], Path] = {}
    for record in records:
        path = trials_dir / f"{record.number:05d}" / "scores.parquet"
        if record.state == "completed" and path.exists():
            paths[int(record.overrides[SEED]), str(record.overrides[PLACEMENT])] = path
    seeds = sorted(seed for seed, placement in paths if placement == question.placement and (seed, _NONE) in paths)
    about = {"placement": question.placement, "trial": question.trial, "num_failed": len(records) - len(paths)}
    if not seeds:
        return {
            "tested": False,
            "sentence": "The gain was not tested: no seed was trained with and without attention.",
            **about,
        }
    hits = read_hits({f"{placement} with seed {seed}": path for (seed, placement), path in sorted(paths.items())})
    ours, theirs = (
        np.stack([hits[f"{placement} with seed {seed}"] for seed in seeds]) for placement in (question.placement, _NONE)
    )
    found = difference(ours, theirs)
    return {
        "tested": True,
        "sentence": verdict_sentence(question, found, num_clips=ours.shape[1]),
        **about,
        "others": question.others,
        "top1": found.top1,
        "interval": list(found.interval),
        "mcnemar": {str(seed): p_value for seed, p_value in zip(seeds, found.mcnemar, strict=True)},
        "separable": found.separable,
        "seeds": seeds,
        "by_seed": {str(seed): [float(a.mean()), float(b.mean())] for seed, a, b in zip(seeds, ours, theirs, strict=True)},
        "num_clips": ours.shape[1],
    }


def verdict_sentence(question: Question, found: Difference, num_clips: int) -> str:
    """The answer in words.

    Example:
        >>> question = Question("4e,5b", trial=7, others={}, won=True)
        >>> verdict_sentence(question, Difference(0.019, (0.004, 0.031), (0.01, 0.2), 2, True), num_clips=320)
        'Attention at 4e,5b adds 1.9 points of top-1 (95 % interval 0.4 to 3.1; 2 paired seeds, 320 clips).'
        >>> verdict_sentence(question, Difference(0.0, (-0.01, 0.01), (1.0, 1.0), 2, False), num_clips=320)
        'Attention at 4e,5b is not separable from seed noise: +0.0 points of top-1 (95 % interval -1.0 to +1.0; 2 paired \
seeds, 320 clips).'
    """
    where = "everywhere" if question.placement == "all" else f"at {question.placement}"
    start = f"Attention {where}" if question.won else f"The search's winner has no attention; attention {where}"
    low, high = (100 * end for end in found.interval)
    seeds = "one seed, whose noise is not known" if found.num_seeds == 1 else f"{found.num_seeds} paired seeds"
    if not found.separable:
        noise = "the noise of clips" if found.num_seeds == 1 else "seed noise"
        points = (
            f"{100 * found.top1:+.1f} points of top-1 (95 % interval {low:+.1f} to {high:+.1f}; {seeds}, {num_clips} clips)"
        )
        return f"{start} is not separable from {noise}: {points}."
    verb, low, high = ("adds", low, high) if found.top1 > 0 else ("costs", -high, -low)
    return (
        f"{start} {verb} {100 * abs(found.top1):.1f} points of top-1 "
        f"(95 % interval {low:.1f} to {high:.1f}; {seeds}, {num_clips} clips)."
    )


def untested(question: Question | None, command: str) -> dict[str, Any]:
    """What stands in the verdict's place where none was asked for, or none is possible.

    Args:
        question: what would be compared.
        command: of the search, with all its settings.
    """
    if question is None:
        sentence = "Nothing can be said of attention: no trial with attention came to an end."
        return {"tested": False, "sentence": sentence, "num_failed": 0}
    test = f"{command} --set search.verdict_seeds={_FEW_SEEDS}"
    start = f"Trial {question.trial} with attention at {question.placement}"
    beat = "won" if question.won else "is the best with attention, but a trial without won"
    sentence = f"{start} {beat}; whether that is more than seed noise was not tested."
    return {
        **{"tested": False, "sentence": sentence, "command": test, "num_failed": 0},
        **{"placement": question.placement, "trial": question.trial},
    }


def verdict_metrics(verdict: Mapping[str, Any]) -> dict[str, float]:
    """The verdict as numbers for MLflow; none if nothing was tested."""
    if not verdict["tested"]:
        return {}
    low, high = verdict["interval"]
    numbers = {"difference": verdict["top1"], "low": low, "high": high, "separable": float(verdict["separable"])}
    return {f"verdict/{name}": value for name, value in numbers.items()}
