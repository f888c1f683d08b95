"""How fast raw videos become shards: ours, the published scripts' way and the bounds, measured side by side.

    python tests/benchmarks/bench_shards.py [--rounds 3] [--json]

Video files (the clips of ../shared/data/videos where that folder is, generated ones elsewhere), at one size and quality:

    2 workers         preprocessing.tasks.write_shards on a Ray cluster of 2 CPUs; every frame counted, every shard synced
    1 worker          the same, a shard at a time; its ffmpeg may still use the other core
    1 worker, 1 core  the same, with all processes of the cluster pinned to one core
    published         one ffmpeg a video in turn, with the threads it likes, frames to files, then a tar (GSM's script)
    decode            ffmpeg alone, 2 at a time, frames thrown away: what no program can beat

Frame folders (the Something-V1 layout of ../shared/data/real_mini, or generated ones):

    ours              as above; every JPEG decoded, every shard synced
    stock             files read in turn into webdataset.TarWriter, one process, nothing checked, nothing synced
    read              the files' bytes alone, one process

A run of ours that is not timed comes first: it starts the workers and brings all files into the page cache, for every
contender. Each round measures every contender once, in another order; ratios are medians over the rounds of ratios within a
round. Removing what was written is not timed. Two workers are compared with one twice: a worker's ffmpeg has threads of its
own, so that one worker fills more than one core, and two on two cores can only be twice as fast as one that keeps to one core.

CPU time is that of all processes together, user and system: it stays about the same where other programs slow the rates down.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray
import webdataset

from preprocessing.datasets import VIDEO_SCHEMA, DatasetSettings, index_videos
from preprocessing.decode import ffmpeg_path, ffmpeg_version
from preprocessing.planning import ShardPlans, plan_shards
from preprocessing.shards import ShardSettings
from preprocessing.sources import FolderSource
from preprocessing.synthetic import SyntheticSettings, generate
from preprocessing.tasks import write_shards

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SHORT_SIDE = 256
QUALITY = 2
FRAME_COPIES = 32  # of the few frame folders: enough work for some seconds
VIDEO_COPIES = 2  # of the clips, so that the end of a round, when one worker waits, counts little
PEAK_BYTES = 400e6
TARGETS = {
    "video files": {"1 worker, 1 core": 1.8, "published": 2.5, "decode": 0.5},
    "frame folders": {"1 worker, 1 core": 1.8, "stock": 2.5},
}
CLIPS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".ts", ".wmv")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, cluster():
        folder = Path(name)
        results = [measure_videos(folder, arguments.rounds), measure_frames(folder, arguments.rounds)]
        worker_bytes = peak_worker_bytes()
    packages = ("ray", "simplejpeg", "webdataset", "pyarrow")
    report = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "versions": {name: version(name) for name in packages} | {"ffmpeg": ffmpeg_version()},
        "peak_worker_bytes": worker_bytes,
        "results": results,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print_table(report)


def print_table(report: dict[str, Any]) -> None:
    """Print rates, ratios and whether the targets are reached, a line a contender."""
    print(f"{report['machine']['cores']} cores, ffmpeg {report['versions']['ffmpeg']}, load {report['machine']['load']:.1f}")
    for result in report["results"]:
        print(f"{result['what']}: {result['videos']} videos, {result['frames']} frames")
        print(f"  {'contender':<18}{'frames/s':>10}{'CPU us/frame':>14}{'2 workers are':>15}")
        for contender, rate in result["frames_per_second"].items():
            ratio, target = result["ours_over"].get(contender), TARGETS[result["what"]].get(contender)
            goal = f"  target {target} x: {'reached' if ratio >= target else 'missed'}" if ratio and target else ""
            against = f"{ratio:.2f} x" if ratio else ""
            print(f"  {contender:<18}{rate:>10,.0f}{result['cpu_us_per_frame'][contender]:>14,.0f}{against:>15}{goal}")
    peak = report["peak_worker_bytes"]
    goal = f"target {PEAK_BYTES / 1e6:.0f} MB: {'reached' if peak <= PEAK_BYTES else 'missed'}"
    print(f"peak memory of a Ray worker, ffmpeg not counted: {peak / 1e6:.0f} MB  {goal}")


@contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster of two CPUs on this machine."""
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False, object_store_memory=256 * 2**20)
    try:
        yield
    finally:
        ray.shutdown()


def measure_videos(folder: Path, num_rounds: int) -> dict[str, Any]:
    """Video files to shards."""
    root = video_root(folder)
    names = VIDEO_COPIES * sorted(path.name for path in root.iterdir() if path.suffix in CLIPS)
    rows = [
        {"video_id": f"{number}-{name}", "path": name, "kind": "video", "split": "train", "label": 0}
        for number, name in enumerate(names)
    ]
    settings = ShardSettings(short_side=SHORT_SIDE, jpeg_quality=QUALITY, videos_per_shard=max(1, len(names) // 30))
    plans = planned(rows, settings)
    paths = [root / name for name in names]
    contenders = our_contenders(plans, root, settings) | {
        "published": lambda output: published(paths, output),
        "decode": lambda _: decode_alone(paths),
    }
    return compare("video files", contenders, folder, len(names), num_rounds)


def measure_frames(folder: Path, num_rounds: int) -> dict[str, Any]:
    """Frame folders to shards."""
    root, names = frames_root(folder)
    rows = [{"video_id": name, "path": name, "kind": "frames", "split": "train", "label": 0} for name in names]
    settings = ShardSettings(videos_per_shard=max(1, len(names) // 12))
    plans = planned(rows, settings)
    contenders = our_contenders(plans, root, settings) | {
        "stock": lambda output: stock_tar(root, names, output),
        "read": lambda _: read_alone(root, names),
    }
    return compare("frame folders", contenders, folder, len(names), num_rounds)


Contender = Callable[[Path], Any]  # takes a folder of its own


def compare(what: str, contenders: dict[str, Contender], folder: Path, num_videos: int, num_rounds: int) -> dict[str, Any]:
    """Median frames a second of each contender, and the median ratio of the first one, ours with two workers, to each."""
    names = list(contenders)
    _, _, num_frames = timed(contenders[names[0]], folder)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            wall, cpu, _ = timed(contenders[name], folder)
            seconds[name].append(wall)
            cpu_seconds[name].append(cpu)
    mine = seconds[names[0]]
    return {
        "what": what,
        "videos": num_videos,
        "frames": num_frames,
        "frames_per_second": {name: num_frames / statistics.median(seconds[name]) for name in names},
        "cpu_us_per_frame": {name: 1e6 * statistics.median(cpu_seconds[name]) / num_frames for name in names},
        "ours_over": {
            name: statistics.median(other / own for own, other in zip(mine, seconds[name], strict=True)) for name in names[1:]
        },
        "targets": TARGETS[what],
        "seconds": seconds,
    }


def timed(contender: Contender, folder: Path) -> tuple[float, float, Any]:
    """Seconds of the clock and of the processor, and the result, of a run in an empty folder, which is removed after it."""
    output = Path(tempfile.mkdtemp(dir=folder))
    before, started = cpu_time(), time.perf_counter()
    result = contender(output)
    wall, cpu = time.perf_counter() - started, cpu_time() - before
    shutil.rmtree(output)
    return wall, cpu, result


def processes() -> list[psutil.Process]:
    """This process and all that it has started, the Ray cluster among them."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def cpu_time() -> float:
    """Processor time of all our processes, and of those that they started and have waited for."""
    total = 0.0
    for process in processes():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def planned(rows: list[dict[str, Any]], settings: ShardSettings) -> ShardPlans:
    """The plan of all shards."""
    table = pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA)
    return plan_shards(table, videos_per_shard=settings.videos_per_shard, seed=settings.seed)


def our_contenders(plans: ShardPlans, root: Path, settings: ShardSettings) -> dict[str, Contender]:
    """Shards written by as many Ray workers as the cluster has CPUs, by one at a time, and by one on one core."""

    def write(output: Path, max_in_flight: int | None = None) -> int:
        reports = write_shards(plans, FolderSource(root), output, settings, max_in_flight=max_in_flight)
        return sum(report.num_frames for report in reports)

    def write_on_one_core(output: Path) -> int:
        cores = os.sched_getaffinity(0)
        pin({min(cores)})
        try:
            return write(output, max_in_flight=1)
        finally:
            pin(cores)

    return {
        "2 workers": write,
        "1 worker": lambda output: write(output, max_in_flight=1),
        "1 worker, 1 core": write_on_one_core,
    }


def pin(cores: set[int]) -> None:
    """Let all threads of all our processes run on these cores only; what they start inherits that."""
    for process in processes():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores)


def published(paths: Sequence[Path], output: Path) -> None:
    """One ffmpeg with its default threads a video in turn, frames to files; then everything into one tar."""
    scale = f"scale='if(gte(iw,ih),-2,{SHORT_SIDE})':'if(gte(iw,ih),{SHORT_SIDE},-2)'"
    for number, path in enumerate(paths):
        frames = output / f"{number}-{path.name}"
        frames.mkdir()
        arguments = ["-v", "quiet", "-nostdin", "-i", str(path), "-map", "0:V:0", "-vf", scale, "-fps_mode", "vfr"]
        subprocess.run([ffmpeg_path(), *arguments, "-q:v", str(QUALITY), str(frames / "%06d.jpg")], check=True)
    subprocess.run(
        ["tar", "-cf", str(output / "all.tar"), "-C", str(output), *sorted(path.name for path in output.iterdir())], check=True
    )


def decode_alone(paths: Sequence[Path]) -> None:
    """All frames decoded and thrown away, two ffmpeg of one thread at a time."""

    def decode(path: Path) -> None:
        arguments = ["-v", "quiet", "-nostdin", "-threads", "1", "-i", str(path), "-map", "0:V:0", "-fps_mode", "passthrough"]
        subprocess.run([ffmpeg_path(), *arguments, "-f", "null", "-"], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(decode, paths))


def stock_tar(root: Path, names: Sequence[str], output: Path) -> None:
    """Every frame read and written by the stock writer, one process."""
    with webdataset.TarWriter(str(output / "stock.tar"), encoder=False) as writer:
        for name in names:
            for index, path in enumerate(sorted((root / name).iterdir())):
                writer.write({"__key__": f"{name}-{index:06d}", "jpg": path.read_bytes()})


def read_alone(root: Path, names: Sequence[str]) -> int:
    """The bytes of every frame."""
    return sum(len(path.read_bytes()) for name in names for path in sorted((root / name).iterdir()))


def video_root(folder: Path) -> Path:
    """Real clips, or generated ones."""
    real = SHARED / "videos"
    if real.is_dir():
        return real
    root = folder / "generated"
    root.mkdir()
    generate(SyntheticSettings(num_train=40, num_validation=0, num_broken=0, height=360, max_width=640), root, "diving48")
    return root / "rgb"


def frames_root(folder: Path) -> tuple[Path, list[str]]:
    """Many frame folders: copies of real ones, or of generated ones."""
    real = SHARED / "real_mini" / "something_v1"
    if not real.is_dir():
        real = folder / "generated_frames"
        real.mkdir()
        generate(SyntheticSettings(num_train=60, num_validation=0, num_broken=0, height=100, max_width=132), real)
    table = index_videos(DatasetSettings(name="something_v1", root=real), real).videos
    root = folder / "frames"
    for copy in range(FRAME_COPIES):
        for path in table["path"].to_pylist():
            target = root / f"{copy}-{Path(path).name}"
            shutil.copytree(real / path, target)
    return root, sorted(path.name for path in root.iterdir())


def peak_worker_bytes() -> int:
    """The highest resident memory that a Ray worker of ours has had."""
    peaks = [0]
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::"):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peaks += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
    return max(peaks)


if __name__ == "__main__":
    main()
