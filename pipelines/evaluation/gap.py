"""The accuracy gap: one checkpoint, judged step by step from the published code's validation to two clips with three crops.

The paper reports 14 % top-1 in its validation and 32 % after "adding transforms" (section 5.1). Those are the usual ones of
testing; its validation shows training crops, mirrored or not whatever the label says, of random segments, without mean and
deviation (PAPER_NOTES.md, D3 and D4). Each step here changes one thing, on the same videos, with the same random draws as the
step before.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra.progress import OnProgress
from pipelines.evaluation.evaluate import EvaluateSettings, Scores, score_clips
from pipelines.evaluation.significance import Hits, difference
from pipelines.training.settings import TrainSettings
from pipelines.training.trained import open_network
from pipelines.training.validation import unnormalised
from preprocessing.clips import write_views
from preprocessing.loader import Batch
from preprocessing.reader import FrameReader, ShardSplit, StoredVideo
from preprocessing.transforms import Frame, centre_crop, clip_rng, draw_flip, draw_train_crop
from preprocessing.views import FrameSampling, NumClips, NumCrops, View, spread_views


@dataclass(frozen=True)
class Step:
    """A way of judging; each step of `STEPS` differs from the one before in one thing.

    Attributes:
        name: for tables.
        change: what it does otherwise than the step before, in words.
        normalised: whether mean and deviation are taken off, as in training.
        train_crops: crops and mirror images of training, else the centre.
        random_segments: a random frame of each segment, else the centre.
        num_clips: of a video.
        num_crops: of a clip.
    """

    name: str
    change: str
    normalised: bool = True
    train_crops: bool = False
    random_segments: bool = False
    num_clips: NumClips = 1
    num_crops: NumCrops = 1


STEPS = (
    Step(
        "seed code's validation",
        "random segments, training crops and mirror images, no mean and deviation",
        normalised=False,
        train_crops=True,
        random_segments=True,
    ),
    Step("normalised", "mean and deviation as in training", train_crops=True, random_segments=True),
    Step("scale and centre crop", "the centre of the scaled frame, never mirrored", random_segments=True),
    Step("fixed segments", "the centre frame of each segment"),
    Step("2 clips", "the mean of two clips of each video", num_clips=2),
    Step("2 clips x 3 crops", "three crops of the full short side of each", num_clips=2, num_crops=3),
)


def measure_gap(
    model_dir: Path,
    shards_place: str,
    settings: EvaluateSettings,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Judge a trained network by each step.

    Args:
        model_dir: as `save_model` wrote it.
        shards_place: the shard set that it was judged on.
        settings: `split`, `batch_size` and `loader_threads`; the steps say the rest.
        on_progress: told after each step.

    Returns:
        a dict a step of `name`, `change`, `top1`, `top5`, `mean_class_accuracy`, `num_clips`, and `gain`: None for the first,
        else `top1` (the difference to the step before), `interval` (95 %) and `separable` from the noise of clips.

    Raises:
        DataError: as `open_network`, and if no clip has a label.
    """
    network = open_network(model_dir, shards_place, settings.split)
    model, shards = network.model, network.shards
    rows: list[dict[str, Any]] = []
    before: Hits | None = None
    for number, step in enumerate(STEPS, start=1):
        prepare = None if step.normalised else (lambda clips: unnormalised(model, model.prepare(clips)))
        scores = score_clips(
            model, StepBatches(shards, network.train, step, settings), network.device, network.precision, prepare=prepare
        )
        summary = scores.summarise(shards.label_names)
        hits = _hits(scores)
        rows.append(
            {
                "name": step.name,
                "change": step.change,
                **{name: summary[name] for name in ("top1", "top5", "mean_class_accuracy", "num_clips")},
                "gain": None if before is None else _gain(hits, before),
            }
        )
        before = hits
        if on_progress:
            on_progress(number, len(STEPS), f"{step.name}: {summary['top1']:.1%}")
    return rows


@dataclass(frozen=True)
class StepBatches:
    """The videos of a split in the order of the index, as a step shows them; an epoch an iteration.

    The random draws are those of a training's first epoch, so that the steps share them.

    Attributes:
        shards: the split.
        train: size, segments and seed.
        step: what to show.
        settings: how many videos at a time, and threads.
    """

    shards: ShardSplit
    train: TrainSettings
    step: Step
    settings: EvaluateSettings

    def __len__(self) -> int:
        return -(-len(self.shards) // self.settings.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        reader = FrameReader(self.shards)
        shape = (self.step.num_clips * self.step.num_crops, self.train.num_segments, self.train.pixels, self.train.pixels, 3)
        with ThreadPoolExecutor(max(1, self.settings.loader_threads)) as pool:
            for start in range(0, len(self.shards), self.settings.batch_size):
                stop = min(start + self.settings.batch_size, len(self.shards))
                videos = [self.shards.video(row) for row in range(start, stop)]
                out = np.empty((len(videos), *shape), np.uint8)
                list(pool.map(lambda video, part: self._load(reader, video, part), videos, out))
                clips = torch.from_numpy(out).flatten(0, 1).permute(0, 1, 4, 2, 3)
                labels = torch.tensor([video.label for video in videos])
                yield Batch(clips, labels, [video.key for video in videos], len(videos), shape[0])

    def views(self, video: StoredVideo) -> list[View]:
        """What is shown of a video."""
        step, pixels, num_frames = self.step, self.train.pixels, len(video.frame_sizes)
        sampling = FrameSampling(self.train.num_segments, self.train.sampling, self.train.stride)
        if not step.random_segments:
            return spread_views(num_frames, video.height, video.width, sampling, pixels, step.num_clips, step.num_crops)
        rng = clip_rng(self.train.seed, 0, video.key)
        frame_indices = sampling.draw(num_frames, rng).tolist()
        if not step.train_crops:
            return [View(frame_indices, centre_crop(video.height, video.width, pixels), False)]
        crop = draw_train_crop(video.height, video.width, pixels, rng)
        mirrored, _ = draw_flip(video.label, (), "naive", rng)
        return [View(frame_indices, crop, mirrored)]

    def _load(self, reader: FrameReader, video: StoredVideo, out: Frame) -> None:
        write_views(self.views(video), video.height, video.width, partial(reader.read_frames, video), out)


def _gain(hits: Hits, before: Hits) -> dict[str, Any]:
    found = difference(hits, before)
    return {"top1": found.top1, "interval": list(found.interval), "separable": found.separable}


def _hits(scores: Scores) -> Hits:
    """Whether each labelled clip is right. Shape: [1, N]."""
    hits: Hits = (scores.logits.argmax(axis=1) == scores.labels)[scores.labels >= 0][None]
    return hits
