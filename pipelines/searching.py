"""What the stage `search` does: trials or a supernet, the verdict on the winner, and the page that shows both.

<output>/study.db, trials/                the search
<output>/supernet/                        the supernet, with search.method = supernet
<output>/verdict/<question>/              the trainings of the verdict
<output>/page/                            index.html, interactive.html, leaderboard.json, search.json, figures/
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.storage import atomic_path, write_json
from models import model_slots
from models.placement import parse_placement
from pipelines.graph import StageContext
from pipelines.training.job import TrainJob
from pipelines.training.trial import TrialRuns, run_trial, trial_job
from pipelines.verdict import pose_question, reach_verdict, untested, verdict_metrics
from tuning.leaderboard import leaderboard
from tuning.process import Objective
from tuning.search import run_search
from tuning.settings import Choice, SearchSettings
from tuning.space import PLACEMENT, baseline_placements
from tuning.trials import STUDY_FILE, SearchResult

if TYPE_CHECKING:
    from pipelines.training.supernet import SupernetResult

_BUDGET = ("num_trials", "max_hours", "max_gpu_hours", "max_concurrent_trials", "verdict_seeds", "supernet_top")


@dataclass(frozen=True)
class SearchTask:
    """What is searched on what.

    Attributes:
        job: the training that the search is for, in full length.
        search: the settings of the search.
        num_val_clips: on which trials are judged.
        num_classes: K.
    """

    job: TrainJob
    search: SearchSettings
    num_val_clips: int
    num_classes: int

    @property
    def trial(self) -> TrainJob:
        """The job of a trial: the same training, shorter."""
        job = self.job
        return trial_job(job.shards_place, job.model, job.train, self.search, val_split=job.val_split)

    @property
    def slots(self) -> tuple[str, ...]:
        """Of the configured backbone, in the order of the network."""
        return model_slots(self.job.model.name)


@dataclass(frozen=True)
class Searched:
    """What came of a search.

    Attributes:
        task: what was searched.
        result: its trials.
        supernet: scores of all placements, with `search.method` = `supernet`.
        verdict: as `pipelines.verdict.judge` or `untested` give it.
        rows: the leaderboard.
    """

    task: SearchTask
    result: SearchResult
    supernet: "SupernetResult | None"
    verdict: dict[str, Any]
    rows: list[dict[str, Any]]


def search_and_judge(context: StageContext, task: SearchTask, command: str, search_command: str) -> dict[str, Any]:
    """Search, let the winner stand against no attention, and write the page; goes on from where an earlier run was.

    Args:
        context: of the stage.
        task: what is searched.
        command: of the experiment, without the settings of the search.
        search_command: of the experiment, with all settings.

    Returns:
        the stage's summary: `overrides` of the winner, `trials` (the leaderboard), `verdict` and `text`.
    """
    _go_on_from_earlier(context)
    supernet = _train_supernet(context, task) if task.search.method == "supernet" else None
    with TrialRuns(context.tracker, context.run.run_id, command) as runs:
        result = run_search(
            _objective(task),
            task.search if supernet is None else shortlist(task, supernet.top),
            storage_dir=context.output_dir,
            network=task.job.model.name,
            on_event=runs.on_event,
            on_progress=context.on_progress,
        )
    assert result.best is not None
    verdict = _reach_verdict(context, task, result, command, search_command)
    searched = Searched(task, result, supernet, verdict, leaderboard(result, command))
    _publish(context, searched)
    best = result.best
    settings = ", ".join(f"{name}={value}" for name, value in best.overrides.items())
    note = f" ({result.note})" if result.note else ""
    text = f"best of {len(searched.rows)} trials{note}, {best.top1:.1%}: {settings}; {verdict['sentence']}"
    return {"overrides": best.overrides, "trials": searched.rows, "verdict": verdict, "text": text}


def _go_on_from_earlier(context: StageContext) -> None:
    """Begin with the trials of a finished search that differs in nothing but in how long it was allowed to search."""
    if (context.output_dir / STUDY_FILE).exists():
        return
    wanted = _without_budget(context.config.model_dump(mode="json"))
    for earlier in context.earlier:
        found, num_trials = _without_budget(earlier.manifest["config"]), earlier.manifest["config"]["search"]["num_trials"]
        same = all(found[section] == wanted[section] for section in found)
        if same and 0 < num_trials <= context.config.search.num_trials:
            for name in ("supernet", "verdict"):
                if (earlier.path / name).exists():
                    shutil.copytree(earlier.path / name, context.output_dir / name, dirs_exist_ok=True)
            with atomic_path(context.output_dir / STUDY_FILE) as temporary:  # the last, since it stands for all
                shutil.copyfile(earlier.path / STUDY_FILE, temporary)
            return


def _without_budget(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"search": {name: value for name, value in config["search"].items() if name not in _BUDGET}}


def shortlist(task: SearchTask, top: list[str]) -> SearchSettings:
    """The placements that are trained after a supernet: baselines, its best, and seeded random ones.

    The random ones fill up to `search.num_trials`: a rank correlation over the best alone would say little of the other
    thousand. All else is as configured.

    Args:
        task: what is searched.
        top: the supernet's best placements.
    """
    slots = task.slots
    wanted = [*map(str, baseline_placements(slots)), *top]
    rng = np.random.default_rng(task.search.seed)
    while len(set(wanted)) < min(task.search.num_trials, 2 ** len(slots)):
        wanted.append(str(parse_placement(int(rng.integers(2 ** len(slots))), slots)))
    values = tuple(dict.fromkeys(wanted))
    grid = {"method": "trials", "num_trials": len(values), "sampler": "grid", "scheduler": "none", "placement": "fixed"}
    chosen = {"space": {PLACEMENT: Choice(values=values)}, "baselines": False}
    return SearchSettings.model_validate(task.search.model_dump() | grid | chosen)


def _objective(task: SearchTask) -> Objective:
    return partial(run_trial, job=task.trial, search=task.search)


def _train_supernet(context: StageContext, task: SearchTask) -> "SupernetResult":
    from pipelines.training.supernet import search_supernet

    def on_epoch(metrics: Any) -> None:
        context.run.log_metrics({f"supernet/{name}": value for name, value in metrics.to_dict().items()}, step=metrics.epoch)

    folder = context.output_dir / "supernet"
    folder.mkdir(exist_ok=True)
    return search_supernet(task.job, task.search, storage_dir=folder, on_epoch=on_epoch, on_progress=context.on_progress)


def _reach_verdict(
    context: StageContext, task: SearchTask, result: SearchResult, command: str, search_command: str
) -> dict[str, Any]:
    question = pose_question(result, configured=task.job.model.placement) if task.slots else None
    if question is None or task.search.verdict_seeds == 0:
        return untested(question, search_command)
    with TrialRuns(context.tracker, context.run.run_id, command, stage="verdict") as runs:
        return reach_verdict(
            question,
            task.search,
            task.trial,
            context.output_dir / "verdict",
            on_event=runs.on_event,
            on_progress=_say("trainings of the verdict", context.on_progress),
        )


def _say(what: str, on_progress: Callable[[int, int, str], None]) -> Callable[[int, int, str], None]:
    """The same progress with other words: `run_search` speaks of trials and of the best."""

    def say(done: int, total: int, _: str) -> None:
        on_progress(done, total, what)

    return say


def _publish(context: StageContext, searched: Searched) -> None:
    """The page in the store, and page, pictures, tables and the verdict in MLflow."""
    from pipelines.reports.search import FILE_NAME, INTERACTIVE, describe_search, search_metrics, write_search

    folder = context.output_dir
    results = write_search(folder, f"sagsm: {context.experiment}: search", searched, study_dir=folder)
    write_json(folder / "leaderboard.json", searched.rows)
    for name in (FILE_NAME, INTERACTIVE):
        context.run.log_file(folder / name, "report")
    for name in ("leaderboard.json", "search.json"):
        context.run.log_file(folder / name, "tables")
    for path in sorted((folder / "figures").iterdir()):
        context.run.log_file(path, "figures")
    best = searched.result.best
    assert best is not None
    context.run.log_metrics({"val/top1": best.top1 or 0.0, **verdict_metrics(searched.verdict), **search_metrics(results)})
    separable = str(searched.verdict.get("separable", "not tested"))
    context.run.set_tags({"verdict": searched.verdict["sentence"], "separable": separable, "winner": best.placement})
    context.run.describe(describe_search(results, context.run.run_id))
