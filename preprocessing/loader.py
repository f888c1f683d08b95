"""Shards to batches: only the sampled frames are read, and threads decode them.

The order of the clips is a pure function of (seed, epoch), their frames, crops, flips and augmentation of (seed, epoch, key):
neither the number of threads nor that of ranks changes what an epoch shows, and a resumed run goes on at the very next clip.

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
from infra.filesystems import Folder
from preprocessing.augment import NO_AUGMENTATION, Augmentation, augment_clip
from preprocessing.clips import write_views
from preprocessing.fetch_ahead import FetchAhead
from preprocessing.labels import mirror_labels
from preprocessing.order import shuffled_rows
from preprocessing.reader import FrameReader, ShardSplit, StoredVideo, open_shards
from preprocessing.shard_cache import ShardCache
from preprocessing.transforms import Flip, Frame, clip_rng, draw_flip, draw_train_crop
from preprocessing.views import FrameSampling, NumClips, NumCrops, Sampling, View, spread_views, view_size

__all__ = ["Batch", "Loader", "ShardSplit", "make_loader", "open_shards"]

_LEAST = {"batch_size": 1, "seed": 0, "num_workers": 0, "pixels": 1, "world_size": 1, "rank": 0, "shuffle_shards": 1}
# Of remote shards; of 90 MB each, as those of Something-V1 by default, that many want a cache of 1.5 GB.
_REMOTE_SHUFFLE_SHARDS = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """The clips that one rank sees in one step.

    Attributes:
        clips: uint8, RGB, [B * V, T, 3, H, W], the V views of a video one after another; memory is [B * V, T, H, W, 3], so that
            `clips.flatten(0, 1)` is channels_last.
        labels: int64, [B]; of the clips as shown, so after a flip the mirrored label; -1 if unlabelled.
        keys: the videos' keys.
        num_global: the number of videos of this step over all ranks, for weighting a loss exactly.
        num_views: V, 1 in training.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    num_global: int
    num_views: int = 1


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
    sampling: Sampling = "segments",
    stride: int = 8,
    num_clips: NumClips = 1,
    num_crops: NumCrops = 1,
    whole_frames: bool = False,
    augmentation: Augmentation = NO_AUGMENTATION,
    shuffle_shards: int | None = None,
    cache: ShardCache | None = None,
) -> "Loader":
    """Make the batches of one split for one rank.

    Args:
        shards: from `open_shards`.
        num_segments: T, frames a clip.
        subset: use the first so many videos of the split, in the index's order; None for all.
        sampling: "segments" takes a frame of each of T equal segments of the video, "dense" T frames `stride` apart.
        stride: of dense sampling, in frames.
        shuffle_shards: None for all if the shards are local, for 16 if they are remote.

    The other arguments are those that `Loader` describes.

    Raises:
        ConfigError: if an argument is out of range, if there are too few videos to give each rank one in each step, if the
            cache is too small, or if training asks for several views.
        DataError: if `train` and a video has no label.
    """
    if shuffle_shards is None:
        shuffle_shards = _REMOTE_SHUFFLE_SHARDS if Folder(shards.path).local is None else len(shards.ends)
    return Loader(
        shards=shards,
        sampling=FrameSampling(num_segments, sampling, stride),
        batch_size=batch_size,
        train=train,
        seed=seed,
        num_workers=num_workers,
        pixels=pixels,
        flip=flip,
        rank=rank,
        world_size=world_size,
        num_videos=len(shards) if subset is None else subset,
        num_clips=num_clips,
        num_crops=num_crops,
        whole_frames=whole_frames,
        augmentation=augmentation,
        shuffle_shards=shuffle_shards,
        cache=cache,
    )


@dataclass(eq=False)
class Loader:
    """Batches of one split for one rank, an epoch an iteration; `make_loader` makes it.

    The N clips of an epoch are divided over `ceil(N / (batch_size * world_size))` steps, and each step's clips over the ranks,
    as evenly as can be: every rank has the same number of steps, each clip is shown exactly once an epoch, and no batch is
    larger than `batch_size` or much smaller than the others.

    Successive iterations are epochs 0, 1, 2, ...; `seek` chooses another place. An iteration that is left early ends its
    threads and counts as an epoch.

    Attributes:
        shards: from `open_shards`.
        sampling: how the frames of a clip are taken.
        batch_size: the most videos a rank gets in a step.
        train: True for random frames, crops, flips and order; False for the views of `num_clips` and `num_crops` and the order
            of the index.
        seed: of all draws.
        num_workers: decoding threads; 0 decodes in the caller's thread. Does not change the batches.
        pixels: H and W of a clip.
        flip: what training does about mirror images: "swap" changes their labels as well, "none" makes none, "naive" keeps
            labels as they are. Testing makes none but those of 10 crops.
        rank: this process, from 0.
        world_size: number of processes that share an epoch.
        num_videos: N, the first of the split.
        num_clips: of each video in testing; see `views`.
        num_crops: of each clip in testing. 10 shows mirror images, which is refused where labels tell left from right, unless
            `flip` is "naive".
        whole_frames: show uncropped frames in testing; H and W are then the video's own, so that `batch_size` must be 1.
        augmentation: of training, after crop and flip; testing makes none.
        shuffle_shards: how many shards the training clips that are near each other come from.
        cache: of remote shards; must hold two more than clips come from at a time. None reads just the frames, when needed.
    """

    shards: ShardSplit
    sampling: FrameSampling
    batch_size: int
    train: bool
    seed: int
    num_workers: int
    pixels: int
    flip: Flip
    rank: int
    world_size: int
    num_videos: int
    num_clips: NumClips
    num_crops: NumCrops
    whole_frames: bool
    augmentation: Augmentation
    shuffle_shards: int
    cache: ShardCache | None

    def __post_init__(self) -> None:
        self._mirror = mirror_labels(self.shards.label_names)
        self._num_views = self.num_clips * self.num_crops
        self._check_settings()
        self._check_views()
        self.divide(-(-self.num_videos // (self.batch_size * self.world_size)))
        if self.train:
            self._check_labels()
        shards = self.shards.table["shard"].slice(0, self.num_videos).combine_chunks().dictionary_encode()
        self._shard_names, self._shard_numbers = shards.dictionary, shards.indices.to_numpy().astype(np.int64)
        # Enough batches under way to keep all threads busy while the caller holds one.
        self._num_prefetched = max(2, 1 + -(-self.num_workers // self.batch_size))
        self._reader = FrameReader(self.shards, self.cache)
        if self.cache is not None and self._reader.is_cached:
            self._check_cache(self.cache)
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
        if self.num_videos // num_steps < self.world_size:
            raise ConfigError(
                f"{self.num_videos} clips in {num_steps} steps do not give each of {self.world_size} workers a clip in "
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
        if not 1 <= self.num_videos <= len(self.shards):
            where = f"split {self.shards.split} of {self.shards.path}"
            raise ConfigError(f"subset is {self.num_videos}; expected 1 to {len(self.shards)}, the videos in {where}")

    def _check_views(self) -> None:
        for name, kind in (("num_clips", NumClips), ("num_crops", NumCrops)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(map(str, get_args(kind)))
                raise ConfigError(f"{name} is {getattr(self, name)}; expected one of {allowed}")
        if self.train and self._num_views > 1:
            raise ConfigError(f"{self._num_views} views of a video are for testing; train with num_clips=1 and num_crops=1")
        if self.whole_frames and (self.train or self.num_crops > 1 or self.batch_size > 1):
            raise ConfigError("whole_frames is for testing, with num_crops=1 and batch_size=1: frames differ in size")
        turned = [label for label, other in enumerate(self._mirror) if other != label]
        if self.num_crops == 10 and turned and self.flip != "naive":
            raise ConfigError(
                f"num_crops is 10, but the mirror image of {self.shards.label_names[turned[0]]!r} has another label; "
                "use 5, or flip='naive' if that does not matter"
            )

    def _check_cache(self, cache: ShardCache) -> None:
        """Those that clips come from, the next one and one still under way must fit."""
        num_shards = min((self.shuffle_shards if self.train else 1) + 2, len(self._shard_names))
        num_bytes = num_shards * max(end.num_bytes for end in self.shards.ends.values())
        if cache.max_bytes < num_bytes:
            raise ConfigError(
                f"the shard cache holds {cache.max_bytes} bytes; expected at least {num_bytes}, since {num_shards} shards are "
                "in use at a time: enlarge it, lower shuffle_shards or use no cache"
            )

    def _check_labels(self) -> None:
        unlabelled = self.shards.table["label"].slice(0, self.num_videos).is_null()
        num_unlabelled = pc.sum(unlabelled).as_py()
        if num_unlabelled:
            first = self.shards.video(pc.index(unlabelled, True).as_py()).key
            raise DataError(
                f"{num_unlabelled} of {self.num_videos} videos in split {self.shards.split} of {self.shards.path} have no "
                f"label, the first is {first}; training needs labels: choose another split"
            )

    def _epoch_rows(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self.train:
            return np.arange(self.num_videos)
        return shuffled_rows(self._shard_numbers, self.seed, epoch, self.shuffle_shards)

    def _iterate(self, epoch: int, first_step: int) -> Iterator[Batch]:
        rows = self._epoch_rows(epoch)
        plans = self._plan_batches(rows, epoch, first_step)
        if self.num_workers == 0:
            for plan in plans:
                yield plan.batch([load_clip() for load_clip in plan.tasks])
            return
        ahead = self._fetch_ahead(rows, first_step) if self._reader.is_cached else None
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="loader")
        under_way: deque[tuple[_BatchPlan, list[Future[int]]]] = deque()
        try:
            for number, plan in enumerate(plans):
                if ahead is not None:
                    ahead.reach(number)
                under_way.append((plan, [pool.submit(load_clip) for load_clip in plan.tasks]))
                if len(under_way) > self._num_prefetched:
                    yield _await_batch(*under_way.popleft())
            while under_way:
                yield _await_batch(*under_way.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if ahead is not None:
                ahead.close()

    def _fetch_ahead(self, rows: npt.NDArray[np.int64], first_step: int) -> FetchAhead:
        """Let the cache fetch shards about as many steps before they are needed as a shard's clips fill."""
        names = self._shard_names.to_pylist()
        shards = [
            {names[number] for number in np.unique(self._shard_numbers[self._rank_rows(rows, step)[0]])}
            for step in range(first_step, self._num_steps)
        ]
        return FetchAhead(self._reader.fetch, shards, -(-self._num_steps // len(names)))

    def _rank_rows(self, rows: npt.NDArray[np.int64], step: int) -> tuple[npt.NDArray[np.int64], int]:
        """The rows that this rank shows in a step, and how many all ranks show."""
        start, stop = _part_bounds(self.num_videos, self._num_steps, step)
        first, last = _part_bounds(stop - start, self.world_size, self.rank)
        return rows[start + first : start + last], stop - start

    def _plan_batches(self, rows: npt.NDArray[np.int64], epoch: int, first_step: int) -> Iterator["_BatchPlan"]:
        for step in range(first_step, self._num_steps):
            own_rows, num_global = self._rank_rows(rows, step)
            videos = [self.shards.video(row) for row in own_rows.tolist()]
            size = view_size(videos[0].height, videos[0].width, self.pixels, self.whole_frames)
            views = np.empty((len(videos), self._num_views, self.sampling.num_segments, *size, 3), np.uint8)
            yield _BatchPlan(
                tasks=[
                    functools.partial(self._load_video, video, epoch, out) for video, out in zip(videos, views, strict=True)
                ],
                views=views,
                keys=[video.key for video in videos],
                num_global=num_global,
            )

    def _load_video(self, video: StoredVideo, epoch: int, out: Frame) -> int:
        """Write the pixels of the views of one video into `out`, [V, T, H, W, 3]; return its label as shown."""
        height, width, num_frames, label = video.height, video.width, len(video.frame_sizes), video.label
        read_frames = functools.partial(self._reader.read_frames, video)
        if not self.train:
            counts = self.num_clips, self.num_crops, self.whole_frames
            views = spread_views(num_frames, height, width, self.sampling, self.pixels, *counts)
            write_views(views, height, width, read_frames, out)
            return label
        rng = clip_rng(self.seed, epoch, video.key)
        frame_indices = self.sampling.draw(num_frames, rng).tolist()
        crop = draw_train_crop(height, width, self.pixels, rng)
        mirrored, label = draw_flip(label, self._mirror, self.flip, rng)
        write_views([View(frame_indices, crop, mirrored)], height, width, read_frames, out)
        augment_clip(out[0], self.augmentation, rng)
        return label


@dataclass(frozen=True, slots=True)
class _BatchPlan:
    """A batch still without pixels: each task fills its part of `views` ([B, V, T, H, W, 3]) and returns the label as shown."""

    tasks: list[Callable[[], int]]
    views: npt.NDArray[np.uint8]
    keys: list[str]
    num_global: int

    def batch(self, labels: list[int]) -> Batch:
        clips = torch.from_numpy(self.views).flatten(0, 1).permute(0, 1, 4, 2, 3)
        return Batch(clips, torch.tensor(labels, dtype=torch.int64), self.keys, self.num_global, self.views.shape[1])


def _await_batch(plan: _BatchPlan, labels: list[Future[int]]) -> Batch:
    return plan.batch([label.result() for label in labels])


def _part_bounds(total: int, num_parts: int, part: int) -> tuple[int, int]:
    """Start and stop of one part when `total` things are divided as `np.array_split` does."""
    size, num_larger = divmod(total, num_parts)
    start = part * size + min(part, num_larger)
    return start, start + size + (part < num_larger)
