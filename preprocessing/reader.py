"""One split of a shard set, and its frames: fetched singly by the byte offsets of the index, decoded in memory."""

import functools
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg

from infra.errors import DataError
from preprocessing.index import read_dataset_info, read_index

_COLUMNS = ["key", "shard", "label", "height", "width", "frame_offsets", "frame_sizes"]
_MAX_OPEN_SHARDS = 64
_JPEG_MARKER = b"\xff\xd8"
# At half size or less libjpeg saves time (256 x 340 to 128 x 170: half of it); between half and full size it is slower.
_MIN_REDUCTION = 2.0


@dataclass(frozen=True, slots=True)
class StoredVideo:
    """Where one video of a shard set lies.

    Attributes:
        key: its sample's name in the shard.
        shard: file name of the shard.
        label: class id, -1 if unlabelled.
        height: of its frames, in pixels.
        width: of its frames, in pixels.
        frame_offsets: byte offset of each frame's JPEG in the shard. Shape: [num_frames].
        frame_sizes: its size in bytes. Shape: [num_frames].
    """

    key: str
    shard: str
    label: int
    height: int
    width: int
    frame_offsets: npt.NDArray[np.int64]
    frame_sizes: npt.NDArray[np.int32]


@dataclass(frozen=True)
class ShardSplit:
    """One split of a shard set, as `open_shards` gives it; its rows stay in Arrow's memory.

    Attributes:
        path: folder of the shard set.
        split: "train", "validation" or "test".
        label_names: the name of each class id.
        label_passport: hash of the names.
        table: what index.parquet says of each video that a loader needs, in the index's order, each column in one chunk.
    """

    path: Path
    split: str
    label_names: list[str]
    label_passport: str
    table: pa.Table

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

    def video(self, row: int) -> StoredVideo:
        """Where the video of one row lies."""
        key, shard, label, height, width, offsets, sizes = (column.chunk(0)[row] for column in self.table.columns)
        return StoredVideo(
            key=key.as_py(),
            shard=shard.as_py(),
            label=label.as_py() if label.is_valid else -1,
            height=height.as_py(),
            width=width.as_py(),
            frame_offsets=offsets.values.to_numpy(),
            frame_sizes=sizes.values.to_numpy(),
        )


def open_shards(path: Path | str, split: str) -> ShardSplit:
    """Open one split of a shard set; reads the index, not the frames.

    Args:
        path: folder with index.parquet, dataset.json and the shards.
        split: "train", "validation" or "test".

    Raises:
        DataError: if the folder is no shard set or has no such split, if a label is none of the label names, or if a shard of
            the split is missing or does not have the size that dataset.json gives.
    """
    path = Path(path)
    info = read_dataset_info(path)
    table = read_index(path, split).select(_COLUMNS).combine_chunks()
    highest = pc.max(table["label"]).as_py()
    if highest is not None and highest >= len(info.label_names):
        raise DataError(
            f"{path / 'index.parquet'} has label {highest} in split {split}, but dataset.json names {len(info.label_names)} "
            "labels (from 0); the files do not belong together: run the shards stage again"
        )
    for name in pc.unique(table["shard"]).to_pylist():
        if name not in info.shards:
            raise DataError(f"{path / 'index.parquet'} names shard {name}, dataset.json does not; run the shards stage again")
        _check_shard_size(path / name, info.shards[name].bytes)
    return ShardSplit(path, split, info.label_names, info.label_passport, table)


class FrameReader:
    """Reads frames of a shard set; safe to share between threads. Keeps at most 64 shards open.

    Args:
        path: folder of the shard set.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open = functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)(_OpenShard)

    def read(self, video: StoredVideo, frame_index: int, smallest_size: tuple[int, int] = (0, 0)) -> npt.NDArray[np.uint8]:
        """Read and decode one frame.

        Args:
            video: from `ShardSplit.video`.
            frame_index: from 0.
            smallest_size: (height, width) that would do. If half the frame's size or less will do, the frame is decoded at
                n/8 of its size, which is twice as fast and gives slightly other pixels than decoding and resizing.
                (0, 0) decodes at full size.

        Returns:
            RGB pixels. Shape: [H, W, 3], or the reduced size.

        Raises:
            DataError: if the bytes cannot be read, are no whole JPEG, or have another size than the index says; names the
                frame, the video and the shard.
        """
        shard_path = self._path / video.shard
        try:
            data = self._open(shard_path).read(int(video.frame_offsets[frame_index]), int(video.frame_sizes[frame_index]))
            return _decode(data, video.height, video.width, smallest_size)
        except (OSError, ValueError) as error:
            raise DataError(
                f"frame {frame_index} of video {video.key} in {shard_path} cannot be read: {error}; "
                f"list all that is broken with `sagsm shards verify {self._path}`, then run the shards stage again"
            ) from error


class _OpenShard:
    """A file descriptor that is closed when nobody holds this object: a cache may drop it while a thread still reads."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise ValueError(f"found {len(data)} bytes at byte {offset}, the index says {size}")
        return data


def _decode(data: bytes, height: int, width: int, smallest_size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    if not data.startswith(_JPEG_MARKER):
        raise ValueError(f"found bytes that begin with {data[:4]!r}, expected a JPEG")
    found_height, found_width, _, _ = simplejpeg.decode_jpeg_header(data)
    if (found_height, found_width) != (height, width):
        raise ValueError(f"found {found_width} x {found_height} pixels, the index says {width} x {height}")
    min_height, min_width = smallest_size if any(smallest_size) else (height, width)
    return simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width, min_factor=_MIN_REDUCTION)  # type: ignore[no-any-return]


def _check_shard_size(path: Path, expected_bytes: int) -> None:
    try:
        found_bytes = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"shard {path} is missing; dataset.json lists it: run the shards stage again") from error
    if found_bytes != expected_bytes:
        raise DataError(f"shard {path} has {found_bytes} bytes, dataset.json says {expected_bytes}; run the shards stage again")
