"""The index, the ledger and dataset.json: what makes a folder of tars a shard set. FORMAT.md describes the files."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from infra.errors import DataError
from infra.settings import Settings, explain_validation_error
from infra.storage import sha256_json
from preprocessing.labels import label_passport
from preprocessing.shards import FORMAT_VERSION, SIDECAR_SCHEMA

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


def read_dataset_info(path: Path) -> DatasetInfo:
    """Read the dataset.json of the shard set in folder `path`.

    Raises:
        DataError: if it is missing, of another format version, or its label names do not fit their passport.
    """
    file = path / "dataset.json"
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is no finished shard set: it has no dataset.json; run the shards stage, or give another folder"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}; run the shards stage again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file} has format version {version!r}, this program reads {FORMAT_VERSION}; run the shards stage again"
        )
    checksum = content.pop("checksum", None)
    if checksum != sha256_json(content):
        raise DataError(
            f"{file} does not have the checksum that it states; it was changed or damaged; run the shards stage again"
        )
    try:
        info = DatasetInfo.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{file} is damaged: {explain_validation_error(error)}; run the shards stage again") from error
    passport = label_passport(info.label_names)
    if passport != info.label_passport:
        raise DataError(
            f"{file} says label passport {info.label_passport}, its names have {passport}; run the shards stage again"
        )
    return info


def read_index(path: Path, split: str | None = None) -> pa.Table:
    """Read index.parquet (`INDEX_SCHEMA`) of the shard set in folder `path`, all of it or the rows of one split.

    Raises:
        DataError: if it is missing, damaged or has other columns, or the split has no sample.
    """
    table = _read_parquet(path / "index.parquet", INDEX_SCHEMA)
    if split is None:
        return table
    rows = table.filter(pc.equal(table["split"], split))
    if rows.num_rows == 0:
        known = sorted(set(table["split"].to_pylist()))
        raise DataError(f"{path} has no sample of split {split!r}; it has {', '.join(known) or 'none at all'}")
    return rows


def read_ledger(path: Path) -> pa.Table:
    """Read ledger.parquet (`LEDGER_SCHEMA`) of the shard set in folder `path`: a row for every source video.

    Raises:
        DataError: if it is missing, damaged or has other columns.
    """
    return _read_parquet(path / "ledger.parquet", LEDGER_SCHEMA)


def _read_parquet(path: Path, schema: pa.Schema) -> pa.Table:
    """Check the columns before any row is read."""
    again = "run the shards stage again"
    try:
        found = pq.read_schema(path)
        if not found.equals(schema):
            raise DataError(f"{path} has columns {found.names}; expected {schema.names} with their types; {again}")
        return pq.read_table(path, partitioning=None)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {again}, or give another folder") from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}; {again}") from error
