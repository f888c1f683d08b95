"""A network of some hundred numbers, clips in memory, processes that train it, and a tiny shard set of real frames."""

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipelines.training.checkpoint import State
from pipelines.training.loop import train
from pipelines.training.optim import build_optimizer
from pipelines.training.settings import TrainSettings
from preprocessing.loader import Batch

NUM_CLASSES, NUM_SEGMENTS, PIXELS = 3, 2, 8
CPU = torch.device("cpu")
LOAD_TINY = f"""
import importlib.util, os, random, signal, sys, time
from pathlib import Path
import torch
spec = importlib.util.spec_from_file_location("tiny", {__file__!r})
tiny = sys.modules["tiny"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
torch.set_num_threads(1)
"""


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


class LargeLoader(MemoryLoader):
    """The same clips at 32 x 32 pixels, for real networks."""

    def __iter__(self):
        for batch in super().__iter__():
            yield replace(batch, clips=batch.clips.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4))


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


def train_tiny(checkpoint_dir, model=None, *, loaders=None, settings=None, **options):
    """Train the tiny network, or another, on the clips in memory."""
    loaders = loaders or (MemoryLoader(), MemoryLoader(9, train=False))
    model = model or make_tiny_net()
    return train(model, *loaders, tiny_settings(**(settings or {})), checkpoint_dir=checkpoint_dir, device=CPU, **options)


def stop_after(num_steps):
    """A `should_stop` that says True after so many steps."""
    calls = []

    def should_stop():
        calls.append(None)
        return len(calls) >= num_steps

    return should_stop


def without_times(history):
    """The epochs without what differs from run to run."""
    return [replace(epoch, seconds=0.0, clips_per_second=0.0, data_wait=0.0, peak_memory_bytes=0) for epoch in history]


def run_script(script, *arguments):
    """Run Python code in a process of its own, in which `tiny` is this file; return what it printed."""
    command = [sys.executable, "-c", LOAD_TINY + textwrap.dedent(script), *map(str, arguments)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_ranks(folder, world_size, work):
    """Call `work(rank)` in so many forked processes of one gloo group, and wait for them; for scripts only."""
    children = []
    folder.mkdir(parents=True)
    for rank in range(world_size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        work(rank)
        dist.destroy_process_group()
        os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world_size


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
