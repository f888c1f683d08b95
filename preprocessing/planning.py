"""Which video goes into which shard: a pure function of the set of videos, the seed and the size of a shard."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import DataError
from infra.storage import sha256_json

# What a plan keeps of a video; the split is in the shard.
_COLUMNS = ["video_id", "path", "kind", "label", "start", "end"]
_KIND = pa.dictionary(pa.int8(), pa.string())
_MAX_TEXT_BYTES = 2**31 - 1  # more need 64-bit offsets


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
        return sidecar_name(self.name)


def sidecar_name(tar_name: str) -> str:
    """The file name of a tar's sidecar: "train-000003.tar" gives "train-000003.parquet"."""
    return Path(tar_name).with_suffix(".parquet").name


def sample_key(video_id: str) -> str:
    """The key of a video's sample: safe as a file name, without dots, never beginning with "-", unique for the video id.

    Example:
        >>> sample_key("-1c8.mp4")
        '_1c8_mp4-9986e3fb5f9f3201'
    """
    readable = re.sub(r"[^A-Za-z0-9]", "_", video_id)[:40]
    return f"{readable}-{hashlib.sha256(video_id.encode()).hexdigest()[:16]}"


class ShardPlans(Sequence[ShardPlan]):
    """The plans of a shard set: a sequence that makes each `ShardPlan` when it is asked for.

    The videos stay in Arrow columns, about 60 bytes each, so that ten million of them fit; slices share the columns.
    Send single plans to other processes, not the sequence.
    """

    def __init__(self, videos: pa.Table, order: npt.NDArray[np.uint32], shards: list[tuple[str, str]], cuts: list[int]) -> None:
        """Use `plan_shards` or `ShardPlans.of`.

        Args:
            videos: a row a video, without chunks.
            order: row numbers, shard after shard.
            shards: name and split of each.
            cuts: where each shard begins in `order`, and where the last one ends.
        """
        self._videos = videos
        self._order = order
        self._shards = shards
        self._cuts = cuts

    @classmethod
    def of(cls, plans: Sequence[ShardPlan]) -> "ShardPlans":
        """The same plans as `ShardPlans`."""
        if isinstance(plans, ShardPlans):
            return plans
        members = [video for plan in plans for video in plan.videos]
        text, number = pa.string(), pa.float64()
        types = dict(zip(_COLUMNS, [text, text, text, pa.int32(), number, number], strict=True))
        table = pa.table({name: pa.array([getattr(video, name) for video in members], types[name]) for name in _COLUMNS})
        cuts = [0]
        for plan in plans:
            cuts.append(cuts[-1] + len(plan.videos))
        order = np.arange(len(members), dtype=np.uint32)
        return cls(_without_chunks(table), order, [(plan.name, plan.split) for plan in plans], cuts)

    @property
    def num_videos(self) -> int:
        """Videos of all shards."""
        return self._cuts[-1] - self._cuts[0]

    @property
    def names(self) -> list[str]:
        """The tars' file names."""
        return [name for name, _ in self._shards]

    @property
    def shards(self) -> list[tuple[str, str]]:
        """Name and split of each shard."""
        return self._shards

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, position: int) -> ShardPlan: ...
    @overload
    def __getitem__(self, position: slice) -> "ShardPlans": ...
    def __getitem__(self, position: int | slice) -> "ShardPlan | ShardPlans":
        if isinstance(position, slice):
            start, stop, step = position.indices(len(self))
            if step != 1:
                raise ValueError(f"plans are sliced with a step of {step}; expected 1")
            stop = max(start, stop)
            return ShardPlans(self._videos, self._order, self._shards[start:stop], self._cuts[start : stop + 1])
        name, split = self._shards[position]
        columns = self._columns(position)
        keys = [sample_key(video_id) for video_id in columns["video_id"]]
        rows = zip(columns.pop("video_id"), keys, *columns.values(), strict=True)
        return ShardPlan(name, split, tuple(PlannedVideo(*row) for row in rows))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardPlans) and len(self) == len(other) and all(map(ShardPlan.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # as for any sequence that compares by content

    def num_videos_of(self, position: int) -> int:
        """`len(plans[position].videos)`, without making the plan."""
        position = range(len(self))[position]
        return self._cuts[position + 1] - self._cuts[position]

    def video_ids(self, position: int) -> list[str]:
        """The video ids of one shard, in order, without making the plan."""
        return self._columns(position, ["video_id"])["video_id"]

    def digest(self, position: int) -> str:
        """`plan_digest(plans[position])`, without making the plan."""
        return _digest(*self._shards[position], self._columns(position))

    def _columns(self, position: int, names: Sequence[str] = _COLUMNS) -> dict[str, list[Any]]:
        position = range(len(self))[position]
        rows = pa.array(self._order[self._cuts[position] : self._cuts[position + 1]])
        taken = self._videos.select(list(names)).take(rows)
        return {name: taken[name].to_pylist() for name in names}


def plan_digest(plan: ShardPlan) -> str:
    """Hex SHA-256 of a shard's name, split and videos; what the sidecar records, to know later what it was written for."""
    return _digest(plan.name, plan.split, {name: [getattr(video, name) for video in plan.videos] for name in _COLUMNS})


def plan_shards(videos: pa.Table, *, videos_per_shard: int, seed: int) -> ShardPlans:
    """Distribute videos over shards: the same for the same set of videos, whatever the order of the rows.

    Within a split the videos are ordered by a hash of the seed and their ids, which is a fair shuffle, and cut into as few
    shards of nearly equal size as `videos_per_shard` allows. A million videos take about 1.5 seconds.

    Args:
        videos: columns of `datasets.VIDEO_SCHEMA`.
        videos_per_shard: the most that a shard holds.
        seed: of the shuffle.

    Raises:
        DataError: if there is no video, or two have the same id.
    """
    if videos.num_rows == 0:
        raise DataError("there is no video to write into shards; check the dataset's annotation files")
    _require_unique(videos["video_id"])
    digests = _digests(videos, lambda video_id, split: f"{seed}/{split}/{video_id}")
    order = np.empty(videos.num_rows, np.uint32)
    shards: list[tuple[str, str]] = []
    cuts = [0]
    for split in sorted(pc.unique(videos["split"]).to_pylist()):
        rows = np.flatnonzero(pc.equal(videos["split"], split).to_numpy()).astype(np.uint32)
        num_shards = -(-len(rows) // videos_per_shard)
        begin = cuts[-1]
        order[begin : begin + len(rows)] = _in_order(rows, digests, videos["video_id"], f"{seed}/{split}/")
        shards += [(f"{split}-{index:06d}.tar", split) for index in range(num_shards)]
        cuts += [begin + len(rows) * index // num_shards for index in range(1, num_shards + 1)]
    del digests
    return ShardPlans(_without_chunks(videos.select(_COLUMNS)), order, shards, cuts)


def _digest(name: str, split: str, columns: dict[str, list[Any]]) -> str:
    return sha256_json([name, split, [columns[column] for column in _COLUMNS]])


def _without_chunks(videos: pa.Table) -> pa.Table:
    """Rows can be taken from such a table without a look at all others; columns are as small as their content allows."""
    columns = {}
    for name in videos.column_names:
        column = videos[name]
        if column.null_count == len(column):
            columns[name] = pa.nulls(len(column))
            continue
        if name == "kind":
            column = column.cast(_KIND)
        elif column.type == pa.string() and column.nbytes > _MAX_TEXT_BYTES:
            column = column.cast(pa.large_string())
        columns[name] = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.unify_dictionaries().chunks)
    return pa.table(columns)


def _require_unique(video_ids: pa.ChunkedArray) -> None:
    """Keys are compared, not ids: those hold 8 bytes of the id's hash, so that equal ones are found by sorting numbers."""
    digests = _digests(pa.table([video_ids], ["video_id"]), lambda video_id: video_id)
    in_order = np.sort(digests)
    doubles = in_order[1:][in_order[1:] == in_order[:-1]]
    seen: set[str] = set()
    for row in np.flatnonzero(np.isin(digests, doubles)).tolist() if len(doubles) else []:
        video_id = video_ids[row].as_py()
        key = sample_key(video_id)
        if key in seen:
            raise DataError(f"video {video_id!r} is listed twice; expected each id once, check the annotation files")
        seen.add(key)


def _in_order(
    rows: npt.NDArray[np.uint32], digests: npt.NDArray[np.uint64], video_ids: pa.ChunkedArray, prefix: str
) -> npt.NDArray[np.uint32]:
    """`rows` in the order of the SHA-256 of `prefix` and the row's video id, of which `digests` are the beginnings."""
    mine = digests[rows]
    places = np.argsort(mine, kind="stable")
    found, mine = rows[places], mine[places]
    for first in np.flatnonzero(mine[1:] == mine[:-1]).tolist():  # hardly ever: 8 bytes are equal, so all 32 decide
        same = np.flatnonzero(mine == mine[first])
        ids = {row: video_ids[row].as_py() for row in found[same].tolist()}
        found[same] = sorted(ids, key=lambda row: hashlib.sha256((prefix + ids[row]).encode()).digest())
    return found


def _digests(videos: pa.Table, text: Callable[..., str]) -> npt.NDArray[np.uint64]:
    """The first 8 bytes of the SHA-256 of `text(video_id, split)` of each row, as numbers that sort as the bytes do."""
    found = np.empty(videos.num_rows, np.uint64)
    names = [name for name in ("video_id", "split") if name in videos.column_names]
    position = 0
    for batch in videos.select(names).to_batches(max_chunksize=65536):
        texts = map(text, *(column.to_pylist() for column in batch.columns))
        data = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in texts)
        found[position : position + len(batch)] = np.frombuffer(data, ">u8")
        position += len(batch)
    return found
