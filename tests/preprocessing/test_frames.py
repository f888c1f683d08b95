"""Numbered JPEG files: their bytes pass through, in order; a folder with a gap, a link or a damaged file is rejected."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from infra.filesystems import Folder
from preprocessing.decode import DecodeSettings, VideoRejectedError
from preprocessing.frames import frames_from_files, read_frame_folder
from preprocessing.planning import PlannedVideo, sample_key
from preprocessing.sources import FolderSource

SETTINGS = DecodeSettings()


def make_jpeg(seed: int = 0, height: int = 24, width: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=80))


def make_folder(path: Path, names: list[str]) -> Path:
    path.mkdir()
    for seed, name in enumerate(names):
        (path / name).write_bytes(make_jpeg(seed))
    return path


def rejected(path: Path, settings: DecodeSettings = SETTINGS) -> VideoRejectedError:
    with pytest.raises(VideoRejectedError) as caught:
        read_frame_folder(path, settings)
    return caught.value


def planned(path: str, kind: str = "frames", start: float | None = None) -> PlannedVideo:
    return PlannedVideo(path, sample_key(path), path, kind, 0, start)


def test_frame_folder_passes_bytes_through_in_numeric_order(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "7", ["2.jpg", "1.jpg", "10.JPG", *(f"{n}.jpeg" for n in range(3, 10))])
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "Thumbs.db").write_bytes(b"x")
    video = read_frame_folder(folder, SETTINGS)
    names = ["1.jpg", "2.jpg", *(f"{n}.jpeg" for n in range(3, 10)), "10.JPG"]
    assert video.frames == [(folder / name).read_bytes() for name in names]
    assert (video.height, video.width, video.fps) == (24, 32, None)


@pytest.mark.parametrize(
    ("names", "reason", "detail"),
    [
        ([], "no_frames", "holds no JPEG"),
        (["00001.jpg", "00003.jpg"], "gap", "frame 2 is missing; found 2 from 1 to 3"),
        (["00005.jpg"], "gap", "frame 1 is missing"),
        (["00001.jpg", "999999999999.jpg"], "gap", "frame 2 is missing"),
        (["1.jpg", "00001.jpg"], "odd_file", "have the same number"),
        (["00001.jpg", "cover.jpg"], "odd_file", "'cover.jpg' is no numbered JPEG"),
    ],
)
def test_frame_folder_with_wrong_names_is_rejected(tmp_path: Path, names: list[str], reason: str, detail: str) -> None:
    error = rejected(make_folder(tmp_path / "7", names))
    assert error.reason == reason
    assert detail in error.detail


def test_frame_folder_with_bad_content_is_rejected(tmp_path: Path) -> None:
    cut = make_folder(tmp_path / "cut", ["1.jpg", "2.jpg"])
    (cut / "2.jpg").write_bytes(make_jpeg()[:-30])
    assert (rejected(cut).reason, rejected(cut).detail[:6]) == ("not_jpeg", "2.jpg:")
    sizes = make_folder(tmp_path / "sizes", ["1.jpg", "2.jpg"])
    (sizes / "2.jpg").write_bytes(make_jpeg(height=25))
    assert rejected(sizes).reason == "size_changes"
    link = make_folder(tmp_path / "link", ["1.jpg"])
    (link / "2.jpg").symlink_to("/etc/passwd")
    assert rejected(link).reason == "odd_file"
    with pytest.raises(VideoRejectedError, match="missing"):
        read_frame_folder(tmp_path / "none", SETTINGS)


@given(st.permutations(range(1, 13)), st.integers(1, 15))
def test_order_of_files_does_not_matter_and_a_budget_reads_only_its_frames(order: list[int], max_frames: int) -> None:
    read: list[int] = []

    def reader(number: int) -> Callable[[], bytes]:
        def give() -> bytes:
            read.append(number)
            return make_jpeg(number)

        return give

    files = [(f"{number:05d}.jpg", reader(number)) for number in order]
    video = frames_from_files([*files, ("readme.txt", reader(99))], DecodeSettings(max_frames=max_frames))
    kept = min(12, max_frames)
    expected = [1 + int((index + 0.5) * 12 / kept) for index in range(kept)]
    assert read == expected
    assert video.frames == [make_jpeg(number) for number in expected]


def test_larger_frames_are_scaled_and_smaller_ones_pass_through(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "7", ["1.jpg", "2.jpg"])
    assert read_frame_folder(folder, DecodeSettings(short_side=24)) == read_frame_folder(folder, SETTINGS)
    small = read_frame_folder(folder, DecodeSettings(short_side=16))
    assert (small.height, small.width, len(small.frames)) == (16, 21, 2)
    assert small == read_frame_folder(folder, DecodeSettings(short_side=16))
    assert [simplejpeg.decode_jpeg(frame).shape for frame in small.frames] == [(16, 21, 3)] * 2
    assert small.source_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_too_many_bytes_are_rejected_before_they_are_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "7", ["1.jpg"])
    with (folder / "1.jpg").open("wb") as file:
        file.truncate(1 << 40)
    assert rejected(folder).reason == "too_large"
    (folder / "1.jpg").write_bytes(make_jpeg(0, 160, 160))
    (folder / "2.jpg").write_bytes(make_jpeg(0, 160, 160))
    (folder / "3.jpg").write_bytes(make_jpeg(0, 160, 160))
    error = rejected(folder, DecodeSettings(max_video_bytes=1 << 16))
    assert (error.reason, "shards.max_video_bytes" in error.detail) == ("too_large", True)


def test_source_takes_nothing_outside_its_folder_and_no_times_of_frames(tmp_path: Path) -> None:
    make_folder(tmp_path / "secret", ["1.jpg"])
    inside = make_folder(tmp_path / "data", [])
    make_folder(inside / "7", ["1.jpg"])
    source = FolderSource(Folder(inside))
    assert len(source.read(planned("7"), "train-000000.tar", SETTINGS).frames) == 1
    for path, reason in {
        "../secret": "odd_file",
        str(tmp_path / "secret"): "odd_file",
        "none": "missing",
        "x" * 300: "missing",
    }.items():
        for kind in ("frames", "video"):
            with pytest.raises(VideoRejectedError) as caught:
                source.read(planned(path, kind), "train-000000.tar", SETTINGS)
            assert caught.value.reason == reason, (path, kind)
    with pytest.raises(VideoRejectedError, match="no_times"):
        source.read(planned("7", start=1.0), "train-000000.tar", SETTINGS)


def test_a_folder_that_is_a_link_to_itself_is_rejected(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(VideoRejectedError) as found:
        read_frame_folder(tmp_path / "loop", DecodeSettings())
    assert found.value.reason == "missing"
