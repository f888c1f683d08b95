"""The shard set's books: each video exactly once, too many rejections refused, every later damage found."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from infra.errors import DataError, PipelineError
from infra.storage import sha256_json
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.finish import finish_shard_set
from preprocessing.index import INDEX_SCHEMA, LEDGER_SCHEMA, read_dataset_info, read_index, read_ledger
from preprocessing.labels import label_passport
from preprocessing.planning import plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.verify import verify_shards

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


def test_whole_shard_set_has_no_problem(shard_set: Path) -> None:
    assert verify_shards(shard_set) == []


def test_verify_names_each_damage(shard_set: Path) -> None:
    first, second, third, fourth = sorted(shard_set.glob("*.tar"))
    data = bytearray(first.read_bytes())
    data[600] ^= 1  # inside a picture
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-512])
    third.unlink()
    shutil.copy(fourth, shard_set / "train-000099.tar")
    size = second.stat().st_size
    assert verify_shards(shard_set) == [
        "train-000099.tar is not listed in dataset.json",
        f"{first.name} has another SHA-256 than dataset.json says",
        f"{second.name} has {size} bytes, dataset.json says {size + 512}",
        f"{third.name} is missing",
    ]


def test_verify_sees_a_damaged_header(shard_set: Path) -> None:
    path = min(shard_set.glob("*.tar"))
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    problems = verify_shards(shard_set)
    assert len(problems) == 2
    assert "no valid member header at byte 0" in problems[1]


def test_verify_sees_an_index_that_points_elsewhere(shard_set: Path) -> None:
    rows = read_index(shard_set).to_pylist()
    rows[0]["frame_offsets"][1] += 512
    lost = rows.pop()
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), shard_set / "index.parquet")
    problems = verify_shards(shard_set)
    assert f"{rows[0]['shard']}: frame 1 of {rows[0]['key']} is not where the index says" in problems
    assert f"{lost['shard']} holds 1 samples by dataset.json, the index has 0" in problems
    assert any("their keys differ" in problem for problem in problems)


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
    assert read_ledger(output_dir).num_rows == 9
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


def test_reading_errors_say_what_to_do(shard_set: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is no finished shard set: it has no dataset\.json; run the shards stage"):
        read_dataset_info(tmp_path)
    with pytest.raises(DataError, match=r"index\.parquet is missing; run the shards stage again"):
        read_index(tmp_path)
    with pytest.raises(DataError, match="has no sample of split 'dev'; it has test, train, validation"):
        read_index(shard_set, "dev")
    shutil.copy(shard_set / "ledger.parquet", shard_set / "index.parquet")
    with pytest.raises(DataError, match=r"index\.parquet has columns \['video_id', .*; expected \['key', "):
        read_index(shard_set)
    (shard_set / "ledger.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"ledger\.parquet cannot be read"):
        read_ledger(shard_set)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "has format version 3, this program reads 2"),
        ({"label_names": ["left", "right", "down"]}, "says label passport"),
        ({"surprise": 1}, "is damaged: surprise: Extra inputs are not permitted"),
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


def test_dataset_json_that_is_no_json(shard_set: Path) -> None:
    (shard_set / "dataset.json").write_text("[1")
    with pytest.raises(DataError, match=r"dataset\.json cannot be read: .*; run the shards stage again"):
        read_dataset_info(shard_set)
