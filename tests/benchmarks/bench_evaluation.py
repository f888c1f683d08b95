"""How fast a split is judged: scores, intervals and ensembles of files, and evaluation against the published test's loop.

    python tests/benchmarks/bench_evaluation.py [--videos 96] [--rounds 3] [--json]

ensemble    four files of 10,000 clips x 174 classes: read, averaged, all judged with intervals; the target is 10 s
evaluation  SA-GSM on BN-Inception, 8 frames of 224 pixels, the centre crop: videos a second from shards, as `evaluate` does it,
            against a loop as in the published test script (one video at a time, whole JPEG files by Pillow, frames scaled to
            256 and cropped, float32 in contiguous memory, the plain form of gate and attention); same weights; target: 3 x

Rounds take turns, and the ratio is the median of those within a round. Frames are of 240 pixels, as most are stored; loading
the network counts for neither. On a machine with bfloat16 instructions evaluation uses them, as it does by default.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_models import NUM_CLASSES, NUM_SEGMENTS, networks
from PIL import Image
from scipy.special import softmax
from torch import nn

from pipelines.evaluation.ensemble import average_scores, describe_ensemble, read_members
from pipelines.evaluation.evaluate import EvaluateSettings, Scores, score_clips
from pipelines.evaluation.scores import Origin
from pipelines.training.precision import resolve_precision
from preprocessing.datasets import DatasetSettings, VideoIndex, index_videos
from preprocessing.finish import finish_shard_set
from preprocessing.loader import make_loader
from preprocessing.planning import plan_shards, sample_key
from preprocessing.reader import open_shards
from preprocessing.segments import segment_indices
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.synthetic import SyntheticSettings, generate

PIXELS = 224
TARGET_SECONDS, TARGET_RATIO = 10.0, 3.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_ensemble(Path(folder)) | measure_evaluation(Path(folder), options.videos, options.rounds)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    goal = "reached" if found["ensemble_seconds"] <= TARGET_SECONDS else "missed"
    print(f"ensemble of 4, 10,000 clips x 174 classes: {found['ensemble_seconds']:.2f} s  target {TARGET_SECONDS:g} s: {goal}")
    goal = "reached" if found["ratio"] >= TARGET_RATIO else "missed"
    print(
        f"evaluation: {found['ours']:.2f} videos/s against {found['plain']:.2f}, {found['ratio']:.2f} x  target "
        f"{TARGET_RATIO:g} x: {goal}; the scores differ by at most {found['difference']:.4f}"
    )


def measure_ensemble(folder: Path) -> dict[str, float]:
    """Seconds from four files to all numbers of the members and of their mean; what is imported on the way counts."""
    labels = np.arange(10_000) % NUM_CLASSES
    names = tuple(f"class {label}" for label in range(NUM_CLASSES))
    paths = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(10_000, NUM_CLASSES)) + 3 * np.eye(NUM_CLASSES)[labels]
        order = rng.permutation(10_000)
        scores = Scores([f"v{row:05d}" for row in order], labels[order], logits[order].astype(np.float32))
        paths.append(str(folder / f"{seed}.parquet"))
        scores.save(Path(paths[-1]), Origin(names, "validation", "centre"))
    started = time.perf_counter()
    members = read_members(paths, None, folder)
    describe_ensemble(members, average_scores(members))
    return {"ensemble_seconds": time.perf_counter() - started}


def measure_evaluation(folder: Path, num_videos: int, num_rounds: int) -> dict[str, Any]:
    """Videos a second of both, and how far their scores are apart."""
    index = make_shards(folder, num_videos)
    plain, ours = networks()
    videos = [row for row in index.videos.to_pylist() if row["split"] == "validation"]
    settings, device = EvaluateSettings(), torch.device("cpu")
    loader = make_loader(
        open_shards(folder / "shards", "validation"),
        num_segments=NUM_SEGMENTS,
        batch_size=settings.batch_size,
        train=False,
        seed=0,
        num_workers=settings.loader_threads,
    )
    ours_said: dict[str, Any] = {}
    plain_said: dict[str, Any] = {}

    def evaluate() -> None:
        scores = score_clips(ours, loader, device, resolve_precision("auto", device))
        ours_said.update(zip(scores.keys, softmax(scores.logits, axis=1), strict=True))

    def published() -> None:
        plain_said.update(test_as_published(plain.eval(), folder / "raw", videos))

    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(num_rounds):
        contenders: list[tuple[str, Callable[[], None]]] = [("ours", evaluate), ("plain", published)]
        for name, run in contenders if number % 2 else contenders[::-1]:
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    differences = [np.abs(row - plain_said[key]).max() for key, row in ours_said.items()]
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["plain"], strict=True)]
    rates = {name: num_videos / statistics.median(values) for name, values in seconds.items()}
    return rates | {"ratio": statistics.median(ratios), "difference": float(max(differences)), "rounds": seconds}


def make_shards(folder: Path, num_videos: int) -> VideoIndex:
    """Generated videos of 240 x 320 pixels with 174 label names, as frame folders in `raw` and as shards."""
    (folder / "raw").mkdir()
    (folder / "shards").mkdir()
    generate(
        SyntheticSettings(num_train=8, num_validation=num_videos, num_broken=0, height=240, min_width=320, max_width=320),
        folder / "raw",
    )
    index = index_videos(DatasetSettings(name="something_v1", root=folder / "raw"), folder / "raw")
    names = index.label_names + [f"another class {number}" for number in range(NUM_CLASSES - len(index.label_names))]
    index = VideoIndex(index.videos, names)
    settings = ShardSettings(videos_per_shard=32)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for plan in plans:
        write_shard(plan, FolderSource(folder / "raw"), folder / "shards", settings)
    finish_shard_set(folder / "shards", index, plans, settings, "something_v1")
    return index


def test_as_published(model: nn.Module, root: Path, videos: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Scores by key: GSM's `test_models.py` and its transforms, on the CPU."""
    found = {}
    for video in videos:
        files = sorted((root / video["path"]).glob("*.jpg"))
        frames = []
        for frame_index in segment_indices(len(files), NUM_SEGMENTS):
            image = Image.open(files[frame_index]).convert("RGB")
            scale = 256 / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
            left, top = (image.width - PIXELS) // 2, (image.height - PIXELS) // 2
            frames.append(np.asarray(image.crop((left, top, left + PIXELS, top + PIXELS))))
        clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous().float()
        inputs = ((clip - model.mean) / model.std).contiguous()
        with torch.no_grad():
            found[sample_key(video["video_id"])] = model(inputs[None]).softmax(dim=1)[0].numpy()
    return found


if __name__ == "__main__":
    main()
