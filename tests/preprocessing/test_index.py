"""The books: each video exactly once, too many rejections refused, and read only if they are as they were written."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import simplejpeg

from infra.errors import DataError, PipelineError
from infra.filesystems import Folder
from infra.storage import sha256_file, sha256_json
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.finish import finish_shard_set
from preprocessing.index import INDEX_SCHEMA, LEDGER_SCHEMA, FileInfo, dataset_json, read_dataset_info, read_index, read_ledger
from preprocessing.labels import label_passport
from preprocessing.planning import plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource

LABEL_NAMES = ["left", "right", "up"]
SETTINGS = ShardSettings(videos_per_shard=3, max_bad_fraction=0.4)


def make_raw(root: Path) -> VideoIndex:
    """Nine frame folders in three splits; "gap" and "none" cannot be used, the test videos have no label."""
    ids = {"train": ["t1", "t2", "gap", "t3", "t4"], "validation": ["v1", "none"], "test": ["e1", "e2"]}
    rows = []
    for split, members in ids.items():
        for number, video_id in enumerate(members):
            label = None if split == "test" else number % 3
            path = f"raw/{video_id}"
            rows.append({"video_id": video_id, "path": path, "kind": "frames", "split": split, "label": label})
            if video_id != "none":
                (root / path).mkdir(parents=True)
            for index in (1, 3) if video_id == "gap" else () if video_id == "none" else (1, 2, 3):
                pixels = np.random.default_rng(number * 10 + index).integers(0, 256, (24, 32, 3), dtype=np.uint8)
                (root / path / f"{index:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    return VideoIndex(videos=pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), label_names=LABEL_NAMES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("set")
    index = make_raw(root)
    output_dir = root / "shards"
    output_dir.mkdir()
    plans = plan_shards(index.videos, videos_per_shard=SETTINGS.videos_per_shard, seed=SETTINGS.seed)
    for plan in plans:
        write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    return output_dir, finish_shard_set(output_dir, index, plans, SETTINGS, "something_v1")


@pytest.fixture
def shard_set(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished[0], tmp_path / "shards"))


def test_summary_counts_and_reasons(finished: tuple[Path, dict[str, Any]]) -> None:
    summary = finished[1]
    assert (summary["videos"], summary["kept"], summary["rejected"], summary["frames"], summary["shards"]) == (9, 7, 2, 21, 4)
    assert summary["by_reason"] == {"gap": 1, "missing": 1}
    assert summary["by_split"] == {
        "test": {"kept": 2, "rejected": 0},
        "train": {"kept": 4, "rejected": 1},
        "validation": {"kept": 1, "rejected": 1},
    }


def test_ledger_has_each_video_once_and_the_index_the_kept_ones(shard_set: Path) -> None:
    ledger, index, info = read_ledger(shard_set), read_index(shard_set), read_dataset_info(shard_set)
    assert ledger.schema.equals(LEDGER_SCHEMA)
    assert index.schema.equals(INDEX_SCHEMA)
    assert sorted(ledger["video_id"].to_pylist()) == ["e1", "e2", "gap", "none", "t1", "t2", "t3", "t4", "v1"]
    kept = [row["key"] for row in ledger.to_pylist() if row["status"] == "kept"]
    assert index["key"].to_pylist() == kept
    assert read_index(shard_set, "test")["label"].to_pylist() == [None, None]
    assert sum(shard.samples for shard in info.shards.values()) == index.num_rows
    assert {shard.split for shard in info.shards.values()} == {"train", "validation", "test"}
    assert (info.dataset, info.label_names, info.label_passport) == ("something_v1", LABEL_NAMES, label_passport(LABEL_NAMES))
    assert info.settings == SETTINGS.model_dump(mode="json")


def test_too_many_rejected_videos_are_refused_with_what_to_do(tmp_path: Path) -> None:
    index = make_raw(tmp_path)
    strict = SETTINGS.model_copy(update={"max_bad_fraction": 0.02})
    plans = plan_shards(index.videos, videos_per_shard=strict.videos_per_shard, seed=strict.seed)
    output_dir = tmp_path / "shards"
    output_dir.mkdir()
    for plan in plans:
        write_shard(plan, FolderSource(tmp_path), output_dir, strict)
    with pytest.raises(PipelineError) as caught:
        finish_shard_set(output_dir, index, plans, strict, "something_v1")
    message = str(caught.value)
    assert "2 of 9 videos (22.2%) cannot be used: 1 gap, 1 missing; expected at most 2.0%. First: " in message
    assert "gap (gap: frame 2 is missing; found 2 from 1 to 3)" in message
    assert "none (missing: no folder of that name: none)" in message
    assert message.endswith("accept them with --set shards.max_bad_fraction=0.223")
    assert pq.read_table(output_dir / "ledger.parquet").num_rows == 9
    assert not (output_dir / "dataset.json").exists()


def test_books_that_do_not_balance_are_refused(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    index = make_raw(tmp_path)
    plans = plan_shards(index.videos, videos_per_shard=SETTINGS.videos_per_shard, seed=SETTINGS.seed)
    output_dir = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    with pytest.raises(
        PipelineError, match=r"account for 7 videos, the index lists 9, expected each exactly once \(missing: \["
    ):
        finish_shard_set(output_dir, index, plans[1:], SETTINGS, "something_v1")
    (output_dir / plans[0].sidecar_name).unlink()
    with pytest.raises(DataError, match=r"is no readable shard sidecar: .*; run the shards stage again"):
        finish_shard_set(output_dir, index, plans, SETTINGS, "something_v1")


def restamp(folder: Path) -> None:
    """Make dataset.json vouch for the tables that lie in the folder now."""
    info = read_dataset_info(folder)
    files = {name: FileInfo(sha256=sha256_file(folder / name), bytes=(folder / name).stat().st_size) for name in info.files}
    (folder / "dataset.json").write_bytes(dataset_json(info.model_copy(update={"files": files})))


def test_reading_errors_say_what_to_do(shard_set: Path, tmp_path: Path) -> None:
    for read in (read_dataset_info, read_index, read_ledger):
        with pytest.raises(DataError, match=r"is no finished shard set: it has no dataset\.json; run the shards stage"):
            read(tmp_path)
    with pytest.raises(DataError, match="has no sample of split 'dev'; it has test, train, validation"):
        read_index(shard_set, "dev")
    shutil.copy(shard_set / "ledger.parquet", shard_set / "index.parquet")
    with pytest.raises(DataError, match=r"index\.parquet has \d+ bytes, dataset\.json says \d+; run the shards stage again"):
        read_index(shard_set)
    restamp(shard_set)
    with pytest.raises(DataError, match=r"index\.parquet has columns \['video_id', .*; expected \['key', "):
        read_index(shard_set)
    (shard_set / "ledger.parquet").write_bytes(b"PAR1 nonsense")
    restamp(shard_set)
    with pytest.raises(DataError, match=r"ledger\.parquet cannot be read"):
        read_ledger(shard_set)
    (shard_set / "ledger.parquet").unlink()
    with pytest.raises(DataError, match=r"ledger\.parquet is missing; run the shards stage again"):
        read_ledger(shard_set)


def test_a_changed_table_is_refused_before_it_is_parsed(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray((shard_set / "index.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (shard_set / "index.parquet").write_bytes(data)
    monkeypatch.setattr(pq, "ParquetFile", lambda path: pytest.fail("parsed"))
    with pytest.raises(DataError, match=r"index\.parquet has another SHA-256 than dataset\.json says; run"):
        read_index(shard_set)


def test_columns_can_be_chosen(shard_set: Path) -> None:
    index, ledger = read_index(shard_set), read_ledger(shard_set)
    assert read_index(shard_set, columns=["width", "key"]).equals(index.select(["width", "key"]))
    assert read_ledger(str(shard_set), columns=["status"]).equals(ledger.select(["status"]))
    train = index.filter(pc.field("split") == "train")
    assert read_index(shard_set, "train").equals(train)
    assert read_index(shard_set, "train", ["frame_crc32", "key"]).equals(train.select(["frame_crc32", "key"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "has format version 3, this program reads 2"),
        ({"label_names": ["left", "right", "down"]}, "says label passport"),
        ({"surprise": 1}, "is damaged: surprise: Extra inputs are not permitted"),
        ({"files": {}, "shards": {}, "counts": {"videos": True}}, "is not byte for byte as it was written"),
        ({"shards": {"../a.tar": {"sha256": "", "bytes": 0, "samples": 0, "split": "train"}}}, r"lists shard '\.\./a\.tar'"),
        ({"shards": {"a.tar": {}}}, r"is damaged: shards\.a\.tar\.sha256: Field required"),
    ],
)
def test_dataset_json_is_checked(shard_set: Path, change: dict[str, Any], message: str) -> None:
    file = shard_set / "dataset.json"
    content = json.loads(file.read_text()) | change
    del content["checksum"]
    file.write_text(json.dumps(content | {"checksum": sha256_json(content)}))
    with pytest.raises(DataError, match=message):
        read_dataset_info(shard_set)


def test_a_changed_dataset_json_is_refused(shard_set: Path) -> None:
    file = shard_set / "dataset.json"
    file.write_text(file.read_text().replace('"videos": 9', '"videos": 8'))
    with pytest.raises(DataError, match="does not have the checksum that it states"):
        read_dataset_info(shard_set)


def test_dataset_json_with_other_spaces_is_refused(shard_set: Path) -> None:
    file = shard_set / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=2, sort_keys=True))
    with pytest.raises(DataError, match=r"is not byte for byte as it was written; it was changed or damaged"):
        read_dataset_info(shard_set)


@pytest.mark.parametrize("text", ["[1", "[1]", '{"format_version": NaN}', '{"format_version": 1e999}', "[" * 100_000, "\udcff"])
def test_dataset_json_that_is_no_json(shard_set: Path, text: str) -> None:
    (shard_set / "dataset.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"dataset\.json cannot be read: .*; run the shards stage again"):
        read_dataset_info(shard_set)


def test_a_table_that_dataset_json_does_not_list(shard_set: Path) -> None:
    info = read_dataset_info(shard_set)
    (shard_set / "dataset.json").write_bytes(dataset_json(info.model_copy(update={"files": {}})))
    with pytest.raises(DataError, match=r"dataset\.json does not list index\.parquet; run the shards stage again"):
        read_index(shard_set)


def test_a_store_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Folder, name: str) -> bytes:
        raise OSError("no route to host")

    monkeypatch.setattr(Folder, "read_bytes", fail)
    with pytest.raises(DataError, match=r"s3://bucket/set/dataset\.json cannot be read: no route to host; check the disk or"):
        read_dataset_info("s3://bucket/set")
