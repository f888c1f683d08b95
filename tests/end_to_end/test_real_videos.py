"""Real clips of many codecs give every frame; real broken ones give those that decode, or a reason."""

import time
from pathlib import Path

import pytest

from preprocessing.datasets import DatasetSettings, index_videos, raw_listing
from preprocessing.decode import DecodeSettings, VideoRejectedError, decode_video

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
SETTINGS = DecodeSettings(timeout_seconds=25)

pytestmark = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the test videos in ../shared/data are not here")


def sources_table(folder: str, column: str) -> dict[str, str]:
    """A column of the table in a SOURCES.md by file name."""
    rows = [line.split("|") for line in (SHARED_DATA / folder / "SOURCES.md").read_text().splitlines() if line.startswith("| ")]
    place = [cell.strip() for cell in rows[0]].index(column)
    return {row[1].strip(): row[place].strip() for row in rows[1:]}


@pytest.mark.slow
def test_all_real_videos_give_their_frames_with_the_right_aspect() -> None:
    counts, sizes, shapes, turns = (sources_table("videos", name) for name in ("decoded", "WxH", "SAR", "rotation"))
    assert len(counts) == 46
    for name, count in counts.items():
        video = decode_video(SHARED_DATA / "videos" / name, DecodeSettings(jpeg_quality=8, short_side=128, timeout_seconds=60))
        width, height = map(int, sizes[name].split("x"))
        shape = 1.0 if shapes[name] == "None" else eval_ratio(shapes[name])
        aspect = width * shape / height
        if abs(int(turns[name])) == 90:
            aspect = 1 / aspect
        assert (len(video.frames), min(video.height, video.width)) == (int(count), 128), name
        assert video.width / video.height == pytest.approx(aspect, rel=0.013), name


def eval_ratio(text: str) -> float:
    left, right = text.split(":")
    return int(left) / int(right)


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


def test_real_rotated_videos_are_upright() -> None:
    for name, size in {"decord_video_90.mov": (568, 320), "decord_video_180.mov": (320, 568)}.items():
        video = decode_video(SHARED_DATA / "videos" / name, SETTINGS)
        assert (video.height, video.width) == size


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


@pytest.mark.parametrize("name", ["something_v1", "diving48"])
def test_every_video_of_the_small_real_datasets_is_where_the_index_says(name: str) -> None:
    root = SHARED_DATA / "real_mini" / name
    settings = DatasetSettings(name=name, root=str(root))
    index = index_videos(settings, root)
    assert all((root / path).exists() for path in index.videos["path"].to_pylist())
    assert raw_listing(settings)
