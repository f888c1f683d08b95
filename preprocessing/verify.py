"""Reading a whole shard set again and comparing it with its own books."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import DataError
from infra.storage import sha256_file
from preprocessing.index import DatasetInfo, ShardInfo, read_dataset_info, read_index, read_ledger
from preprocessing.shards import read_tar


def verify_shards(path: Path) -> list[str]:
    """Check a shard set against its own books: every byte by its hash, every header, every frame's place, every video's row.

    Returns:
        One sentence for each problem; none if all is well.

    Raises:
        DataError: if dataset.json, the index or the ledger cannot be read at all.
    """
    info = read_dataset_info(path)
    index = read_index(path)
    ledger = read_ledger(path)
    problems = _check_ledger(index, ledger, info)
    unlisted = {file.name for file in path.glob("*.tar")} - set(info.shards)
    problems += [f"{name} is not listed in dataset.json" for name in sorted(unlisted)]
    rows_by_shard: dict[str, list[dict[str, Any]]] = {}
    for row in index.to_pylist():
        rows_by_shard.setdefault(row["shard"], []).append(row)
    problems += [f"the index names {name}, dataset.json does not" for name in sorted(set(rows_by_shard) - set(info.shards))]
    for name, shard in info.shards.items():
        problems += _check_shard(path / name, shard, rows_by_shard.get(name, []))
    return problems


def _check_shard(file: Path, shard: ShardInfo, rows: list[dict[str, Any]]) -> list[str]:
    if not file.is_file():
        return [f"{file.name} is missing"]
    num_bytes = file.stat().st_size
    if num_bytes != shard.bytes:
        return [f"{file.name} has {num_bytes} bytes, dataset.json says {shard.bytes}"]
    problems = []
    if sha256_file(file) != shard.sha256:
        problems.append(f"{file.name} has another SHA-256 than dataset.json says")
    if len(rows) != shard.samples:
        problems.append(f"{file.name} holds {shard.samples} samples by dataset.json, the index has {len(rows)}")
    try:
        members = {member.name: member for member in read_tar(file)}
    except DataError as error:
        return [*problems, str(error)]
    for row in rows:
        members.pop(f"{row['key']}.json", None)
        for number, place in enumerate(zip(row["frame_offsets"], row["frame_sizes"], strict=True)):
            member = members.pop(f"{row['key']}.{number:06d}.jpg", None)
            if member is None or (member.offset, member.size) != place:
                problems.append(f"{file.name}: frame {number} of {row['key']} is not where the index says")
                break
        if row["split"] != shard.split or len(row["frame_offsets"]) != row["num_frames"]:
            problems.append(f"{file.name}: the index row of {row['key']} contradicts itself or dataset.json")
    if members and not problems:
        problems.append(f"{file.name} holds {len(members)} files that the index does not know, for example {min(members)}")
    return problems


def _check_ledger(index: pa.Table, ledger: pa.Table, info: DatasetInfo) -> list[str]:
    problems = []
    if len(set(ledger["video_id"].to_pylist())) != ledger.num_rows:
        problems.append("the ledger lists a video twice")
    if ledger.num_rows != info.counts.get("videos"):
        problems.append(f"the ledger has {ledger.num_rows} rows, dataset.json counts {info.counts.get('videos')} videos")
    kept = ledger.filter(pc.equal(ledger["status"], "kept"))
    if sorted(kept["key"].to_pylist()) != sorted(index["key"].to_pylist()):
        problems.append(f"the ledger keeps {kept.num_rows} videos, the index holds {index.num_rows}, and their keys differ")
    return problems
