"""Ten million videos without the videos: what driver, ledger and index cost, and how soon an interrupted run goes on.

    python tests/benchmarks/bench_scale.py [--videos 10000000] [--json]

Planning, Ray tasks, tars, sidecars, ledger and index are the real ones; only decoding is replaced, by a source that gives one
constant frame a video. It runs in two processes, as an interruption and its rerun would: the first writes half of the shards,
the second finds those, writes the rest and finishes the set. It needs about 2.7 kB of disk a video, and frees it at the end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from infra.storage import require_free_space
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.decode import DecodedVideo, DecodeSettings
from preprocessing.finish import finish_shard_set
from preprocessing.planning import PlannedVideo, ShardPlans, plan_shards
from preprocessing.shards import ShardSettings
from preprocessing.tasks import write_shards

BYTES_A_VIDEO = 2700
# The smallest frame that a decoder accepts is larger; nobody decodes these.
FRAME = b"\xff\xd8" + bytes(200) + b"\xff\xd9"


@dataclass(frozen=True)
class NoDecoding:
    """One constant frame a video."""

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:
        """See `Source.read`."""
        return DecodedVideo([FRAME], 25.0, 16, 16, 100_000, "")


def main() -> None:
    """Run both halves and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--videos-per-shard", type=int, default=256)
    parser.add_argument("--shards", type=int, help="write only so many of the planned shards, where time or disk are short")
    parser.add_argument("--folder", type=Path, help="where the shards go for a while (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--half", choices=["first", "second"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.half is not None:
        print(json.dumps(run_half(options)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=options.folder) as folder:
        num_videos = min(options.videos, (options.shards or options.videos) * options.videos_per_shard)
        require_free_space(Path(folder), num_videos * BYTES_A_VIDEO, "the simulation")
        found = {half: start_half(half, folder, options) for half in ("first", "second")}
    if options.json:
        print(json.dumps(found))
        return
    for half, numbers in found.items():
        print(f"{half} half")
        for name, value in numbers.items():
            print(f"  {name:<40} {value:>14,.3f}")


def start_half(half: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    """One half in a process of its own, so that its memory is measured alone."""
    command = [sys.executable, __file__, "--half", half, "--folder", folder, "--videos", str(options.videos)]
    command += ["--videos-per-shard", str(options.videos_per_shard)]
    command += ["--shards", str(options.shards)] if options.shards else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def run_half(options: argparse.Namespace) -> dict[str, float]:
    """Plan, write half of the shards or what is left of them, and finish after the second half; returns what it cost."""
    folder, settings = options.folder, ShardSettings(videos_per_shard=options.videos_per_shard)
    numbers: dict[str, float] = {}
    ray.init("local", include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False, logging_level="error")
    numbers["driver peak RSS after Ray's start, MB"] = peak_megabytes()
    index = VideoIndex(many_videos(options.videos), ["one"])
    numbers["driver peak RSS with the video table, MB"] = peak_megabytes()
    started, used = time.perf_counter(), time.process_time()
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    numbers["planning, s"] = time.perf_counter() - started
    numbers["planning, CPU s"] = time.process_time() - used
    numbers["shards planned"] = float(len(plans))
    plans = plans[: options.shards]
    half = plans[: len(plans) // 2]
    numbers |= write(half if options.half == "first" else plans, folder, settings)
    numbers["driver peak RSS after writing, MB"] = peak_megabytes()
    if options.half == "second":
        numbers["planning and looking, s"] = numbers["planning, s"] + numbers["looking at finished shards, s"]
        started, used = time.perf_counter(), time.process_time()
        index = VideoIndex(index.videos.slice(0, plans.num_videos), ["one"])
        finish_shard_set(folder, index, plans, settings, "simulated")
        numbers["finishing, s"] = time.perf_counter() - started
        numbers["finishing, driver CPU ms a shard"] = (time.process_time() - used) / len(plans) * 1e3
        for name in ("index.parquet", "ledger.parquet", "dataset.json"):
            numbers[f"{name}, MB"] = (folder / name).stat().st_size / 1e6
    numbers["driver peak RSS, MB"] = peak_megabytes()
    return numbers


def write(plans: ShardPlans, folder: Path, settings: ShardSettings) -> dict[str, float]:
    """`write_shards`, timed by what it tells of its progress."""
    started, used = time.perf_counter(), time.process_time()
    looked, used_to_look, first_new = started, used, 0.0

    def on_progress(done: int, _total: int, text: str) -> None:
        nonlocal looked, used_to_look, first_new
        if text.startswith("written before"):
            looked, used_to_look = time.perf_counter(), time.process_time()
        elif done and not first_new:
            first_new = time.perf_counter()

    reports = write_shards(plans, NoDecoding(), folder, settings, on_progress)
    ended, used_in_all = time.perf_counter(), time.process_time()
    new = [report for report in reports if not report.skipped]
    return {
        "finished shards found": float(len(reports) - len(new)),
        "looking at finished shards, s": looked - started,
        "looking at finished shards, CPU s": used_to_look - used,
        "first new shard complete after, s": first_new - started,
        "writing, s": ended - looked,
        "videos/s": sum(report.num_kept for report in new) / (ended - looked),
        "driver CPU ms a new shard": (used_in_all - used_to_look) / len(new) * 1e3,
        "wall ms a new shard": (ended - looked) / len(new) * 1e3,
        "bytes of tar a video": sum(report.num_bytes for report in new) / sum(report.num_kept for report in new),
    }


def many_videos(num_videos: int) -> pa.Table:
    """A table as the index stage gives it, with ids and paths of a usual length, in chunks as Parquet is read."""
    chunks = []
    for begin in range(0, num_videos, 100_000):
        numbers = range(begin, min(begin + 100_000, num_videos))
        columns: dict[str, Any] = {
            "video_id": [f"v{number:010d}" for number in numbers],
            "path": [f"raw/{number // 1000:06d}/v{number:010d}.mp4" for number in numbers],
            "kind": ["video"] * len(numbers),
            "split": ["validation" if number % 10 == 0 else "train" for number in numbers],
            "label": np.zeros(len(numbers), np.int32),
            "start": pa.nulls(len(numbers), pa.float64()),
            "end": pa.nulls(len(numbers), pa.float64()),
        }
        chunks.append(pa.table(columns, schema=VIDEO_SCHEMA))
    return pa.concat_tables(chunks)


def peak_megabytes() -> float:
    """Most memory that this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e6


if __name__ == "__main__":
    main()
