"""Five videos of different formats, the shard set made of them, and a small network that was never trained, as files."""

from dataclasses import dataclass
from pathlib import Path

import ffmpeg
import pyarrow as pa
import pytest
import simplejpeg
import torch
from safetensors.torch import save_file

from pipelines.training.job import TrainJob, save_model
from pipelines.training.settings import ModelSettings, TrainSettings, build_model
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.decode import ffmpeg_path
from preprocessing.finish import finish_shard_set
from preprocessing.planning import plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.synthetic import LABEL_NAMES, SyntheticSettings, draw_scene, render

CODECS = {"mp4": "libx264", "webm": "libvpx", "avi": "mpeg4", "mov": "mjpeg"}


@dataclass(frozen=True)
class Asked:
    """Attributes: `raw` is the folder of the videos, whose names are `names`; `artifact` holds the folder `model`."""

    raw: Path
    names: list[str]
    shards_dir: Path
    artifact: Path


def write_film(path, number):
    """A generated video; its format goes by the suffix, and without one it is a folder of JPEG frames."""
    frames = render(draw_scene(SyntheticSettings(min_frames=5, max_frames=9), number, number), 72)
    if not path.suffix:
        path.mkdir()
        for index, frame in enumerate(frames, start=1):
            (path / f"{index:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(frame, quality=95))
        return
    source = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{frames.shape[2]}x{frames.shape[1]}", r=25)
    codec = CODECS[path.suffix[1:]]
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    target = source.output(str(path), vcodec=codec, pix_fmt=pixels, threads=1)
    target.run(cmd=ffmpeg_path(), input=frames.tobytes(), quiet=True)


@pytest.fixture(scope="session")
def asked(tmp_path_factory):
    """Not to be changed. The shards' frames are smaller than the videos, so that it matters how they are decoded."""
    raw, shards_dir, artifact = (tmp_path_factory.mktemp(name) for name in ("films", "film-shards", "film-model"))
    names = [*(f"film.{suffix}" for suffix in CODECS), "frames"]
    rows = []
    for number, name in enumerate(names):
        write_film(raw / name, number)
        kind = "video" if "." in name else "frames"
        rows.append({"video_id": name, "path": name, "kind": kind, "split": "train", "label": number})
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), list(LABEL_NAMES))
    settings = ShardSettings(short_side=40, jpeg_quality=5)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for plan in plans:
        write_shard(plan, FolderSource(raw), shards_dir, settings)
    finish_shard_set(shards_dir, index, plans, settings, "folder")
    train = TrainSettings(pixels=32, num_segments=4, precision="fp32")
    job = TrainJob("films", str(shards_dir), ModelSettings(name="gsm_resnet18"), train, val_split="train")
    torch.manual_seed(3)
    network = build_model(job.model, num_classes=len(LABEL_NAMES), num_segments=train.num_segments)
    save_file(network.state_dict(), artifact / "weights.safetensors")
    save_model(artifact / "model", job, artifact / "weights.safetensors")
    return Asked(raw, names, shards_dir, artifact)
