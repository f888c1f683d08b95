"""How fast raw videos become shards: ours, the published scripts' way and the bounds, measured side by side.

    python tests/benchmarks/bench_shards.py [--json]

Video files (the clips of ../shared/data/videos where that folder is, generated ones elsewhere), at one size and quality:

    ours, N workers   preprocessing.tasks.write_shards on a Ray cluster of N CPUs
    published         one ffmpeg a video in turn, frames to files, the files into a tar (TSM's and GSM's scripts)
    decode            ffmpeg alone, N at a time, frames thrown away: what no program can beat

Frame folders (the Something-V1 layout of ../shared/data/real_mini, or generated ones):

    ours, N workers   the same
    stock             files read in turn into webdataset.TarWriter, one process, nothing checked
    read              the files' bytes alone, one process

Each round measures every contender once, in another order; ratios are medians over the rounds of ratios within a round.
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
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray
import webdataset

from preprocessing.datasets import VIDEO_SCHEMA, DatasetSettings, index_videos
from preprocessing.decode import ffmpeg_path, ffmpeg_version
from preprocessing.planning import plan_shards
from preprocessing.shards import ShardSettings
from preprocessing.sources import FolderSource
from preprocessing.synthetic import SyntheticSettings, generate
from preprocessing.tasks import write_shards

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SHORT_SIDE = 256
QUALITY = 2
FRAME_COPIES = 32  # of the few frame folders: enough work for some seconds
VIDEO_COPIES = 2  # of the clips, so that the end of a round, when one worker waits, counts little
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
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in packages} | {"ffmpeg": ffmpeg_version()},
        "peak_worker_bytes": worker_bytes,
        "results": results,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for result in results:
        print(f"{result['what']}: {result['videos']} videos, {result['frames']} frames")
        print(f"  {'contender':<16}{'frames/s':>10}{'of it ours, 2 workers, is':>28}")
        for contender, rate in result["frames_per_second"].items():
            ratio = result["ours_over"].get(contender)
            print(f"  {contender:<16}{rate:>10,.0f}{f'{ratio:.2f} x' if ratio else '':>28}")
    print(f"peak memory of a Ray worker, ffmpeg not counted: {worker_bytes / 1e6:.0f} MB")


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
    num_frames = ours(rows, root, settings, folder, max_in_flight=None)()
    paths = [root / name for name in names]
    contenders = {
        "ours, 2 workers": ours(rows, root, settings, folder, max_in_flight=None),
        "ours, 1 worker": ours(rows, root, settings, folder, max_in_flight=1),
        "published": lambda: published(paths, folder),
        "decode": lambda: decode_alone(paths),
    }
    return compare("video files", contenders, len(names), num_frames, num_rounds)


def measure_frames(folder: Path, num_rounds: int) -> dict[str, Any]:
    """Frame folders to shards."""
    root, names = frames_root(folder)
    rows = [{"video_id": name, "path": name, "kind": "frames", "split": "train", "label": 0} for name in names]
    settings = ShardSettings(videos_per_shard=max(1, len(names) // 12))
    num_frames = ours(rows, root, settings, folder, max_in_flight=None)()
    contenders = {
        "ours, 2 workers": ours(rows, root, settings, folder, max_in_flight=None),
        "ours, 1 worker": ours(rows, root, settings, folder, max_in_flight=1),
        "stock": lambda: stock_tar(root, names, folder),
        "read": lambda: read_alone(root, names),
    }
    return compare("frame folders", contenders, len(names), num_frames, num_rounds)


def compare(
    what: str, contenders: dict[str, Callable[[], Any]], num_videos: int, num_frames: int, num_rounds: int
) -> dict[str, Any]:
    """Median frames a second of each contender, and the median ratio of ours with two workers to each."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - started)
    mine = seconds[names[0]]
    return {
        "what": what,
        "videos": num_videos,
        "frames": num_frames,
        "frames_per_second": {name: num_frames / statistics.median(seconds[name]) for name in names},
        "ours_over": {
            name: statistics.median(other / own for own, other in zip(mine, seconds[name], strict=True)) for name in names[1:]
        },
        "seconds": seconds,
    }


def ours(
    rows: list[dict[str, Any]], root: Path, settings: ShardSettings, folder: Path, *, max_in_flight: int | None
) -> Callable[[], int]:
    """Shards written by as many Ray workers as the cluster has CPUs, or by one at a time; returns the number of frames."""
    table = pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA)
    plans = plan_shards(table, videos_per_shard=settings.videos_per_shard, seed=settings.seed)

    def write() -> int:
        output = Path(tempfile.mkdtemp(dir=folder))
        reports = write_shards(plans, FolderSource(root), output, settings, max_in_flight=max_in_flight)
        shutil.rmtree(output)
        return sum(report.num_frames for report in reports)

    return write


def published(paths: Sequence[Path], folder: Path) -> None:
    """One ffmpeg with its default threads a video in turn, frames to files; then everything into one tar."""
    output = Path(tempfile.mkdtemp(dir=folder))
    scale = f"scale='if(gte(iw,ih),-2,{SHORT_SIDE})':'if(gte(iw,ih),{SHORT_SIDE},-2)'"
    for number, path in enumerate(paths):
        frames = output / f"{number}-{path.name}"
        frames.mkdir()
        arguments = ["-v", "quiet", "-nostdin", "-i", str(path), "-map", "0:V:0", "-vf", scale, "-fps_mode", "vfr"]
        subprocess.run([ffmpeg_path(), *arguments, "-q:v", str(QUALITY), str(frames / "%06d.jpg")], check=True)
    subprocess.run(
        ["tar", "-cf", str(output / "all.tar"), "-C", str(output), *sorted(path.name for path in output.iterdir())], check=True
    )
    shutil.rmtree(output)


def decode_alone(paths: Sequence[Path]) -> None:
    """All frames decoded and thrown away, two ffmpeg of one thread at a time."""

    def decode(path: Path) -> None:
        arguments = ["-v", "quiet", "-nostdin", "-threads", "1", "-i", str(path), "-map", "0:V:0", "-fps_mode", "passthrough"]
        subprocess.run([ffmpeg_path(), *arguments, "-f", "null", "-"], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(decode, paths))


def stock_tar(root: Path, names: Sequence[str], folder: Path) -> None:
    """Every frame read and written by the stock writer, one process."""
    target = folder / "stock.tar"
    with webdataset.TarWriter(str(target), encoder=False) as writer:
        for name in names:
            for index, path in enumerate(sorted((root / name).iterdir())):
                writer.write({"__key__": f"{name}-{index:06d}", "jpg": path.read_bytes()})
    target.unlink()


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
