"""How fast clips come out of shards: our loader, the stock way, and the decoder alone, measured side by side.

    python tests/benchmarks/bench_loader.py [--json]

Contenders, all on the same generated shards and with the same random frames and crops:

    ours        preprocessing.make_loader
    stock       webdataset.WebDataset, Pillow and torchvision in the worker processes of a torch DataLoader
    decode      simplejpeg alone: the 8 frames of each clip from memory, no crop, no resize, in as many threads

Each round measures every contender once, in another order; ratios are medians over the rounds of ratios within a round, so
that a machine that slows down for a while does not decide. Every contender delivers the same number of clips in a round.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg
import torch
import webdataset
from PIL import Image
from torchvision.transforms.v2 import functional

from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.finish import finish_shard_set
from preprocessing.loader import make_loader, open_shards
from preprocessing.planning import plan_shards
from preprocessing.segments import segment_indices
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.transforms import clip_rng, draw_train_crop

NUM_SEGMENTS = 8
BATCH_SIZE = 16
NUM_FRAMES = 50  # Something-V1: 49.16 on average
SEED = 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frame", default="100x132", help="height x width of the stored frames (default: as Something-V1)")
    parser.add_argument("--pixels", type=int, nargs="+", default=[64, 224], help="sides of the clips")
    parser.add_argument("--videos", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="threads of ours, processes of stock")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    height, width = (int(side) for side in arguments.frame.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        shard_dir, frame_bytes = write_shards(Path(folder), arguments.videos, height, width)
        results = [measure(shard_dir, pixels, arguments.workers, arguments.rounds) for pixels in arguments.pixels]
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "torchvision", "simplejpeg", "webdataset", "pillow", "numpy")},
        "settings": vars(arguments) | {"num_segments": NUM_SEGMENTS, "batch_size": BATCH_SIZE, "frame_bytes": frame_bytes},
        "results": results,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)


def write_shards(folder: Path, num_videos: int, height: int, width: int) -> tuple[Path, int]:
    """Write shards of textured noise that drifts; returns their folder and the mean size of a frame in bytes."""
    rng = np.random.default_rng(SEED)
    root, output_dir = folder / "raw", folder / "shards"
    output_dir.mkdir()
    rows, num_bytes = [], 0
    for video in range(num_videos):
        video_id = f"video{video:05d}"
        rows.append({"video_id": video_id, "path": video_id, "kind": "frames", "split": "train", "label": video % 4})
        (root / video_id).mkdir(parents=True)
        coarse = torch.from_numpy(rng.integers(0, 256, (3, 12, 24), dtype=np.uint8))
        canvas = functional.resize(coarse, [height, width + NUM_FRAMES], antialias=True).permute(1, 2, 0).numpy()
        canvas = np.clip(canvas + rng.normal(0, 10, canvas.shape), 0, 255).astype(np.uint8)
        for frame_index in range(NUM_FRAMES):
            frame = np.ascontiguousarray(canvas[:, frame_index : frame_index + width])
            data = simplejpeg.encode_jpeg(frame, quality=85, colorsubsampling="420")
            num_bytes += len(data)
            (root / video_id / f"{frame_index + 1:05d}.jpg").write_bytes(data)
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), ["a", "b", "c", "d"])
    settings = ShardSettings(videos_per_shard=max(1, num_videos // 8))
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for plan in plans:
        write_shard(plan, FolderSource(root), output_dir, settings)
    finish_shard_set(output_dir, index, plans, settings, "something_v1")
    return output_dir, num_bytes // (num_videos * NUM_FRAMES)


def measure(shard_dir: Path, pixels: int, num_workers: int, num_rounds: int) -> dict[str, Any]:
    """Clips a second of each contender in each round, their medians, and the median ratio of ours to each."""
    contenders: dict[str, Callable[[], int]] = {
        "ours": ours(shard_dir, pixels, num_workers),
        "stock": stock(shard_dir, pixels, num_workers),
        "decode": decode_alone(shard_dir, num_workers),
    }
    names = list(contenders)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for run_epoch in contenders.values():
        run_epoch()  # files into the page cache, worker processes started
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            num_clips = contenders[name]()
            rates[name].append(num_clips / (time.perf_counter() - start))
    return {
        "pixels": pixels,
        "clips_per_second": {name: statistics.median(rates[name]) for name in names},
        "ours_over": {
            name: statistics.median(mine / other for mine, other in zip(rates["ours"], rates[name], strict=True))
            for name in names[1:]
        },
        "rounds": rates,
    }


def ours(shard_dir: Path, pixels: int, num_workers: int) -> Callable[[], int]:
    """An epoch of our loader."""
    loader = make_loader(
        open_shards(shard_dir, "train"),
        num_segments=NUM_SEGMENTS,
        batch_size=BATCH_SIZE,
        train=True,
        seed=SEED,
        num_workers=num_workers,
        pixels=pixels,
    )
    return lambda: sum(len(batch.keys) for batch in loader)


def stock(shard_dir: Path, pixels: int, num_workers: int) -> Callable[[], int]:
    """An epoch of the stock readers, whose worker processes stay alive between epochs."""

    def to_clip(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        names = sorted(name for name in sample if name.endswith(".jpg"))
        rng = clip_rng(SEED, 0, sample["__key__"])
        images = [Image.open(io.BytesIO(sample[names[i]])) for i in segment_indices(len(names), NUM_SEGMENTS, rng)]
        crop = draw_train_crop(images[0].height, images[0].width, pixels, rng)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        frames = [image.convert("RGB").crop(box).resize((pixels, pixels), Image.Resampling.BILINEAR) for image in images]
        if rng.random() < 0.5:
            frames = [frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for frame in frames]
        return torch.stack([functional.pil_to_tensor(frame) for frame in frames]), json.loads(sample["json"])["label"]

    shards = sorted(str(path) for path in shard_dir.glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).map(to_clip)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH_SIZE, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    return lambda: sum(len(labels) for _, labels in loader)


def decode_alone(shard_dir: Path, num_workers: int) -> Callable[[], int]:
    """Decoding of the frames of an epoch, which lie in memory."""
    shards = open_shards(shard_dir, "train")

    def frames_of(row: int) -> Iterator[bytes]:
        video = shards.video(row)
        content = (shard_dir / video.shard).read_bytes()
        for i in segment_indices(len(video.frame_sizes), NUM_SEGMENTS, clip_rng(SEED, 0, video.key)):
            yield content[video.frame_offsets[i] : video.frame_offsets[i] + video.frame_sizes[i]]

    clips = [list(frames_of(row)) for row in range(len(shards))]

    def decode(clip: list[bytes]) -> list[npt.NDArray[np.uint8]]:
        return [simplejpeg.decode_jpeg(frame) for frame in clip]

    def run_epoch() -> int:
        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            return sum(len(frames) > 0 for frames in pool.map(decode, clips))

    return run_epoch


def print_table(report: dict[str, Any]) -> None:
    """Print medians and ratios, a line a contender."""
    settings = report["settings"]
    print(
        f"{settings['videos']} clips of {NUM_SEGMENTS} frames from {settings['frame']} pixels, {settings['frame_bytes']} bytes "
        f"a frame; {settings['workers']} workers, {settings['rounds']} rounds, {report['machine']['cores']} cores"
    )
    print(f"{'pixels':>6}  {'contender':<9}  {'clips/s':>8}  {'ours is':>8}")
    for result in report["results"]:
        for name, rate in result["clips_per_second"].items():
            ratio = result["ours_over"].get(name)
            print(f"{result['pixels']:>6}  {name:<9}  {rate:>8.0f}  {f'{ratio:.2f} x' if ratio else '':>8}")


if __name__ == "__main__":
    main()
