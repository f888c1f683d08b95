"""Shards: the plan is a pure function, a tar is whole or absent, its bytes repeat, and nothing damaged passes unseen."""

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import DataError, PipelineError
from preprocessing import sources
from preprocessing.datasets import VIDEO_SCHEMA
from preprocessing.decode import ffmpeg_path
from preprocessing.planning import ShardPlan, plan_shards
from preprocessing.shards import SIDECAR_SCHEMA, ShardSettings, read_sidecar, write_shard
from preprocessing.sources import FolderSource
from preprocessing.tars import read_tar, tar_header

SETTINGS = ShardSettings(videos_per_shard=4, timeout_seconds=30)


def videos_table(ids: list[str], split: str = "train", kind: str = "frames") -> pa.Table:
    rows = [
        {"video_id": video_id, "path": f"raw/{video_id}", "kind": kind, "split": split, "label": number % 3}
        for number, video_id in enumerate(ids)
    ]
    return pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA)


def make_frames(root: Path, ids: list[str], num_frames: int = 3) -> None:
    """Frame folders of 24 x 32 pixels."""
    for number, video_id in enumerate(ids):
        folder = root / "raw" / video_id
        folder.mkdir(parents=True)
        for index in range(num_frames + number % 2):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            (folder / f"{index + 1:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=80))


def make_shard(tmp_path: Path, ids: list[str]) -> tuple[ShardPlan, Path, Path]:
    """A plan with one shard for `ids`, its root and an empty output folder."""
    plans = plan_shards(videos_table(ids), videos_per_shard=256, seed=0)
    output_dir = tmp_path / "shards"
    output_dir.mkdir()
    assert len(plans) == 1
    return plans[0], tmp_path, output_dir


def test_shard_holds_the_untouched_frames_where_the_sidecar_says(tmp_path: Path) -> None:
    ids = ["-1", "2", "3"]
    make_frames(tmp_path, ids)
    plan, root, output_dir = make_shard(tmp_path, ids)
    report = write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    table, commit = read_sidecar(output_dir, plan.sidecar_name)
    tar = (output_dir / plan.name).read_bytes()
    assert table.schema.equals(SIDECAR_SCHEMA)
    assert (report.num_kept, report.num_rejected, report.num_frames, report.skipped) == (3, 0, 10, False)
    assert report.sha256 == commit.tar_sha256 == hashlib.sha256(tar).hexdigest()
    assert report.num_bytes == commit.tar_bytes == len(tar)
    for row, video in zip(table.to_pylist(), plan.videos, strict=True):
        raw = sorted((root / video.path).iterdir())
        places = zip(row["frame_offsets"], row["frame_sizes"], strict=True)
        assert [tar[offset : offset + size] for offset, size in places] == [file.read_bytes() for file in raw]
        assert (row["video_id"], row["key"], row["label"]) == (video.video_id, video.key, video.label)
        assert (row["num_frames"], row["height"], row["width"], row["fps"]) == (len(raw), 24, 32, None)
        assert row["num_bytes"] == sum(file.stat().st_size for file in raw)
    assert sorted(path.name for path in output_dir.iterdir()) == ["train-000000.parquet", "train-000000.tar"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # stock webdataset leaves its files to the garbage collector
def test_stock_webdataset_and_gnu_tar_read_it(tmp_path: Path) -> None:
    ids = ["a", "-b", "c"]
    make_frames(tmp_path, ids)
    plan, root, output_dir = make_shard(tmp_path, ids)
    write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    path = output_dir / plan.name
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [video.key for video in plan.videos]
    for sample, video in zip(samples, plan.videos, strict=True):
        frames = [sample[name] for name in sorted(sample) if name.endswith("jpg")]
        assert frames == [file.read_bytes() for file in sorted((root / video.path).iterdir())]
        facts = {"video_id": video.video_id, "split": "train", "label": video.label, "num_frames": len(frames)}
        assert json.loads(sample["json"]) == facts | {"fps": None, "height": 24, "width": 32}
    listed = subprocess.run(["tar", "-tvf", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    members = read_tar(path)
    assert [line.split()[-1] for line in listed] == [member.name for member in members]
    assert {tuple(line.split()[:2]) for line in listed} == {("-r--r--r--", "sagsm/sagsm")}


def test_broken_videos_get_a_row_and_no_sample(tmp_path: Path) -> None:
    ids = ["good", "gap", "none"]
    make_frames(tmp_path, ids)
    (tmp_path / "raw/gap/00002.jpg").unlink()
    shutil.rmtree(tmp_path / "raw/none")
    plan, root, output_dir = make_shard(tmp_path, ids)
    report = write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    rows = {row["video_id"]: row for row in read_sidecar(output_dir, plan.sidecar_name)[0].to_pylist()}
    assert (report.num_kept, report.num_rejected) == (1, 2)
    assert {key: (row["status"], row["reason"]) for key, row in rows.items()} == {
        "good": ("kept", ""),
        "gap": ("rejected", "gap"),
        "none": ("rejected", "missing"),
    }
    assert rows["gap"]["detail"].startswith("frame 2 is missing")
    assert (rows["gap"]["num_frames"], rows["gap"]["frame_offsets"], rows["gap"]["height"]) == (0, None, None)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_shard_of_rejected_videos_only_is_a_tar_without_members(tmp_path: Path) -> None:
    plan, root, output_dir = make_shard(tmp_path, ["x", "y"])
    report = write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    path = output_dir / plan.name
    assert (report.num_kept, report.num_rejected, read_tar(path)) == (0, 2, [])
    assert list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)) == []
    assert subprocess.run(["tar", "-tf", str(path)], capture_output=True, check=True).stdout == b""
    assert write_shard(plan, FolderSource(root), output_dir, SETTINGS).skipped


def test_complete_shard_is_kept_and_any_other_is_written_again(tmp_path: Path) -> None:
    ids = ["a", "b"]
    make_frames(tmp_path, ids)
    plan, root, output_dir = make_shard(tmp_path, ids)
    first = write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    tar, sidecar = output_dir / plan.name, output_dir / plan.sidecar_name
    whole = tar.read_bytes()

    assert write_shard(plan, FolderSource(root), output_dir, SETTINGS).skipped
    more_patient = SETTINGS.model_copy(update={"max_bad_fraction": 0.5})
    assert write_shard(plan, FolderSource(root), output_dir, more_patient).skipped
    for damage in (tar.unlink, sidecar.unlink, lambda: sidecar.write_bytes(b"PAR1"), lambda: os.truncate(tar, 600)):
        damage()
        again = write_shard(plan, FolderSource(root), output_dir, SETTINGS)
        assert (again.skipped, again.sha256, tar.read_bytes()) == (False, first.sha256, whole)
    assert not write_shard(plan, FolderSource(root), output_dir, SETTINGS.model_copy(update={"jpeg_quality": 3})).skipped


def test_killed_writer_leaves_nothing_visible_and_the_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    ids = [f"v{number}" for number in range(4)]
    make_frames(tmp_path, ids)
    plan, root, output_dir = make_shard(tmp_path, ids)
    expected = write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    for file in output_dir.iterdir():
        file.unlink()
    # The writer kills itself when it comes to the third video.
    code = f"""
import os, signal
from pathlib import Path
from preprocessing import shards, sources
from preprocessing.planning import PlannedVideo, ShardPlan
from preprocessing.shards import ShardSettings
from preprocessing.sources import FolderSource
count = iter(range(100))
original = sources.read_frame_folder
def read(path, settings):
    if next(count) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path, settings)
sources.read_frame_folder = read
shards.write_shard({plan!r}, FolderSource(Path({str(root)!r})), Path({str(output_dir)!r}), {SETTINGS!r})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert [path.name.startswith(".tmp-") for path in output_dir.iterdir()] == [True]
    again = write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    assert (again.sha256, again.skipped) == (expected.sha256, False)
    assert sorted(path.name for path in output_dir.iterdir()) == ["train-000000.parquet", "train-000000.tar"]


def test_unreadable_video_is_rejected_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, settings: ShardSettings) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))  # a real one never meets the tests' root user

    monkeypatch.setattr(sources, "read_frame_folder", refuse)
    plan, root, output_dir = make_shard(tmp_path, ["a"])
    write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    row = read_sidecar(output_dir, plan.sidecar_name)[0].to_pylist()[0]
    assert (row["status"], row["reason"], row["detail"]) == ("rejected", "unreadable", "Permission denied")


def test_video_files_become_frames(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name in ("-one", "two"):
        source = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=1", "-f", "mp4"]
        subprocess.run([ffmpeg_path(), "-v", "error", *source, f"file:{tmp_path}/raw/{name}"], check=True)
    plan = plan_shards(
        videos_table(["-one", "two"], kind="video"), videos_per_shard=SETTINGS.videos_per_shard, seed=SETTINGS.seed
    )[0]
    output_dir = tmp_path / "shards"
    output_dir.mkdir()
    write_shard(plan, FolderSource(tmp_path), output_dir, SETTINGS.model_copy(update={"short_side": 24}))
    rows = read_sidecar(output_dir, plan.sidecar_name)[0].to_pylist()
    assert [(row["status"], row["num_frames"], row["height"], row["width"], row["fps"]) for row in rows] == [
        ("kept", 10, 24, 32, 10.0)
    ] * 2


def test_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    ids = ["a", "b"]
    make_frames(tmp_path, ids, num_frames=60)
    plan, root, output_dir = make_shard(tmp_path, ids)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(output_dir)], check=False).returncode != 0:
        pytest.skip("this machine does not allow a tmpfs mount")
    try:
        with pytest.raises(
            PipelineError, match=r"no space left for shard train-000000\.tar in .*; free some space and run again"
        ):
            write_shard(plan, FolderSource(root), output_dir, SETTINGS)
        assert list(output_dir.iterdir()) == []
    finally:
        subprocess.run(["umount", str(output_dir)], check=True)


def test_file_size_limit_is_told_as_no_space(tmp_path: Path) -> None:
    ids = ["a"]
    make_frames(tmp_path, ids, num_frames=60)
    plan, root, output_dir = make_shard(tmp_path, ids)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(PipelineError, match="no space left for shard"):
            write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(output_dir.iterdir()) == []


@pytest.fixture(scope="module")
def small_tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tmp_path = tmp_path_factory.mktemp("small")
    make_frames(tmp_path, ["a", "b"], num_frames=2)
    plan, root, output_dir = make_shard(tmp_path, ["a", "b"])
    write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    return (output_dir / plan.name).read_bytes()


def listing(path: Path, data: bytes) -> list[tuple[str, int, int]]:
    path.write_bytes(data)
    return [(member.name, member.offset, member.size) for member in read_tar(path)]


def test_tar_reader_agrees_with_the_standard_library(small_tar: bytes, tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(small_tar)) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar.getmembers()]
    assert listing(tmp_path / "x.tar", small_tar) == expected


@settings(max_examples=150)
@given(st.data())
def test_tar_reader_sees_every_flipped_bit_outside_the_data(
    small_tar: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.tar"
    inside = {byte for _, offset, size in listing(path, small_tar) for byte in range(offset, offset + size)}
    outside = sorted(set(range(len(small_tar))) - inside)
    byte = data.draw(st.sampled_from(outside))
    flipped = bytearray(small_tar)
    flipped[byte] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DataError, match="write it again"):
        listing(path, bytes(flipped))


@settings(max_examples=100)
@given(st.data())
def test_tar_reader_sees_every_cut(small_tar: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    # F1: the standard library takes a cut at a member's border for the end, and says nothing.
    path = tmp_path_factory.getbasetemp() / "cut.tar"
    last = listing(path, small_tar)[-1]
    end = last[1] + last[2] + -last[2] % 512
    cut = data.draw(st.one_of(st.integers(0, end), st.integers(0, end // 512).map(lambda block: block * 512)))
    with pytest.raises(DataError, match="write it again"):
        listing(path, small_tar[:cut])


def test_tar_reader_refuses_links_and_foreign_names(tmp_path: Path) -> None:
    for name, kind in {"a.json": tarfile.SYMTYPE, "../a.json": tarfile.REGTYPE, "a.pyd": tarfile.REGTYPE}.items():
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.uname, info.gname = kind, 0o444, "sagsm", "sagsm"
        with pytest.raises(DataError, match="no valid member header at byte 0"):
            listing(tmp_path / "x.tar", info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))


@given(st.from_regex(r"[A-Za-z0-9_-]{1,80}\.json", fullmatch=True), st.integers(0, 8**11 - 1))
def test_tar_headers_are_those_of_the_standard_library(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, "sagsm", "sagsm"
    assert tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_header_with_a_negative_size_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_header("a.json", -512) + bytes(1024))
    with pytest.raises(DataError, match="no valid member header at byte 0"):
        read_tar(tmp_path / "x.tar")
