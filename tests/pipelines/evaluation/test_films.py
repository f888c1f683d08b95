"""Films as they are drawn, and read back from their files."""

import numpy as np
import pytest
from PIL import Image

from infra.errors import ConfigError
from pipelines.evaluation.films import FilmClip, SlotFilm, draw_film, save_film, weight_heat
from preprocessing.decode import DecodeSettings, decode_video
from preprocessing.jpeg import decode_frame

NUM_SEGMENTS = 4


def weight_with_a_spot(gamma, place=(1, 2)):
    weight = np.zeros((NUM_SEGMENTS, 4, 4), np.float32)
    weight[:, *place] = 16 * abs(gamma)
    return weight


def clip(*slots, label="up", answer="up", title="v1.mp4"):
    frames = np.full((NUM_SEGMENTS, 64, 64, 3), 120, np.uint8)
    return FilmClip(title, frames, answer, 0.873, label, [SlotFilm(name, gamma, weight) for name, gamma, weight in slots])


def panels_of(frame, clip_index=0, num_clips=1):
    """Where in a frame of the film the grey of the clips is, a column run a panel: (left, right) in pixels."""
    width = frame.shape[1] // num_clips
    block = frame[:, clip_index * width : (clip_index + 1) * width]
    middle = block[200]
    is_white = (middle == 255).all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_white, [True]]).astype(int)))
    return [(block[:, left:right], left, right) for left, right in edges.reshape(-1, 2)]


@pytest.mark.parametrize("num_clips", [1, 2, 3])
@pytest.mark.parametrize("num_slots", [1, 2, 10])
def test_all_clips_have_the_same_number_of_frames_and_even_sizes(num_clips, num_slots):
    slots = [(f"{number}", 0.1, weight_with_a_spot(0.1)) for number in range(num_slots)]
    film = draw_film([clip(*slots) for _ in range(num_clips)])
    num_frames, height, width, channels = film.shape
    assert (num_frames, channels) == (NUM_SEGMENTS, 3)
    assert width >= 640
    assert height % 2 == width % 2 == 0


def test_gamma_zero_shows_the_clip_uncovered_and_a_spot_is_where_the_attention_is():
    film = draw_film([clip(("3a", 0.5, weight_with_a_spot(0.5)), ("5b", 0.0, weight_with_a_spot(0.0)))])
    for frame in film:
        (plain, _, _), (covered, left, right), (uncovered, _, _) = panels_of(frame)
        assert np.array_equal(plain[110:180], uncovered[110:180])
        changed = (covered != plain).any(axis=2)[104 : 104 + right - left]
        rows, columns = np.nonzero(changed)
        side = right - left
        # The middle of place (1, 2) of 4 x 4, and the spread of linear interpolation around it.
        assert rows.mean() == pytest.approx((1.5 / 4) * side, abs=0.1 * side)
        assert columns.mean() == pytest.approx((2.5 / 4) * side, abs=0.1 * side)
        assert 0 < changed.mean() < 0.5


def test_of_many_slots_the_strongest_are_shown():
    weak = [(f"layer{number}", 0.0, weight_with_a_spot(0.0)) for number in range(30)]
    strong = ("mixed_10", -0.5, weight_with_a_spot(0.5))
    crowded = draw_film([clip(*weak[:20], strong, *weak[20:])])
    assert crowded.shape == draw_film([clip(*weak[:10], strong)]).shape
    assert np.array_equal(crowded[:, 72:600], draw_film([clip(*weak[:10], strong)])[:, 72:600])


def test_heat_has_one_scale_for_all_films():
    """Nothing is made brighter because there is nothing brighter beside it."""
    faint = ("3a", 0.001, np.full((NUM_SEGMENTS, 4, 4), 0.001, np.float32))
    strong = ("3b", 1.0, np.full((NUM_SEGMENTS, 4, 4), 1.0, np.float32))
    alone, beside = draw_film([clip(faint)])[0], draw_film([clip(faint, strong)])[0]
    (plain, _, _), (lone, _, _) = panels_of(alone)
    pixel = tuple(int(value) for value in lone[200, 100])
    assert np.abs(np.array(pixel) - plain[200, 100]).max() <= 1
    _, (with_it, _, _), (bright, _, _) = panels_of(beside)
    assert tuple(int(value) for value in with_it[200, 100]) == pixel
    assert np.abs(bright[200, 100].astype(int) - 120).max() > 50
    heat = weight_heat(np.array([0.0, 0.1, 0.25, 1.0, 1e6], np.float32))
    assert heat[0] == 0
    assert heat[2] == 0.5
    assert (np.diff(heat) > 0).all()
    assert heat[-1] <= 1


def test_right_wrong_and_unknown_are_told_apart():
    heads = [draw_film([clip(("5b", 0.1, weight_with_a_spot(0.1)), label=label)])[0, :50] for label in ("up", "down", None)]
    green, red, ink = ((head.astype(int) - head.astype(int).mean(axis=2, keepdims=True)) for head in heads)
    assert green[..., 1].max() > 40
    assert red[..., 0].max() > 40
    assert np.abs(ink).max() < 20


@pytest.fixture
def pair():
    return [
        clip(("5a", 0.3, weight_with_a_spot(0.3)), ("5b", -0.1, weight_with_a_spot(-0.1, (3, 0)))),
        clip(
            ("5a", 0.3, weight_with_a_spot(0.3, (0, 0))),
            ("5b", -0.1, weight_with_a_spot(-0.1)),
            label="\u202e<b>$x$",
            title="\x1b",
        ),
    ]


def test_a_film_is_read_back_as_h264(pair, tmp_path):
    path, expected = save_film(tmp_path / "film.mp4", pair), draw_film(pair)
    video = decode_video(path, DecodeSettings())
    assert (len(video.frames), video.height, video.width) == expected.shape[:3]
    assert video.fps == 2
    for frame, jpeg in zip(expected, video.frames, strict=True):
        assert np.abs(decode_frame(jpeg, *frame.shape[:2], (0, 0)).astype(int) - frame).mean() < 4
    assert path.read_bytes() == save_film(tmp_path / "again.MP4", pair).read_bytes()


def test_a_film_is_read_back_as_gif(pair, tmp_path):
    path, expected = save_film(tmp_path / "film.gif", pair), draw_film(pair)
    with Image.open(path) as film:
        assert (film.n_frames, film.height, film.width) == expected.shape[:3]
        assert (film.info["duration"], film.info["loop"]) == (500, 0)
        for index, frame in enumerate(expected):
            film.seek(index)
            assert np.abs(np.asarray(film.convert("RGB")).astype(int) - frame).mean() < 4
    assert path.read_bytes() == save_film(tmp_path / "again.gif", pair).read_bytes()


def test_another_kind_of_film_is_refused_and_nothing_half_written_stays(pair, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"x.webm has the suffix .webm; a film is written as .mp4 or .gif"):
        save_film(tmp_path / "x.webm", pair)
    monkeypatch.setattr("preprocessing.encode.ffmpeg_path", lambda: "/bin/false")
    with pytest.raises(Exception, match="could not encode"):
        save_film(tmp_path / "x.mp4", pair)
    assert list(tmp_path.iterdir()) == []
