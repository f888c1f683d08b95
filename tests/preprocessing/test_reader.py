import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import simplejpeg

from infra.errors import DataError
from preprocessing import reader
from preprocessing.reader import FrameReader, StoredVideo, open_shards


def pixels_of(height, width):
    """Smooth, so that JPEG keeps it nearly."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([255 * rows / height, 255 * columns / width, np.full((height, width), 90.0)], axis=-1).astype(np.uint8)


def stored(folder, data, height, width):
    """A "shard" that holds nothing but one frame, and its index row."""
    (folder / "one.tar").write_bytes(data)
    return StoredVideo("somebody", "one.tar", 0, height, width, np.array([0]), np.array([len(data)], np.int32))


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


def test_a_shard_that_vanishes_or_shrinks_after_opening_is_an_error(tmp_path):
    video = stored(tmp_path, JPEG, 48, 64)
    (tmp_path / "one.tar").write_bytes(JPEG[:-7])
    with pytest.raises(DataError, match=rf"found {len(JPEG) - 7} bytes at byte 0, the index says {len(JPEG)}"):
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
