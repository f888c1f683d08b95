"""Videos that are stored as numbered JPEG files: 00001.jpg, 00002.jpg, ...

The bytes pass through untouched, whether the files lie in a folder, an object store or an archive; only where a smaller size is
asked for are they decoded and encoded again. FORMAT.md states which folders are rejected.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from infra.filesystems import Folder
from preprocessing.decode import DecodedVideo, DecodeSettings, VideoRejectedError, chosen_frames, common_size, too_many_bytes
from preprocessing.jpeg import OversizeError, jpeg_size, require_whole_jpeg

# Of frames that were scaled; 4:2:0. About what ffmpeg's best quantiser gives.
_QUALITY = 95
_FRAME_NAME = re.compile(r"([0-9]+)\.jpe?g", re.IGNORECASE | re.ASCII)
_MAX_DIGITS = 18


def frames_from_files(files: Iterable[tuple[str, Callable[[], bytes]]], settings: DecodeSettings) -> DecodedVideo:
    """Put numbered JPEG files in numeric order and check them; the bytes pass through untouched unless they are scaled.

    Numbers begin at 0 or 1 and have no gap; every file that is taken must decode in full. Hidden files and files of other types
    are not frames.

    Args:
        files: file names without folders, in any order, and for each a function that gives the content; it is called once at
            most, and only if the names are in order. It may raise VideoRejectedError.
        settings: `short_side` scales frames that are larger and leaves the others; `max_frames` and `max_video_bytes` hold as
            for video files; the rest has no effect.

    Raises:
        VideoRejectedError: if the frames cannot be used.
        OSError: what the functions raise.
    """
    numbered = _by_number(files)
    chosen = chosen_frames(len(numbered), settings.max_frames)
    frames: list[bytes] = []
    num_bytes = 0
    source_bytes = 0
    sizes: set[tuple[int, int]] = set()
    for index in chosen:
        name, read = numbered[index]
        data = read()
        source_bytes += len(data)
        frame, size = _checked(name, data, settings.short_side)
        sizes.add(size)
        num_bytes += len(frame)
        if num_bytes > settings.max_video_bytes:
            raise too_many_bytes(settings)
        frames.append(frame)
    height, width = common_size(sizes)
    return DecodedVideo(frames, None, height, width, source_bytes, "")


def read_frame_folder(path: Path, settings: DecodeSettings) -> DecodedVideo:
    """Read a local folder of numbered JPEG files; see `frames_from_files`. Links in it are not followed.

    Raises:
        VideoRejectedError: if the folder cannot be used.
        OSError: if a file cannot be read.
    """
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoRejectedError("missing", f"no folder of that name: {path.name}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise VideoRejectedError("missing", "no folder can have so long a name") from error
        if error.errno == errno.ELOOP:
            raise VideoRejectedError("missing", f"a link that leads to itself: {path.name}") from error
        raise
    folder = str(path)
    most = settings.max_video_bytes
    return frames_from_files([(name, partial(_read_regular_file, f"{folder}/{name}", name, most)) for name in names], settings)


def read_remote_frame_folder(folder: Folder, settings: DecodeSettings) -> DecodedVideo:
    """Read a folder of numbered JPEG files in an object store; see `frames_from_files`.

    Raises:
        VideoRejectedError: if the folder cannot be used.
        OSError: if the network fails.
    """
    sizes = folder.list()
    if not sizes:
        raise VideoRejectedError("missing", f"no folder of that name: {folder.url.rpartition('/')[2]}")
    if any(size > settings.max_video_bytes for size in sizes.values()):
        raise too_many_bytes(settings)
    return frames_from_files([(name, partial(folder.read_bytes, name)) for name in sizes], settings)


def is_frame_folder(path: Path) -> bool:
    """Whether a local folder holds a numbered JPEG file, so that it is one video and not a folder of videos.

    Raises:
        OSError: if the folder cannot be read.
    """
    with os.scandir(path) as entries:
        return any(_FRAME_NAME.fullmatch(entry.name) for entry in entries)


def _by_number(files: Iterable[tuple[str, Callable[[], bytes]]]) -> list[tuple[str, Callable[[], bytes]]]:
    numbered: dict[int, tuple[str, Callable[[], bytes]]] = {}
    for name, read in files:
        if name.startswith(".") or not name.lower().endswith((".jpg", ".jpeg")):
            continue
        found = _FRAME_NAME.fullmatch(name)
        if found is None or len(found[1]) > _MAX_DIGITS:
            raise VideoRejectedError("odd_file", f"{name!r} is no numbered JPEG file such as 00001.jpg")
        number = int(found[1])
        if number in numbered:
            raise VideoRejectedError("odd_file", f"{sorted([numbered[number][0], name])} have the same number")
        numbered[number] = name, read
    _require_no_gap(sorted(numbered))
    return [numbered[number] for number in sorted(numbered)]


def _require_no_gap(numbers: list[int]) -> None:
    if not numbers:
        raise VideoRejectedError("no_frames", "the folder holds no JPEG file")
    first = min(numbers[0], 1)
    missing = next((expected for expected, number in enumerate(numbers, first) if number != expected), None)
    if missing is not None:
        raise VideoRejectedError("gap", f"frame {missing} is missing; found {len(numbers)} from {numbers[0]} to {numbers[-1]}")


def _read_regular_file(path: str, name: str, max_bytes: int) -> bytes:
    """The content of a file that is no link, no pipe and no device, even if it was swapped for one a moment ago."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise VideoRejectedError("odd_file", f"{name!r} is no regular file") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise VideoRejectedError("odd_file", f"{name!r} is no regular file")
        if status.st_size > max_bytes:
            raise VideoRejectedError("too_large", f"{name!r} has {status.st_size} bytes; expected at most {max_bytes}")
        data = os.read(descriptor, status.st_size)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def _checked(name: str, data: bytes, short_side: int | None) -> tuple[bytes, tuple[int, int]]:
    """The file itself if it decodes in full, or a smaller one if it is larger than asked for; and its height and width."""
    try:
        height, width = require_whole_jpeg(data)
        if short_side is None or short_side >= min(height, width):
            return data, (height, width)
        frame = _scaled(data, short_side)
        return frame, jpeg_size(frame)
    except OversizeError as error:
        raise VideoRejectedError("too_large", f"{name} {error}") from error
    except ValueError as error:
        raise VideoRejectedError("not_jpeg", f"{name}: {error}") from error


def _scaled(data: bytes, short_side: int) -> bytes:
    image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    scale = short_side / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return bytes(simplejpeg.encode_jpeg(pixels, quality=_QUALITY, colorsubsampling="420"))
