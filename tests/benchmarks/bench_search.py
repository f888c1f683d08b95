"""What a trial of the search costs beside its training: its process, its reports, and the driver between two trials.

    python tests/benchmarks/bench_search.py [--trials 8] [--json]

A search on a Ray cluster of 2 CPUs, trials of one CPU, two at a time: the real training of SA-GSM on generated videos, one
short epoch a trial, nothing stopped early. Of each trial

    inside    seconds of its record, from the start of its process to its end, without those of its epochs
    between   from the end of the trial before it in its place to the start of its process; not known of the first two
    overhead  the sum of the medians of both; the target is 5 s

and of the search the seconds before the first trial starts, and those from the last one's end to the search's.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray

from pipelines.training.settings import ModelSettings, TrainSettings
from pipelines.training.trial import run_trial, trial_job
from preprocessing.datasets import DatasetSettings, index_videos
from preprocessing.finish import finish_shard_set
from preprocessing.planning import plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.synthetic import SyntheticSettings, generate
from tuning.search import run_search
from tuning.settings import SearchSettings
from tuning.trials import TrialEvent, TrialRecord

NUM_CPUS = 2
TARGET_SECONDS = 5.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder))
        ray.init(
            num_cpus=NUM_CPUS,
            include_dashboard=False,
            logging_level="error",
            log_to_driver=False,
            object_store_memory=256 * 2**20,
        )
        try:
            found = measure(shards, Path(folder) / "search", arguments.trials)
        finally:
            ray.shutdown()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    goal = "reached" if found["overhead"] <= TARGET_SECONDS else "missed"
    print(f"search of {arguments.trials} trials on {NUM_CPUS} CPUs, load {os.getloadavg()[0]:.1f}, seconds:")
    for name, seconds in found.items():
        target = f"  target {TARGET_SECONDS:g}: {goal}" if name == "overhead" else ""
        print(f"  {name:<12}{seconds:>8.2f}{target}")


def make_shards(folder: Path) -> Path:
    """A small shard set of generated videos."""
    raw, output = folder / "raw", folder / "shards"
    raw.mkdir()
    output.mkdir()
    generate(SyntheticSettings(num_train=64, num_validation=16, num_broken=0), raw)
    index = index_videos(DatasetSettings(name="something_v1", root=raw), raw)
    settings = ShardSettings(videos_per_shard=32)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for plan in plans:
        write_shard(plan, FolderSource(raw), output, settings)
    finish_shard_set(output, index, plans, settings, "something_v1")
    return output


def measure(shards: Path, storage_dir: Path, num_trials: int) -> dict[str, float]:
    """Run the search and take it apart."""
    search = SearchSettings(num_trials=num_trials, max_epochs=1, grace_epochs=1, scheduler="none")
    train = TrainSettings(epochs=1, warmup_epochs=0.5, batch_size=8, pixels=48, num_segments=4, loader_threads=1)
    job = trial_job(str(shards), ModelSettings(), train, search, val_split="validation")
    moments: list[tuple[float, TrialEvent]] = []
    started = time.monotonic()
    result = run_search(
        partial(run_trial, job=job, search=search),
        search,
        storage_dir=storage_dir,
        on_event=lambda event: moments.append((time.monotonic() - started, event)),
    )
    total = time.monotonic() - started
    assert all(record.state == "completed" for record in result.trials), [record.error for record in result.trials]
    return describe(result.trials, moments, total)


def describe(records: list[TrialRecord], moments: list[tuple[float, Any]], total: float) -> dict[str, float]:
    """The medians, and what the search costs before its first and after its last trial."""
    training = [record.metrics["work/epoch_seconds"] for record in records]
    inside = [record.seconds - seconds for record, seconds in zip(records, training, strict=True)]
    starts = [moment for moment, event in moments if event.kind == "started"]
    ends = [moment for moment, event in moments if event.kind == "ended"]
    between = [start - end for start, end in zip(starts[NUM_CPUS:], ends, strict=False)]
    return {
        "training": statistics.median(training),
        "inside": statistics.median(inside),
        "between": statistics.median(between),
        "overhead": statistics.median(inside) + statistics.median(between),
        "before": starts[0],
        "after": total - ends[-1],
        "total": total,
    }


if __name__ == "__main__":
    main()
