"""The end of writing a shard set: the sidecars become index.parquet and ledger.parquet, then dataset.json commits them."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import DataError, PipelineError
from infra.filesystems import Folder
from infra.storage import sha256_file
from preprocessing.datasets import VideoIndex
from preprocessing.decode import ffmpeg_version
from preprocessing.index import INDEX_SCHEMA, LEDGER_SCHEMA, DatasetInfo, FileInfo, ShardInfo, dataset_json
from preprocessing.labels import label_passport
from preprocessing.planning import ShardPlan, ShardPlans, sidecar_name
from preprocessing.shards import FORMAT_VERSION, ShardCommit, ShardSettings, read_sidecar

VIDEOS_SHOWN = 5
_REASONS_SHOWN = 5
_SIDECAR_READERS = 8
# A row group ends with the first of these, and with the split: a reader of one split skips the others. Larger groups cost the
# driver memory: Arrow's allocator kept 50 MB after groups of 16,000 short rows, and 15 MB after these.
_GROUP_ROWS = 2048
_GROUP_BYTES = 64 * 2**20
_REPEATED = ["shard", "split", "status", "reason"]  # a dictionary of values that do not repeat is memory for nothing


def finish_shard_set(
    output: Folder | Path, index: VideoIndex, plans: Sequence[ShardPlan], settings: ShardSettings, dataset_name: str
) -> dict[str, Any]:
    """Gather the sidecars into index.parquet and ledger.parquet, then write dataset.json, the commit of the whole set.

    One sidecar after the other, so that memory does not depend on the number of shards but for dataset.json's entries. Call it
    when no task writes into the folder any more; what killed writers left there is removed.

    Returns:
        The `counts` of dataset.json, with `shards`, the number of tars.

    Raises:
        DataError: if a sidecar is missing or unreadable; it is removed, so that its shard is written again by the next run.
        PipelineError: if the ledger does not hold each source video exactly once, or more than `settings.max_bad_fraction` of
            the videos were rejected (the ledger is written then, for a look at the reasons).
    """
    output, plans = Folder(output), ShardPlans.of(plans)
    if output.local is not None:
        for leftover in output.local.glob(".tmp-*"):
            leftover.unlink(missing_ok=True)
    books = _Books()
    with output.create("index.parquet") as index_path:
        with output.create("ledger.parquet") as ledger_path:
            _write_tables(plans, output, books, ledger_path, index_path)
            if books.num_videos != index.videos.num_rows:
                raise _unbalanced(books.num_videos, plans, index)
            files = {"ledger.parquet": _file_info(ledger_path)}
        require_few_rejected(books.num_videos, books.reasons, settings, books.examples, f"{output}/ledger.parquet")
        files["index.parquet"] = _file_info(index_path)
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        dataset=dataset_name,
        label_names=index.label_names,
        label_passport=label_passport(index.label_names),
        settings=settings.model_dump(mode="json"),
        ffmpeg_version=ffmpeg_version(),
        counts=books.counts(),
        files=files,
        shards=books.shards,
    )
    output.write_bytes("dataset.json", dataset_json(info))
    return books.counts() | {"shards": len(books.shards)}


def require_few_rejected(
    num_videos: int, reasons: Mapping[str, int], settings: ShardSettings, examples: Sequence[str], ledger: str | None = None
) -> None:
    """Refuse a shard set of which too little is left.

    Args:
        num_videos: of the whole set.
        reasons: rejected videos by reason; while shards are still being written, those rejected by now.
        settings: with `max_bad_fraction`.
        examples: what to show of single videos.
        ledger: where all of them are listed; None while shards are still being written.

    Raises:
        PipelineError: if more than `settings.max_bad_fraction` of the videos were rejected, with the most frequent reasons.
    """
    rejected = sum(reasons.values())
    fraction = rejected / num_videos
    if fraction <= settings.max_bad_fraction:
        return
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{number} {reason}" for reason, number in ranked[:_REASONS_SHOWN])
    where = f"All are in {ledger}" if ledger else "Not all videos were tried"
    raise PipelineError(
        f"{rejected} of {num_videos} videos ({fraction:.1%}) cannot be used: {shown}; expected at most "
        f"{settings.max_bad_fraction:.1%}. First: {'; '.join(examples)}. {where}. Repair or replace "
        f"those files, or accept them with --set shards.max_bad_fraction={min(1.0, fraction + 0.001):.3f}"
    )


def rejected_examples(rows: pa.Table, limit: int) -> list[str]:
    """The first `limit` rejected videos of a sidecar's rows, each with reason and detail, as an error message shows them."""
    bad = rows.filter(pc.equal(rows["status"], "rejected")).slice(0, limit).select(["video_id", "reason", "detail"])
    return [f"{row['video_id']} ({row['reason']}: {row['detail'][:100]})" for row in bad.to_pylist()]


class _Books:
    """What has been counted so far."""

    def __init__(self) -> None:
        self.num_videos = self.num_frames = self.num_bytes = 0
        self.by_split: dict[str, Counter[str]] = {}
        self.reasons: Counter[str] = Counter()
        self.examples: list[str] = []
        self.shards: dict[str, ShardInfo] = {}

    def add(self, name: str, split: str, rows: pa.Table, commit: ShardCommit) -> None:
        """Count the rows of one shard."""
        bad = rows.filter(pc.equal(rows["status"], "rejected"))
        num_kept = rows.num_rows - bad.num_rows
        self.num_videos += rows.num_rows
        self.num_frames += pc.sum(rows["num_frames"]).as_py() or 0
        self.num_bytes += pc.sum(rows["num_bytes"]).as_py() or 0
        self.by_split.setdefault(split, Counter()).update(kept=num_kept, rejected=bad.num_rows)
        self.reasons.update(bad["reason"].to_pylist())
        self.examples += rejected_examples(bad, VIDEOS_SHOWN - len(self.examples))
        self.shards[name] = ShardInfo(sha256=commit.tar_sha256, bytes=commit.tar_bytes, samples=num_kept, split=split)

    def counts(self) -> dict[str, Any]:
        """As dataset.json holds them."""
        rejected = sum(self.reasons.values())
        return {
            "videos": self.num_videos,
            "kept": self.num_videos - rejected,
            "rejected": rejected,
            "frames": self.num_frames,
            "bytes": self.num_bytes,
            "by_split": {split: dict(self.by_split[split]) for split in sorted(self.by_split)},
            "by_reason": dict(sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))),
        }


def _write_tables(plans: ShardPlans, output: Folder, books: _Books, ledger_path: Path, index_path: Path) -> None:
    """Stream the rows of all sidecars into both tables, and count them."""
    with ExitStack() as stack:
        ledger = stack.enter_context(_RowGroups(ledger_path, LEDGER_SCHEMA))
        index = stack.enter_context(_RowGroups(index_path, INDEX_SCHEMA))
        split_before = None
        for position, (rows, commit) in enumerate(_sidecars(plans, output)):
            name, split = plans.shards[position]
            if rows["video_id"].to_pylist() != plans.video_ids(position):
                raise _wrong_videos(output, name)
            if split != split_before:
                ledger.flush()
                index.flush()
                split_before = split
            books.add(name, split, rows, commit)
            ledger.add(rows.select(LEDGER_SCHEMA.names))
            index.add(rows.filter(pc.equal(rows["status"], "kept")).select(INDEX_SCHEMA.names))


def _sidecars(plans: ShardPlans, output: Folder) -> Iterator[tuple[pa.Table, ShardCommit]]:
    """The rows of each shard in order, a few read ahead."""
    names = plans.names
    with ThreadPoolExecutor(_SIDECAR_READERS) as pool:
        ahead = deque(pool.submit(read_sidecar, output, sidecar_name(name)) for name in names[: 2 * _SIDECAR_READERS])
        for position, name in enumerate(names):
            try:
                yield ahead.popleft().result()
            except DataError as error:
                try:
                    output.read_bytes(sidecar_name(name))  # its bytes arrive, so it is damaged and not just out of reach
                except FileNotFoundError:
                    raise error from None
                except OSError as unreachable:
                    raise PipelineError(f"{unreachable}; nothing was removed; run again") from error
                output.delete(sidecar_name(name))
                raise
            following = position + 2 * _SIDECAR_READERS
            if following < len(names):
                ahead.append(pool.submit(read_sidecar, output, sidecar_name(names[following])))


class _RowGroups:
    """A Parquet file that is written in row groups of bounded size; closed by the end of its `with` block."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, write_page_checksum=True, use_dictionary=_REPEATED)
        self._tables: list[pa.Table] = []
        self._num_rows = self._num_bytes = 0

    def __enter__(self) -> "_RowGroups":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
        self._writer.close()

    def add(self, rows: pa.Table) -> None:
        """Append rows; they are written when there are enough of them."""
        self._tables.append(rows)
        self._num_rows += rows.num_rows
        self._num_bytes += rows.nbytes
        if self._num_rows >= _GROUP_ROWS or self._num_bytes >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """End the row group."""
        if self._num_rows:
            rows = pa.concat_tables(self._tables).replace_schema_metadata(None).combine_chunks()
            self._writer.write_table(rows, row_group_size=self._num_rows)
        self._tables, self._num_rows, self._num_bytes = [], 0, 0


def _wrong_videos(output: Folder, name: str) -> PipelineError:
    output.delete(sidecar_name(name))
    return PipelineError(
        f"{output}/{sidecar_name(name)} does not list the videos that belong into {name}, expected each exactly once; "
        "it was removed; run the shards stage again, which writes this shard again"
    )


def _unbalanced(num_found: int, plans: ShardPlans, index: VideoIndex) -> PipelineError:
    """Only here all ids are held at a time."""
    planned = {video_id for position in range(len(plans)) for video_id in plans.video_ids(position)}
    expected = set(index.videos["video_id"].to_pylist())
    missing, surplus = sorted(expected - planned)[:VIDEOS_SHOWN], sorted(planned - expected)[:VIDEOS_SHOWN]
    return PipelineError(
        f"the shards account for {num_found} videos, the index lists {index.videos.num_rows}, "
        f"expected each exactly once (missing: {missing}, surplus: {surplus}); remove the folder of the shards and run again"
    )


def _file_info(path: Path) -> FileInfo:
    return FileInfo(sha256=sha256_file(path), bytes=path.stat().st_size)
