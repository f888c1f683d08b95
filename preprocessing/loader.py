"""Shards to batches: only the sampled frames are read, and threads decode them.

The order of the clips is a pure function of (seed, epoch), their frames, crops and flips of (seed, epoch, key): neither the
number of threads nor that of ranks changes what an epoch shows, and a resumed run goes on at the very next clip.

Threads, not processes: reading, decoding and resizing free the GIL, and processes would pay for moving batches of 14 MB.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from infra.errors import ConfigError, DataError
from preprocessing.labels import mirror_labels
from preprocessing.reader import FrameReader, ShardSplit, StoredVideo, open_shards
from preprocessing.segments import segment_indices
from preprocessing.transforms import (
    Flip,
    Frame,
    centre_crop,
    clip_rng,
    draw_flip,
    draw_train_crop,
    smallest_decoded_size,
    write_clip,
)

__all__ = ["Batch", "Loader", "ShardSplit", "make_loader", "open_shards"]

_LEAST = {"num_segments": 1, "batch_size": 1, "seed": 0, "num_workers": 0, "pixels": 1, "world_size": 1, "rank": 0}


@dataclass(frozen=True, slots=True)
class Batch:
    """The clips that one rank sees in one step.

    Attributes:
        clips: uint8, RGB, [B, T, 3, H, W]; memory is [B, T, H, W, 3], so that `clips.flatten(0, 1)` is channels_last.
        labels: int64, [B]; of the clips as shown, so after a flip the mirrored label; -1 if unlabelled.
        keys: the videos' keys.
        num_global: the number of clips of this step over all ranks, for weighting a loss exactly.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    num_global: int


def make_loader(
    shards: ShardSplit,
    *,
    num_segments: int,
    batch_size: int,
    train: bool,
    seed: int,
    num_workers: int = 2,
    pixels: int = 224,
    flip: Flip = "swap",
    rank: int = 0,
    world_size: int = 1,
    subset: int | None = None,
) -> "Loader":
    """Make the batches of one split for one rank.

    The N clips of an epoch are divided over `ceil(N / (batch_size * world_size))` steps, and each step's clips over the ranks,
    as evenly as can be: every rank has the same number of steps, each clip is shown exactly once an epoch, and no batch is
    larger than `batch_size` or much smaller than the others.

    Args:
        shards: from `open_shards`.
        num_segments: T, frames a clip.
        batch_size: the most clips a rank gets in a step.
        train: True for random frames, crops, flips and order; False for the centre of each segment, the centre crop and the
            order of the index.
        seed: of all draws.
        num_workers: decoding threads; 0 decodes in the caller's thread. Does not change the batches.
        pixels: H and W of a clip.
        flip: what training does about mirror images: "swap" changes their labels as well, "none" makes none, "naive" keeps
            labels as they are. Testing makes none.
        rank: this process, from 0.
        world_size: number of processes that share an epoch.
        subset: use the first so many videos of the split, in the index's order; None for all.

    Raises:
        ConfigError: if an argument is out of range or there are too few clips to give each rank one in each step.
        DataError: if `train` and a video has no label.
    """
    num_clips = len(shards) if subset is None else subset
    return Loader(
        shards, num_segments, batch_size, train, seed, num_workers, pixels, flip, rank, world_size, num_clips=num_clips
    )


@dataclass(eq=False)
class Loader:
    """Batches of one split for one rank, an epoch an iteration. `make_loader` makes it and describes its settings.

    Successive iterations are epochs 0, 1, 2, ...; `seek` chooses another place. An iteration that is left early ends its
    threads and counts as an epoch.
    """

    shards: ShardSplit
    num_segments: int
    batch_size: int
    train: bool
    seed: int
    num_workers: int
    pixels: int
    flip: Flip
    rank: int
    world_size: int
    num_clips: int

    def __post_init__(self) -> None:
        self._check_settings()
        self.divide(-(-self.num_clips // (self.batch_size * self.world_size)))
        if self.train:
            self._check_labels()
        self._mirror = mirror_labels(self.shards.label_names)
        # Enough batches under way to keep all threads busy while the caller holds one.
        self._num_prefetched = max(2, 1 + -(-self.num_workers // self.batch_size))
        self._reader = FrameReader(self.shards)
        self._epoch = 0
        self._step = 0

    def __len__(self) -> int:
        """Steps an epoch, the same on every rank."""
        return self._num_steps

    def seek(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration start at this step of this epoch; it ends with the epoch.

        Args:
            epoch: from 0.
            step: from 0 to `len(loader)`, which is the end: the next iteration is then empty.

        Raises:
            ConfigError: if either is out of range.
        """
        if epoch < 0 or not 0 <= step <= self._num_steps:
            raise ConfigError(f"cannot go to epoch {epoch}, step {step}; expected epoch >= 0 and step 0 to {self._num_steps}")
        self._epoch, self._step = epoch, step

    def divide(self, num_steps: int) -> None:
        """Divide each epoch into so many steps, whatever `batch_size` says: those of a training that other ranks began.

        Raises:
            ConfigError: if there are too few clips to give each rank one in each step.
        """
        if self.num_clips // num_steps < self.world_size:
            raise ConfigError(
                f"{self.num_clips} clips in {num_steps} steps do not give each of {self.world_size} workers a clip in "
                "each step; use fewer workers, a larger batch_size or more videos"
            )
        self._num_steps = num_steps

    def epoch_keys(self, epoch: int) -> list[str]:
        """The keys of an epoch's clips in their order over all ranks: step by step, and within a step rank by rank."""
        return self.shards.table["key"].take(pa.array(self._epoch_rows(epoch))).to_pylist()  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[Batch]:
        """Start the next epoch.

        Raises:
            DataError: while iterating, if a frame cannot be read or decoded; names the video, the shard and the frame.
        """
        epoch, first_step = self._epoch, self._step
        self._epoch, self._step = epoch + 1, 0
        return self._iterate(epoch, first_step)

    def _check_settings(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.rank >= self.world_size:
            raise ConfigError(f"rank is {self.rank}; expected below {self.world_size}, which is world_size")
        if self.flip not in get_args(Flip):
            raise ConfigError(f"flip is {self.flip!r}; expected one of {', '.join(get_args(Flip))}")
        if not 1 <= self.num_clips <= len(self.shards):
            where = f"split {self.shards.split} of {self.shards.path}"
            raise ConfigError(f"subset is {self.num_clips}; expected 1 to {len(self.shards)}, the videos in {where}")

    def _check_labels(self) -> None:
        unlabelled = self.shards.table["label"].slice(0, self.num_clips).is_null()
        num_unlabelled = pc.sum(unlabelled).as_py()
        if num_unlabelled:
            first = self.shards.video(pc.index(unlabelled, True).as_py()).key
            raise DataError(
                f"{num_unlabelled} of {self.num_clips} videos in split {self.shards.split} of {self.shards.path} have no "
                f"label, the first is {first}; training needs labels: choose another split"
            )

    def _epoch_rows(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self.train:
            return np.arange(self.num_clips)
        return clip_rng(self.seed, epoch, "order of clips").permutation(self.num_clips)

    def _iterate(self, epoch: int, first_step: int) -> Iterator[Batch]:
        plans = self._plan_batches(epoch, first_step)
        if self.num_workers == 0:
            for plan in plans:
                yield plan.batch([load_clip() for load_clip in plan.tasks])
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="loader")
        under_way: deque[tuple[_BatchPlan, list[Future[int]]]] = deque()
        try:
            for plan in plans:
                under_way.append((plan, [pool.submit(load_clip) for load_clip in plan.tasks]))
                if len(under_way) > self._num_prefetched:
                    yield _await_batch(*under_way.popleft())
            while under_way:
                yield _await_batch(*under_way.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _plan_batches(self, epoch: int, first_step: int) -> Iterator["_BatchPlan"]:
        rows = self._epoch_rows(epoch)
        for step in range(first_step, self._num_steps):
            start, stop = _part_bounds(self.num_clips, self._num_steps, step)
            first, last = _part_bounds(stop - start, self.world_size, self.rank)
            videos = [self.shards.video(row) for row in rows[start + first : start + last].tolist()]
            clips = np.empty((len(videos), self.num_segments, self.pixels, self.pixels, 3), np.uint8)
            yield _BatchPlan(
                tasks=[functools.partial(self._load_clip, video, epoch, out) for video, out in zip(videos, clips, strict=True)],
                clips=clips,
                keys=[video.key for video in videos],
                num_global=stop - start,
            )

    def _load_clip(self, video: StoredVideo, epoch: int, out: Frame) -> int:
        """Write the pixels of one clip into `out`; return its label."""
        height, width, num_frames, label, mirrored = video.height, video.width, len(video.frame_sizes), video.label, False
        if self.train:
            rng = clip_rng(self.seed, epoch, video.key)
            frame_indices = segment_indices(num_frames, self.num_segments, rng)
            crop = draw_train_crop(height, width, self.pixels, rng)
            mirrored, label = draw_flip(label, self._mirror, self.flip, rng)
        else:
            frame_indices = segment_indices(num_frames, self.num_segments)
            crop = centre_crop(height, width, self.pixels)
        size = smallest_decoded_size(crop, height, width, self.pixels)
        frames = [self._reader.read(video, frame_index, size) for frame_index in frame_indices.tolist()]
        write_clip(frames, crop, height, width, mirrored, out)
        return label


@dataclass(frozen=True, slots=True)
class _BatchPlan:
    """A batch still without pixels: each task fills its part of `clips` ([B, T, H, W, 3]) and returns the clip's label."""

    tasks: list[Callable[[], int]]
    clips: npt.NDArray[np.uint8]
    keys: list[str]
    num_global: int

    def batch(self, labels: list[int]) -> Batch:
        clips = torch.from_numpy(self.clips).permute(0, 1, 4, 2, 3)
        return Batch(clips, torch.tensor(labels, dtype=torch.int64), self.keys, self.num_global)


def _await_batch(plan: _BatchPlan, labels: list[Future[int]]) -> Batch:
    return plan.batch([label.result() for label in labels])


def _part_bounds(total: int, num_parts: int, part: int) -> tuple[int, int]:
    """Start and stop of one part when `total` things are divided as `np.array_split` does."""
    size, num_larger = divmod(total, num_parts)
    start = part * size + min(part, num_larger)
    return start, start + size + (part < num_larger)
