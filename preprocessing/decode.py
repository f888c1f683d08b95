"""Raw videos to JPEG frames: ffmpeg for video files, untouched bytes for folders of JPEG frames.

A video is either kept whole or rejected with a reason; FORMAT.md states the rule. Video files are hostile until proven
otherwise: ffmpeg opens only that file (protocol and demuxer lists, `file:` prefix, no shell), with limits on time, pixels,
memory and output, in a process group of its own and an environment without secrets.
"""

import functools
import os
import re
import selectors
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import ffmpeg
import simplejpeg
from pydantic import Field

from infra.errors import PipelineError
from infra.settings import Settings

# Demuxers that read nothing but the file itself. Playlists, manifests, image sequences and devices are left out on purpose.
_DEMUXERS = "mov,mp4,avi,matroska,webm,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,flv,asf,ogg,gif,rm,dv,nut"
_MAX_PIXELS = 1 << 26
_MAX_ALLOC_BYTES = 1 << 30
_MAX_MESSAGE_BYTES = 16 << 20
# A file in which more than a tenth of the packets cannot be decoded is damaged (ffmpeg then ends with a code that is not 0).
_MAX_ERROR_RATE = 0.1
_READ_BYTES = 1 << 20
_NUM_DETAIL_LINES = 5
_MAX_DETAIL_CHARS = 600

_MESSAGE = re.compile(r"^((?:\[[^\]]* @ 0x[0-9a-fA-F]+\] )*)\[(warning|error|fatal|panic)\] (.*)$")
_FPS = re.compile(r"Stream #0:0.*: Video: mjpeg.*?, (\d+(?:\.\d+)?)(k?) fps")
_FRAME_NAME = re.compile(r"([0-9]+)\.jpe?g", re.IGNORECASE)


class DecodeSettings(Settings):
    """How videos become JPEG frames.

    `short_side` (pixels) scales frames of video files to that shorter side, with square pixels; None keeps the stored pixels.
    `jpeg_quality` is ffmpeg's quantiser, 2 (best) to 31. Frame folders are never scaled nor encoded again.
    A video that takes longer than `timeout_seconds` or gives more than `max_video_bytes` of JPEG data is rejected.
    """

    short_side: int | None = Field(default=None, ge=16, le=4096)
    jpeg_quality: int = Field(default=2, ge=2, le=31)
    timeout_seconds: float = Field(default=120.0, gt=0)
    max_video_bytes: int = Field(default=1 << 30, ge=1 << 16)


@dataclass(frozen=True)
class DecodedVideo:
    """The frames of one video, in order.

    `frames` are whole JPEG files of one size, `height` x `width` pixels; `fps` is what the container says (None if it does not,
    and for frame folders); `source_bytes` is the size of the raw file or files; `detail` holds what the decoder complained
    about although the video is kept, or "".
    """

    frames: list[bytes]
    fps: float | None
    height: int
    width: int
    source_bytes: int
    detail: str


class VideoRejectedError(Exception):
    """A video cannot be used: `reason` is one of the codes in FORMAT.md, `detail` what was found. Never reaches the user."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@functools.cache
def ffmpeg_path() -> str:
    """The ffmpeg program: the one on PATH, else the one inside the wheel `imageio-ffmpeg`.

    Raises:
        PipelineError: if there is neither.
    """
    on_path = shutil.which("ffmpeg")
    if on_path is not None:
        return on_path
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise PipelineError(
            "no ffmpeg program was found, neither on PATH nor inside the package imageio-ffmpeg; "
            "install one (apt-get install ffmpeg) or reinstall with: pip install --force-reinstall imageio-ffmpeg"
        ) from error


@functools.cache
def ffmpeg_version() -> str:
    """The version word that `ffmpeg -version` prints, for example "n7.1" or "5.1.9-0+deb12u1".

    Raises:
        PipelineError: if ffmpeg is missing or does not run.
    """
    command = [ffmpeg_path(), "-hide_banner", "-version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        raise PipelineError(
            f"{ffmpeg_path()} does not run: {error}; install ffmpeg or put a working one first on PATH"
        ) from error
    words = done.stdout.split()
    return words[2] if words[:2] == ["ffmpeg", "version"] and len(words) > 2 else "unknown"


def decode_video(path: Path, settings: DecodeSettings) -> DecodedVideo:
    """Decode every frame of a video file, upright, at its own times (a variable rate is kept), to JPEG.

    The first video stream that is not a cover picture is taken; frames are those that ffmpeg decodes, whatever the container
    counts. The same file, settings and ffmpeg give the same bytes.

    Raises:
        VideoRejectedError: if the video cannot be used.
        OSError: if the machine, not the video, is at fault (no space for messages, ffmpeg killed from outside).
        PipelineError: if ffmpeg is missing.
    """
    path = path.absolute()
    _require_regular_file(path)
    output, return_code, lines = _run_ffmpeg(_ffmpeg_command(path, settings), settings)
    messages = [found for line in lines if (found := _MESSAGE.match(line))]
    serious = [found[3] for found in messages if found[2] != "warning"]
    detail = _clean_detail(serious, path)
    frames = split_jpegs(output)
    cut = [found[3] for found in messages if _says_cut(found[1], found[3])]
    if frames and cut:
        raise VideoRejectedError("truncated", _clean_detail(cut[:1] + serious, path))
    if return_code != 0:
        code = f"killed by signal {-return_code}" if return_code < 0 else f"exit code {return_code}"
        kind = "damaged" if frames else "undecodable"
        raise VideoRejectedError(kind, f"ffmpeg {code} after {len(frames)} frames: {detail}")
    if not frames:
        raise VideoRejectedError("no_frames", detail or "ffmpeg ended well but gave no frame")
    height, width = _common_size(frames)
    rates = [float(found[1]) * (1000 if found[2] else 1) for line in lines if (found := _FPS.search(line))]
    return DecodedVideo(frames, rates[-1] if rates else None, height, width, path.stat().st_size, detail)


def read_frame_folder(path: Path, settings: DecodeSettings) -> DecodedVideo:
    """Read a folder of numbered JPEG files (00001.jpg, 00002.jpg, ...) in numeric order; the bytes pass through untouched.

    Numbers begin at 0 or 1 and have no gap; every file must decode in full. Hidden files and files of other types are not
    frames. Links are not followed.

    Raises:
        VideoRejectedError: if the folder cannot be used.
        OSError: if a file cannot be read.
    """
    if not path.is_dir():
        raise VideoRejectedError("missing", f"no folder of that name: {path.name}")
    names: dict[int, str] = {}
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(".") or not entry.name.lower().endswith((".jpg", ".jpeg")):
            continue
        found = _FRAME_NAME.fullmatch(entry.name)
        if found is None or entry.is_symlink() or not entry.is_file():
            raise VideoRejectedError("odd_file", f"{entry.name!r} is no numbered JPEG file such as 00001.jpg")
        number = int(found[1])
        if number in names:
            raise VideoRejectedError("odd_file", f"{sorted([names[number], entry.name])} have the same number")
        names[number] = entry.name
    _require_no_gap(sorted(names))
    frames: list[bytes] = []
    num_bytes = 0
    for _, name in sorted(names.items()):
        data = (path / name).read_bytes()
        num_bytes += len(data)
        if num_bytes > settings.max_video_bytes:
            raise VideoRejectedError("too_large", f"more than {settings.max_video_bytes} bytes of JPEG data")
        _require_whole_jpeg(data, name)
        frames.append(data)
    height, width = _common_size(frames)
    return DecodedVideo(frames, None, height, width, num_bytes, "")


def split_jpegs(data: bytes) -> list[bytes]:
    """Split concatenated baseline JPEG files, as ffmpeg's mjpeg encoder writes them; an unfinished last one is dropped.

    Segments before the scan are skipped by their length, so bytes inside them are never taken for an end; inside the scan a
    0xFF is always followed by 0x00 or a restart marker (ITU-T T.81, B.1.1.5), so the first FF D9 is the end.

    Raises:
        ValueError: if `data` is not such a stream.
    """
    jpegs = []
    start = 0
    while start < len(data):
        if data[start : start + 2] != b"\xff\xd8":
            raise ValueError(f"no JPEG begins at byte {start} of the stream")
        position = start + 2
        marker = data[position : position + 2]
        while len(marker) == 2 and marker != b"\xff\xda":
            if marker[0] != 0xFF:
                raise ValueError(f"no JPEG segment begins at byte {position} of the stream")
            length = data[position + 2 : position + 4]
            position += 2 + int.from_bytes(length, "big") if len(length) == 2 else len(data)
            marker = data[position : position + 2]
        end = data.find(b"\xff\xd9", position)
        if len(marker) < 2 or end < 0:
            break
        jpegs.append(data[start : end + 2])
        start = end + 2
    return jpegs


def _ffmpeg_command(path: Path, settings: DecodeSettings) -> list[str]:
    """The command line. `settb`, `setpts` and `enc_time_base` number the frames, since the encoder refuses equal timestamps."""
    filters = []
    if settings.short_side is not None:
        side = settings.short_side
        filters.append(f"scale=w='if(gte(dar,1),round({side}*dar),{side})':h='if(gte(dar,1),{side},round({side}/dar))'")
        filters.append("setsar=1")
    filters.append("settb=1/1000,setpts=N")
    source = ffmpeg.input(
        f"file:{path}",
        protocol_whitelist="file,pipe",
        format_whitelist=_DEMUXERS,
        max_pixels=_MAX_PIXELS,
        max_streams=64,
        threads=1,
        flags="+bitexact",
    )
    output = source["V:0"].output(
        "pipe:1",
        format="image2pipe",
        vcodec="mjpeg",
        vf=",".join(filters),
        sws_flags="bicubic+accurate_rnd+bitexact",
        fps_mode="passthrough",
        enc_time_base="1/1000",
        pix_fmt="yuvj420p",
        threads=1,
        huffman="default",
        map_metadata=-1,
        **{"flags:v": "+bitexact", "q:v": settings.jpeg_quality},
    )
    limits = ["-max_alloc", str(_MAX_ALLOC_BYTES), "-max_error_rate", str(_MAX_ERROR_RATE), "-filter_threads", "1"]
    limits += ["-timelimit", str(int(settings.timeout_seconds) + 1)]
    quiet = ["-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info"]
    command: list[str] = output.compile(cmd=[ffmpeg_path(), *quiet, *limits])
    return command


def _run_ffmpeg(command: list[str], settings: DecodeSettings) -> tuple[bytes, int, list[str]]:
    """Run to the end or to a limit; returns the output, the exit code and the lines of messages."""
    environment = {"PATH": os.defpath, "LC_ALL": "C"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        try:
            output = _collect(process, messages, settings)
            return_code = process.wait(timeout=settings.timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise VideoRejectedError("timeout", f"ffmpeg closed its output but did not end: {error.timeout} s") from error
        finally:
            _kill_group(process)
        if return_code == -signal.SIGKILL:
            raise ChildProcessError(f"ffmpeg was killed from outside (out of memory?) while it ran: {' '.join(command)}")
        messages.seek(0)
        return output, return_code, messages.read().decode("utf-8", "replace").splitlines()


def _collect(process: subprocess.Popen[bytes], messages: IO[bytes], settings: DecodeSettings) -> bytes:
    """Read standard output until it ends, watching the clock, the output's size and the messages' size."""
    assert process.stdout is not None
    deadline = time.monotonic() + settings.timeout_seconds
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if time.monotonic() > deadline:
                raise VideoRejectedError("timeout", f"ffmpeg took longer than {settings.timeout_seconds:g} s")
            if os.fstat(messages.fileno()).st_size > _MAX_MESSAGE_BYTES:
                raise VideoRejectedError("damaged", f"ffmpeg printed more than {_MAX_MESSAGE_BYTES} bytes of messages")
            if not selector.select(timeout=0.2):
                continue
            chunk = os.read(process.stdout.fileno(), _READ_BYTES)
            if not chunk:
                return bytes(output)
            output += chunk
            if len(output) > settings.max_video_bytes:
                raise VideoRejectedError("too_large", f"more than {settings.max_video_bytes} bytes of JPEG data")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End ffmpeg and whatever it started; without effect on one that has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _says_cut(source: str, message: str) -> bool:
    """Whether a demuxer's message means that the file ends before what its own header promises.

    MPEG transport streams mark packets as corrupt after every gap in reception, which is no cut.
    """
    if "partial file" in message or "File ended prematurely" in message:
        return True
    return message.startswith("Packet corrupt (stream") and "mpegts" not in source


def _clean_detail(messages: list[str], path: Path) -> str:
    """The last few messages as one printable line without the folder names of this machine."""
    tail = "; ".join(messages[-_NUM_DETAIL_LINES:] if len(messages) <= _NUM_DETAIL_LINES else [messages[0], *messages[-4:]])
    tail = tail.replace(f"file:{path}", path.name).replace(str(path), path.name)
    return "".join(char if char.isprintable() else "?" for char in tail)[:_MAX_DETAIL_CHARS]


def _require_regular_file(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise VideoRejectedError("missing", f"no file of that name: {path.name}") from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoRejectedError("odd_file", f"{path.name} is no regular file")
    if status.st_size == 0:
        raise VideoRejectedError("empty", "the file has 0 bytes")


def _require_no_gap(numbers: list[int]) -> None:
    if not numbers:
        raise VideoRejectedError("no_frames", "the folder holds no JPEG file")
    first = min(numbers[0], 1)
    missing = sorted(set(range(first, min(numbers[-1] + 1, first + 2 * len(numbers)))) - set(numbers))
    if missing:
        raise VideoRejectedError(
            "gap", f"frame {missing[0]} is missing; found {len(numbers)} from {numbers[0]} to {numbers[-1]}"
        )


def _require_whole_jpeg(data: bytes, name: str) -> None:
    try:
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        if height * width > _MAX_PIXELS:
            raise VideoRejectedError("too_large", f"{name} has {width}x{height} pixels")
        simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True)
    except ValueError as error:
        raise VideoRejectedError("not_jpeg", f"{name}: {error}") from error


def _common_size(frames: list[bytes]) -> tuple[int, int]:
    sizes = {tuple(simplejpeg.decode_jpeg_header(frame)[:2]) for frame in frames}
    if len(sizes) > 1:
        raise VideoRejectedError(
            "size_changes", f"frames have {len(sizes)} sizes, for example {sorted(sizes)[:3]} (height, width)"
        )
    height, width = sizes.pop()
    return int(height), int(width)
