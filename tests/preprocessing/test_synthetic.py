"""Generated videos: the same bytes each time, and nothing but motion tells their class."""

import hashlib
import json
from itertools import combinations
from pathlib import Path

import ffmpeg
import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import DataError
from preprocessing import encode
from preprocessing.datasets import DatasetSettings, index_videos
from preprocessing.decode import ffmpeg_path
from preprocessing.labels import mirror_labels
from preprocessing.synthetic import LABEL_NAMES, Layout, Scene, SyntheticSettings, draw_scene, generate, render

SMALL = SyntheticSettings(
    num_train=9, num_validation=3, num_test=2, num_broken=4, height=32, min_width=32, max_width=40, max_frames=13
)
LAYOUTS: tuple[Layout, ...] = ("something_v1", "diving48")
FRAMES_DIR = "20bn-something-something-v1"


def contents(root: Path) -> dict[str, str]:
    """Every entry below `root`: a file with its hash, a folder without."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in root.rglob("*")
    }


@pytest.fixture(scope="module")
def something(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated Something-V1 root."""
    root = tmp_path_factory.mktemp("something") / "root"
    generate(SMALL, root, "something_v1")
    return root


@pytest.fixture(scope="module")
def diving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated Diving48 root."""
    root = tmp_path_factory.mktemp("diving") / "root"
    generate(SMALL, root, "diving48")
    return root


def test_something_layout_is_read_back(something: Path) -> None:
    index = index_videos(DatasetSettings(name="something_v1"), something)
    columns = index.videos.to_pydict()
    assert index.label_names == sorted(LABEL_NAMES)
    assert columns["split"] == ["train"] * 13 + ["validation"] * 3 + ["test"] * 2
    assert sorted(map(int, columns["video_id"])) == list(range(1, 19))
    assert columns["label"][-2:] == [None, None]
    assert index.label_names[columns["label"][0]] == LABEL_NAMES[0]
    good = [path for path, split in zip(columns["path"], columns["split"], strict=True) if split != "train"] + columns["path"][
        :9
    ]
    for path in good:
        frames = sorted((something / path).iterdir())
        assert [frame.name for frame in frames] == [f"{number:05d}.jpg" for number in range(1, len(frames) + 1)]
        assert 12 <= len(frames) <= 13
        assert all(simplejpeg.decode_jpeg(frame.read_bytes()).shape[0] == 32 for frame in frames)


def test_the_broken_frame_folders_are_broken_each_in_its_way(something: Path) -> None:
    index = index_videos(DatasetSettings(name="something_v1"), something)
    truncated, empty, missing, text = (something / path for path in index.videos["path"].to_pylist()[9:13])
    assert not list(empty.iterdir())
    assert not missing.exists()
    for folder in (truncated, text):
        bad = []
        for frame in folder.iterdir():
            try:
                simplejpeg.decode_jpeg(frame.read_bytes(), strict=True)
            except ValueError:
                bad.append(frame)
        assert len(bad) == 1


def test_diving_layout_is_read_back(diving: Path) -> None:
    index = index_videos(DatasetSettings(name="diving48"), diving)
    columns = index.videos.to_pydict()
    assert index.label_names == list(LABEL_NAMES)
    assert columns["split"] == ["train"] * 13 + ["test"] * 3
    assert columns["label"][:13] == sorted(columns["label"][:13])
    assert any(video_id.startswith("-") for video_id in columns["video_id"])
    assert all(len(video_id) == 17 and video_id[11] == "_" for video_id in columns["video_id"])
    assert sum((diving / path).exists() for path in columns["path"]) == 15
    sizes = {path: (diving / path).stat().st_size for path in columns["path"] if (diving / path).exists()}
    assert list(sizes.values()).count(0) == 1
    assert sum((diving / path).read_bytes()[4:8] == b"ftyp" for path in sizes) == 13
    # moov follows mdat, so the truncated one of these 13 has none.
    assert sum(b"moov" in (diving / path).read_bytes() for path in sizes) == 12


def test_an_mp4_decodes_to_as_many_frames_as_its_row_says(diving: Path) -> None:
    row = json.loads((diving / "Diving48_V2_test.json").read_bytes())[0]
    source = ffmpeg.input(str(diving / "rgb" / f"{row['vid_name']}.mp4")).output(
        "pipe:", format="rawvideo", pix_fmt="gray", s="32x32"
    )
    pixels, messages = source.global_args("-loglevel", "error").run(cmd=ffmpeg_path(), capture_stdout=True, capture_stderr=True)
    assert messages == b""
    assert len(pixels) == (row["end_frame"] + 1) * 32 * 32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generating_again_elsewhere_gives_the_same_bytes(
    layout: Layout, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    first: Path = request.getfixturevalue("diving" if layout == "diving48" else "something")
    generate(SMALL, tmp_path, layout)
    assert contents(tmp_path) == contents(first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lost_video_comes_back_and_the_rest_is_untouched(layout: Layout, tmp_path: Path) -> None:
    few = SMALL.model_copy(update={"num_train": 2, "num_validation": 0, "num_test": 0, "num_broken": 1})
    generate(few, tmp_path, layout)
    before = contents(tmp_path)
    videos_dir = tmp_path / ("rgb" if layout == "diving48" else FRAMES_DIR)
    first, *others = sorted(videos_dir.iterdir())
    times = {path: path.stat().st_mtime_ns for path in others}
    if first.is_dir():
        for frame in first.iterdir():
            frame.unlink()
        first.rmdir()
    else:
        first.unlink()
    generate(few, tmp_path, layout)
    assert contents(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in others} == times


def test_other_settings_and_real_data_are_never_mixed_in(something: Path, tmp_path: Path) -> None:
    before = contents(something)
    with pytest.raises(DataError, match=r"was generated with other settings .* choose another folder or remove it"):
        generate(SMALL.model_copy(update={"seed": 1}), something)
    assert contents(something) == before
    (tmp_path / "something-something-v1-train.csv").write_text("1;Holding something\n")
    with pytest.raises(DataError, match="is not empty and was not generated; expected a new folder"):
        generate(SMALL, tmp_path)
    assert len(contents(tmp_path)) == 1


def test_an_interrupted_call_leaves_no_half_video_and_is_finished_by_the_next(something: Path, tmp_path: Path) -> None:
    def stop(done: int, _total: int, _text: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(SMALL, tmp_path, on_progress=stop)
    whole = contents(something)
    assert all(whole[name] == value for name, value in contents(tmp_path).items())
    assert not list(tmp_path.glob("*.csv"))
    generate(SMALL, tmp_path)
    assert contents(tmp_path) == whole


def test_progress_counts_videos(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    generate(SMALL, tmp_path, on_progress=lambda done, total, text: calls.append((done, total, text)))
    assert [done for done, _, _ in calls] == list(range(1, 19))
    assert {total for _, total, _ in calls} == {18}
    assert calls[-1][2].endswith(" frames/s")


def test_an_encoder_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\ncat > /dev/null\necho Unknown encoder libx264 >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(encode, "ffmpeg_path", lambda: str(program))
    with pytest.raises(DataError, match=r"could not encode -.*mp4: Unknown encoder libx264; expected one with libx264"):
        generate(SMALL, tmp_path / "root", "diving48")


NUMBERS = st.integers(0, 10_000)
PAIRS = st.sampled_from([0, 2, 4, 6])


@given(NUMBERS, PAIRS)
def test_the_opposite_class_is_the_same_video_backwards(number: int, label: int) -> None:
    forwards, backwards = draw_scene(SMALL, number, label), draw_scene(SMALL, number, label + 1)
    assert np.array_equal(forwards.poses, backwards.poses[::-1])
    assert (forwards.look, forwards.width) == (backwards.look, backwards.width)


@settings(max_examples=10)
@given(NUMBERS, PAIRS)
def test_the_opposite_class_shows_the_same_pictures_backwards(number: int, label: int) -> None:
    forwards, backwards = (render(draw_scene(SMALL, number, label + way), SMALL.height) for way in (0, 1))
    assert np.array_equal(forwards, backwards[::-1])


@given(NUMBERS, st.integers(0, 7))
def test_one_coordinate_moves_far_and_in_its_direction(number: int, label: int) -> None:
    scene = draw_scene(SyntheticSettings(), number, label)
    coordinate, backwards = divmod(label, 2)
    change = scene.poses[-1] - scene.poses[0]
    assert np.array_equal(np.flatnonzero(change), [coordinate])
    assert (change[coordinate] < 0) == bool(backwards)
    enough = [0.5, 0.5, None, np.radians(109)][coordinate]  # at least 11 of 12 parts of the sweep
    sizes = scene.poses[:, 2]
    assert max(sizes[0] / sizes[-1], sizes[-1] / sizes[0]) >= 2 if enough is None else abs(change[coordinate]) >= enough
    assert len(scene.poses) in range(12, 25)
    assert scene.width in range(72, 97, 2)


def test_the_look_the_width_and_the_length_do_not_depend_on_the_class() -> None:
    scenes = [draw_scene(SMALL, 5, label) for label in range(8)]
    assert len({(scene.look, scene.width, len(scene.poses)) for scene in scenes}) == 1


def test_the_pose_in_a_random_frame_has_one_distribution_for_all_classes() -> None:
    """Largest distance of two empirical distributions (Kolmogorov-Smirnov), by coordinate, for every two classes."""
    rng = np.random.default_rng(0)
    num_videos = 1500
    drawn = np.empty((8, num_videos, 4))
    for label in range(8):
        for position in range(num_videos):
            poses = draw_scene(SMALL, 10_000 * label + position, label).poses
            drawn[label, position] = poses[rng.integers(len(poses))]
    drawn[..., 3] %= 2 * np.pi
    drawn.sort(axis=1)
    # 1.95 sqrt(2/n) is exceeded by chance once in 1000 comparisons; 28 x 4 are made, so 2.5 sqrt(2/n) allows one in 10^5.
    for one, other in combinations(drawn, 2):
        for coordinate in range(4):
            a, b = one[:, coordinate], other[:, coordinate]
            points = np.concatenate([a, b])
            gap = np.abs(np.searchsorted(a, points, "right") - np.searchsorted(b, points, "right")).max() / num_videos
            assert gap < 2.5 * np.sqrt(2 / num_videos)


def pose_scene(look: int, angles: list[float], size: float = 0.6) -> Scene:
    """An object in the middle of a square picture, at these angles."""
    return Scene(look=look, width=64, poses=np.array([[0.5, 0.5, size, angle] for angle in angles]))


def test_every_shape_shows_its_angle() -> None:
    """No turn of 15 to 345 degrees maps the object onto itself."""
    angles = [float(angle) for angle in np.radians(np.arange(0, 360, 15))]
    for look in range(30):
        pictures = render(pose_scene(look, angles), 64).astype(float)
        assert np.abs(pictures[1:] - pictures[0]).mean(axis=(1, 2, 3)).min() > 1.0


def test_a_growing_angle_is_clockwise_as_seen() -> None:
    """The arrow's head, which points up at angle 0, points right after a quarter turn."""
    look = next(n for n in range(100) if is_arrow(n))
    up, right = (
        np.abs(picture.astype(float) - background(look)).sum(axis=2) > 60
        for picture in render(pose_scene(look, [0.0, np.pi / 2]), 64)
    )
    # The head is wider than the shaft, so more of the object is on its side.
    assert up[:32].sum() > up[32:].sum()
    assert right[:, 32:].sum() > right[:, :32].sum()


def background(look: int) -> npt.NDArray[np.float64]:
    """The picture without its object."""
    picture = render(Scene(look=look, width=64, poses=np.array([[9.0, 9.0, 0.3, 0.0]])), 64)[0]
    as_float: npt.NDArray[np.float64] = picture.astype(np.float64)
    return as_float


def is_arrow(look: int) -> bool:
    """Whether this look draws the first shape: narrow at the top, wide in the middle."""
    inside = np.abs(render(pose_scene(look, [0.0], size=0.9), 64)[0].astype(float) - background(look)).sum(axis=2) > 60
    widths = inside.sum(axis=1)
    return bool(0 < widths[8] < widths[16] < widths[30] and widths[45] < 0.6 * widths[30] and widths[45] > 10)


def test_the_object_stands_out_from_its_background() -> None:
    for look in range(50):
        difference = np.abs(render(pose_scene(look, [0.0]), 64)[0].astype(float) - background(look)).max(axis=2)
        assert (difference > 60).mean() > 0.05


def test_only_the_object_moves() -> None:
    pictures = render(draw_scene(SyntheticSettings(), 0, 0), 72)
    assert (pictures == pictures[0]).all(axis=(0, 3)).mean() > 0.2


def test_mirrored_labels_match_the_motion() -> None:
    mirrored = mirror_labels(LABEL_NAMES)
    assert mirrored == [1, 0, 2, 3, 4, 5, 7, 6]


def test_frames_have_the_size_of_real_ones(tmp_path: Path) -> None:
    generate(SyntheticSettings(num_train=8, num_validation=0, num_broken=0), tmp_path)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.jpg")]
    assert 2_500 < np.mean(sizes) < 7_500


@pytest.mark.parametrize(
    "wrong",
    [{"min_width": 96, "max_width": 72}, {"min_frames": 20, "max_frames": 19}, {"height": 71}, {"num_train": 0}, {"hight": 72}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        SyntheticSettings.model_validate(wrong)
