"""Generated videos that can be told apart by motion alone, in the layouts of Something-V1 and Diving48 V2.

An object (shape, two colours, stripes) lies on a textured background. Its pose has four coordinates: x, y, size and angle. In
each video exactly one of them sweeps and the others stand still; each coordinate with its direction is a class: 8 classes.

No single frame tells the class. Every video draws a sweep for all four coordinates; those that stand still are frozen at a
random instant of theirs. So the pose at a random instant has one distribution for all classes, whatever the sweeps are, and
appearance is drawn before and apart from the class. The opposite class is the same video played backwards, so a network that
ignores the order of frames gets at most one of two right.

A video is a pure function of (settings, its number, its layout): videos may be made in any order, and made again.
"""

import base64
import hashlib
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
import simplejpeg
from pydantic import Field, model_validator

from infra.errors import DataError
from infra.progress import OnProgress
from infra.settings import Settings
from infra.storage import write_bytes, write_json
from preprocessing.encode import encode_mp4

GENERATOR_VERSION = 2
"""Raised whenever the same settings give other bytes."""

# Class 2k sweeps coordinate k forwards, class 2k + 1 backwards. The order is not the sorted one, as in the genuine list.
LABEL_NAMES = (
    "Moving something from left to right",
    "Moving something from right to left",
    "Moving something down",
    "Moving something up",
    "Moving something closer to the camera",
    "Moving something away from the camera",
    "Turning something clockwise",
    "Turning something counterclockwise",
)
BROKEN_KINDS = ("truncated", "empty", "missing", "text")

Layout = Literal["something_v1", "diving48"]
Plane = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

_JPEG_QUALITY = 95
_DIVING_FPS = ("25", "30", "30000/1001")
_VIDEOS_PER_SOURCE = 4
_SOURCES_PER_DASH = 5
_SETTINGS_FILE = "synthetic.json"
_NOT_A_VIDEO = b"<html><body><h1>404 Not Found</h1></body></html>\n"

EvenPixels = Annotated[int, Field(ge=32, le=1024, multiple_of=2)]


class SyntheticSettings(Settings):
    """How many videos to generate, and of which size.

    Attributes:
        num_train, num_validation, num_test: good videos a split. Diving48 has two splits: there `num_validation` videos form
            the test split, which is labelled, and `num_test` videos are left out.
        num_broken: videos of the train split that cannot be read, on top of `num_train`: truncated, empty, missing and text in
            turn.
        height: of the pictures in pixels; the width is drawn from `min_width` to `max_width`. All even, as h264 wants them.
        min_frames, max_frames: the number of frames is drawn from this range, both ends included.
        seed: of all draws.
    """

    num_train: int = Field(default=640, ge=1, le=99_999)
    num_validation: int = Field(default=160, ge=0, le=99_999)
    num_test: int = Field(default=0, ge=0, le=99_999)
    num_broken: int = Field(default=4, ge=0, le=99_999)
    height: EvenPixels = 72
    min_width: EvenPixels = 72
    max_width: EvenPixels = 96
    min_frames: int = Field(default=12, ge=4)
    max_frames: int = Field(default=24, le=1000)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if self.min_width > self.max_width:
            raise ValueError(f"min_width {self.min_width} is above max_width {self.max_width}; expected it at most equal")
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames {self.min_frames} is above max_frames {self.max_frames}; expected it at most equal")
        return self


@dataclass(frozen=True)
class Scene:
    """Everything that a video shows.

    Attributes:
        look: seed of the appearance: background, shape, colours, stripes.
        width: of the pictures, in pixels.
        poses: float64 [num_frames, 4]: x and y of the object's centre in parts of the width and height, its diameter in parts
            of the height, and its angle in radians, growing clockwise.
    """

    look: int
    width: int
    poses: npt.NDArray[np.float64]


def generate(
    settings: SyntheticSettings, root: Path, layout: Layout = "something_v1", on_progress: OnProgress | None = None
) -> None:
    """Write a whole dataset under `root`, as `index_videos` reads it; at least 300 frames/s on one core.

    Each video appears whole or not at all, and the annotation files come last. A video that is there is kept, so calling again
    finishes an interrupted call or does nothing.

    Raises:
        DataError: if `root` holds something that was not generated with the same settings; nothing is changed then.
    """
    _claim(settings, root, layout)
    videos_dir = root / ("rgb" if layout == "diving48" else "20bn-something-something-v1")
    videos_dir.mkdir(exist_ok=True)
    splits = _split_numbers(settings, layout)
    numbers = [number for split in splits.values() for number in split]
    started, num_frames = time.perf_counter(), 0
    with tempfile.TemporaryDirectory(dir=root, prefix=".tmp-") as staging:
        for done, number in enumerate(numbers, start=1):
            target = videos_dir / _file_name(settings, number, layout)
            if not target.exists():
                num_frames += _write_video(settings, number, layout, Path(staging) / target.name, target)
            if on_progress is not None:
                on_progress(done, len(numbers), f"{num_frames / (time.perf_counter() - started):.0f} frames/s")
    write_annotations = _write_json_files if layout == "diving48" else _write_csv_files
    write_annotations(settings, root, splits)


def draw_scene(settings: SyntheticSettings, number: int, label: int) -> Scene:
    """Draw what video `number` shows if its class is `label` (0 to 7, an index of `LABEL_NAMES`).

    Nothing but the choice of the sweeping coordinate and its direction depends on the label.
    """
    rng = np.random.default_rng((settings.seed, number))
    look = int(rng.integers(2**32))
    width = 2 * int(rng.integers(settings.min_width // 2, settings.max_width // 2 + 1))
    num_frames = int(rng.integers(settings.min_frames, settings.max_frames + 1))
    # Sweeps cover at least 0.56 of the picture, a factor of 2.2 in size (0.27 to 0.72 of the height) and 120 degrees.
    reach_xy = rng.uniform(0.56, 0.7, size=2)
    start_xy = 0.15 + (0.7 - reach_xy) * rng.uniform(size=2)
    start_log_size = math.log(rng.uniform(0.27, 0.3))
    reach_log_size = math.log(rng.uniform(2.2, 2.4))
    start_angle = rng.uniform(0.0, 2.0 * math.pi)
    reach_angle = math.radians(rng.uniform(120.0, 180.0))
    starts = np.array([*start_xy, start_log_size, start_angle])
    reaches = np.array([*reach_xy, reach_log_size, reach_angle])
    # A common offset within the first frame's span makes each frame's instant uniform over the whole sweep.
    instants = (np.arange(num_frames) + rng.uniform()) / num_frames
    poses = np.tile(starts + reaches * rng.uniform(size=4), (num_frames, 1))
    coordinate, backwards = divmod(label, 2)
    poses[:, coordinate] = starts[coordinate] + reaches[coordinate] * instants
    poses[:, 2] = [math.exp(log_size) for log_size in poses[:, 2]]
    return Scene(look=look, width=width, poses=poses[::-1] if backwards else poses)


def render(scene: Scene, height: int) -> Pixels:
    """Draw a scene: uint8 RGB [num_frames, height, scene.width, 3].

    Only + - * / sqrt floor abs min max touch whole pictures: IEEE 754 fixes their results, so the pixels do not depend on the
    processor's vector units. The object is drawn from its signed distance, which gives smooth edges at any size and angle.
    """
    rng = np.random.default_rng(scene.look)
    ground = rng.uniform(60.0, 195.0)
    background = ground + _texture(rng, height, scene.width)
    head, tail = _contrasting_colours(rng, ground)
    shape = _SHAPES[int(rng.integers(len(_SHAPES)))]
    stripes_per_unit = np.float32(rng.uniform(1.5, 3.0))

    x, y, size = (scene.poses[:, i].astype(np.float32)[:, None, None] for i in range(3))
    radius = size * np.float32(height / 2)
    cos, sin = (np.array([f(a) for a in scene.poses[:, 3]], dtype=np.float32)[:, None, None] for f in (math.cos, math.sin))
    dx = (np.arange(scene.width, dtype=np.float32) + np.float32(0.5) - x * np.float32(scene.width)) / radius
    dy = (np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5) - y * np.float32(height)) / radius
    u, v = dx * cos + dy * sin, dy * cos - dx * sin  # the object's own axes; its head points to v = -1

    coverage = np.clip(np.float32(0.5) - shape(u, v) * radius, 0, 1)[..., None]
    stripe = np.abs(u * stripes_per_unit - np.floor(u * stripes_per_unit) - np.float32(0.5))  # 0 to 0.5
    shade = (np.float32(0.8) + np.float32(0.6) * stripe)[..., None]
    tail_share = np.clip(v * np.float32(5) + np.float32(0.5), 0, 1)[..., None]
    painted = (head + (tail - head) * tail_share) * shade
    picture = background + (painted - background) * coverage
    pixels: Pixels = np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)
    return pixels


def _both(one: Plane, other: Plane) -> Plane:
    result: Plane = np.maximum(one, other)
    return result


def _either(one: Plane, other: Plane) -> Plane:
    result: Plane = np.minimum(one, other)
    return result


def _box(u: Plane, v: Plane, centre: tuple[float, float], half_u: float, half_v: float) -> Plane:
    return _both(np.abs(u - np.float32(centre[0])) - np.float32(half_u), np.abs(v - np.float32(centre[1])) - np.float32(half_v))


def _disc(u: Plane, v: Plane, centre_v: float, radius: float) -> Plane:
    below = v - np.float32(centre_v)
    distance: Plane = np.sqrt(u * u + below * below) - np.float32(radius)
    return distance


def _arrow(u: Plane, v: Plane) -> Plane:
    tip = _both(v - np.float32(0.1), (np.abs(u) - np.float32(0.8) * (v + np.float32(1))) / np.float32(1.28))
    return _either(tip, _box(u, v, (0.0, 0.45), 0.3, 0.5))


def _hammer(u: Plane, v: Plane) -> Plane:
    return _either(_box(u, v, (0.0, -0.6), 0.85, 0.32), _box(u, v, (0.0, 0.2), 0.28, 0.8))


def _boot(u: Plane, v: Plane) -> Plane:
    return _either(_box(u, v, (-0.4, -0.1), 0.32, 0.85), _box(u, v, (0.05, 0.55), 0.77, 0.32))


def _spoon(u: Plane, v: Plane) -> Plane:
    return _either(_disc(u, v, -0.45, 0.55), _box(u, v, (0.0, 0.45), 0.22, 0.55))


def _open_mouth(u: Plane, v: Plane) -> Plane:
    mouth = (np.abs(u) + np.float32(0.8) * v) / np.float32(1.28)
    return _both(_disc(u, v, 0.0, 0.9), -mouth)


# Signed distances (negative inside) in units of the object's radius; none looks the same after a turn of less than 360 degrees.
_SHAPES = (_arrow, _hammer, _boot, _spoon, _open_mouth)


def _texture(rng: np.random.Generator, height: int, width: int) -> Plane:
    """Smooth noise of three scales and fine grain, at most 55 from 0: float32 [height, width, 3]."""
    texture = rng.uniform(-9.0, 9.0, size=(height, width, 3)).astype(np.float32)
    for cells, amplitude in ((2, 18.0), (5, 15.0), (15, 13.0)):
        grid = rng.uniform(-amplitude, amplitude, size=(cells + 1, cells + 1, 3)).astype(np.float32)
        texture += _stretch(_stretch(grid, height).swapaxes(0, 1), width).swapaxes(0, 1)
    return texture


def _stretch(grid: Plane, length: int) -> Plane:
    """Linear interpolation along the first axis to `length` points."""
    places = np.arange(length, dtype=np.float32) * np.float32((len(grid) - 1) / length)
    cells = places.astype(np.int64)
    shares = (places - cells.astype(np.float32))[:, None, None]
    result: Plane = grid[cells] + (grid[cells + 1] - grid[cells]) * shares
    return result


def _contrasting_colours(rng: np.random.Generator, ground: float) -> tuple[Plane, Plane]:
    """Two colours [3] of the object: far from the background's brightness, and apart from each other."""
    away = -1.0 if ground > 127.5 else 1.0
    tint = rng.uniform(-25.0, 25.0, size=(2, 3))
    head = ground + away * 95.0 + tint[0]
    tail = ground + away * 55.0 + tint[1]
    strong = rng.permutation(3)[:2]  # one channel of each pushes the hues apart
    head[strong[0]] += away * 30.0
    tail[strong[1]] -= away * 90.0
    return head.astype(np.float32), tail.astype(np.float32)


def _split_numbers(settings: SyntheticSettings, layout: Layout) -> dict[str, list[int]]:
    """The numbers of each split's videos; the classes of consecutive numbers go round. Broken ones come last."""
    first_test = settings.num_train + settings.num_validation
    num_test = settings.num_test if layout == "something_v1" else 0
    first_broken = first_test + settings.num_test
    return {
        "train": [*range(settings.num_train), *range(first_broken, first_broken + settings.num_broken)],
        "validation": list(range(settings.num_train, first_test)),
        "test": list(range(first_test, first_test + num_test)),
    }


def _broken_kind(settings: SyntheticSettings, number: int) -> str | None:
    position = number - (settings.num_train + settings.num_validation + settings.num_test)
    return BROKEN_KINDS[position % len(BROKEN_KINDS)] if position >= 0 else None


def _video_id(settings: SyntheticSettings, number: int, layout: Layout) -> str:
    """Something-V1: numbers from 1 without gaps. Diving48: a source's 11 characters and 5 digits, some beginning with "-"."""
    if layout == "something_v1":
        return str(number + 1)
    source, part = divmod(number, _VIDEOS_PER_SOURCE)
    digest = hashlib.sha256(f"{settings.seed} {source}".encode()).digest()
    name = base64.urlsafe_b64encode(digest).decode()[:11]
    if source % _SOURCES_PER_DASH == 0:
        name = "-" + name[1:]
    return f"{name}_{part:05d}"


def _file_name(settings: SyntheticSettings, number: int, layout: Layout) -> str:
    return _video_id(settings, number, layout) + (".mp4" if layout == "diving48" else "")


def _write_video(settings: SyntheticSettings, number: int, layout: Layout, staged: Path, target: Path) -> int:
    """Write one video under a temporary name and move it into place. Returns its number of frames."""
    broken = _broken_kind(settings, number)
    if broken == "missing":
        return 0
    frames = render(draw_scene(settings, number, number % len(LABEL_NAMES)), settings.height)
    if layout == "diving48":
        _write_mp4(frames, _DIVING_FPS[number % len(_DIVING_FPS)], broken, staged)
    else:
        _write_frame_folder(frames, broken, staged)
    staged.rename(target)
    return len(frames)


def _write_frame_folder(frames: Pixels, broken: str | None, folder: Path) -> None:
    folder.mkdir()
    if broken == "empty":
        return
    for index, frame in enumerate(frames):
        data = simplejpeg.encode_jpeg(frame, quality=_JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")
        if broken is not None and index == len(frames) // 2:
            data = data[: len(data) // 2] if broken == "truncated" else _NOT_A_VIDEO
        (folder / f"{index + 1:05d}.jpg").write_bytes(data)


def _write_mp4(frames: Pixels, fps: str, broken: str | None, path: Path) -> None:
    """Bytes depend on the ffmpeg version alone. moov comes after mdat, as in the genuine files."""
    if broken in ("empty", "text"):
        path.write_bytes(b"" if broken == "empty" else _NOT_A_VIDEO)
        return
    encode_mp4(frames, fps, path)
    if broken == "truncated":
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])


def _claim(settings: SyntheticSettings, root: Path, layout: Layout) -> None:
    """Mark `root` as made by these settings, so that no real dataset and no other generated one is ever mixed with it."""
    root.mkdir(parents=True, exist_ok=True)
    marker = {"generator_version": GENERATOR_VERSION, "layout": layout, "settings": settings.model_dump(mode="json")}
    path = root / _SETTINGS_FILE
    if not path.exists():
        if any(not path.name.startswith(".tmp-") for path in root.iterdir()):
            raise DataError(f"{root} is not empty and was not generated; expected a new folder; choose another or remove it")
        write_json(path, marker)
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; remove {root} and generate again") from error
    if found != marker:
        raise DataError(f"{root} was generated with other settings (see {_SETTINGS_FILE}); choose another folder or remove it")


def _write_csv_files(settings: SyntheticSettings, root: Path, splits: dict[str, list[int]]) -> None:
    rows = {"labels": list(LABEL_NAMES)}
    for split, numbers in splits.items():
        ids = [_video_id(settings, number, "something_v1") for number in numbers]
        texts = [LABEL_NAMES[number % len(LABEL_NAMES)] for number in numbers]
        rows[split] = ids if split == "test" else [f"{video_id};{text}" for video_id, text in zip(ids, texts, strict=True)]
    for part, lines in rows.items():
        write_bytes(root / f"something-something-v1-{part}.csv", "".join(f"{line}\n" for line in lines).encode())


def _write_json_files(settings: SyntheticSettings, root: Path, splits: dict[str, list[int]]) -> None:
    """Sorted by label, as the genuine files are, so that whoever takes a contiguous part of them sees few classes."""
    for split, file_part in (("train", "train"), ("validation", "test")):
        rows = [
            {
                "vid_name": _video_id(settings, number, "diving48"),
                "label": number % len(LABEL_NAMES),
                "start_frame": 0,
                "end_frame": len(draw_scene(settings, number, 0).poses) - 1,
            }
            for number in sorted(splits[split], key=lambda number: number % len(LABEL_NAMES))
        ]
        write_json(root / f"Diving48_V2_{file_part}.json", rows)
    write_json(root / "Diving48_vocab.json", [name.split(" ") for name in LABEL_NAMES])
