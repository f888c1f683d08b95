"""Scoring a split on a cluster: each worker takes some of the batches, and the numbers are those of one worker.

A batch is the same whoever scores it, and every worker computes with the same number of threads, since sums of several threads
depend on how many they are. The results travel through Ray's object store: 8 MB for Something-V1's validation split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra import cluster
from infra.progress import OnProgress
from pipelines.evaluation.evaluate import EvaluateSettings, Scores, join_scores
from pipelines.training.job import keep_scores, score_part
from preprocessing.reader import open_shards

NUM_THREADS = 2


@dataclass(frozen=True)
class Workers:
    """How many workers score a split, and what each of them reserves."""

    count: int
    num_cpus: float
    num_gpus: float


def plan_workers(nodes: Sequence[Mapping[str, float]], num_batches: int, at_once: int = 1) -> Workers:
    """One worker a GPU, or where there is none one for every two CPUs of a node; never more than batches.

    Args:
        nodes: "CPU" and "GPU" of each node.
        num_batches: of the split.
        at_once: among so many stages a node's CPUs are divided.

    Example:
        >>> plan_workers([{"CPU": 8.0}, {"CPU": 3.0}], num_batches=100)
        Workers(count=5, num_cpus=2, num_gpus=0)
    """
    num_gpus = sum(int(min(node.get("GPU", 0), node.get("CPU", 0))) for node in nodes)
    if num_gpus:
        return Workers(min(num_gpus, num_batches), 1, 1)
    places = [sum(int(node.get("CPU", 0) // at_once // num_cpus) for node in nodes) for num_cpus in (NUM_THREADS, 1)]
    if places[0]:
        return Workers(min(places[0], num_batches), NUM_THREADS, 0)
    return Workers(max(1, min(places[1], num_batches)), 1, 0)


def score_on_cluster(
    model_dir: Path,
    shards_place: str,
    settings: EvaluateSettings,
    scores_path: Path,
    *,
    workers: Workers | None = None,
    at_once: int = 1,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """As `job.score_model`, by workers of the cluster to which this process is connected.

    Args:
        model_dir: on a disk that all workers see.
        shards_place: likewise, or an object store.
        settings: which split, and how.
        scores_path: where the scores of all clips are written, by this process.
        workers: None: as many as fit.
        at_once: so many stages share the cluster.
        on_progress: told as parts of the split are done.

    Raises:
        ClusterError: as `cluster.call_each`; and what `score_part` and `keep_scores` raise.
    """
    num_batches = -(-len(open_shards(shards_place, settings.split)) // settings.videos_at_a_time)
    workers = workers or plan_workers(cluster.node_resources(), num_batches, at_once)
    common = {"model_dir": model_dir, "shards_place": shards_place, "settings": settings, "num_threads": NUM_THREADS}
    results = cluster.call_each(
        score_part,
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus,
        arguments=[common | {"part": part, "num_parts": workers.count} for part in range(workers.count)],
    )
    parts: dict[int, Scores] = {}
    for number, scores in results:
        parts[number] = scores
        if on_progress:
            on_progress(len(parts), workers.count, f"parts of the {settings.split} clips scored")
    joined = join_scores([parts[number] for number in sorted(parts)])
    return keep_scores(joined, shards_place, settings, scores_path)
