import dataclasses
import pickle
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pyarrow as pa
import pytest
import simplejpeg

from infra.errors import DataError
from infra.filesystems import Folder
from preprocessing import reader
from preprocessing.loader import make_loader
from preprocessing.planning import PlannedVideo, ShardPlan, sample_key
from preprocessing.reader import FrameReader, StoredVideo, open_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.verify import verify_shards


def pixels_of(height, width):
    """Smooth, so that JPEG keeps it nearly."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([255 * rows / height, 255 * columns / width, np.full((height, width), 90.0)], axis=-1).astype(np.uint8)


def stored(folder, data, height, width):
    """A "shard" that holds nothing but one frame, and its index row."""
    (folder / "one.tar").write_bytes(data)
    crc32 = zlib.crc32(data)
    return StoredVideo(
        key="somebody",
        shard="one.tar",
        label=0,
        height=height,
        width=width,
        sample_offset=0,
        sample_bytes=len(data),
        sample_crc32=crc32,
        frame_offsets=np.array([0]),
        frame_sizes=np.array([len(data)], np.int32),
        frame_crc32=np.array([crc32], np.uint32),
    )


def test_a_split_tells_what_it_holds(tiny_shard_dir):
    split = open_shards(str(tiny_shard_dir), "train")
    assert len(split) == 23
    assert sorted(key[:3] for key in split.keys) == [f"v{video:02d}" for video in range(23)]
    assert split.labels == [int(key[1:3]) % 4 for key in split.keys]
    assert split.label_names == ["moving left", "moving right", "moving up", "turning left"]
    assert len(split.label_passport) == 16
    assert open_shards(tiny_shard_dir, "test").labels == [-1] * 5


def test_every_frame_of_every_video_is_where_the_index_says(tiny_shard_dir):
    split = open_shards(tiny_shard_dir, "train")
    frames = FrameReader(tiny_shard_dir)
    for row in range(len(split)):
        video = split.video(row)
        number = int(video.key[1:3])
        assert len(video.frame_offsets) == len(video.frame_sizes) == 3 + number % 10
        for frame_index in range(len(video.frame_sizes)):
            frame = frames.read(video, frame_index).astype(int)
            assert frame.shape == (video.height, video.width, 3) == (20, 28, 3)
            assert np.abs(frame[..., 1:] - (8 * number, 20 * frame_index)).max() <= 3


def test_reading_in_many_threads_with_few_open_shards(tiny_shard_dir, monkeypatch):
    monkeypatch.setattr(reader, "_MAX_OPEN_SHARDS", 1)
    split = open_shards(tiny_shard_dir, "train")
    rows = np.random.default_rng(0).integers(len(split), size=400).tolist()
    alone = {row: FrameReader(tiny_shard_dir).read(split.video(row), 2) for row in set(rows)}
    num_open = psutil.Process().num_fds()
    frames = FrameReader(tiny_shard_dir)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda row: frames.read(split.video(row), 2), rows))
    assert all(np.array_equal(frame, alone[row]) for row, frame in zip(rows, read, strict=True))
    assert psutil.Process().num_fds() <= num_open + 1


@pytest.mark.parametrize(
    ("smallest_size", "decoded_size"),
    [((0, 0), (256, 340)), ((256, 340), (256, 340)), ((129, 100), (256, 340)), ((128, 170), (128, 170)), ((60, 64), (64, 85))],
)
def test_frames_are_decoded_smaller_if_half_the_size_will_do(tmp_path, smallest_size, decoded_size):
    video = stored(tmp_path, simplejpeg.encode_jpeg(pixels_of(256, 340), quality=95), 256, 340)
    frame = FrameReader(tmp_path).read(video, 0, smallest_size)
    assert frame.shape[:2] == decoded_size
    assert np.abs(frame.astype(int) - pixels_of(*decoded_size)).mean() < 3.0


def test_gray_frames_become_rgb(tmp_path):
    data = simplejpeg.encode_jpeg(np.full((16, 16, 1), 77, np.uint8), colorspace="GRAY")
    assert (FrameReader(tmp_path).read(stored(tmp_path, data, 16, 16), 0) == 77).all()


JPEG = simplejpeg.encode_jpeg(pixels_of(48, 64))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GIF8" + JPEG[4:], "found bytes that begin with b'GIF8', expected a JPEG"),
        (b"", "found bytes that begin with b'', expected a JPEG"),
        (JPEG[:200], ".+"),
        (JPEG[: len(JPEG) // 2], ".+"),
        (JPEG[:100] + bytes(len(JPEG) - 100), ".+"),
        (simplejpeg.encode_jpeg(pixels_of(64, 48)), "found 48 x 64 pixels, the index says 64 x 48"),
    ],
    ids=["not a JPEG", "empty", "header cut", "half", "zeros", "other size"],
)
def test_a_broken_frame_is_named_with_its_video_and_shard(tmp_path, data, reason):
    video = stored(tmp_path, data, 48, 64)
    expected = rf"frame 0 of video somebody in {tmp_path}/one.tar cannot be read: {reason}; list all that is broken with `sagsm"
    with pytest.raises(DataError, match=expected) as caught:
        FrameReader(tmp_path).read(video, 0)
    assert isinstance(caught.value.__cause__, ValueError)


def test_frames_that_changed_are_not_decoded(tmp_path, monkeypatch):
    video = stored(tmp_path, JPEG, 48, 64)
    (tmp_path / "one.tar").write_bytes(JPEG[:-3] + b"\0" + JPEG[-2:])
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(
        DataError, match=r"frame 0 of video somebody in .*one\.tar cannot .*: found bytes with checksum [0-9a-f]{8}, "
    ):
        FrameReader(tmp_path).read(video, 0)


def test_whole_samples_are_read_and_checked(tiny_shard_dir, tmp_path):
    shutil.copytree(tiny_shard_dir, tmp_path, dirs_exist_ok=True)
    split = open_shards(tmp_path, "train")
    video = split.video(3)
    frames = FrameReader(split).read_sample(video)
    data = (tmp_path / video.shard).read_bytes()
    assert frames == [data[o:][:s] for o, s in zip(video.frame_offsets, video.frame_sizes, strict=True)]
    for place, what in ((video.sample_offset, "the sample"), (int(video.frame_offsets[2]) + 5, "frame 2")):
        changed = bytearray(data)
        changed[place] ^= 16
        (tmp_path / video.shard).write_bytes(changed)
        with pytest.raises(
            DataError, match=rf"^{what} of video {video.key} in .*{video.shard} cannot be read: found bytes with"
        ):
            FrameReader(split).read_sample(video)
    outside = dataclasses.replace(video, frame_offsets=video.frame_offsets - 10_000)
    with pytest.raises(DataError, match="the index says that a frame lies outside"):
        FrameReader(split).read_sample(outside)


def test_a_shard_that_is_replaced_after_opening_is_an_error(tiny_shard_dir, tmp_path):
    shutil.copytree(tiny_shard_dir, tmp_path, dirs_exist_ok=True)
    split = open_shards(tmp_path, "train")
    video = split.video(0)
    path = tmp_path / video.shard
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(DataError, match=rf"the end in {path} cannot .* not zero, the first at byte {len(data) - 1}; list all"):
        FrameReader(split).read(video, 0)
    assert FrameReader(tmp_path).read(video, 0).shape == (20, 28, 3), "how a shard ends is known of a split only"
    path.write_bytes(data[:-512])
    with pytest.raises(DataError, match=rf"shard {path} has {len(data) - 512} bytes, dataset\.json says {len(data)}; run"):
        FrameReader(split).read(video, 0)


def test_an_index_with_holes_is_refused(tiny_shard_dir, monkeypatch):
    table = reader.read_index(tiny_shard_dir, "train", reader._COLUMNS)
    for name, values in (("width", [None] * 23), ("frame_crc32", [[1, None]] * 23)):
        column = pa.array(values, table.schema.field(name).type)
        holed = table.set_column(table.schema.get_field_index(name), name, column)
        monkeypatch.setattr(reader, "read_index", lambda *_, holed=holed: holed)
        with pytest.raises(
            DataError, match=rf"index\.parquet has rows without {name} in split train; run the shards stage again"
        ):
            open_shards(tiny_shard_dir, "train")


def test_a_video_is_what_its_row_of_the_index_says(tiny_shard_dir):
    split = open_shards(tiny_shard_dir, "test")
    for number, row in enumerate(split.table.to_pylist()):
        video = dataclasses.asdict(split.video(number))
        assert {name: value.tolist() if name.startswith("frame_") else value for name, value in video.items()} == row | {
            "label": -1
        }


def test_a_split_can_be_pickled(tiny_shard_dir):
    split = open_shards(tiny_shard_dir, "train")
    size = len(pickle.dumps(split))
    split.video(0)
    assert len(pickle.dumps(split)) == size, "what is cached does not travel"
    copy = pickle.loads(pickle.dumps(split))
    assert (copy.path, copy.keys, copy.ends) == (split.path, split.keys, split.ends)
    assert (FrameReader(copy).read(copy.video(4), 1) == FrameReader(split).read(split.video(4), 1)).all()


def test_a_remote_shard_set_is_like_a_local_one(tiny_shard_dir, s3_url, monkeypatch):
    remote = Folder(s3_url) / "some/set"
    for path in tiny_shard_dir.iterdir():
        remote.write_bytes(path.name, path.read_bytes())
    here, there = open_shards(tiny_shard_dir, "train"), open_shards(str(remote), "train")
    assert there.path == f"{s3_url}/some/set"
    assert there.table.equals(here.table)
    there = pickle.loads(pickle.dumps(there))
    near, far = FrameReader(here), FrameReader(there)
    assert far.read_sample(there.video(5)) == near.read_sample(here.video(5))
    options = {"num_segments": 3, "batch_size": 8, "train": True, "seed": 1, "pixels": 16, "num_workers": 4}
    for ours, theirs in zip(make_loader(here, **options), make_loader(there, **options), strict=True):
        assert ours.keys == theirs.keys
        assert bool((ours.clips == theirs.clips).all())
    assert verify_shards(remote) == []

    shard = there.video(0).shard
    data = bytearray(remote.read_bytes(shard))
    data[there.video(0).sample_offset + 20] ^= 1
    remote.write_bytes(shard, data)
    with pytest.raises(DataError, match=rf"the sample of video {there.video(0).key} in {remote}/{shard} cannot be read"):
        FrameReader(there).read_sample(there.video(0))
    assert [(problem.shard, problem.key) for problem in verify_shards(str(remote))] == [
        (shard, ""),
        (shard, there.video(0).key),
        (shard, there.video(0).key),
    ]
    remote.delete(shard)
    with pytest.raises(DataError, match=rf"shard {remote}/{shard} is missing"):
        open_shards(remote, "train")


def test_shards_are_written_to_a_bucket_and_from_one(s3_url, tmp_path):
    for number in range(3):
        (tmp_path / f"raw/v{number}").mkdir(parents=True)
        for frame in (1, 2):
            data = simplejpeg.encode_jpeg(np.full((16, 24, 3), 40 * number + frame, np.uint8))
            (tmp_path / f"raw/v{number}/{frame:05d}.jpg").write_bytes(data)
    videos = tuple(PlannedVideo(f"v{number}", sample_key(f"v{number}"), f"raw/v{number}", "frames", 0) for number in range(3))
    plan, remote = ShardPlan("train-000000.tar", "train", videos), Folder(f"{s3_url}/written")
    there = write_shard(plan, FolderSource(tmp_path), remote, ShardSettings())
    (tmp_path / "shards").mkdir()
    here = write_shard(plan, FolderSource(tmp_path), tmp_path / "shards", ShardSettings())
    assert (there.num_kept, there.sha256) == (3, here.sha256)
    assert remote.read_bytes(plan.name) == (tmp_path / "shards" / plan.name).read_bytes()
    assert sorted(remote.list()) == ["train-000000.parquet", "train-000000.tar"]
    assert write_shard(plan, FolderSource(tmp_path), remote, ShardSettings()).skipped


def test_a_shard_that_vanishes_or_shrinks_after_opening_is_an_error(tmp_path):
    video = stored(tmp_path, JPEG, 48, 64)
    (tmp_path / "one.tar").write_bytes(JPEG[:-7])
    with pytest.raises(DataError, match=rf"found a file of {len(JPEG) - 7} bytes, expected {len(JPEG)} bytes at byte 0"):
        FrameReader(tmp_path).read(video, 0)
    (tmp_path / "one.tar").unlink()
    with pytest.raises(DataError, match="No such file or directory"):
        FrameReader(tmp_path).read(video, 0)


def test_opening_names_the_shard_that_is_missing_or_cut(tiny_shard_dir, tmp_path):
    shutil.copytree(tiny_shard_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / open_shards(tmp_path, "train").video(0).shard
    num_bytes = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-512])
    expected = rf"{path} has {num_bytes - 512} bytes, dataset.json says {num_bytes}; run the shards stage again"
    with pytest.raises(DataError, match=expected):
        open_shards(tmp_path, "train")
    path.unlink()
    with pytest.raises(DataError, match=rf"shard {path} is missing; .* run the shards stage again"):
        open_shards(tmp_path, "train")
    assert len(open_shards(tmp_path, "test")) == 5, "a split is not hurt by another one's shard"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.model_copy(update={"shards": {}}), r"names shard \S+\.tar, dataset.json does not; run"),
        (lambda info: info.model_copy(update={"label_names": ["one"]}), "has label 3 in split train, but dataset.json names 1"),
    ],
)
def test_an_index_of_another_set_is_an_error(tiny_shard_dir, monkeypatch, change, message):
    info = change(reader.read_dataset_info(tiny_shard_dir))
    monkeypatch.setattr(reader, "read_dataset_info", lambda path: info)
    with pytest.raises(DataError, match=message):
        open_shards(tiny_shard_dir, "train")


def test_an_unknown_split_names_those_there_are(tiny_shard_dir):
    with pytest.raises(DataError, match="no sample of split 'validation'; it has test, train"):
        open_shards(tiny_shard_dir, "validation")


def test_remote_frames_that_are_near_each_other_come_by_one_request(tiny_shard_dir, s3_url, s3_reads, monkeypatch):
    remote = Folder(f"{s3_url}/ranges")
    for path in tiny_shard_dir.iterdir():
        remote.write_bytes(path.name, path.read_bytes())
    split = open_shards(remote, "train")
    video = max(map(split.video, range(len(split))), key=lambda video: len(video.frame_sizes))
    indices = [0, 3, 4, 9, len(video.frame_sizes) - 1]
    expected = FrameReader(tiny_shard_dir).read_frames(video, indices)
    for max_gap, num_requests in ((512 << 10, 1), (1024, 4), (0, 5)):
        monkeypatch.setattr(reader, "_MAX_GAP_BYTES", max_gap)
        frames = FrameReader(split)
        frames.read(video, 1)  # the shard is open and its end is checked
        before = s3_reads(video.shard)
        found = frames.read_frames(video, indices)
        assert s3_reads(video.shard) - before == num_requests
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_damaged_frame_inside_a_range_is_named(tiny_shard_dir, s3_url):
    remote = Folder(f"{s3_url}/range")
    for path in tiny_shard_dir.iterdir():
        remote.write_bytes(path.name, path.read_bytes())
    split = open_shards(remote, "train")
    video = split.video(1)
    data = bytearray(remote.read_bytes(video.shard))
    data[int(video.frame_offsets[2]) + 3] ^= 1
    remote.write_bytes(video.shard, data)
    FrameReader(split).read_frames(video, [0, 1])
    with pytest.raises(DataError, match=rf"frame 2 of video {video.key} in {remote}/{video.shard} cannot be read: .*checksum"):
        FrameReader(split).read_frames(video, [0, 1, 2])
