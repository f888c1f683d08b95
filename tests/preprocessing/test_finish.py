"""Finishing: the tables hold each sidecar's rows once and in order, however grouped; what is wrong is told and healed."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from infra.errors import DataError, PipelineError
from infra.filesystems import Folder
from infra.storage import sha256_file
from preprocessing import finish
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.decode import DecodedVideo, DecodeSettings, VideoRejectedError
from preprocessing.finish import finish_shard_set, rejected_examples, require_few_rejected
from preprocessing.index import INDEX_SCHEMA, LEDGER_SCHEMA, read_dataset_info, read_index, read_ledger
from preprocessing.planning import PlannedVideo, ShardPlans, plan_shards
from preprocessing.shards import ShardSettings, read_sidecar, write_shard

SETTINGS = ShardSettings(videos_per_shard=4, max_bad_fraction=0.5)
SPLITS = ("test", "train", "train", "validation")


@dataclass(frozen=True)
class Numbered:
    """As many frames as the video's number modulo 5, and no video where that is 4."""

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:
        number = int(video.video_id)
        if number % 5 == 4:
            raise VideoRejectedError("damaged" if number % 2 else "gap", f"number {number}")
        return DecodedVideo([b"frame %d" % index for index in range(1 + number % 5)], None, 16, 16, 10 * number, "")


@pytest.fixture
def index() -> VideoIndex:
    rows = [
        {"video_id": str(number), "path": "-", "kind": "video", "split": SPLITS[number % 4], "label": 0} for number in range(60)
    ]
    return VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), ["one"])


@pytest.fixture
def plans(index: VideoIndex) -> ShardPlans:
    return plan_shards(index.videos, videos_per_shard=4, seed=0)


@pytest.fixture
def folder(plans: ShardPlans, tmp_path: Path) -> Path:
    """All shards, not yet finished."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for plan in plans:
        write_shard(plan, Numbered(), folder, SETTINGS)
    return folder


@pytest.mark.parametrize(("rows", "num_bytes"), [(1, 1 << 30), (6, 1 << 30), (1 << 16, 1), (1 << 16, 1 << 26)])
def test_tables_hold_the_rows_of_the_sidecars_in_order(
    rows: int, num_bytes: int, index: VideoIndex, plans: ShardPlans, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "_GROUP_ROWS", rows)
    monkeypatch.setattr(finish, "_GROUP_BYTES", num_bytes)
    counts = finish_shard_set(Folder(folder), index, plans, SETTINGS, "x")
    sidecars = pa.concat_tables([read_sidecar(folder, plan.sidecar_name)[0] for plan in plans]).replace_schema_metadata(None)
    kept = sidecars.filter(pc.equal(sidecars["status"], "kept"))
    assert read_ledger(folder).equals(sidecars.select(LEDGER_SCHEMA.names))
    assert read_index(folder).equals(kept.select(INDEX_SCHEMA.names))
    assert counts["videos"] == 60
    assert counts["kept"] == kept.num_rows == 48
    assert counts["rejected"] == 12
    assert counts["frames"] == sum(sidecars["num_frames"].to_pylist())
    assert counts["bytes"] == sum(sidecars["num_bytes"].to_pylist())
    assert counts["by_reason"] == {"damaged": 6, "gap": 6}
    expected = Counter(zip(sidecars["split"].to_pylist(), sidecars["status"].to_pylist(), strict=True))
    assert {(split, word): n for split, words in counts["by_split"].items() for word, n in words.items()} == expected
    assert counts["shards"] == len(plans)


def test_a_row_group_holds_one_split(index: VideoIndex, plans: ShardPlans, folder: Path) -> None:
    finish_shard_set(folder, index, plans, SETTINGS, "x")
    for name in ("index.parquet", "ledger.parquet"):
        file = pq.ParquetFile(folder / name)
        groups = [set(file.read_row_group(number)["split"].to_pylist()) for number in range(file.num_row_groups)]
        assert groups == [{"test"}, {"train"}, {"validation"}]


def test_the_same_shards_give_the_same_index_and_their_hashes(index: VideoIndex, plans: ShardPlans, folder: Path) -> None:
    finish_shard_set(folder, index, plans, SETTINGS, "x")
    before = {name: (folder / name).read_bytes() for name in ("index.parquet", "ledger.parquet", "dataset.json")}
    finish_shard_set(folder, index, list(plans), SETTINGS, "x")
    assert {name: (folder / name).read_bytes() for name in before} == before
    info = read_dataset_info(folder)
    for name, facts in info.files.items():
        assert facts.sha256 == sha256_file(folder / name)
        assert facts.bytes == (folder / name).stat().st_size
    assert sorted(info.files) == ["index.parquet", "ledger.parquet"]
    assert list(info.shards) == sorted(plans.names)


def test_what_killed_writers_left_is_removed(index: VideoIndex, plans: ShardPlans, folder: Path) -> None:
    (folder / ".tmp-12345678-train-000001.tar").write_bytes(b"half")
    (folder / ".tmp-12345678-index.parquet").write_bytes(b"half")
    finish_shard_set(folder, index, plans, SETTINGS, "x")
    assert not list(folder.glob(".tmp-*"))


def test_a_damaged_sidecar_is_removed_so_that_it_is_written_again(index: VideoIndex, plans: ShardPlans, folder: Path) -> None:
    file = folder / plans[2].sidecar_name
    data = bytearray(file.read_bytes())
    data[30] ^= 1  # a page, and not the footer, which is all that a resumed run looks at
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"is no readable shard sidecar: .*; run the shards stage again"):
        finish_shard_set(folder, index, plans, SETTINGS, "x")
    assert not file.exists()
    assert not (folder / "ledger.parquet").exists()
    assert not list(folder.glob(".tmp-*"))
    write_shard(plans[2], Numbered(), folder, SETTINGS)
    assert finish_shard_set(folder, index, plans, SETTINGS, "x")["videos"] == 60


def test_a_sidecar_of_other_videos_is_refused(index: VideoIndex, plans: ShardPlans, folder: Path) -> None:
    (folder / plans[5].sidecar_name).write_bytes((folder / plans[6].sidecar_name).read_bytes())
    with pytest.raises(PipelineError, match=r"does not list the videos that belong into train-.*; it was removed; run"):
        finish_shard_set(folder, index, plans, SETTINGS, "x")
    assert not (folder / plans[5].sidecar_name).exists()


def test_a_plan_that_leaves_videos_out_is_refused(index: VideoIndex, plans: ShardPlans, folder: Path) -> None:
    message = rf"account for {60 - plans.num_videos_of(0)} videos, the index lists 60, .* \(missing: \['"
    with pytest.raises(PipelineError, match=message):
        finish_shard_set(folder, index, plans[1:], SETTINGS, "x")
    assert not (folder / "dataset.json").exists()


def test_too_many_rejected_leave_a_ledger_and_no_set(index: VideoIndex, plans: ShardPlans, folder: Path) -> None:
    strict = SETTINGS.model_copy(update={"max_bad_fraction": 0.1})
    with pytest.raises(PipelineError, match=r"12 of 60 videos \(20\.0%\) cannot be used: 6 damaged, 6 gap; .* All are in "):
        finish_shard_set(folder, index, plans, strict, "x")
    assert pq.read_table(folder / "ledger.parquet").num_rows == 60
    assert not (folder / "index.parquet").exists()
    assert not (folder / "dataset.json").exists()


def test_the_limit_is_on_the_fraction_and_the_top_reasons_are_told() -> None:
    reasons = {"a": 1, "b": 7, "c": 2, "d": 4, "e": 3, "f": 3}
    require_few_rejected(40, reasons, SETTINGS, [])
    with pytest.raises(PipelineError, match=r"^20 of 39 videos \(51\.3%\) cannot be used: 7 b, 4 d, 3 e, 3 f, 2 c; expected"):
        require_few_rejected(39, reasons, SETTINGS, [])


def test_examples_are_cut_short() -> None:
    rows = pa.table(
        {
            "video_id": ["a", "b", "c"],
            "status": ["rejected", "kept", "rejected"],
            "reason": ["gap", "", "gap"],
            "detail": ["x" * 500] * 3,
        }
    )
    assert rejected_examples(rows, 5) == [f"a (gap: {'x' * 100})", f"c (gap: {'x' * 100})"]
    assert len(rejected_examples(rows, 1)) == 1
    assert rejected_examples(rows, 0) == []
