"""One split of a shard set, and its frames: fetched singly by the byte offsets of the index, decoded in memory."""

import functools
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import DataError
from infra.filesystems import FileRanges, Folder
from preprocessing.index import INDEX_NAME, DatasetInfo, read_dataset_info, read_index
from preprocessing.jpeg import decode_frame
from preprocessing.shard_cache import ShardCache

_NUMBERS = ["height", "width", "sample_offset", "sample_bytes", "sample_crc32"]
_LISTS = ["frame_offsets", "frame_sizes", "frame_crc32"]
_COLUMNS = ["key", "shard", "label", *_NUMBERS, *_LISTS]
# A local shard takes a file descriptor; to open a remote one takes a request.
_MAX_OPEN_SHARDS = 64
_MAX_OPEN_REMOTE_SHARDS = 4096
# An object store takes about as long to answer one more request as to send this much more. So all frames of a clip of
# Something-Something, which lie in 350 kB, come by one.
_MAX_GAP_BYTES = 512 << 10


_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class StoredVideo:
    """Where one video of a shard set lies.

    Attributes:
        key: its sample's name in the shard.
        shard: file name of the shard.
        label: class id, -1 if unlabelled.
        height: of its frames, in pixels.
        width: of its frames, in pixels.
        sample_offset: byte in the shard at which its sample begins, with the first header.
        sample_bytes: size of the sample, with all headers and padding.
        sample_crc32: CRC-32 of these bytes.
        frame_offsets: byte offset of each frame's JPEG in the shard. Shape: [num_frames].
        frame_sizes: its size in bytes. Shape: [num_frames].
        frame_crc32: its CRC-32. Shape: [num_frames].
    """

    key: str
    shard: str
    label: int
    height: int
    width: int
    sample_offset: int
    sample_bytes: int
    sample_crc32: int
    frame_offsets: npt.NDArray[np.int64]
    frame_sizes: npt.NDArray[np.int32]
    frame_crc32: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """How a shard must end: where its last sample does (None if that is not known), and its size in bytes."""

    samples_end: int | None
    num_bytes: int


@dataclass(frozen=True)
class ShardSplit:
    """One split of a shard set, as `open_shards` gives it; its rows stay in Arrow's memory. It can be pickled.

    Attributes:
        path: folder of the shard set: a path, or the URL of a remote one.
        split: "train", "validation" or "test".
        label_names: the name of each class id.
        label_passport: hash of the names.
        table: what index.parquet says of each video that a loader needs, in the index's order, each column in one chunk.
        ends: how each shard of the split must end, by its file name.
    """

    path: Path | str
    split: str
    label_names: list[str]
    label_passport: str
    table: pa.Table
    ends: Mapping[str, ShardEnd]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @functools.cached_property
    def labels(self) -> list[int]:
        """The class id of each video, -1 if unlabelled, in the index's order."""
        return pc.fill_null(self.table["label"], -1).to_pylist()  # type: ignore[no-any-return]

    @functools.cached_property
    def keys(self) -> list[str]:
        """The key of each video, in the index's order."""
        return self.table["key"].to_pylist()  # type: ignore[no-any-return]

    @functools.cached_property
    def _columns(self) -> dict[str, Any]:
        """The columns as NumPy sees them, strings as they are: a tenth of the time of Arrow's scalars."""
        columns = {name: self.table[name].chunk(0) for name in _COLUMNS}
        numbers = {name: columns[name].to_numpy() for name in _NUMBERS}
        lists = {name: (columns[name].offsets.to_numpy(), columns[name].values.to_numpy()) for name in _LISTS}
        labels = columns["label"].fill_null(-1).to_numpy()
        return {"key": columns["key"], "shard": columns["shard"], "label": labels, **numbers, **lists}

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without what is cached

    def video(self, row: int) -> StoredVideo:
        """Where the video of one row lies."""
        columns = self._columns
        frame_offsets, frame_sizes, frame_crc32 = (
            values[starts[row] : starts[row + 1]] for starts, values in (columns[name] for name in _LISTS)
        )
        return StoredVideo(
            key=columns["key"][row].as_py(),
            shard=columns["shard"][row].as_py(),
            label=int(columns["label"][row]),
            height=int(columns["height"][row]),
            width=int(columns["width"][row]),
            sample_offset=int(columns["sample_offset"][row]),
            sample_bytes=int(columns["sample_bytes"][row]),
            sample_crc32=int(columns["sample_crc32"][row]),
            frame_offsets=frame_offsets,
            frame_sizes=frame_sizes,
            frame_crc32=frame_crc32,
        )


def open_shards(path: Folder | Path | str, split: str) -> ShardSplit:
    """Open one split of a shard set; reads the index, not the frames.

    Args:
        path: folder with index.parquet, dataset.json and the shards; s3:// and gs:// URLs are read from afar, piece by piece.
        split: "train", "validation" or "test".

    Raises:
        DataError: if the folder is no shard set or has no such split, if dataset.json or the index is not bit for bit as it
            was written, if a label is none of the label names, or if a shard of the split is missing or does not have the
            size that dataset.json gives.
    """
    folder = Folder(path)
    info = read_dataset_info(folder)
    table = read_index(folder, split, _COLUMNS).combine_chunks()
    empty = [name for name in _COLUMNS if name != "label" and table[name].null_count]
    empty += [name for name in _LISTS if table[name].chunk(0).values.null_count]
    if empty:
        raise DataError(f"{folder}/{INDEX_NAME} has rows without {empty[0]} in split {split}; run the shards stage again")
    highest = pc.max(table["label"]).as_py()
    if highest is not None and highest >= len(info.label_names):
        raise DataError(
            f"{folder}/{INDEX_NAME} has label {highest} in split {split}, but dataset.json names {len(info.label_names)} "
            "labels (from 0); the files do not belong together: run the shards stage again"
        )
    ends = _shard_ends(table, info, folder)
    try:
        sizes = folder.list()
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}; check the disk or the network and try again") from error
    for name, end in ends.items():
        _check_shard_size(f"{folder}/{name}", sizes.get(name), end.num_bytes)
    return ShardSplit(folder.local or folder.url, split, info.label_names, info.label_passport, table, ends)


class FrameReader:
    """Reads frames of a shard set; safe to share between threads. Keeps at most 64 local shards open.

    Args:
        shards: the split whose videos are read, or just the folder of the shard set. Of a split it is known how its shards must
            end, so each is checked when it is first opened: its size, and that nothing but zeros follows its last sample.
        cache: of a remote split: shards are read from whole local copies. A copy whose bytes are wrong is fetched again, once.
            Local shards use none.
    """

    def __init__(self, shards: ShardSplit | Folder | Path | str, cache: ShardCache | None = None) -> None:
        self._folder = Folder(shards.path if isinstance(shards, ShardSplit) else shards)
        self._ends = shards.ends if isinstance(shards, ShardSplit) else {}
        self._checked: set[str] = set()
        is_remote = self._folder.local is None
        self._cache = cache if is_remote else None
        self._max_gap = _MAX_GAP_BYTES if is_remote and cache is None else 0
        self._open: Callable[[str], FileRanges] = self._open_shard
        if self._cache is None:  # a copy that stayed open would take disk space after its removal
            max_open = _MAX_OPEN_REMOTE_SHARDS if is_remote else _MAX_OPEN_SHARDS
            self._open = functools.lru_cache(maxsize=max_open)(self._open_shard)

    @property
    def is_cached(self) -> bool:
        """Whether shards are read from local copies."""
        return self._cache is not None

    def fetch(self, shard: str) -> None:
        """Let the cache have a shard before it is needed."""
        self._open(shard)

    def read(self, video: StoredVideo, frame_index: int, smallest_size: tuple[int, int] = (0, 0)) -> npt.NDArray[np.uint8]:
        """Read and decode one frame, as `read_frames` does. Shape: [H, W, 3]."""
        return self.read_frames(video, [frame_index], smallest_size)[0]

    def read_frames(
        self, video: StoredVideo, frame_indices: Sequence[int], smallest_size: tuple[int, int] = (0, 0)
    ) -> list[npt.NDArray[np.uint8]]:
        """Read and decode frames of one video. Remote frames that are near each other come by one request.

        Args:
            video: from `ShardSplit.video`.
            frame_indices: from 0, in rising order.
            smallest_size: (height, width) that would do; see `decode_frame`.

        Returns:
            RGB pixels of each. Shape: [H, W, 3], or the reduced size.

        Raises:
            DataError: if the bytes cannot be read, do not have the checksum of the index, are no whole JPEG, or have another
                size than the index says; names the frame, the video and the shard.
        """
        frames = self._with_shard(video.shard, lambda: self._read_jpegs(video, frame_indices))
        pixels = []
        for frame_index, data in zip(frame_indices, frames, strict=True):
            try:
                pixels.append(decode_frame(data, video.height, video.width, smallest_size))
            except ValueError as error:
                raise self._cannot_read(f"frame {frame_index} of video {video.key}", video.shard, error) from error
        return pixels

    def _read_jpegs(self, video: StoredVideo, frame_indices: Sequence[int]) -> list[bytes]:
        """The bytes of some frames, which have the checksums of the index."""
        what = f"frame {frame_indices[0]} of video {video.key}"
        frames = []
        try:
            shard = self._open(video.shard)
            for run in _near_runs(video, frame_indices, self._max_gap):
                what = f"frame {run[0]} of video {video.key}"
                start = int(video.frame_offsets[run[0]])
                data = shard.read(start, int(video.frame_offsets[run[-1]]) + int(video.frame_sizes[run[-1]]) - start)
                for frame_index in run:
                    what = f"frame {frame_index} of video {video.key}"
                    offset = int(video.frame_offsets[frame_index]) - start
                    frames.append(data[offset : offset + int(video.frame_sizes[frame_index])])
                    _check_crc32(frames[-1], int(video.frame_crc32[frame_index]))
        except (OSError, ValueError) as error:
            raise self._cannot_read(what, video.shard, error) from error
        return frames

    def _with_shard(self, name: str, read: Callable[[], _Read]) -> _Read:
        """What `read` gives; if a cached copy of the shard may be the reason that it fails, the copy is fetched again."""
        try:
            return read()
        except DataError:
            if self._cache is None:
                raise
        self._cache.discard(self._folder, name)
        self._checked.discard(name)
        return read()

    def read_sample(self, video: StoredVideo) -> list[bytes]:
        """Read the JPEG files of all frames of a video, in order, without decoding them.

        Every byte of the video's sample in the shard is checked: headers, label, padding and frames.

        Raises:
            DataError: if the bytes cannot be read or do not have the checksum of the index; names the video and the shard, and
                the first frame that is hurt if there is one.
        """
        return self._with_shard(video.shard, lambda: self._read_sample(video))

    def _read_sample(self, video: StoredVideo) -> list[bytes]:
        what = f"the sample of video {video.key}"
        try:
            data = self._open(video.shard).read(video.sample_offset, video.sample_bytes)
            starts = (video.frame_offsets - video.sample_offset).tolist()
            places = list(zip(starts, video.frame_sizes.tolist(), strict=True))
            if any(not 0 <= start <= start + size <= len(data) for start, size in places):
                raise ValueError("the index says that a frame lies outside")
            frames = [data[start : start + size] for start, size in places]
            if zlib.crc32(data) != video.sample_crc32:
                checksums = zip(frames, video.frame_crc32.tolist(), strict=True)
                hurt = [number for number, (frame, crc32) in enumerate(checksums) if zlib.crc32(frame) != crc32]
                what = f"frame {hurt[0]} of video {video.key}" if hurt else what
                _check_crc32(data, video.sample_crc32)
            return frames
        except (OSError, ValueError) as error:
            raise self._cannot_read(what, video.shard, error) from error

    def _open_shard(self, name: str) -> FileRanges:
        if self._cache is None:
            shard = self._folder.open_ranges(name)
        else:
            shard = self._cache.open(self._folder, name, self._ends[name].num_bytes)
        if name not in self._checked and name in self._ends:
            _check_shard_size(f"{self._folder}/{name}", shard.size, self._ends[name].num_bytes)
            self._check_end(name, shard)
        self._checked.add(name)
        return shard

    def _check_end(self, name: str, shard: FileRanges) -> None:
        start = self._ends[name].samples_end
        if start is None:
            return
        try:
            num_bytes = shard.size - start
            if not 2 * tarfile.BLOCKSIZE <= num_bytes < 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE:
                raise ValueError(f"found {num_bytes} bytes after its last sample, expected the two blocks that end an archive")
            rest = shard.read(start, num_bytes)
            if rest.strip(b"\0"):
                place = start + num_bytes - len(rest.lstrip(b"\0"))
                raise ValueError(f"found bytes after its last sample that are not zero, the first at byte {place}")
        except (OSError, ValueError) as error:
            raise self._cannot_read("the end", name, error) from error

    def _cannot_read(self, what: str, shard: str, error: Exception) -> DataError:
        return DataError(
            f"{what} in {self._folder}/{shard} cannot be read: {error}; "
            f"list all that is broken with `sagsm shards verify {self._folder}`, then run the shards stage again"
        )


def _near_runs(video: StoredVideo, frame_indices: Sequence[int], max_gap: int) -> list[list[int]]:
    """The frames in runs, each of which is read at once: at most `max_gap` bytes lie between two frames of a run."""
    runs: list[list[int]] = []
    end = 0
    for frame_index in frame_indices:
        start = int(video.frame_offsets[frame_index])
        if runs and 0 <= start - end <= max_gap:
            runs[-1].append(frame_index)
        else:
            runs.append([frame_index])
        end = start + int(video.frame_sizes[frame_index])
    return runs


def _check_crc32(data: bytes, expected: int) -> None:
    found = zlib.crc32(data)
    if found != expected:
        raise ValueError(f"found bytes with checksum {found:08x}, the index says {expected:08x}")


def _shard_ends(table: pa.Table, info: DatasetInfo, folder: Folder) -> dict[str, ShardEnd]:
    """How each shard that the table names must end."""
    ends_of_samples = pa.table({"shard": table["shard"], "end": pc.add(table["sample_offset"], table["sample_bytes"])})
    ends = {}
    for row in ends_of_samples.group_by("shard").aggregate([("end", "max")]).to_pylist():
        name = row["shard"]
        if name not in info.shards:
            raise DataError(f"{folder}/{INDEX_NAME} names shard {name}, dataset.json does not; run the shards stage again")
        # Tars made elsewhere may hold more after the last sample.
        ends[name] = ShardEnd(None if info.settings.get("foreign") else row["end_max"], info.shards[name].bytes)
    return ends


def _check_shard_size(shard: str, found_bytes: int | None, expected_bytes: int) -> None:
    if found_bytes is None:
        raise DataError(f"shard {shard} is missing; dataset.json lists it: run the shards stage again")
    if found_bytes != expected_bytes:
        raise DataError(
            f"shard {shard} has {found_bytes} bytes, dataset.json says {expected_bytes}; run the shards stage again"
        )
