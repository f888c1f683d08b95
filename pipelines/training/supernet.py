"""Weight sharing: one network is trained with a random placement in each step, and then scored with every placement.

A gamma of 0 is an exact bypass, so one set of weights has an answer for each of the 2^n placements; how well these answers
order the placements is for real trainings to say (`tuning.agreement`). Guo et al.: Single Path One-Shot Neural Architecture
Search with Uniform Sampling, ECCV 2020, https://arxiv.org/abs/1904.00420; there too every candidate is equally likely.

    <storage_dir>/supernet.json          all scores, written at the end
                  supernet-1a2b3c4d/     until then: the checkpoints of the training, part-000.json for each scored part

Against the paper: statistics of batch norms are not measured anew for each placement; they are the moving averages over the
placements of the last steps.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra import cluster
from infra.errors import ConfigError, PipelineError
from infra.progress import OnProgress
from infra.storage import sha256_json, write_json
from models import model_options, model_slots
from models.placement import parse_placement
from pipelines.training.job import TrainJob, job_loader
from pipelines.training.metrics import EpochMetrics
from pipelines.training.settings import build_model
from preprocessing.reader import open_shards
from tuning.settings import SearchSettings

RESULT = "supernet.json"
_MAX_SLOTS = 12
_MAX_PARTS = 16
_BATCHES_AT_A_TIME = 4  # a forward pass keeps far less than a training step, and the last maps are small


@dataclass(frozen=True)
class SupernetResult:
    """What the weights of one network say of every placement.

    Attributes:
        scores: placement, as it prints itself -> top-1 on the validation clips; all 2^n.
        losses: placement -> mean cross-entropy on them.
        seconds_training: of the supernet, with its validations.
        seconds_scoring: of all placements.
        top: the best, best first: by top-1, then by loss, then with fewer slots.
    """

    scores: dict[str, float]
    losses: dict[str, float]
    seconds_training: float
    seconds_scoring: float
    top: list[str]


def search_supernet(
    job: TrainJob,
    settings: SearchSettings,
    *,
    storage_dir: Path,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    on_progress: OnProgress | None = None,
) -> SupernetResult:
    """Train the supernet of `job` and score all placements with it, on the cluster to which this process is connected.

    Killed and called again it goes on from its last checkpoint or scored part, and what is complete is only read. Disk: three
    checkpoints while it trains, a few hundred kilobytes in the end.

    Args:
        job: the training whose placement is looked for. Its placement is replaced, `settings.fixed` is applied.
        settings: gives `supernet_epochs`, `supernet_top`, `fixed` and `subset`.
        storage_dir: see above; on a disk that all workers see.
        on_epoch: told each epoch, whose validation is that of attention in all slots.
        on_progress: told steps, then parts of the validation clips.

    Raises:
        ConfigError: if the network has no placements, or too many.
        PipelineError: if a score is not finite; and as `train_on_cluster`.
    """
    supernet = supernet_job(job, settings)
    identity = _identity(supernet)
    path = storage_dir / RESULT
    found = json.loads(path.read_bytes()) if path.exists() else None
    work_dir = storage_dir / f"supernet-{identity[:8]}"
    if found is None or found["identity"] != identity:
        weights, seconds = _train(supernet, work_dir, on_epoch, on_progress)
        sums, seconds_scoring = _score(supernet, weights, work_dir, on_progress)
        found = {
            "identity": identity,
            "seconds_training": seconds,
            "seconds_scoring": seconds_scoring,
            "placements": _means(sums),
        }
        write_json(path, found)
    shutil.rmtree(work_dir, ignore_errors=True)
    return _result(found, supernet, settings.supernet_top)


def supernet_job(job: TrainJob, settings: SearchSettings) -> TrainJob:
    """The training of the supernet: that of `job` with attention in all slots, a random subset of them in each step.

    Raises:
        ConfigError: if the network has no placements, or more than can be scored.
    """
    job = job.with_overrides(settings.fixed)
    name = job.model.name
    if "placement" not in model_options(name):
        raise ConfigError(
            f"search.method=supernet compares placements of attention, and model.name={name} has none; choose an SA-GSM network"
        )
    num_slots = len(model_slots(name))
    if num_slots > _MAX_SLOTS:
        raise ConfigError(
            f"search.method=supernet scores all placements, and {name} has 2^{num_slots}; expected at most {_MAX_SLOTS} slots: "
            "choose a smaller network, or search.method=trials"
        )
    changes = {"model.placement": "all", "train.random_placement": True, "train.subset": settings.subset or job.train.subset}
    longer = job.train.with_epochs(settings.supernet_epochs or job.train.epochs)
    return replace(job, name="supernet", train=longer).with_overrides(changes)


def score_part(job: TrainJob, weights: Path, part: int, num_parts: int, num_threads: int) -> dict[str, list[float]]:
    """Sums of the cross-entropy, top-1 hits and clips of every placement over one of `num_parts` parts of the validation clips.

    Of equal logits the class with the lower id wins, as in `evaluation.metrics`.

    Args:
        job: of `supernet_job`.
        weights: safetensors that it trained.
        part: from 0.
        num_parts: at most as many as there are clips.
        num_threads: of torch.
    """
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import cross_entropy

    from models import each_placement
    from pipelines.training.precision import autocast, resolve_precision

    torch.set_num_threads(num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = open_shards(job.shards_place, job.val_split)
    bare = job.model.model_copy(update={"weights": None, "weights_labels": None, "backbone_weights": None})
    model = build_model(bare, len(shards.label_names), job.train.num_segments)
    model.load_state_dict(load_file(weights))
    model.eval().to(device)
    sums: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), autocast(resolve_precision(job.train.precision, device), device):
        for batch in job_loader(_in_large_batches(job), shards, is_train=False, rank=part, world_size=num_parts):
            labels = batch.labels.to(device)
            for placement, logits in each_placement(model, model.prepare(batch.clips.to(device))):
                loss = cross_entropy(logits, labels, reduction="sum").double()
                found = torch.stack((loss, (logits.argmax(dim=1) == labels).sum(), torch.tensor(len(labels), device=device)))
                sums[str(placement)] = sums.get(str(placement), 0) + found
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))


def _train(
    job: TrainJob,
    work_dir: Path,
    on_epoch: Callable[[EpochMetrics], None] | None,
    on_progress: OnProgress | None,
) -> tuple[Path, float]:
    """The last weights, or their average if training keeps one, and the seconds that all epochs took."""
    from pipelines.training.checkpoint import AVERAGE
    from pipelines.training.rank import train_locally
    from pipelines.training.worker import train_on_cluster

    train = train_locally if job.train.local else train_on_cluster
    result = train(job, storage_dir=work_dir, on_epoch=on_epoch, on_progress=on_progress)
    assert result.last_weights is not None  # there is a folder for checkpoints
    weights = result.last_weights if job.train.ema_decay is None else result.last_weights.with_name(AVERAGE)
    return weights, sum(metrics.seconds for metrics in result.history)


def _score(
    job: TrainJob, weights: Path, work_dir: Path, on_progress: OnProgress | None
) -> tuple[dict[str, list[float]], float]:
    """What `score_part` gives, of all parts, and the seconds it took; parts that are there are not scored again."""
    val_shards = open_shards(job.shards_place, job.val_split)
    num_parts = min(_MAX_PARTS, len(job_loader(_in_large_batches(job), val_shards, is_train=False, rank=0, world_size=1)))
    paths = [work_dir / f"part-{part:03d}.json" for part in range(num_parts)]
    missing = [part for part, path in enumerate(paths) if not path.exists()]
    have = cluster.resources()
    num_cpus = max(1, int(have["CPU"]) // num_parts)
    common = {"job": job, "weights": weights, "num_parts": num_parts, "num_threads": num_cpus}
    results = cluster.call_each(
        score_part,
        num_cpus=num_cpus,
        num_gpus=min(have["GPU"], 1.0),
        arguments=[common | {"part": part} for part in missing],
    )
    text = f"parts of the validation clips scored with {2 ** len(model_slots(job.model.name)):,} placements"
    tell = on_progress or (lambda _done, _total, _text: None)
    tell(num_parts - len(missing), num_parts, text)
    before = time.monotonic()
    for done, (number, sums) in enumerate(results, start=num_parts - len(missing) + 1):
        now = time.monotonic()
        write_json(paths[missing[number]], {"seconds": now - before, "sums": sums})
        before = now
        tell(done, num_parts, text)
    parts = [json.loads(path.read_bytes()) for path in paths]
    totals = {
        placement: [sum(values) for values in zip(*(part["sums"][placement] for part in parts), strict=True)]
        for placement in parts[0]["sums"]
    }
    return totals, sum(part["seconds"] for part in parts)


def _in_large_batches(job: TrainJob) -> TrainJob:
    return replace(job, train=job.train.model_copy(update={"batch_size": _BATCHES_AT_A_TIME * job.train.batch_size}))


def _means(sums: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Top-1 and loss of each placement.

    Raises:
        PipelineError: if a loss is not finite.
    """
    diverged = [placement for placement, (loss, _, _) in sums.items() if not math.isfinite(loss)]
    if diverged:
        raise PipelineError(
            f"the supernet's loss is not finite with {len(diverged)} of {len(sums)} placements, such as {diverged[0]}; "
            "expected numbers. Its training diverged: lower train.learning_rate"
        )
    return {placement: {"top1": hits / count, "loss": loss / count} for placement, (loss, hits, count) in sums.items()}


def _identity(job: TrainJob) -> str:
    """Of all that the scores depend on."""
    from pipelines.training.run import OPERATIONAL

    keys = [open_shards(job.shards_place, split).keys for split in (job.train_split, job.val_split)]
    train = job.train.model_dump(mode="json", exclude=set(OPERATIONAL))
    return sha256_json({"model": job.model.model_dump(mode="json"), "train": train, "clips": keys})


def _result(found: Mapping[str, Any], job: TrainJob, num_top: int) -> SupernetResult:
    placements, slots = found["placements"], model_slots(job.model.name)

    def rank(name: str) -> tuple[float, float, int, int]:
        placement = parse_placement(name, slots)
        return -placements[name]["top1"], placements[name]["loss"], len(placement), placement.mask

    return SupernetResult(
        scores={name: values["top1"] for name, values in placements.items()},
        losses={name: values["loss"] for name, values in placements.items()},
        seconds_training=found["seconds_training"],
        seconds_scoring=found["seconds_scoring"],
        top=sorted(placements, key=rank)[:num_top],
    )
