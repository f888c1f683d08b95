"""Which video goes into which shard: a pure function of the set of videos, the seed and the size of a shard."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from infra.errors import DataError


@dataclass(frozen=True)
class PlannedVideo:
    """One source video of a shard.

    Attributes:
        video_id: unique in the dataset.
        key: of its sample; see `sample_key`.
        path: relative to the dataset's root.
        kind: "frames" (a folder of JPEG files) or "video".
        label: class id, None if unlabelled.
        start: first second that is taken, None for the beginning.
        end: second before which it stops, None for the end.
    """

    video_id: str
    key: str
    path: str
    kind: str
    label: int | None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class ShardPlan:
    """The videos of one shard, in order; `name` is the tar's file name, for example "train-000003.tar"."""

    name: str
    split: str
    videos: tuple[PlannedVideo, ...]

    @property
    def sidecar_name(self) -> str:
        """The file name of the sidecar, for example "train-000003.parquet"."""
        return Path(self.name).with_suffix(".parquet").name


def sample_key(video_id: str) -> str:
    """The key of a video's sample: safe as a file name, without dots, never beginning with "-", unique for the video id.

    Example:
        >>> sample_key("-1c8.mp4")
        '_1c8_mp4-9986e3fb5f9f3201'
    """
    readable = re.sub(r"[^A-Za-z0-9]", "_", video_id)[:40]
    return f"{readable}-{hashlib.sha256(video_id.encode()).hexdigest()[:16]}"


def plan_shards(videos: pa.Table, *, videos_per_shard: int, seed: int) -> list[ShardPlan]:
    """Distribute videos over shards: the same for the same set of videos, whatever the order of the rows.

    Within a split the videos are ordered by a hash of the seed and their ids, which is a fair shuffle, and cut into as few
    shards of nearly equal size as `videos_per_shard` allows.

    Args:
        videos: columns of `datasets.VIDEO_SCHEMA`.
        videos_per_shard: the most that a shard holds.
        seed: of the shuffle.

    Raises:
        DataError: if there is no video, or two have the same id.
    """
    by_split: dict[str, list[PlannedVideo]] = {}
    seen: set[str] = set()
    for row in videos.to_pylist():
        key = sample_key(row["video_id"])
        if key in seen:
            raise DataError(f"video {row['video_id']!r} is listed twice; expected each id once, check the annotation files")
        seen.add(key)
        video = PlannedVideo(row["video_id"], key, row["path"], row["kind"], row["label"], row["start"], row["end"])
        by_split.setdefault(row["split"], []).append(video)
    if not by_split:
        raise DataError("there is no video to write into shards; check the dataset's annotation files")
    plans = []
    for split, members in sorted(by_split.items()):
        members.sort(key=lambda video: hashlib.sha256(f"{seed}/{split}/{video.video_id}".encode()).digest())
        num_shards = -(-len(members) // videos_per_shard)
        cuts = [len(members) * index // num_shards for index in range(num_shards + 1)]
        for index in range(num_shards):
            plans.append(ShardPlan(f"{split}-{index:06d}.tar", split, tuple(members[cuts[index] : cuts[index + 1]])))
    return plans
