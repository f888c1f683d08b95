"""The index, the ledger and dataset.json: what makes a folder of tars a shard set. FORMAT.md describes the files."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from infra.errors import DataError
from infra.filesystems import Folder
from infra.settings import Settings, explain_validation_error
from infra.storage import sha256_file, sha256_json
from preprocessing.labels import label_passport
from preprocessing.shards import FORMAT_VERSION, SIDECAR_SCHEMA

DATASET_NAME, INDEX_NAME, LEDGER_NAME = "dataset.json", "index.parquet", "ledger.parquet"

_AGAIN = "run the shards stage again"
_INDEX_COLUMNS = ["key", "shard", "split", "label", "num_frames", "fps", "height", "width"]
_INDEX_COLUMNS += ["sample_offset", "sample_bytes", "sample_crc32", "frame_offsets", "frame_sizes", "frame_crc32"]
_LEDGER_COLUMNS = [
    "video_id",
    "key",
    "split",
    "label",
    "status",
    "reason",
    "detail",
    "num_frames",
    "num_bytes",
    "source_bytes",
    "content_sha256",
    "seconds",
    "shard",
]
INDEX_SCHEMA = pa.schema([SIDECAR_SCHEMA.field(name) for name in _INDEX_COLUMNS])
LEDGER_SCHEMA = pa.schema([SIDECAR_SCHEMA.field(name) for name in _LEDGER_COLUMNS])
_SCHEMAS = {INDEX_NAME: INDEX_SCHEMA, LEDGER_NAME: LEDGER_SCHEMA}


class ShardInfo(Settings):
    """One tar of a shard set: its hash, its size in bytes, its number of samples and its split."""

    sha256: str
    bytes: int
    samples: int
    split: str


class FileInfo(Settings):
    """A file beside the tars: its hash and its size in bytes."""

    sha256: str
    bytes: int


class DatasetInfo(Settings):
    """The content of dataset.json.

    `label_passport` is the hash of `label_names`; `settings` are the `ShardSettings` as plain data; `counts` holds numbers of
    videos, kept, rejected, frames and bytes, and `by_split` and `by_reason`; `files` are index.parquet and ledger.parquet.
    """

    format_version: int
    dataset: str
    label_names: list[str]
    label_passport: str
    settings: dict[str, Any]
    ffmpeg_version: str
    counts: dict[str, Any]
    files: dict[str, FileInfo]
    shards: dict[str, ShardInfo]


def dataset_json(info: DatasetInfo) -> bytes:
    """The bytes of dataset.json: indented JSON, whose entry `checksum` is the SHA-256 of the canonical JSON of all others."""
    content = info.model_dump(mode="json")
    content["checksum"] = sha256_json(content)
    return (json.dumps(content, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def read_dataset_info(place: Folder | Path | str) -> DatasetInfo:
    """Read the dataset.json of the shard set in a folder, local or remote.

    Raises:
        DataError: if it is missing, of another format version, not byte for byte what `dataset_json` writes (so that a single
            wrong bit is found wherever it lies), or its label names do not fit their passport.
    """
    folder = Folder(place)
    file = f"{folder}/{DATASET_NAME}"
    try:
        data = folder.read_bytes(DATASET_NAME)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} is no finished shard set: it has no dataset.json; run the shards stage, or give another folder"
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}; check the disk or the network and try again") from error
    content = _parse_json(data, file)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(f"{file} has format version {version!r}, this program reads {FORMAT_VERSION}; {_AGAIN}")
    checksum = content.pop("checksum", None)
    if checksum != sha256_json(content):
        raise DataError(f"{file} does not have the checksum that it states; it was changed or damaged; {_AGAIN}")
    try:
        info = DatasetInfo.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{file} is damaged: {explain_validation_error(error)}; {_AGAIN}") from error
    passport = label_passport(info.label_names)
    if passport != info.label_passport:
        raise DataError(f"{file} says label passport {info.label_passport}, its names have {passport}; {_AGAIN}")
    for name in info.shards:
        if name in {"", ".", ".."} or "/" in name or "\0" in name:
            raise DataError(f"{file} lists shard {name!r}; expected the name of a file in the same folder; {_AGAIN}")
    if dataset_json(info) != data:
        raise DataError(f"{file} is not byte for byte as it was written; it was changed or damaged; {_AGAIN}")
    return info


def read_index(place: Folder | Path | str, split: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Read index.parquet of the shard set in a folder, local or remote, after a check of its hash.

    Args:
        place: the folder.
        split: only the rows of this split; None for all.
        columns: only these of `INDEX_SCHEMA`; None for all. What a caller does not need costs no memory.

    Raises:
        DataError: if it is missing, is not the file that dataset.json describes or has other columns, or the split has no
            sample.
    """
    names = list(INDEX_SCHEMA.names if columns is None else columns)
    with open_table(place, INDEX_NAME) as file:
        if split is None:
            return file.read(columns=names).select(names)
        known: set[str] = set()
        parts = []
        # Piece by piece, so that the rows of other splits are never held all together.
        for batch in file.iter_batches(columns=list(dict.fromkeys([*names, "split"]))):
            known.update(batch["split"].unique().to_pylist())
            parts.append(batch.filter(pc.equal(batch["split"], split)).select(names))
    if split not in known:
        raise DataError(f"{place} has no sample of split {split!r}; it has {', '.join(sorted(known)) or 'none at all'}")
    return pa.Table.from_batches(parts)


def read_ledger(place: Folder | Path | str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read ledger.parquet of the shard set in a folder, local or remote, after a check of its hash.

    Args:
        place: the folder.
        columns: only these of `LEDGER_SCHEMA`; None for all.

    Returns:
        A row for every source video.

    Raises:
        DataError: if it is missing, is not the file that dataset.json describes or has other columns.
    """
    names = list(LEDGER_SCHEMA.names if columns is None else columns)
    with open_table(place, LEDGER_NAME) as file:
        return file.read(columns=names).select(names)


@contextmanager
def open_table(place: Folder | Path | str, name: str) -> Iterator[pq.ParquetFile]:
    """Open index.parquet or ledger.parquet for reading row by row, after a check of its size, its hash and its columns.

    Args:
        place: the folder, local or remote; a remote file is copied to this machine for as long as the block lasts.
        name: `INDEX_NAME` or `LEDGER_NAME`.

    Raises:
        DataError: if dataset.json cannot be used, or the file is missing, is not the one that dataset.json describes or has
            other columns; also inside the block, if its rows cannot be read.
    """
    folder = Folder(place)
    path = f"{folder}/{name}"
    expected = read_dataset_info(folder).files.get(name)
    if expected is None:
        raise DataError(f"{folder}/{DATASET_NAME} does not list {name}; {_AGAIN}")
    try:
        with folder.fetch(name) as local:
            num_bytes = local.stat().st_size
            if num_bytes != expected.bytes:
                raise DataError(f"{path} has {num_bytes} bytes, dataset.json says {expected.bytes}; {_AGAIN}")
            if sha256_file(local) != expected.sha256:
                raise DataError(f"{path} has another SHA-256 than dataset.json says; {_AGAIN}")
            with pq.ParquetFile(local) as file:
                if not file.schema_arrow.equals(_SCHEMAS[name]):
                    found, wanted = file.schema_arrow.names, _SCHEMAS[name].names
                    raise DataError(f"{path} has columns {found}; expected {wanted} with their types; {_AGAIN}")
                yield file
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {_AGAIN}, or give another folder") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; {_AGAIN}") from error


def _parse_json(data: bytes, file: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise ValueError(f"found {word}, which is no JSON")

    try:
        content = json.loads(data, parse_constant=refuse)
        sha256_json(content)  # refuses numbers beyond all bounds, which JSON can write and floats cannot hold
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}; {_AGAIN}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} cannot be read: found {type(content).__name__}, expected a JSON object; {_AGAIN}")
    return content
