"""Reading a whole shard set again and comparing it with its own books.

Every byte is read once, one sample at a time, and what the books say is read shard by shard: memory does not grow with the set.
"""

import hashlib
import itertools
import json
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import simplejpeg

from infra.errors import DataError
from infra.filesystems import Folder
from infra.progress import OnProgress
from infra.storage import sha256_file
from preprocessing.index import INDEX_NAME, LEDGER_NAME, DatasetInfo, ShardInfo, open_table, read_dataset_info
from preprocessing.planning import sidecar_name
from preprocessing.shards import read_sidecar
from preprocessing.tars import read_tar, tar_header

_BLOCK_BYTES = 512
_CHUNK_BYTES = 1 << 20
_ROWS_AT_ONCE = 256
_MAX_THREADS = 8
_EXAMPLES_SHOWN = 5
_FAULTS_SHOWN = 3  # of one sample
_INDEX_COLUMNS = ["key", "shard", "split", "label", "num_frames", "height", "width", "sample_offset", "sample_bytes"]
_INDEX_COLUMNS += ["sample_crc32", "frame_offsets", "frame_sizes", "frame_crc32"]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a shard set.

    Attributes:
        text: what was found, as a sentence that names the shard and the sample.
        shard: file name of the shard that is hurt; "" if it is none of them.
        key: of the sample that is hurt; "" if it is none of them.
    """

    text: str
    shard: str = ""
    key: str = ""

    def __str__(self) -> str:
        return self.text


def verify_shards(place: Folder | Path | str, on_progress: OnProgress | None = None) -> list[Problem]:
    """Check a shard set against its own books.

    Each shard by its size and SHA-256; each sample by its place, its checksum, its headers and its label file; each frame by
    its place and its checksum, and by decoding it in full; the index and the ledger by their hashes, and against each other:
    every video has one row, and every kept one its sample; each sidecar by the checksums of its pages and by the tar that it
    belongs to. Of tars made elsewhere (see `foreign.py`), which have none, headers, label files and what lies between the
    samples are checked by the SHA-256 of the shard alone.

    Args:
        place: the folder, local or remote.
        on_progress: called with the number of shards read and that of all.

    Returns:
        The problems: those of the set, then those of the shards in the order of the index; none if all is well.

    Raises:
        DataError: if dataset.json is missing or damaged, since nothing can be checked then.
        OSError: if the place cannot be read.
    """
    folder = Folder(place)
    info = read_dataset_info(folder)
    sizes = folder.list()
    problems = [
        Problem(f"{name} is not listed in dataset.json", name)
        for name in sorted(sizes)
        if name.endswith(".tar") and name not in info.shards
    ]
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with ExitStack() as stack:
        ledger, index = (_open_or_tell(stack, folder, name, problems) for name in (LEDGER_NAME, INDEX_NAME))
        if ledger is not None:
            problems += _check_ledger(ledger, index, info)
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="verify")
        try:
            tasks = (
                pool.submit(_check_shard, folder, name, info, sizes.get(name), rows)
                for name, rows in _rows_by_shard(index, info, problems)
            )
            for done, found in enumerate(_in_order(tasks, num_threads + 1), start=1):
                problems += found
                if on_progress is not None:
                    on_progress(done, len(info.shards), "shards verified")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return problems


def _open_or_tell(stack: ExitStack, folder: Folder, name: str, problems: list[Problem]) -> pq.ParquetFile | None:
    try:
        return stack.enter_context(open_table(folder, name))
    except DataError as error:
        problems.append(Problem(str(error)))
        return None


def _in_order(tasks: Iterable[Future[list[Problem]]], max_under_way: int) -> Iterator[list[Problem]]:
    """Results in the order of the tasks; no more than `max_under_way` of them are submitted ahead."""
    under_way: deque[Future[list[Problem]]] = deque()
    for task in tasks:
        under_way.append(task)
        if len(under_way) >= max_under_way:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _rows_by_shard(
    index: pq.ParquetFile | None, info: DatasetInfo, problems: list[Problem]
) -> Iterator[tuple[str, list[dict[str, Any]] | None]]:
    """Each shard of dataset.json once, with its rows of the index, None if there is none; adds what is wrong with the order."""
    seen: set[str] = set()
    if index is not None:
        for name, rows in _runs_of_rows(index.iter_batches(_ROWS_AT_ONCE, columns=_INDEX_COLUMNS, use_threads=False)):
            if name not in info.shards:
                problems.append(Problem(f"the index names {name}, dataset.json does not", name))
            elif name in seen:
                problems.append(Problem(f"the rows of {name} are not next to each other in the index", name))
            else:
                seen.add(name)
                yield name, rows
    yield from ((name, None if index is None else []) for name in info.shards if name not in seen)


def _runs_of_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Successive rows of the same shard, with its name."""
    for name, rows in itertools.groupby((row for batch in batches for row in batch.to_pylist()), lambda row: row["shard"]):
        yield name, list(rows)


def _check_shard(
    folder: Folder, name: str, info: DatasetInfo, num_bytes: int | None, rows: list[dict[str, Any]] | None
) -> list[Problem]:
    shard = info.shards[name]
    is_foreign = bool(info.settings.get("foreign"))
    if num_bytes is None:
        return [Problem(f"{name} is missing", name)]
    problems = [] if is_foreign else _check_sidecar(folder, name, shard)
    if num_bytes != shard.bytes:
        problems.append(Problem(f"{name} has {num_bytes} bytes, dataset.json says {shard.bytes}", name))
    try:
        if rows is None:
            return problems + _check_without_index(folder, name, shard, is_foreign)
        with folder.open(name) as file:
            found = _ShardCheck(name, shard, is_foreign).run(file, rows)
    except OSError as error:
        found = [Problem(f"{name} cannot be read: {error}", name)]
    return problems + found


def _check_sidecar(folder: Folder, name: str, shard: ShardInfo) -> list[Problem]:
    """No reader needs it, but without it the shard cannot be healed."""
    try:
        _, commit = read_sidecar(folder, sidecar_name(name))
    except DataError as error:
        return [Problem(f"{name}: {error}", name)]
    if (commit.tar_sha256, commit.tar_bytes, commit.num_kept) == (shard.sha256, shard.bytes, shard.samples):
        return []
    return [Problem(f"{name}: {sidecar_name(name)} belongs to another tar than dataset.json says", name)]


def _check_without_index(folder: Folder, name: str, shard: ShardInfo, is_foreign: bool) -> list[Problem]:
    problems = []
    with folder.fetch(name) as path:
        if sha256_file(path) != shard.sha256:
            problems.append(Problem(f"{name} has another SHA-256 than dataset.json says", name))
        try:
            if not is_foreign:
                read_tar(path)
        except DataError as error:
            problems.append(Problem(str(error), name))
    return problems


class _ShardCheck:
    """One pass over a shard: all of it goes through the hash, its samples one by one through the other checks."""

    def __init__(self, name: str, shard: ShardInfo, is_foreign: bool) -> None:
        self._name = name
        self._shard = shard
        self._is_foreign = is_foreign
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._problems: list[Problem] = []

    def run(self, file: IO[bytes], rows: list[dict[str, Any]]) -> list[Problem]:
        if len(rows) != self._shard.samples:
            self._add(f"holds {self._shard.samples} samples by dataset.json, the index has {len(rows)}")
        complete = []
        for row in rows:
            if _is_complete(row, self._shard.split):
                complete.append(row)
            else:
                self._add_of_sample(f"the index row of {row['key']} contradicts itself or dataset.json", row["key"])
        for row in sorted(complete, key=lambda row: int(row["sample_offset"])):
            offset, num_bytes, key = row["sample_offset"], row["sample_bytes"], row["key"]
            if not self._position <= offset <= offset + num_bytes <= self._shard.bytes:
                self._add_of_sample(f"sample {key} is not where the index says, it overlaps another or the end", key)
                continue
            if offset > self._position and not self._is_foreign:
                self._add(f"holds bytes that the index does not know, from {self._position} to {offset}")
            self._skip(file, offset - self._position)
            faults = _sample_faults(self._read(file, num_bytes), row, self._is_foreign)
            for fault in itertools.islice(faults, _FAULTS_SHOWN):
                self._add_of_sample(fault, key)
        self._check_end(file)
        if self._sha256.hexdigest() != self._shard.sha256:
            self._problems.insert(0, Problem(f"{self._name} has another SHA-256 than dataset.json says", self._name))
        return self._problems

    def _check_end(self, file: IO[bytes]) -> None:
        position, is_zero = self._position, True
        while chunk := self._read(file, _CHUNK_BYTES):
            is_zero = is_zero and not chunk.strip(b"\0")
        num_bytes = self._position - position
        is_whole = is_zero and num_bytes >= 2 * _BLOCK_BYTES and num_bytes % _BLOCK_BYTES == 0
        if not is_whole and not self._is_foreign:
            self._add(f"does not end cleanly after its last sample, at byte {position}")

    def _skip(self, file: IO[bytes], num_bytes: int) -> None:
        end = self._position + num_bytes
        while self._position < end and self._read(file, min(_CHUNK_BYTES, end - self._position)):
            pass

    def _read(self, file: IO[bytes], num_bytes: int) -> bytes:
        data = file.read(num_bytes)
        self._sha256.update(data)
        self._position += len(data)
        return data

    def _add(self, text: str) -> None:
        self._problems.append(Problem(f"{self._name} {text}", self._name))

    def _add_of_sample(self, text: str, key: str) -> None:
        self._problems.append(Problem(f"{self._name}: {text}", self._name, key))


def _is_complete(row: dict[str, Any], split: str) -> bool:
    """Whether a row of the index says all that is needed, of the right split."""
    needed = [row[name] for name in _INDEX_COLUMNS if name != "label"]
    if None in needed or row["split"] != split:
        return False
    lists = [row["frame_offsets"], row["frame_sizes"], row["frame_crc32"]]
    return all(len(values) == row["num_frames"] and None not in values for values in lists)


def _sample_faults(data: bytes, row: dict[str, Any], is_foreign: bool) -> Iterator[str]:
    """What is wrong with the bytes of a sample."""
    key, begin = row["key"], row["sample_offset"]
    if len(data) < row["sample_bytes"]:
        yield f"sample {key} is cut off after {len(data)} of {row['sample_bytes']} bytes"
        return
    if zlib.crc32(data) != row["sample_crc32"]:
        yield f"sample {key} (bytes {begin} to {begin + len(data)}) has another checksum than the index says"
    end = 0
    places = zip(row["frame_offsets"], row["frame_sizes"], row["frame_crc32"], strict=True)
    for number, (offset, size, crc32) in enumerate(places):
        start = offset - begin
        is_next = is_foreign or start == end + _BLOCK_BYTES
        if not is_next or not 0 <= start <= start + size <= len(data):
            yield f"frame {number} of {key} is not where the index says"
            return
        if not is_foreign and data[end:start] != tar_header(f"{key}.{number:06d}.jpg", size):
            yield f"the header of frame {number} of {key} is damaged"
        if fault := _frame_fault(data[start : start + size], crc32, row["height"], row["width"]):
            yield f"frame {number} of {key} {fault}"
        end = start + size + -size % _BLOCK_BYTES
        if not is_foreign and any(data[start + size : end]):
            yield f"the padding after frame {number} of {key} is not zero"
    if not is_foreign and not _is_label_file(data[end:], row):
        yield f"the label file of {key} is damaged, or says something else than the index"


def _frame_fault(jpeg: bytes, crc32: int, height: int, width: int) -> str:
    """What is wrong with a frame; "" if nothing is."""
    if zlib.crc32(jpeg) != crc32:
        return "has another checksum than the index says"
    try:
        found_height, found_width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
        if (found_height, found_width) != (height, width):
            return f"has {found_width} x {found_height} pixels, the index says {width} x {height}"
        # All coefficients are read, which is what fails on damage; most of the inverse transform is saved.
        simplejpeg.decode_jpeg(jpeg, "GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1, min_factor=1)
    except ValueError as error:
        return f"does not decode: {error}"
    return ""


def _is_label_file(data: bytes, row: dict[str, Any]) -> bool:
    """Whether these bytes are the header, the content and the padding of the JSON file that closes the sample."""
    try:
        size = int(data[124:135], 8)
        content, padding = data[_BLOCK_BYTES : _BLOCK_BYTES + size], data[_BLOCK_BYTES + size :]
        if data[:_BLOCK_BYTES] != tar_header(f"{row['key']}.json", size) or padding != bytes(-size % _BLOCK_BYTES):
            return False
        facts = json.loads(content)
        return all(facts[name] == row[name] for name in ("split", "label", "num_frames", "height", "width"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _check_ledger(ledger: pq.ParquetFile, index: pq.ParquetFile | None, info: DatasetInfo) -> list[Problem]:
    """Compare the ledger with dataset.json and the index, by 8-byte digests of names: 80 MB for ten million videos."""
    problems = []
    num_rows, num_videos = ledger.metadata.num_rows, info.counts.get("videos")
    if num_rows != num_videos:
        problems.append(Problem(f"the ledger has {num_rows} rows, dataset.json counts {num_videos} videos"))
    ids = _digests(_names(ledger, "video_id"))
    twice = np.unique(ids[1:][ids[1:] == ids[:-1]])
    if len(twice):
        problems.append(Problem(f"the ledger lists a video twice, for example {_examples(twice, _names(ledger, 'video_id'))}"))
    if index is None:
        return problems
    kept, held = _digests(_names(ledger, "key", status="kept")), _digests(_names(index, "key"))
    if not np.array_equal(kept, held):
        differing = np.setxor1d(kept, held)
        examples = _examples(differing, itertools.chain(_names(ledger, "key"), _names(index, "key")))
        numbers = f"the ledger keeps {len(kept)} videos, the index holds {len(held)}"
        problems.append(Problem(f"{numbers}, and their keys differ, for example {examples}"))
    return problems


def _names(table: pq.ParquetFile, column: str, status: str | None = None) -> Iterator[str]:
    """The values of a column, only those of the rows with that status if one is given."""
    for batch in table.iter_batches(columns=[column] if status is None else [column, "status"], use_threads=False):
        chosen = batch if status is None else batch.filter(pc.equal(batch["status"], status))
        yield from (name or "" for name in chosen[column].to_pylist())


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def _digests(names: Iterable[str]) -> npt.NDArray[np.uint64]:
    """The digests of all names, sorted. Shape: [num_names]."""
    return np.sort(np.fromiter(map(_digest, names), np.uint64))


def _examples(digests: npt.NDArray[np.uint64], names: Iterable[str]) -> str:
    wanted = set(digests[:_EXAMPLES_SHOWN].tolist())
    return ", ".join(sorted({name for name in names if _digest(name) in wanted}))
