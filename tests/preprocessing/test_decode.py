"""Decoding: every real clip gives its frames, every broken one a reason, and no file name or content runs anything."""

import math
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import PipelineError
from preprocessing import decode, sandbox
from preprocessing.decode import (
    DecodedVideo,
    DecodeSettings,
    VideoRejectedError,
    chosen_frames,
    decode_video,
    ffmpeg_path,
    ffmpeg_version,
)

SETTINGS = DecodeSettings(timeout_seconds=25)


@pytest.fixture(autouse=True)
def _known_version() -> None:
    """Programs that stand in for ffmpeg are not asked for their version."""
    ffmpeg_version()


def make_video(path: Path, *options: str, size: str = "64x48", seconds: float = 1.0, rate: int = 10) -> Path:
    source = f"testsrc=size={size}:rate={rate}:duration={seconds}"
    command = [ffmpeg_path(), "-v", "error", "-y", "-f", "lavfi", "-i", source, *options, f"file:{path}"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def make_jpeg(seed: int = 0, height: int = 24, width: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=80))


def rejected(path: Path, settings: DecodeSettings = SETTINGS) -> VideoRejectedError:
    with pytest.raises(VideoRejectedError) as caught:
        decode_video(path, settings)
    return caught.value


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


@pytest.mark.parametrize(("sar", "size"), [("2/1", (48, 128)), ("1/2", (96, 64)), ("640/639", (48, 64)), ("99/1", (48, 64))])
def test_pixels_become_square_unless_they_nearly_are(tmp_path: Path, sar: str, size: tuple[int, int]) -> None:
    video = decode_video(make_video(tmp_path / "clip.mp4", "-vf", f"setsar={sar}"), SETTINGS)
    assert (video.height, video.width) == size


def make_numbered(path: Path, *options: str, rate: str = "10", num_frames: int = 100) -> Path:
    """A clip whose frames carry their number: sixteens as the brightness of the left half, the rest as that of the right."""
    frames = np.zeros((num_frames, 48, 64), np.uint8)
    for number in range(num_frames):
        frames[number, :, :32], frames[number, :, 32:] = 16 * (number // 16) + 8, 16 * (number % 16) + 8
    raw = ["-f", "rawvideo", "-pix_fmt", "gray", "-s", "64x48", "-r", rate, "-i", "pipe:0"]
    subprocess.run([ffmpeg_path(), "-v", "error", "-y", *raw, *options, str(path)], input=frames.tobytes(), check=True)
    return path


def numbers(video: DecodedVideo) -> list[int]:
    grey = [simplejpeg.decode_jpeg(frame, "GRAY")[8:40, :, 0].astype(float) for frame in video.frames]
    return [int(frame[:, 4:28].mean() // 16) * 16 + int(frame[:, 36:60].mean() // 16) for frame in grey]


@pytest.mark.parametrize("rate", ["10", "30000/1001"])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.ts"])
def test_a_span_takes_exactly_the_frames_of_its_time(tmp_path: Path, name: str, rate: str) -> None:
    codec = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-bf", "2", "-g", "40"] if name[-2] in "pk" else ["-c:v", "mpeg2video"]
    codec = ["-c:v", "mpeg4"] if name.endswith("avi") else codec
    path = make_numbered(tmp_path / name, *codec, "-q:v", "2", rate=rate)
    period = 0.1 if rate == "10" else 1001 / 30000
    for start, end in [(None, 1.0), (2.0, 3.015), (50.5 * period, 52.5 * period), (1.99, None), (-1.0, 0.0301)]:
        times = [round(number * period, 3 if name.endswith("mkv") else 6) for number in range(100)]
        expected = [number for number, time in enumerate(times) if (start or 0) <= time < (end or math.inf)]
        assert numbers(decode_video(path, SETTINGS, start, end)) == expected, (start, end)


@pytest.mark.parametrize("span", [(3.0, 2.0), (1.0, 1.0), (math.nan, 2.0), (1.0, math.nan), (math.inf, None), (50.0, 60.0)])
def test_a_span_without_frames_is_rejected(tmp_path: Path, span: tuple[float, float | None]) -> None:
    with pytest.raises(VideoRejectedError, match="no_frames"):
        decode_video(make_video(tmp_path / "clip.mp4"), SETTINGS, *span)


@pytest.mark.parametrize("fps", [3.0, 4.0, 10.0, 25.0, 7.3])
def test_a_rate_takes_the_frame_that_is_shown_at_each_time(tmp_path: Path, fps: float) -> None:
    path = make_numbered(tmp_path / "clip.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    video = decode_video(path, DecodeSettings(fps=fps))
    assert video.fps == fps
    assert numbers(video) == [int(index / fps * 10 + 1e-6) for index in range(1000) if index / fps < 10 - 1e-9]


@pytest.mark.parametrize("max_video_bytes", [1 << 16, 1 << 24])
def test_a_frame_budget_takes_evenly_spaced_frames_even_of_a_video_too_large_to_hold(
    tmp_path: Path, max_video_bytes: int
) -> None:
    path = make_numbered(tmp_path / "clip.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    for max_frames in (1, 7, 33):
        video = decode_video(path, DecodeSettings(max_frames=max_frames, max_video_bytes=max_video_bytes))
        assert numbers(video) == [int((index + 0.5) * 100 / max_frames) for index in range(max_frames)]
        assert video.fps == pytest.approx(max_frames / 10)
    assert len(decode_video(path, DecodeSettings(max_frames=100)).frames) == 100


@given(st.integers(1, 500), st.integers(1, 500))
def test_chosen_frames_are_the_middles_of_equal_spans(num_frames: int, max_frames: int) -> None:
    chosen = list(chosen_frames(num_frames, max_frames))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(num_frames, max_frames)
    if num_frames > max_frames:
        assert all(index * num_frames <= max_frames * (frame + 0.5) for index, frame in enumerate(chosen))
    assert list(chosen_frames(num_frames, None)) == list(range(num_frames))


def test_duration_is_judged_by_frames(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mp4", seconds=3)
    assert rejected(path, DecodeSettings(max_seconds=2.9)).reason == "too_long"
    assert len(decode_video(path, DecodeSettings(max_seconds=3)).frames) == 30
    assert len(decode_video(path, DecodeSettings(max_seconds=1), 1.5, 2.5).frames) == 10


COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (230, 230, 230), (20, 20, 20), (180, 160, 40), (40, 160, 180)]


@pytest.mark.parametrize(
    ("matrix", "colour_range", "pixels", "short_side"),
    [
        ("bt709", "tv", "yuv420p", None),
        ("bt709", "tv", "yuv420p", 32),
        ("bt709", "pc", "yuv420p", None),
        ("smpte170m", "tv", "yuv420p", None),
        ("bt709", "tv", "yuv420p10le", None),
        ("bt709", "tv", "yuv444p", 32),
    ],
)
def test_colours_are_those_of_the_source(
    tmp_path: Path, matrix: str, colour_range: str, pixels: str, short_side: int | None
) -> None:
    image = np.repeat(np.array(COLOURS, np.uint8)[None], 64, 0).repeat(32, 1)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{32 * len(COLOURS)}x64", "-r", "5", "-i", "pipe:0"]
    convert = ["-vf", f"scale=out_color_matrix={matrix}:out_range={colour_range},format={pixels}"]
    marks = ["-colorspace", matrix, "-color_range", colour_range, "-c:v", "libx264", "-crf", "2"]
    path = tmp_path / "clip.mp4"
    command = [ffmpeg_path(), "-v", "error", *raw, *convert, *marks, str(path)]
    subprocess.run(command, input=image.tobytes() * 3, check=True)
    video = decode_video(path, DecodeSettings(short_side=short_side))
    decoded = simplejpeg.decode_jpeg(video.frames[0]).astype(float)
    side = video.height // 2
    for place, colour in enumerate(COLOURS):
        middle = decoded[side // 2 : -side // 2, place * side + side // 4 : (place + 1) * side - side // 4].mean((0, 1))
        assert np.abs(middle - colour).max() <= 5, (colour, middle)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of the instruction sets are those of x86-64")
@pytest.mark.parametrize("short_side", [None, 32])
def test_bytes_do_not_depend_on_the_processors_newer_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_side: int | None
) -> None:
    path = make_video(tmp_path / "clip.mp4", "-pix_fmt", "yuv420p", "-colorspace", "bt709")
    settings = DecodeSettings(short_side=short_side)
    expected = decode_video(path, settings)
    program = tmp_path / "ffmpeg"
    program.write_text(f'#!/bin/sh\nexec {ffmpeg_path()} -cpuflags -avx512icl-avx512-avx2-fma3-avx-sse4.2-sse4.1 "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(decode, "ffmpeg_path", lambda: str(program))
    assert decode_video(path, settings) == expected


def test_processor_time_limit_is_a_timeout_and_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nwhile :; do :; done\n")
    program.chmod(0o755)
    monkeypatch.setattr(decode, "ffmpeg_path", lambda: str(program))
    monkeypatch.setattr(sandbox, "_cpu_limit", lambda _: 1)
    (tmp_path / "clip.mp4").write_bytes(b"x")
    error = rejected(tmp_path / "clip.mp4", DecodeSettings(timeout_seconds=60))
    assert (error.reason, error.detail[:47]) == ("timeout", "ffmpeg used more than 1 s of processor time; ra")


def test_quality_changes_size(tmp_path: Path) -> None:
    path = make_video(tmp_path / "clip.mkv")
    best, worst = (sum(map(len, decode_video(path, DecodeSettings(jpeg_quality=quality)).frames)) for quality in (2, 31))
    assert worst < best / 2


def test_variable_rate_and_equal_times_keep_each_frame(tmp_path: Path) -> None:
    uneven = make_video(tmp_path / "uneven.mkv", "-vf", "setpts='PTS+floor(N/3)*0.4/TB'", "-fps_mode", "passthrough")
    assert len(decode_video(uneven, SETTINGS).frames) == 10


@pytest.mark.parametrize("name", ["n" * 251 + ".mp4", "-y.mp4", "concat:a|b.mp4", "a b;$(touch x)'\"%03d.mp4", "üñ\n.mp4"])
def test_odd_names_are_only_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "plain.mp4").rename(tmp_path / name)
    assert len(decode_video(Path(name), SETTINGS).frames) == 10
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_empty_and_special_files_are_rejected_without_ffmpeg(tmp_path: Path) -> None:
    assert rejected(tmp_path / "none.mp4").reason == "missing"
    (tmp_path / "zero.mp4").touch()
    assert rejected(tmp_path / "zero.mp4").reason == "empty"
    assert rejected(tmp_path / ("n" * 256)).reason == "missing"
    assert rejected(tmp_path / "a\0b").reason == "missing"
    assert rejected(tmp_path / "zero.mp4" / "x").reason == "missing"
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


def test_frames_of_another_size_become_like_the_first(tmp_path: Path) -> None:
    parts = [make_video(tmp_path / f"{size}.ts", "-c:v", "mpeg2video", size=size) for size in ("64x48", "96x64")]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    video = decode_video(path, SETTINGS)
    assert (video.height, video.width) == (48, 64)
    assert len(video.frames) >= 19  # where the streams meet, the decoder gives up a frame that it had kept back


def test_time_limit_kills_the_whole_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nsleep 300 & echo $! > " + str(tmp_path / "child") + "\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(decode, "ffmpeg_path", lambda: str(program))
    (tmp_path / "clip.mp4").write_bytes(b"x")
    started = time.monotonic()
    error = rejected(tmp_path / "clip.mp4", DecodeSettings(timeout_seconds=1.0))
    assert (error.reason, error.detail) == (
        "timeout",
        "ffmpeg took longer than 1 s; raise shards.timeout_seconds if the video is sound",
    )
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


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotated_video_is_upright(tmp_path: Path, angle: int) -> None:
    plain = make_video(tmp_path / "plain.mp4", "-pix_fmt", "yuv420p")
    turned = tmp_path / "turned.mp4"
    turn = [ffmpeg_path(), "-v", "error", "-display_rotation", str(angle), "-i", str(plain), "-c", "copy", str(turned)]
    subprocess.run(turn, check=True, stdin=subprocess.DEVNULL)
    before, after = (simplejpeg.decode_jpeg(decode_video(path, SETTINGS).frames[3]).astype(float) for path in (plain, turned))
    expected = np.rot90(before, angle // 90)
    assert after.shape == expected.shape
    assert np.abs(after - expected).mean() < 4
