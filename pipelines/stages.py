"""The whole pipeline: one table, and the function of each stage.

    index -> shards -> audit
                    -> search -> train -> evaluate -> insight -> report

A stage takes a context, the artifacts of the stages it needs, and its sections of the experiment; it writes files into
`context.output_dir` and returns a small summary. Raise a stage's version when its code gives other results for the same input.
"""

import json
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from infra import cluster
from infra.filesystems import Folder
from infra.settings import Settings, changed_settings
from infra.storage import require_free_space, write_json
from pipelines.artifacts import Artifact, shards_place
from pipelines.config import ExperimentConfig
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.experiments import find_experiment
from pipelines.forecast import forecast_error
from pipelines.graph import Stage, StageContext
from pipelines.insight.settings import InsightSettings
from pipelines.reproduction import Expected, card_markdown, reproduction_card
from pipelines.training.settings import ModelSettings, TrainSettings
from preprocessing.archives import open_source
from preprocessing.datasets import (
    DatasetSettings,
    find_archive,
    index_videos,
    load_video_index,
    raw_listing,
    save_video_index,
    val_split,
)
from preprocessing.finish import finish_shard_set
from preprocessing.index import dataset_json, read_dataset_info
from preprocessing.planning import plan_shards
from preprocessing.sandbox import missing_layers, sandbox_layers
from preprocessing.shards import ShardReport, ShardSettings
from preprocessing.synthetic import generate
from tuning.settings import SearchSettings

_MINIMUM_SHARD_BYTES = 50 * 10**6


def index(context: StageContext, dataset: DatasetSettings) -> dict[str, Any]:
    """Annotation files -> videos.parquet and labels.json; a generated dataset is generated first, into `raw/`."""
    if dataset.synthetic is not None:
        assert dataset.name != "folder"  # the settings refuse it
        root, where = Folder(context.output_dir / "raw"), "raw"
        generate(dataset.synthetic, context.output_dir / "raw", dataset.name, context.on_progress)
    else:
        assert dataset.root is not None  # raw_listing has refused a dataset without any source
        root = Folder(dataset.root)
        where = root.url
    found = index_videos(dataset, root)
    archive = find_archive(dataset, root)
    save_video_index(found, context.output_dir)
    splits = {split: int(count) for split, count in _count(found.videos["split"].to_pylist()).items()}
    context.run.log_metrics({f"videos/{split}": count for split, count in splits.items()})
    text = f"{found.videos.num_rows:,} videos of {len(found.label_names)} classes"
    summary = {"root": where, "archive": archive, "dataset": dataset.dataset_name, "splits": splits}
    return {**summary, "num_classes": len(found.label_names), "text": text}


def shards(context: StageContext, index: Artifact, shards: ShardSettings) -> dict[str, Any]:
    """Videos -> WebDataset tars of JPEG frames with their index and ledger (preprocessing/FORMAT.md); Ray tasks."""
    from preprocessing.tasks import write_shards

    where = index.summary["root"]
    root = Folder(where if "://" in where else index.path / where)
    found = load_video_index(index.path)
    require_free_space(context.output_dir, _MINIMUM_SHARD_BYTES, "writing shards")
    output = Folder(context.output_dir if shards.output is None else f"{shards.output}/{context.output_dir.stem}")
    plans = plan_shards(found.videos, videos_per_shard=shards.videos_per_shard, seed=shards.seed)
    spool = context.output_dir / "spool"
    source, in_archive = open_source(root, index.summary["archive"], plans, spool, output, shards, context.on_progress)
    started = time.monotonic()
    reports = write_shards(plans, source, output, shards, context.on_progress)
    seconds = time.monotonic() - started
    counts = finish_shard_set(output, found, plans, shards, index.summary["dataset"])
    shutil.rmtree(spool, ignore_errors=True)
    info = read_dataset_info(output)
    context.run.log_metrics({f"shards/{name}": counts[name] for name in ("kept", "rejected", "frames", "bytes")})
    context.run.log_text(dataset_json(info).decode(), "conf/dataset.json")
    text = (
        f"{counts['kept']:,} videos kept, {counts['rejected']:,} rejected; "
        f"{counts['frames']:,} frames, {counts['bytes'] / 1e6:,.1f} MB in {len(info.shards)} shards"
    )
    context.run.set_tags({"decoding_sandbox": ", ".join(sandbox_layers())})
    if missing := missing_layers():
        text += f"; this machine's decoding sandbox lacks: {', '.join(missing)}"
    if in_archive is not None and in_archive.num_hostile:
        text += f"; {in_archive.num_hostile} members of the archive refused"
    text += _log_forecast_error(context, reports, seconds)
    place = None if shards.output is None else output.url
    summary = {**counts, "dataset": info.dataset, "label_passport": info.label_passport, "place": place, "text": text}
    return {**summary, "archive": None if in_archive is None else asdict(in_archive)}


def audit(context: StageContext, shards: Artifact) -> dict[str, Any]:
    """Read every shard again, compare it with its hash, and show what is in it: a page with contact sheets and rejects."""
    from pipelines.reports.audit import audit_metrics, describe_audit, write_audit

    summary = write_audit(shards_place(shards), context.output_dir)
    _log_folder(context, context.output_dir)
    _log_input(context, shards, "audit")
    context.run.log_metrics(audit_metrics(summary))
    context.run.describe(describe_audit(summary, context.run.run_id))
    return {**summary, "text": summary["verdict"]}


def search(
    context: StageContext, shards: Artifact, search: SearchSettings, model: ModelSettings, train: TrainSettings
) -> dict[str, Any]:
    """Where should attention go, and is the gain real? Trials by Ray Tune and Optuna, a verdict, and a page."""
    from pipelines.searching import SearchTask, search_and_judge
    from pipelines.training.job import TrainJob

    if search.num_trials == 0:
        return {"overrides": {}, "trials": [], "text": "no trials asked for; training goes by the settings"}
    _log_input(context, shards, "search")
    split = _val_split(shards)
    job = TrainJob(context.experiment, shards_place(shards), model, train, val_split=split)
    names = read_dataset_info(shards_place(shards)).label_names
    task = SearchTask(job, search, num_val_clips=shards.summary["by_split"][split]["kept"], num_classes=len(names))
    return search_and_judge(context, task, _command(context, without="search."), _command(context))


def train(
    context: StageContext, shards: Artifact, search: Artifact, model: ModelSettings, train: TrainSettings
) -> dict[str, Any]:
    """Train with what the search found: Ray Train, data-parallel; goes on from the newest good checkpoint."""
    from pipelines.evaluation.figures import draw_curves
    from pipelines.training.job import TrainJob, save_model
    from pipelines.training.rank import train_locally
    from pipelines.training.room import share_of
    from pipelines.training.worker import train_on_cluster

    job = TrainJob(context.experiment, shards_place(shards), model, train, val_split=_val_split(shards)).with_overrides(
        search.summary["overrides"]
    )
    context.run.log_params({f"chosen.{name}": value for name, value in search.summary["overrides"].items()})
    _log_input(context, shards, "train")

    def on_epoch(metrics: Any) -> None:
        context.run.log_metrics(metrics.to_dict(), step=metrics.epoch)

    context.on_progress(0, train.epochs, f"epochs, from {model.start}")
    plan = None if context.at_once == 1 else share_of(train.num_workers, cluster.node_resources(), context.at_once)
    result = (train_locally if train.local else partial(train_on_cluster, plan=plan))(
        job,
        storage_dir=context.output_dir,
        mirror=None if train.checkpoints is None else Folder(train.checkpoints) / context.output_dir.stem,
        on_epoch=on_epoch,
        on_progress=context.on_progress,
    )
    assert result.best is not None
    assert result.best_weights is not None
    save_model(context.output_dir / "model", job, result.best_weights)
    history = [metrics.to_json() for metrics in result.history]
    write_json(context.output_dir / "history.json", history)
    (context.output_dir / "figures").mkdir(exist_ok=True)
    context.run.log_file(draw_curves(context.output_dir / "figures" / "curves.png", history), "figures")
    context.run.log_file(context.output_dir / "model" / "model.json", "conf")
    best = result.best
    text = f"{len(history)} epochs, best val top-1 {best.val_top1:.1%} in epoch {best.epoch + 1}; from {model.start}"
    return {"best_epoch": best.epoch, "best_val_top1": best.val_top1, "epochs": len(history), "text": text}


def evaluate(context: StageContext, shards: Artifact, train: Artifact, evaluate: EvaluateSettings) -> dict[str, Any]:
    """Score every clip of a split once with the best weights; accuracies, confusions, scores.parquet."""
    from pipelines.evaluation.figures import draw_confusion
    from pipelines.training.scoring import score_on_cluster

    summary = score_on_cluster(
        train.path / "model",
        shards_place(shards),
        evaluate,
        context.output_dir / "scores.parquet",
        at_once=context.at_once,
        on_progress=context.on_progress,
    )
    metrics = {name: summary[name] for name in ("top1", "top5", "mean_class_accuracy", "loss", "ece")}
    about = {"split": evaluate.split, "protocol": evaluate.protocol, "label_passport": shards.summary["label_passport"]}
    write_json(context.output_dir / "evaluation.json", {**summary, **about})
    (context.output_dir / "figures").mkdir(exist_ok=True)
    names = read_dataset_info(shards_place(shards)).label_names
    context.run.log_file(
        draw_confusion(context.output_dir / "figures" / "confusion.png", summary["confusion"], names), "figures"
    )
    context.run.log_file(context.output_dir / "evaluation.json", "tables")
    twins = {} if summary["left_right"] is None else {"left_right_confusion": summary["left_right"]["share"]}
    context.run.log_metrics({f"test/{name}": value for name, value in {**metrics, **twins}.items()})
    _log_input(context, shards, evaluate.split)
    text = f"top-1 {metrics['top1']:.1%}, top-5 {metrics['top5']:.1%} on {summary['num_clips']} {evaluate.split} clips"
    text += "" if evaluate.protocol == "centre" else f", protocol {evaluate.protocol}"
    return {"metrics": metrics, "num_clips": summary["num_clips"], "split": evaluate.split, "text": text}


def insight(
    context: StageContext, shards: Artifact, train: Artifact, evaluate: Artifact, insight: InsightSettings
) -> dict[str, Any]:
    """Explain the trained network with pictures: what it takes for alike, where it errs; a page, and images in MLflow."""
    from pipelines.explaining import explain

    _log_input(context, shards, evaluate.summary["split"])
    return explain(context, shards, train, evaluate, insight)


def report(
    context: StageContext,
    shards: Artifact,
    audit: Artifact,
    search: Artifact,
    train: Artifact,
    evaluate: Artifact,
    insight: Artifact,
    expected: Expected,
) -> dict[str, Any]:
    """One self-contained page: the verdict, curves, confusions, trials, data, settings; also the text of the MLflow run.

    And the network in MLflow's registry, with a model card.
    """
    from pipelines.reports.report import verdict, write_report
    from pipelines.reports.trained import found_numbers

    evaluation = json.loads((evaluate.path / "evaluation.json").read_bytes())
    figures = {"curves": train.path / "figures" / "curves.png", "confusion": evaluate.path / "figures" / "confusion.png"}
    if search.summary["trials"]:
        figures["search"] = search.path / "figures" / "search.png"
    made = [shards, audit, search, train, evaluate, insight]
    kept = {name: shards.summary[name] for name in ("dataset", "label_passport", "kept", "rejected", "frames")}
    numbers = found_numbers(train, evaluate)
    card = reproduction_card(context.experiment, {"": expected.bands}, {"": numbers}, _changed(context))
    links = {"audit of the shards": (audit.path / "page.html").as_uri()}
    if search.summary["trials"]:
        links["page of the search"] = (search.path / "index.html").as_uri()
    links["what the network sees, in pictures"] = (insight.path / "index.html").as_uri()
    page = write_report(
        context.output_dir,
        title=f"sagsm: {context.experiment}",
        stages=[
            {"name": item.stage, "status": "done", "seconds": item.manifest["seconds"], "fingerprint": item.fingerprint}
            for item in made
        ],
        dataset=kept,
        search={"trials": search.summary["trials"]} if search.summary["trials"] else None,
        history=json.loads((train.path / "history.json").read_bytes()),
        evaluation=evaluation,
        card=card,
        figures=figures,
        config_yaml=config_yaml(context.config),
        links=links,
    )
    context.run.log_file(page, "report")
    context.run.log_file(insight.path / "index.html", "insight")
    for name, figure in figures.items():
        context.run.log_file(figure, f"figures/{name}")
    model = _register_model(context, shards, train, evaluation, num_trials=len(search.summary["trials"]))
    sentence = verdict(evaluation)
    markdown = _describe_report(context, sentence, card, insight, model)
    context.run.describe(markdown)
    return {"card": card, "markdown": markdown, "model": model, "text": sentence}


STAGES = [
    Stage("index", index, settings=("dataset",), version=3, raw=lambda config: raw_listing(config.dataset)),
    Stage("shards", shards, needs=("index",), settings=("shards",), version=3),
    Stage("audit", audit, needs=("shards",), version=3),
    Stage("search", search, needs=("shards",), settings=("search", "model", "train"), version=3, takes_cluster=True),
    Stage("train", train, needs=("shards", "search"), settings=("model", "train"), version=2, takes_cluster=True),
    Stage("evaluate", evaluate, needs=("shards", "train"), settings=("evaluate",), version=3, takes_cluster=True),
    Stage("insight", insight, needs=("shards", "train", "evaluate"), settings=("insight",), takes_cluster=True),
    Stage(
        "report",
        report,
        needs=("shards", "audit", "search", "train", "evaluate", "insight"),
        settings=("expected",),
        version=4,
    ),
]


def config_yaml(config: Settings) -> str:
    """All settings as YAML; of a comparison those of all variants."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _command(context: StageContext, without: str | None = None) -> str:
    """The shell command of this experiment with the settings that were changed, but for those that begin with `without`."""
    kept = {name: value for name, value in _changed(context).items() if without is None or not name.startswith(without)}
    sets = [f"--set {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in kept.items()]
    return " ".join([f"sagsm run {context.experiment}", *sets])


def _describe_report(context: StageContext, sentence: str, card: dict[str, Any], insight: Artifact, model: str) -> str:
    """The text of the report's run, and of the whole pipeline's."""
    from pipelines.reports.page import markdown_text

    run_of_insight = f"#/experiments/{context.tracker.experiment_id}/runs/{insight.mlflow_run_id}"
    parts = [
        sentence,
        card_markdown(card),
        f"![curves](get-artifact?path=figures/curves/curves.png&run_uuid={context.run.run_id})",
        f"The page: Artifacts, report/index.html of the run `{context.run.name}`, with the network's card.md beside it.",
        f"In pictures: {markdown_text(insight.summary['text'])} See [its run]({run_of_insight}), or insight/index.html.",
        f"To use the network: `sagsm predict --model {model} VIDEO`",
    ]
    return "\n\n".join(parts)


def _register_model(
    context: StageContext, shards: Artifact, train: Artifact, evaluation: dict[str, Any], num_trials: int
) -> str:
    """Put the network into MLflow's registry with a card; returns its URI there.

    Here and not in `train`, so that the card can say how good it is.
    """
    from pipelines.reports.card import model_card
    from pipelines.serving import CODE, NEWEST, example_video, registered_name

    name = registered_name(context.experiment)
    files = train.path / "model"
    facts = json.loads((files / "model.json").read_bytes())
    card = model_card(
        name=name,
        alias=NEWEST,
        facts=facts,
        training=train.summary,
        evaluation=evaluation,
        dataset=shards.summary,
        num_trials=num_trials,
        command=_command(context),
        folder=train.path,
    )
    tags = {"dataset": shards.summary["dataset"], "label_passport": facts["label_passport"], "fingerprint": train.fingerprint}
    context.run.log_model(name, NEWEST, files, code=CODE, card=card, example=example_video(), tags=tags)
    (context.output_dir / "card.md").write_text(card)
    context.run.log_file(context.output_dir / "card.md", "report")
    return f"models:/{name}@{NEWEST}"


def _changed(context: StageContext) -> dict[str, Any]:
    """The settings that differ from the experiment as it is written, by dotted names."""
    experiment = find_experiment(context.experiment)()
    assert isinstance(experiment, ExperimentConfig)  # a comparison searches nothing and has a page of its own
    return changed_settings(experiment, context.config)


def _log_forecast_error(context: StageContext, reports: Sequence[ShardReport], seconds: float) -> str:
    """How wrong `sagsm plan --estimate` was; "" if it was not asked, or an earlier run had written some of the shards."""
    if any(report.skipped for report in reports):
        return ""
    num_cpus, num_bytes = int(cluster.resources()["CPU"]), sum(report.num_bytes for report in reports)
    found = forecast_error(context.output_dir, num_cpus=num_cpus, seconds=seconds, num_bytes=num_bytes)
    if found is None:
        return ""
    context.run.log_metrics(found[0])
    return f"; {found[1]}"


def _val_split(shards: Artifact) -> str:
    return val_split(shards.summary["dataset"], shards.summary["by_split"])


def _count(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


def _log_input(context: StageContext, shards: Artifact, purpose: str) -> None:
    context.run.log_dataset(shards.summary["dataset"], shards.fingerprint, shards_place(shards), purpose)
    context.run.set_tags({"dataset": shards.summary["dataset"], "label_passport": shards.summary["label_passport"]})


def _log_folder(context: StageContext, folder: Path) -> None:
    """Keep all files of a folder in the run, in the same folders."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place = str(path.parent.relative_to(folder))
            context.run.log_file(path, "" if place == "." else place)
