"""Healing: the new set is what an undisturbed run on good raw data gives; the old one stays; no kept video is ever lost."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import DataError, PipelineError
from infra.filesystems import Folder
from preprocessing import heal
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.finish import finish_shard_set
from preprocessing.heal import heal_shards
from preprocessing.index import dataset_json, read_dataset_info, read_ledger
from preprocessing.planning import ShardPlan, plan_shards
from preprocessing.shards import ShardReport, ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.stats import shard_stats
from preprocessing.verify import verify_shards

SETTINGS = ShardSettings(videos_per_shard=3, max_bad_fraction=1.0)
NUM_VIDEOS = 12
IDS = [f"v{number:02d}" for number in range(NUM_VIDEOS)]


def make_raw(root: Path) -> Path:
    for number, video_id in enumerate(IDS):
        (root / video_id).mkdir(parents=True)
        for index in range(2 + number % 3):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (16, 24, 3), dtype=np.uint8)
            (root / video_id / f"{index + 1:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
    return root


def make_set(root: Path, folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"video_id": name, "path": name, "kind": "frames", "split": "train" if number < 9 else "test", "label": number % 2}
        for number, name in enumerate(IDS)
    ]
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), ["up", "down"])
    plans = plan_shards(index.videos, videos_per_shard=SETTINGS.videos_per_shard, seed=SETTINGS.seed)
    for plan in plans:
        write_shard(plan, FolderSource(root), folder, SETTINGS)
    finish_shard_set(folder, index, plans, SETTINGS, "something_v1")
    return folder


class Writer:
    """Writes in this process, and remembers which shards it was asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []

    def __call__(self, plans: Sequence[ShardPlan], output: Folder, settings: ShardSettings) -> list[ShardReport]:
        self.asked += [plan.name for plan in plans]
        return [write_shard(plan, FolderSource(self.root), output, settings) for plan in plans]


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def books(folder: Path) -> tuple[dict, list[dict]]:
    """dataset.json but for the hash of the ledger, whose seconds differ; and the ledger without them."""
    info = read_dataset_info(folder).model_dump()
    del info["files"]["ledger.parquet"]
    return info, read_ledger(folder).drop_columns(["seconds"]).to_pylist()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def good(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that an undisturbed run makes."""
    return make_set(raw, tmp_path_factory.mktemp("good") / "set")


@pytest.fixture
def broken_raw(raw: Path, tmp_path: Path) -> Path:
    """v03 has a gap, v10 is missing."""
    root = Path(shutil.copytree(raw, tmp_path / "raw"))
    (root / "v03" / "00001.jpg").rename(root / "v03" / "00009.jpg")
    shutil.rmtree(root / "v10")
    return root


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(gone=st.sets(st.sampled_from(IDS), max_size=6), damaged=st.sets(st.integers(0, 3), max_size=2))
def test_healed_set_equals_that_of_an_undisturbed_run(
    raw: Path, good: Path, tmp_path_factory: pytest.TempPathFactory, gone: set[str], damaged: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("heal")
    partial = folder / "raw"
    partial.mkdir()
    for name in set(IDS) - gone:
        (partial / name).symlink_to(raw / name)
    old = make_set(partial, folder / "old")
    names = sorted(tars(old))
    for number in damaged:
        data = bytearray((old / names[number]).read_bytes())
        data[len(data) // 2] ^= 1
        (old / names[number]).write_bytes(data)
    writer = Writer(raw)
    report = heal_shards(old, folder / "new", writer)
    assert books(folder / "new") == books(good)
    assert tars(folder / "new") == tars(good)
    assert verify_shards(folder / "new") == []
    assert {video.video_id for video in report.healed} == gone
    assert (report.rejected, report.changed, report.notes) == ([], [], [])
    by_shard = {row["video_id"]: row["shard"] for row in read_ledger(old).to_pylist()}
    affected = {by_shard[name] for name in gone} | {names[number] for number in damaged}
    assert set(writer.asked) == set(report.rewritten) == affected
    for name in set(names) - affected:
        assert (old / name).samefile(folder / "new" / name)


def test_the_old_set_is_untouched_and_what_is_still_broken_is_told(broken_raw: Path, raw: Path, tmp_path: Path) -> None:
    old = make_set(broken_raw, tmp_path / "old")
    before = content(old)
    shutil.copytree(raw / "v10", broken_raw / "v10")
    report = heal_shards(str(old), str(tmp_path / "new"), Writer(broken_raw))
    assert content(old) == before
    assert [(video.video_id, video.reason) for video in report.healed] == [("v10", "missing")]
    assert [(video.video_id, video.reason) for video in report.rejected] == [("v03", "gap")]
    assert "frame 1 is missing" in report.rejected[0].detail
    assert sorted(report.rewritten.values()) == ["1 rejected", "1 rejected"]
    assert report.counts["by_reason"] == {"gap": 1}


def test_nothing_to_heal_writes_nothing(good: Path, raw: Path, tmp_path: Path) -> None:
    writer = Writer(raw)
    calls: list[tuple[int, int, str]] = []
    report = heal_shards(good, tmp_path / "new", writer, lambda *call: calls.append(call))
    assert (writer.asked, report.rewritten, report.num_shards) == ([], {}, 4)
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert books(tmp_path / "new") == books(good)


def test_interrupted_healing_goes_on(broken_raw: Path, raw: Path, good: Path, tmp_path: Path) -> None:
    old = make_set(broken_raw, tmp_path / "old")

    class KilledError(BaseException):
        pass

    def killed_after_one(plans: Sequence[ShardPlan], output: Folder, settings: ShardSettings) -> list[ShardReport]:
        write_shard(plans[0], FolderSource(raw), output, settings)
        raise KilledError

    with pytest.raises(KilledError):
        heal_shards(old, tmp_path / "new", killed_after_one)
    assert not (tmp_path / "new" / "dataset.json").exists()
    reports: list[ShardReport] = []

    def write(plans: Sequence[ShardPlan], output: Folder, settings: ShardSettings) -> list[ShardReport]:
        reports.extend(Writer(raw)(plans, output, settings))
        return reports

    report = heal_shards(old, tmp_path / "new", write)
    assert [done.skipped for done in reports] == [True, False]
    assert sorted(video.video_id for video in report.healed) == ["v03", "v10"]
    assert tars(tmp_path / "new") == tars(good)


def test_a_video_that_is_repaired_after_the_interruption_is_tried_again(
    broken_raw: Path, raw: Path, good: Path, tmp_path: Path
) -> None:
    old = make_set(broken_raw, tmp_path / "old")

    class KilledError(BaseException):
        pass

    def killed_after_all(plans: Sequence[ShardPlan], output: Folder, settings: ShardSettings) -> list[ShardReport]:
        Writer(broken_raw)(plans, output, settings)
        raise KilledError

    with pytest.raises(KilledError):
        heal_shards(old, tmp_path / "new", killed_after_all)
    report = heal_shards(old, tmp_path / "new", Writer(raw))
    assert sorted(video.video_id for video in report.healed) == ["v03", "v10"]
    assert tars(tmp_path / "new") == tars(good)


def test_a_link_to_a_tar_that_rots_after_the_interruption_is_not_trusted(broken_raw: Path, raw: Path, tmp_path: Path) -> None:
    """Both names are one file on the disk, so the damage is in the new set too."""
    old = make_set(broken_raw, tmp_path / "old")

    def killed(plans: Sequence[ShardPlan], output: Folder, settings: ShardSettings) -> list[ShardReport]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal_shards(old, tmp_path / "new", killed)
    linked = sorted((tmp_path / "new").glob("*.tar"))[0]
    with (old / linked.name).open("r+b") as file:
        file.seek(700)
        file.write(b"rot")
    heal_shards(old, tmp_path / "new", Writer(raw))
    assert verify_shards(tmp_path / "new") == []


def test_the_wrong_root_loses_no_video(broken_raw: Path, raw: Path, good: Path, tmp_path: Path) -> None:
    old = make_set(broken_raw, tmp_path / "old")
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        with pytest.raises(DataError, match=r"^4 videos that the shard set keeps cannot be read .*missing.*--root"):
            heal_shards(old, tmp_path / "new", Writer(tmp_path / "empty"))
        assert not (tmp_path / "new" / "dataset.json").exists()
    heal_shards(old, tmp_path / "new", Writer(raw))
    assert tars(tmp_path / "new") == tars(good)


def test_changed_raw_videos_and_another_ffmpeg_are_told(
    broken_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_set(broken_raw, tmp_path / "old")
    ledger = read_ledger(old).to_pylist()
    shard = next(row["shard"] for row in ledger if row["video_id"] == "v03")
    other = next(row["video_id"] for row in ledger if row["shard"] == shard and row["status"] == "kept")
    shutil.copy(broken_raw / other / "00001.jpg", broken_raw / other / "00002.jpg")
    monkeypatch.setattr(heal, "ffmpeg_version", lambda: "n99")
    report = heal_shards(old, tmp_path / "new", Writer(broken_raw))
    assert report.changed == [other]
    assert len(report.notes) == 2
    assert "the 2 rewritten shards with n99" in report.notes[0]


def test_a_copy_is_made_where_links_are_not_possible(
    good: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    heal_shards(good, tmp_path / "new", Writer(raw))
    assert tars(tmp_path / "new") == tars(good)
    assert not (tmp_path / "new" / "test-000000.tar").samefile(good / "test-000000.tar")


def test_a_finished_output_is_refused(good: Path, raw: Path, tmp_path: Path) -> None:
    for new in (good, Path(shutil.copytree(good, tmp_path / "copy"))):
        before = content(new)
        with pytest.raises(PipelineError, match="is a finished shard set, and such a set is never changed"):
            heal_shards(good, new, Writer(raw))
        assert content(new) == before


def set_info(folder: Path, **changes: object) -> None:
    info = read_dataset_info(folder)
    (folder / "dataset.json").write_bytes(dataset_json(info.model_copy(update=changes)))


def test_sets_that_cannot_be_healed_say_why(good: Path, raw: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(good, tmp_path / "old"))
    writer = Writer(raw)
    (old / "train-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"1 of 4 shards of .* sidecars.*are damaged: train-000001\.tar .*run the shards stage"):
        heal_shards(old, tmp_path / "new", writer)
    shutil.copy(old / "train-000000.parquet", old / "train-000001.parquet")
    with pytest.raises(DataError, match=r"its sidecar belongs to another tar than dataset\.json"):
        heal_shards(old, tmp_path / "new", writer)
    set_info(old, settings={"foreign": True})
    with pytest.raises(DataError, match="indexed from tars made elsewhere, so its raw videos are not known"):
        heal_shards(old, tmp_path / "new", writer)
    set_info(old, settings={"jpeg_quality": 99})
    with pytest.raises(DataError, match=r"settings in .* are not those of this program: jpeg_quality"):
        heal_shards(old, tmp_path / "new", writer)
    with pytest.raises(DataError, match="is no finished shard set"):
        heal_shards(tmp_path, tmp_path / "new", writer)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("path", ["../secret", "/etc"])
def test_a_sidecar_cannot_lead_out_of_the_raw_folder(good: Path, raw: Path, tmp_path: Path, path: str) -> None:
    old = Path(shutil.copytree(good, tmp_path / "old"))
    file = old / "train-000001.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[1]["path"] = path
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file, write_page_checksum=True)
    (old / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=rf"^1 videos .*{rows[1]['video_id']} .*does not lie in the dataset's folder"):
        heal_shards(old, tmp_path / "new", Writer(raw))
    assert not (tmp_path / "new" / "train-000001.tar").exists()


def test_a_set_within_its_limit_stays_within_it(broken_raw: Path, tmp_path: Path) -> None:
    """Two of twelve are rejected, but two of the six in the shards that are written again."""
    old = make_set(broken_raw, tmp_path / "old")
    set_info(old, settings=SETTINGS.model_copy(update={"max_bad_fraction": 0.2}).model_dump(mode="json"))
    limits: list[float] = []

    def write(plans: Sequence[ShardPlan], output: Folder, settings: ShardSettings) -> list[ShardReport]:
        limits.append(settings.max_bad_fraction)
        return Writer(broken_raw)(plans, output, settings)

    report = heal_shards(old, tmp_path / "new", write)
    assert (limits, len(report.rejected)) == ([1.0], 2)
    assert read_dataset_info(tmp_path / "new").settings["max_bad_fraction"] == 0.2


@pytest.mark.slow
def test_a_set_in_an_object_store(broken_raw: Path, raw: Path, good: Path, tmp_path: Path, s3_url: str) -> None:
    """Nothing can be linked there: shards are copied. `stats` reads there, too."""
    local = make_set(broken_raw, tmp_path / "old")
    old, new = Folder(f"{s3_url}/old"), Folder(f"{s3_url}/new")
    for name, data in content(local).items():
        old.write_bytes(name, data)
    old.delete("test-000000.tar")
    report = heal_shards(old.url, new.url, Writer(raw))
    assert sorted(video.video_id for video in report.healed) == ["v03", "v10"]
    assert "missing" in report.rewritten["test-000000.tar"]
    assert {name: new.read_bytes(name) for name in new.list() if name.endswith(".tar")} == tars(good)
    assert verify_shards(new.url) == []
    assert shard_stats(new.url)["splits"] == shard_stats(good)["splits"]
