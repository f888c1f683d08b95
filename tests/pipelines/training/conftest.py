"""A network of some hundred numbers, clips in memory, and a tiny shard set of real frames."""

import sys
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
import torch
from torch import nn

from pipelines.training.checkpoint import State
from pipelines.training.optim import build_optimizer
from pipelines.training.settings import TrainSettings
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.finish import finish_shard_set
from preprocessing.loader import Batch
from preprocessing.planning import plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource

NUM_CLASSES, NUM_SEGMENTS, PIXELS = 3, 2, 8


class TinyNet(nn.Module):
    """A convolution, a batch norm, dropout, the mean over segments and a linear layer; `gamma` scales a second path."""

    def __init__(self, *, with_norm=True, dropout=0.5):
        super().__init__()
        self.num_classes = NUM_CLASSES
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8) if with_norm else nn.Identity()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(8, NUM_CLASSES)

    def prepare(self, clips):
        return clips.float() / 128 - 1

    def forward(self, clips):
        features = self.norm(self.conv(clips.flatten(0, 1)))
        features = (torch.relu(features) + self.gamma * features).mean(dim=(2, 3))
        return self.linear(self.dropout(features)).unflatten(0, clips.shape[:2]).mean(dim=1)


@dataclass
class MemoryLoader:
    """Clips made from numbers; in training their order is drawn anew for each epoch. The steps are divided over ranks."""

    num_clips: int = 20
    batch_size: int = 4
    train: bool = True
    rank: int = 0
    world_size: int = 1
    noise_seed: int = 0
    epoch: int = 0
    step: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.noise_seed)
        self.labels = torch.arange(self.num_clips) % NUM_CLASSES
        noise = torch.randint(0, 100, (self.num_clips, NUM_SEGMENTS, 3, PIXELS, PIXELS), generator=generator)
        colour = 100 * nn.functional.one_hot(self.labels, 3)[:, None, :, None, None]
        self.clips = (noise + colour).to(torch.uint8)

        self.num_steps = -(-self.num_clips // (self.batch_size * self.world_size))

    def __len__(self):
        return self.num_steps

    def divide(self, num_steps):
        self.num_steps = num_steps

    def epoch_keys(self, epoch):
        return [f"clip{row}" for row in range(self.num_clips)]

    def seek(self, epoch, step=0):
        self.epoch, self.step = epoch, step

    def __iter__(self):
        epoch, first = self.epoch, self.step
        self.epoch, self.step = epoch + 1, 0
        order = np.random.default_rng(epoch).permutation(self.num_clips) if self.train else np.arange(self.num_clips)
        for rows in np.array_split(order, len(self))[first:]:
            own = np.array_split(rows, self.world_size)[self.rank]
            yield Batch(self.clips[own], self.labels[own], [f"clip{row}" for row in own], len(rows))


def tiny_settings(**changes):
    """Settings under which the tiny network learns its colours in a few epochs."""
    arguments = {
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 0.1,
        "warmup_epochs": 0.5,
        "precision": "fp32",
        "num_segments": 2,
    }
    return TrainSettings(**(arguments | changes))


def tiny_state(model, settings=None):
    """What training would make of the network: an optimiser, no average, no scaler."""
    return State(model, build_optimizer(model, settings or tiny_settings()), None, torch.amp.GradScaler("cpu", enabled=False))


def make_tiny_net(**options):
    """The same tiny network at each call."""
    torch.manual_seed(7)
    return TinyNet(**options)


@pytest.fixture(scope="session")
def tiny():
    """This file: tests are no package, so that they cannot import it by name."""
    return sys.modules[__name__]


@pytest.fixture(autouse=True)
def one_thread():
    """Training on one thread: the sums of several are in no fixed order across thread counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory):
    """A shard set of 24 training and 8 validation videos of two classes: brighter and darker from frame to frame."""
    root, output_dir = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("shards")
    rows = []
    for video in range(32):
        video_id, split = f"v{video:02d}", "train" if video < 24 else "validation"
        rows.append({"video_id": video_id, "path": video_id, "kind": "frames", "split": split, "label": video % 2})
        (root / video_id).mkdir()
        noise = np.random.default_rng(video).integers(0, 40, (40, 48, 3))
        for frame_index in range(6):
            light = 30 * (frame_index if video % 2 else 5 - frame_index)
            data = simplejpeg.encode_jpeg((noise + light).astype(np.uint8), quality=90)
            (root / video_id / f"{frame_index + 1:05d}.jpg").write_bytes(data)
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), ["getting darker", "getting brighter"])
    settings = ShardSettings(videos_per_shard=16)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for plan in plans:
        write_shard(plan, FolderSource(root), output_dir, settings)
    finish_shard_set(output_dir, index, plans, settings, "something_v1")
    return output_dir
