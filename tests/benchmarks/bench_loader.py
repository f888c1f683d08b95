"""How fast clips come out of shards: our loader, the usual ways and the bare work, measured side by side.

    python tests/benchmarks/bench_loader.py [--rounds 5] [--workers 2] [--skip-training] [--json]

Contenders, all on the same frames, with the same random frames, crops and flips, T = 8, to 224 pixels, in two workers:

    ours     preprocessing.make_loader
    pil      a plain loader over frame folders: open 8 files, crop, resize, flip, stack, float, normalise; Pillow in the worker
             processes of a torch DataLoader
    stock    webdataset.WebDataset with decoding, Pillow and torchvision in the worker processes of a torch DataLoader
    bare     the JPEGs lie in memory: decode, crop and resize with the same two functions as ours, in threads, and nothing else

The frames are those of real_mini/something_v1 in ../shared/data where that exists, else generated ones of the same size. Each
round measures every contender once, in another order; ratios are medians over the rounds of ratios within a round, so that a
machine that slows down for a while does not decide. Every contender delivers the same number of clips in a round.

Besides: the JPEG libraries on the same frames on one thread; and how long a training step waits for its batch.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
import torchvision
import webdataset
from PIL import Image
from torchvision.transforms.v2 import functional

from models import create_model
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.finish import finish_shard_set
from preprocessing.loader import make_loader, open_shards
from preprocessing.planning import plan_shards
from preprocessing.reader import StoredVideo
from preprocessing.segments import segment_indices
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.transforms import Crop, clip_rng, draw_train_crop, write_clip

NUM_SEGMENTS = 8
PIXELS = 224
BATCH_SIZE = 16
SEED = 0
NUM_VIDEOS = 320
HEIGHT, WIDTH, NUM_FRAMES = 100, 132, 50  # Something-V1 on average: 49.16 frames
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REAL = Path(__file__).resolve().parents[3] / "shared/data/real_mini/something_v1/20bn-something-something-v1"
TARGETS = {"pil": 6.0, "stock": 3.0, "bare": 0.6}
WAIT_TARGET = 0.02
TRAIN_BATCH, TRAIN_STEPS = 4, 8


@dataclass(frozen=True)
class Data:
    """The same videos as frame folders under `root` and as shards; `folders` has the folder's name of each key."""

    root: Path
    shard_dir: Path
    folders: dict[str, str]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="threads of ours and bare, processes of pil and stock")
    parser.add_argument("--skip-training", action="store_true", help="do not measure the wait of a training step (a minute)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder))
        jpegs = [jpeg for clip in stored_clips(data) for jpeg in clip.jpegs]
        wait = None if arguments.skip_training else measure_wait(data, arguments.workers)
        torch.set_num_threads(1)
        report = {
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": {
                name: version(name) for name in ("torch", "torchvision", "simplejpeg", "webdataset", "pillow", "numpy")
            },
            "settings": vars(arguments)
            | {"frames": "real" if REAL.is_dir() else "generated", "frame_bytes": statistics.mean(map(len, jpegs))},
            "loaders": measure_loaders(data, arguments.workers, arguments.rounds),
            "jpeg": measure_jpeg(jpegs[:800], arguments.rounds),
            "wait": wait,
        }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)


def prepare(folder: Path) -> Data:
    """Write shards of 320 labelled videos: each real one several times, or generated ones."""
    root = REAL if REAL.is_dir() else write_frames(folder / "raw")
    names = sorted(path.name for path in root.iterdir())
    shard_dir = folder / "shards"
    shard_dir.mkdir()
    rows = []
    for number, name in zip(range(NUM_VIDEOS), itertools.cycle(names), strict=False):
        rows.append({"video_id": f"v{number:03d}", "path": name, "kind": "frames", "split": "train", "label": number % 4})
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), ["a", "b", "c", "d"])
    settings = ShardSettings(videos_per_shard=NUM_VIDEOS // 8)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for plan in plans:
        write_shard(plan, FolderSource(root), shard_dir, settings)
    finish_shard_set(shard_dir, index, plans, settings, "something_v1")
    paths = {row["video_id"]: row["path"] for row in rows}
    return Data(root, shard_dir, {key: paths[key[:4]] for key in open_shards(shard_dir, "train").keys})


def write_frames(root: Path) -> Path:
    """Write folders of textured noise that drifts, in frames as large as those of Something-V1."""
    rng = np.random.default_rng(SEED)
    for video in range(NUM_VIDEOS // 4):
        (root / f"{video:05d}").mkdir(parents=True)
        coarse = torch.from_numpy(rng.integers(0, 256, (3, 12, 24), dtype=np.uint8))
        canvas = functional.resize(coarse, [HEIGHT, WIDTH + NUM_FRAMES], antialias=True).permute(1, 2, 0).numpy()
        canvas = np.clip(canvas + rng.normal(0, 10, canvas.shape), 0, 255).astype(np.uint8)
        for frame_index in range(NUM_FRAMES):
            frame = np.ascontiguousarray(canvas[:, frame_index : frame_index + WIDTH])
            jpeg = simplejpeg.encode_jpeg(frame, quality=85, colorsubsampling="420")
            (root / f"{video:05d}" / f"{frame_index + 1:05d}.jpg").write_bytes(jpeg)
    return root


@dataclass(frozen=True)
class Draw:
    """What is random about a clip, the same for every contender."""

    frame_indices: list[int]
    crop: Crop
    mirrored: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The crop as Pillow wants it."""
        crop = self.crop
        return crop.left, crop.top, crop.left + crop.width, crop.top + crop.height


def draw_clip(key: str, num_frames: int, height: int, width: int) -> Draw:
    """The draws of our loader in epoch 0."""
    rng = clip_rng(SEED, 0, key)
    indices = segment_indices(num_frames, NUM_SEGMENTS, rng).tolist()
    return Draw(indices, draw_train_crop(height, width, PIXELS, rng), bool(rng.random() < 0.5))


@dataclass(frozen=True)
class StoredClip:
    """A clip whose JPEGs lie in memory."""

    video: StoredVideo
    draw: Draw
    jpegs: list[bytes]


def stored_clips(data: Data) -> list[StoredClip]:
    """The clips of an epoch."""
    shards = open_shards(data.shard_dir, "train")
    contents = {path.name: path.read_bytes() for path in data.shard_dir.glob("*.tar")}
    clips = []
    for video in map(shards.video, range(len(shards))):
        draw = draw_clip(video.key, len(video.frame_sizes), video.height, video.width)
        spans = [(video.frame_offsets[i], video.frame_offsets[i] + video.frame_sizes[i]) for i in draw.frame_indices]
        clips.append(StoredClip(video, draw, [contents[video.shard][start:stop] for start, stop in spans]))
    return clips


def measure_loaders(data: Data, num_workers: int, num_rounds: int) -> dict[str, Any]:
    """Clips a second of each contender in each round, their medians, and the median ratio of ours to each."""
    contenders: dict[str, Callable[[], int]] = {
        "ours": ours(data, num_workers),
        "pil": plain_pil(data, num_workers),
        "stock": stock(data, num_workers),
        "bare": bare(data, num_workers),
    }
    rates = measure_rounds(contenders, num_rounds)
    return {
        "clips_per_second": {name: statistics.median(rates[name]) for name in rates},
        "ours_over": {
            name: statistics.median(mine / other for mine, other in zip(rates["ours"], rates[name], strict=True))
            for name in TARGETS
        },
        "rounds": rates,
    }


def measure_rounds(contenders: dict[str, Callable[[], int]], num_rounds: int) -> dict[str, list[float]]:
    """Things a second that each contender did, round by round, each round in another order."""
    names = list(contenders)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for run in contenders.values():
        run()  # files into the page cache, worker processes started
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            count = contenders[name]()
            rates[name].append(count / (time.perf_counter() - start))
    return rates


def ours(data: Data, num_workers: int) -> Callable[[], int]:
    """An epoch of our loader."""
    loader = make_loader(
        open_shards(data.shard_dir, "train"),
        num_segments=NUM_SEGMENTS,
        batch_size=BATCH_SIZE,
        train=True,
        seed=SEED,
        num_workers=num_workers,
        pixels=PIXELS,
        flip="naive",
    )

    def run() -> int:
        loader.seek(0)
        return sum(len(batch.keys) for batch in loader)

    return run


class FrameFolders(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """The plain data set: a video is a folder of files."""

    def __init__(self, data: Data) -> None:
        self.videos = [(key, data.root / folder) for key, folder in sorted(data.folders.items())]
        self.num_frames = {folder: len(list(folder.iterdir())) for folder in {folder for _, folder in self.videos}}

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        key, folder = self.videos[index]
        with Image.open(folder / "00001.jpg") as first:
            draw = draw_clip(key, self.num_frames[folder], first.height, first.width)
        frames = [Image.open(folder / f"{i + 1:05d}.jpg").convert("RGB") for i in draw.frame_indices]
        frames = [frame.crop(draw.box).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR) for frame in frames]
        if draw.mirrored:
            frames = [frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for frame in frames]
        clip = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
        return functional.normalize(clip.float().div(255), list(MEAN), list(STD)), index % 4


def plain_pil(data: Data, num_workers: int) -> Callable[[], int]:
    """An epoch of Pillow over frame folders."""
    loader = torch.utils.data.DataLoader(
        FrameFolders(data), batch_size=BATCH_SIZE, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    return lambda: sum(len(labels) for _, labels in loader)


def stock(data: Data, num_workers: int) -> Callable[[], int]:
    """An epoch of the stock readers, whose worker processes stay alive between epochs."""

    def to_clip(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        names = sorted(name for name in sample if name.endswith(".jpg"))
        with Image.open(io.BytesIO(sample[names[0]])) as first:
            draw = draw_clip(sample["__key__"], len(names), first.height, first.width)
        frames = [Image.open(io.BytesIO(sample[names[i]])).convert("RGB") for i in draw.frame_indices]
        frames = [frame.crop(draw.box).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR) for frame in frames]
        if draw.mirrored:
            frames = [frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for frame in frames]
        return torch.stack([functional.pil_to_tensor(frame) for frame in frames]), json.loads(sample["json"])["label"]

    paths = sorted(str(path) for path in data.shard_dir.glob("*.tar"))
    dataset = webdataset.WebDataset(paths, shardshuffle=False).map(to_clip)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH_SIZE, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    return lambda: sum(len(labels) for _, labels in loader)


def bare(data: Data, num_workers: int) -> Callable[[], int]:
    """Decoding, cropping and resizing of the frames of an epoch, which lie in memory; the pixels are thrown away."""
    clips = stored_clips(data)

    def work(part: list[StoredClip]) -> int:
        out = np.empty((NUM_SEGMENTS, PIXELS, PIXELS, 3), np.uint8)
        for clip in part:
            frames = [simplejpeg.decode_jpeg(jpeg) for jpeg in clip.jpegs]
            write_clip(frames, clip.draw.crop, clip.video.height, clip.video.width, clip.draw.mirrored, out)
        return len(part)

    def run() -> int:
        with ThreadPoolExecutor(num_workers) as pool:
            return sum(pool.map(work, [clips[worker::num_workers] for worker in range(num_workers)]))

    return run


def measure_jpeg(jpegs: list[bytes], num_rounds: int) -> dict[str, float | str]:
    """Frames a second of each JPEG library on one thread: to RGB pixels at full size."""
    tensors = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    rgb = torchvision.io.ImageReadMode.RGB
    contenders: dict[str, Callable[[], int]] = {
        "simplejpeg": lambda: sum(simplejpeg.decode_jpeg(jpeg) is not None for jpeg in jpegs),
        "torchvision.io": lambda: sum(torchvision.io.decode_jpeg(tensor, mode=rgb) is not None for tensor in tensors),
        "Pillow": lambda: sum(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) is not None for jpeg in jpegs),
    }
    absent = {}
    try:
        import turbojpeg

        turbo = turbojpeg.TurboJPEG()
        contenders["PyTurboJPEG"] = lambda: sum(turbo.decode(jpeg, turbojpeg.TJPF_RGB) is not None for jpeg in jpegs)
    except (ImportError, OSError, RuntimeError) as error:
        absent["PyTurboJPEG"] = f"not measured: {str(error).splitlines()[0]}"
    return {name: statistics.median(rates) for name, rates in measure_rounds(contenders, num_rounds).items()} | absent


def measure_wait(data: Data, num_workers: int) -> dict[str, Any]:
    """Training steps of SA-GSM on BN-Inception on the CPU: seconds in `next(loader)` and in all, step by step."""
    loader = make_loader(
        open_shards(data.shard_dir, "train"),
        num_segments=NUM_SEGMENTS,
        batch_size=TRAIN_BATCH,
        train=True,
        seed=SEED,
        num_workers=num_workers,
        pixels=PIXELS,
    )
    model = create_model("sa_gsm_bn_inception", num_classes=4, num_segments=NUM_SEGMENTS).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    waits, steps = [], []
    with contextlib.closing(iter(loader)) as batches:
        for _ in range(TRAIN_STEPS + 1):
            start = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - start)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(model.prepare(batch.clips)), batch.labels).backward()
            optimizer.step()
            steps.append(time.perf_counter() - start)
    # Nothing is prefetched yet at the first step.
    return {"first": waits[0], "share": sum(waits[1:]) / sum(steps[1:]), "step_seconds": statistics.median(steps[1:])}


def print_tables(report: dict[str, Any]) -> None:
    """Print medians and ratios beside their targets."""
    settings = report["settings"]
    print(
        f"{NUM_VIDEOS} clips of {NUM_SEGMENTS} {settings['frames']} frames of {settings['frame_bytes']:.0f} bytes to {PIXELS} "
        f"pixels; {settings['workers']} workers, {settings['rounds']} rounds, {report['machine']['cores']} cores"
    )
    loaders = report["loaders"]
    for name, rate in loaders["clips_per_second"].items():
        print(f"  {name:<6} {rate:>6.0f} clips/s", end="" if name in TARGETS else "\n")
        if name in TARGETS:
            ratio = loaders["ours_over"][name]
            print(f"   ours is {ratio:5.2f} x   target {TARGETS[name]:.1f} x   {verdict(ratio >= TARGETS[name])}")
    print("JPEG to RGB, one thread")
    for name, rate in report["jpeg"].items():
        print(f"  {name:<15} {rate if isinstance(rate, str) else f'{rate:.0f} frames/s'}")
    if report["wait"]:
        wait = report["wait"]
        print(
            f"waiting for data: {wait['share']:.2%} of training steps of {wait['step_seconds']:.2f} s (SA-GSM on BN-Inception, "
            f"{TRAIN_BATCH} clips; the first batch took {wait['first']:.2f} s)   target {WAIT_TARGET:.0%}   "
            f"{verdict(wait['share'] <= WAIT_TARGET)}"
        )


def verdict(is_met: bool) -> str:
    """The last word of a line."""
    return "met" if is_met else "MISSED"


if __name__ == "__main__":
    main()
