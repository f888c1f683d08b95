"""A shard set out of WebDataset tars made elsewhere: their index, ledger and dataset.json; the tars stay as they are."""

import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import ConfigError, DataError, PipelineError
from infra.progress import OnProgress
from infra.storage import atomic_path, sha256_file, write_bytes
from preprocessing.foreign_samples import sample_rows
from preprocessing.index import INDEX_SCHEMA, LEDGER_SCHEMA, DatasetInfo, FileInfo, ShardInfo, dataset_json
from preprocessing.labels import label_passport
from preprocessing.shards import FORMAT_VERSION, SIDECAR_SCHEMA

SPLITS = ("train", "validation", "test")
_SHOWN = 5
_MAX_LABEL_BYTES = 64 << 20
_ROW_SCHEMA = pa.schema([SIDECAR_SCHEMA.field(name) for name in dict.fromkeys(LEDGER_SCHEMA.names + INDEX_SCHEMA.names)])


@dataclass
class _Tally:
    """What has been counted so far."""

    by_split: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    highest_label: int = -1

    def add(self, rows: pa.Table, split: str) -> None:
        statuses = self.by_split.setdefault(split, Counter(kept=0, rejected=0))
        for row in pc.value_counts(rows["status"]).to_pylist():
            statuses[row["values"]] += row["counts"]
        bad = rows.filter(pc.field("status") == "rejected")
        self.reasons.update({row["values"]: row["counts"] for row in pc.value_counts(bad["reason"]).to_pylist()})
        for row in bad.slice(0, max(0, _SHOWN - len(self.examples))).to_pylist():
            self.examples.append(f"{row['video_id']} ({row['reason']}: {row['detail'][:100]})")
        for name in ("num_frames", "num_bytes"):
            self.sums[name] += pc.sum(rows[name]).as_py() or 0
        highest = pc.max(rows["label"]).as_py()
        self.highest_label = max(self.highest_label, -1 if highest is None else highest)

    def counts(self, num_ignored: int) -> dict[str, Any]:
        kept = sum(statuses["kept"] for statuses in self.by_split.values())
        rejected = sum(statuses["rejected"] for statuses in self.by_split.values())
        return {
            "videos": kept + rejected,
            "kept": kept,
            "rejected": rejected,
            "frames": self.sums["num_frames"],
            "bytes": self.sums["num_bytes"],
            "by_split": {split: dict(statuses) for split, statuses in sorted(self.by_split.items())},
            "by_reason": dict(self.reasons.most_common()),
            "ignored_files": num_ignored,
        }


def index_foreign_tars(
    tars: Path,
    output: Path | None = None,
    *,
    label_names: Sequence[str] | None = None,
    split_patterns: Mapping[str, Sequence[str]] | None = None,
    max_bad_fraction: float = 0.02,
    num_threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Make a folder of WebDataset tars a shard set that `open_shards` reads, without writing a tar.

    Every header is checked and every frame is decoded once. Samples that cannot be used are rejected in the ledger, each with a
    reason. A video's id is `<tar>/<key in the tar>`. Nothing is unpickled, whatever the tars hold.

    Args:
        tars: a folder that holds the `*.tar` files.
        output: where the shard set is to be: the folder itself (None), or another on the same disk, which gets hard links.
        label_names: the name of each class id. None: class ids are numbers, and the names are those numbers.
        split_patterns: file name patterns (`*`, `?`, `[...]`) of each split; each tar must fit one split. None: a tar whose
            name begins with "val" or "test" is of that split, all others are for training.
        max_bad_fraction: the set is refused if more than this part (0 to 1) of the samples is rejected.
        num_threads: tars read at a time; None means one a CPU.
        on_progress: called with tars done and in all.

    Returns:
        The `counts` of dataset.json, with `shards`, the number of tars.

    Raises:
        ConfigError: if a tar fits no split or two.
        DataError: if there is no tar, one is damaged, or no sample or too few can be used (the ledger is written then).
        PipelineError: if `output` holds a shard set already, or is on another disk.
    """
    names = _tar_names(tars)
    splits = {name: _split_of(name, split_patterns) for name in names}
    output = tars if output is None else output
    _prepare(tars, output, names)
    class_ids = None if label_names is None else {name: class_id for class_id, name in enumerate(label_names)}
    tally, shards, num_ignored = _Tally(), {}, 0
    with atomic_path(output / "index.parquet") as index_path:
        with (
            atomic_path(output / "ledger.parquet") as ledger_path,
            pq.ParquetWriter(index_path, INDEX_SCHEMA) as index,
            pq.ParquetWriter(ledger_path, LEDGER_SCHEMA) as ledger,
        ):
            for done, (name, read) in enumerate(_read_all(output, splits, class_ids, num_threads), start=1):
                ledger.write_table(read.rows.select(LEDGER_SCHEMA.names))
                kept = read.rows.filter(pc.field("status") == "kept")
                index.write_table(kept.select(INDEX_SCHEMA.names))
                tally.add(read.rows, splits[name])
                shards[name] = ShardInfo(sha256=read.sha256, bytes=read.num_bytes, samples=kept.num_rows, split=splits[name])
                num_ignored += read.num_ignored
                if on_progress is not None:
                    on_progress(done, len(names), f"tars, {tally.reasons.total()} samples rejected")
        counts = tally.counts(num_ignored)
        _require_few_rejected(counts, tally.examples, max_bad_fraction, output)
    label_names = label_names if label_names is not None else [str(label) for label in range(tally.highest_label + 1)]
    _write_dataset(output, tars.absolute().name, list(label_names), counts, shards)
    return counts | {"shards": len(shards)}


def read_label_names(path: Path) -> list[str]:
    """Read the name of each class id: a JSON list of texts, an object with such a list as `names`, or text, a name a row.

    Raises:
        DataError: if the file cannot be read, is not UTF-8, or holds no names, an empty one, or one twice.
    """
    try:
        if path.stat().st_size > _MAX_LABEL_BYTES:
            raise ValueError(f"more than {_MAX_LABEL_BYTES} bytes")
        text = path.read_bytes().decode("utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"the label names in {path} cannot be read: {error}; expected a JSON list or a name a row") from error
    names = names.get("names") if isinstance(names, dict) else names
    if not (isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names)):
        raise DataError(f"{path} holds no list of label names; expected a JSON list, or a name in each row")
    double = next((name for name, count in Counter(names).items() if count > 1), None)
    if double is not None:
        raise DataError(f"{path} holds the label {double[:80]!r} twice; expected each once; remove one")
    return names


@dataclass(frozen=True)
class _ReadTar:
    rows: pa.Table
    num_ignored: int
    sha256: str
    num_bytes: int


def _read_all(
    folder: Path, splits: dict[str, str], class_ids: dict[str, int] | None, num_threads: int | None
) -> Iterator[tuple[str, _ReadTar]]:
    """Read the tars in threads, a few ahead of what was asked for; decoding and hashing free the GIL."""
    num_threads = num_threads or os.cpu_count() or 1
    pool = ThreadPoolExecutor(num_threads)
    ahead: deque[tuple[str, Future[_ReadTar]]] = deque()
    try:
        for name, split in splits.items():
            ahead.append((name, pool.submit(_read_tar, folder / name, split, class_ids)))
            if len(ahead) > 2 * num_threads:
                first, future = ahead.popleft()
                yield first, future.result()
        for name, future in ahead:
            yield name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_tar(path: Path, split: str, class_ids: dict[str, int] | None) -> _ReadTar:
    try:
        rows, num_ignored = sample_rows(path, split, class_ids)
        table = pa.Table.from_pylist(rows, schema=_ROW_SCHEMA)
        return _ReadTar(table, num_ignored, sha256_file(path), path.stat().st_size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; check its permissions and the disk") from error


def _tar_names(tars: Path) -> list[str]:
    if not tars.is_dir():
        raise DataError(f"{tars} is no folder; expected one that holds WebDataset tars; give the right one")
    names = sorted(path.name for path in tars.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{tars} holds no file named *.tar; expected uncompressed WebDataset tars; give the right folder")
    odd = [name for name in names if not name.isprintable()]
    if odd:
        raise DataError(f"{tars} holds {odd[0]!r}, whose name holds control characters; expected plain names; rename it")
    return names


def _split_of(name: str, patterns: Mapping[str, Sequence[str]] | None) -> str:
    if not patterns:
        lowered = name.lower()
        return "validation" if lowered.startswith("val") else "test" if lowered.startswith("test") else "train"
    unknown = sorted(set(patterns) - set(SPLITS))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no split; expected {', '.join(SPLITS)}; for example --split 'train=train-*.tar'")
    found = [split for split, globs in patterns.items() if any(fnmatchcase(name, pattern) for pattern in globs)]
    if len(found) != 1:
        fits = f"fits the patterns of {' and '.join(found)}" if found else "fits no pattern of a split"
        raise ConfigError(f"tar {name} {fits}; expected exactly one; change or add --split SPLIT=PATTERN")
    return found[0]


def _prepare(tars: Path, output: Path, names: Sequence[str]) -> None:
    """Refuse a folder that is a shard set; link the tars into another folder."""
    if (output / "dataset.json").exists():
        raise PipelineError(
            f"{output} is a shard set already (it has dataset.json), and such a set is never changed; give another --output, "
            "or remove its dataset.json, index.parquet and ledger.parquet to index it again"
        )
    if output.exists() and output.samefile(tars):
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in names:
            link = output / name
            if not (link.exists() and link.samefile(tars / name)):
                os.link((tars / name).resolve(), link)
    except OSError as error:
        raise PipelineError(
            f"the tars of {tars} cannot be linked into {output}: {error.strerror}; expected an empty folder on the same disk; "
            "leave out --output to write the index beside the tars, or copy them first"
        ) from error


def _require_few_rejected(counts: dict[str, Any], examples: list[str], max_bad_fraction: float, output: Path) -> None:
    if not counts["videos"]:
        raise DataError(
            f"the tars in {output} hold no sample; expected files named KEY.jpg or KEY.000000.jpg, KEY.000001.jpg, ..."
        )
    fraction = counts["rejected"] / counts["videos"]
    if fraction <= max_bad_fraction and counts["kept"]:
        return
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts["by_reason"].items())
    raise DataError(
        f"{counts['rejected']} of {counts['videos']} samples ({fraction:.1%}) cannot be used: {reasons}; expected at most "
        f"{max_bad_fraction:.1%}. First: {'; '.join(examples)}. All are in {output / 'ledger.parquet'}. Repair the tars"
        + (f", or accept them with --max-bad-fraction {min(1.0, fraction + 0.001):.3f}" if counts["kept"] else "")
    )


def _write_dataset(
    output: Path, name: str, label_names: list[str], counts: dict[str, Any], shards: dict[str, ShardInfo]
) -> None:
    tables = {file: output / file for file in ("ledger.parquet", "index.parquet")}
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        dataset=name,
        label_names=label_names,
        label_passport=label_passport(label_names),
        settings={"foreign": True},
        ffmpeg_version="",
        counts=counts,
        files={file: FileInfo(sha256=sha256_file(path), bytes=path.stat().st_size) for file, path in tables.items()},
        shards=shards,
    )
    write_bytes(output / "dataset.json", dataset_json(info))
