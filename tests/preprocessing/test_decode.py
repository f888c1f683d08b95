"""Decoding: every real clip gives its frames, every broken one a reason, and no file name or content runs anything."""

import os
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import PipelineError
from preprocessing import decode
from preprocessing.decode import (
    DecodeSettings,
    VideoRejectedError,
    decode_video,
    ffmpeg_path,
    ffmpeg_version,
    read_frame_folder,
    split_jpegs,
)

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
SETTINGS = DecodeSettings(timeout_seconds=25)

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the test videos in ../shared/data are not here")


def make_video(path: Path, *options: str, size: str = "64x48", seconds: float = 1.0, rate: int = 10) -> Path:
    source = f"testsrc=size={size}:rate={rate}:duration={seconds}"
    command = [ffmpeg_path(), "-v", "error", "-y", "-f", "lavfi", "-i", source, *options, f"file:{path}"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def make_jpeg(seed: int = 0, height: int = 24, width: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=80))


def make_folder(path: Path, names: list[str]) -> Path:
    path.mkdir()
    for seed, name in enumerate(names):
        (path / name).write_bytes(make_jpeg(seed))
    return path


def rejected(path: Path, settings: DecodeSettings = SETTINGS) -> VideoRejectedError:
    read = read_frame_folder if path.is_dir() else decode_video
    with pytest.raises(VideoRejectedError) as caught:
        read(path, settings)
    return caught.value


def sources_table(folder: str, column: str) -> dict[str, str]:
    """A column of the table in a SOURCES.md by file name."""
    rows = [line.split("|") for line in (SHARED_DATA / folder / "SOURCES.md").read_text().splitlines() if line.startswith("| ")]
    place = [cell.strip() for cell in rows[0]].index(column)
    return {row[1].strip(): row[place].strip() for row in rows[1:]}


def test_ffmpeg_is_found_and_names_its_version() -> None:
    assert os.access(ffmpeg_path(), os.X_OK)
    assert re.match(r"[nN]?\d", ffmpeg_version())


def test_broken_ffmpeg_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    decode.ffmpeg_path.cache_clear()
    decode.ffmpeg_version.cache_clear()
    try:
        assert ffmpeg_path() == str(program)  # PATH comes first
        with pytest.raises(PipelineError, match=r"does not run: .*exit status 3\..*; install ffmpeg or put a working one"):
            ffmpeg_version()
    finally:
        decode.ffmpeg_path.cache_clear()
        decode.ffmpeg_version.cache_clear()


def test_video_gives_every_frame_and_the_same_bytes_twice(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mp4", "-pix_fmt", "yuv420p", seconds=1.5)
    first = decode_video(path, SETTINGS)
    assert (len(first.frames), first.fps, first.height, first.width, first.detail) == (15, 10.0, 48, 64, "")
    assert decode_video(path, SETTINGS) == first
    for frame in first.frames:
        assert simplejpeg.decode_jpeg(frame).shape == (48, 64, 3)
    assert first.frames[0] != first.frames[-1]


def test_short_side_scales_to_square_pixels(tmp_path: Path) -> None:
    wide = make_video(tmp_path / "wide.mp4", "-vf", "setsar=2/1", size="64x48")
    video = decode_video(wide, DecodeSettings(short_side=33))
    assert (video.height, video.width) == (33, 88)
    tall = make_video(tmp_path / "tall.avi", size="40x90")
    video = decode_video(tall, DecodeSettings(short_side=20))
    assert (video.height, video.width) == (45, 20)
    assert (decode_video(wide, SETTINGS).height, decode_video(wide, SETTINGS).width) == (48, 64)


def test_quality_changes_size(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mkv")
    best, worst = (sum(map(len, decode_video(path, DecodeSettings(jpeg_quality=quality)).frames)) for quality in (2, 31))
    assert worst < best / 2


def test_variable_rate_and_equal_times_keep_each_frame(tmp_path: Path) -> None:
    uneven = make_video(tmp_path / "uneven.mkv", "-vf", "setpts='PTS+floor(N/3)*0.4/TB'", "-fps_mode", "passthrough")
    assert len(decode_video(uneven, SETTINGS).frames) == 10


@pytest.mark.parametrize("name", ["-y.mp4", "concat:a|b.mp4", "a b;$(touch x)'\"%03d.mp4", "üñ\n.mp4"])
def test_odd_names_are_only_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "plain.mp4").rename(tmp_path / name)
    assert len(decode_video(Path(name), SETTINGS).frames) == 10
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_playlists_open_no_other_file(tmp_path: Path) -> None:
    secret = make_video(tmp_path / "secret.ts", "-c:v", "mpeg2video")
    for name, text in {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile {secret.name}\n",
    }.items():
        path = tmp_path / name
        path.write_text(text)
        error = rejected(path)
        assert error.reason == "undecodable"
        assert "whitelist" in error.detail or "Invalid data" in error.detail
        assert str(tmp_path) not in error.detail


def test_missing_empty_and_special_files_are_rejected_without_ffmpeg(tmp_path: Path) -> None:
    assert rejected(tmp_path / "none.mp4").reason == "missing"
    (tmp_path / "zero.mp4").touch()
    assert rejected(tmp_path / "zero.mp4").reason == "empty"
    os.mkfifo(tmp_path / "pipe.mp4")
    assert rejected(tmp_path / "pipe.mp4").reason == "odd_file"


def test_text_audio_and_still_pictures_are_undecodable(tmp_path: Path) -> None:
    (tmp_path / "page.mp4").write_text("<html>404</html>" * 20)
    (tmp_path / "still.mp4").write_bytes(make_jpeg())
    sound = [ffmpeg_path(), "-v", "error", "-f", "lavfi", "-i", "sine=duration=0.5", str(tmp_path / "sound.mp4")]
    subprocess.run(sound, check=True, stdin=subprocess.DEVNULL)
    for name in ("page.mp4", "still.mp4", "sound.mp4"):
        assert rejected(tmp_path / name).reason == "undecodable", name


@pytest.mark.parametrize("name", ["cut.mp4", "cut.avi", "cut.mkv", "cut.flv"])
def test_cut_file_is_truncated_although_ffmpeg_ends_well(tmp_path: Path, name: str) -> None:
    options = ["-movflags", "+faststart"] if name.endswith("mp4") else []
    path = make_video(tmp_path / name, *options, seconds=3)
    assert len(decode_video(path, SETTINGS).frames) == 30
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    error = rejected(path)
    assert error.reason == "truncated"
    assert error.detail


def test_a_few_damaged_bytes_keep_the_video_and_leave_a_detail(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.avi", "-c:v", "mpeg4", "-q:v", "3", size="160x120", seconds=3)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = b"\x55" * 40
    path.write_bytes(data)
    video = decode_video(path, SETTINGS)
    assert len(video.frames) == 30
    assert video.detail.isprintable()
    assert "0x" not in video.detail


def test_changing_size_is_damaged_when_frames_are_stored_as_they_are(tmp_path: Path) -> None:
    parts = [make_video(tmp_path / f"{size}.ts", "-c:v", "mpeg2video", size=size) for size in ("64x48", "96x64")]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert rejected(path).reason in {"damaged", "size_changes"}


def test_time_limit_kills_the_whole_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nsleep 300 & echo $! > " + str(tmp_path / "child") + "\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(decode, "ffmpeg_path", lambda: str(program))
    (tmp_path / "clip.mp4").write_bytes(b"x")
    started = time.monotonic()
    error = rejected(tmp_path / "clip.mp4", DecodeSettings(timeout_seconds=1.0))
    assert (error.reason, error.detail) == ("timeout", "ffmpeg took longer than 1 s")
    assert time.monotonic() - started < 5
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 5
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_too_much_output_is_too_large(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mp4", size="640x480", seconds=3)
    assert rejected(path, DecodeSettings(max_video_bytes=1 << 16)).reason == "too_large"


def test_a_kill_from_outside_is_no_fault_of_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(decode, "ffmpeg_path", lambda: str(program))
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(ChildProcessError, match="killed from outside"):
        decode_video(tmp_path / "clip.mp4", SETTINGS)


def test_ffmpeg_gets_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path / 'seen'}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(decode, "ffmpeg_path", lambda: str(program))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    rejected(tmp_path / "clip.mp4")
    assert "planted" not in (tmp_path / "seen").read_text()


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


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=6), st.integers(0, 40))
def test_split_jpegs_inverts_joining_and_drops_an_unfinished_end(seeds: list[int], cut: int) -> None:
    comment = b"\xff\xfe\x00\x06\xff\xd9\xff\xd8"  # an end and a beginning inside a comment segment
    jpegs = [data[:2] + comment + data[2:] for data in map(make_jpeg, seeds)]
    assert split_jpegs(b"".join(jpegs)) == jpegs
    assert split_jpegs(b"".join(jpegs) + make_jpeg()[: cut + 2]) == jpegs


def test_split_jpegs_refuses_other_bytes() -> None:
    with pytest.raises(ValueError, match="no JPEG begins at byte"):
        split_jpegs(make_jpeg() + b"junk")


@needs_shared_data
@pytest.mark.slow
def test_all_real_videos_give_their_frames() -> None:
    expected = {name: int(count) for name, count in sources_table("videos", "decoded").items()}
    assert len(expected) == 46
    settings = DecodeSettings(jpeg_quality=8, timeout_seconds=60)
    assert {name: len(decode_video(SHARED_DATA / "videos" / name, settings).frames) for name in expected} == expected


@needs_shared_data
@pytest.mark.parametrize(
    "name",
    [
        "androidx_iibbibb_editlist.mp4",
        "androidx_vp9_odd.webm",
        "cve_vid2.mp4",
        "diving48_8qRmKunCjtY_00016_T.gif",
        "moviepy_transparent.webm",
        "streamio_awesome.mov",  # a variable rate with equal times
        "streamio_weird_aspect.mpg",  # its decoder complains, yet all frames come
        "tika_testWMV.wmv",
        "torchcodec_h265.mp4",
    ],
)
def test_trap_among_the_real_videos_gives_its_frames(name: str) -> None:
    assert len(decode_video(SHARED_DATA / "videos" / name, SETTINGS).frames) == int(sources_table("videos", "decoded")[name])


@needs_shared_data
def test_real_rotated_videos_are_upright() -> None:
    for name, size in {"decord_video_90.mov": (568, 320), "decord_video_180.mov": (320, 568)}.items():
        video = decode_video(SHARED_DATA / "videos" / name, SETTINGS)
        assert (video.height, video.width) == size


@needs_shared_data
def test_all_broken_files_end_in_time_kept_or_rejected_with_a_reason() -> None:
    kept: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for path in sorted((SHARED_DATA / "broken").iterdir()):
        if path.suffix == ".md":
            continue
        started = time.monotonic()
        try:
            kept[path.name] = len(decode_video(path, SETTINGS).frames)
        except VideoRejectedError as error:
            reasons[path.name] = error.reason
        assert time.monotonic() - started < SETTINGS.timeout_seconds + 3
    assert len(kept) + len(reasons) == 31
    assert set(reasons.values()) == {"undecodable", "empty", "no_frames", "truncated"}
    assert reasons["moz_0-timescale.mp4"] == "no_frames"
    assert reasons["derived_truncated50pct_ucf.avi"] == "truncated"
    assert kept == {
        "decord_unordered.mov": 4,
        "exiftool_Flash.flv": 1,
        "exo_avi_large_length.avi": 58,
        "exo_empty_track.mp4": 30,
        "moviepy_bitmap.mp4": 5,
        "moviepy_failing_audio.mp4": 280,
        "moz_video-overhang.ogv": 120,
        "mp4parse_no_timescale.mp4": 170,
    }
