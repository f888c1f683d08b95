"""Video files to JPEG frames, with ffmpeg.

A video is either kept whole or rejected with a reason; FORMAT.md states the rule. Video files are hostile until proven
otherwise: ffmpeg opens only that file (protocol and demuxer lists, `file:` prefix, no shell), with limits on time, pixels,
memory and output, in the sandbox of `sandbox.py`.
"""

import errno
import functools
import math
import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ffmpeg
from pydantic import Field

from infra.errors import PipelineError
from infra.settings import Settings
from preprocessing.jpeg import MAX_PIXELS, JpegSplitter
from preprocessing.messages import clean_detail, complaints, output_rate, printable, says_too_long
from preprocessing.sandbox import MessageLimitError, SandboxedProcess, TimeLimitError, start_sandboxed

MAX_FRAMES = 1_000_000
# Demuxers that read nothing but the file itself. Playlists, manifests, image sequences and devices are left out on purpose.
_DEMUXERS = "mov,mp4,avi,matroska,webm,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,flv,asf,ogg,gif,rm,dv,nut"
# How files begin whose demuxer finds the exact frame of a time without reading all before it: MP4 and Matroska.
_SEEKABLE = re.compile(rb"....(ftyp|moov|mdat|free|skip|wide)|\x1aE\xdf\xa3", re.DOTALL)
_MAX_ALLOC_BYTES = 1 << 30
# A file in which more than a tenth of the packets cannot be decoded is damaged (ffmpeg then ends with a code that is not 0).
_MAX_ERROR_RATE = 0.1
# The pixel's shape, width by height, in ffmpeg's language. Nearly square is square (640:639 comes from rounding when a video
# was made smaller), and nothing that a camera or a disc writes is beyond 4.
_PIXEL_SHAPE = "if(between(sar,0.25,4)*gt(abs(sar-1),0.005),sar,1)"


class DecodeSettings(Settings):
    """How videos become JPEG frames.

    Args:
        short_side: pixels of the frames' shorter side; None keeps the stored size. Frames that are stored as JPEG files are
            scaled only if they are larger, else their bytes pass through.
        jpeg_quality: ffmpeg's quantiser, 2 (best) to 31, of video files.
        fps: None takes every frame of a video file, at its own time; a number resamples to that constant rate, each time with
            the frame that a player shows then. It has no effect on folders of frames, which know no times.
        max_frames: a video of more frames keeps that many, evenly spaced: of n those at floor((i + 0.5) * n / max_frames).
        max_seconds: a video file that is longer, or of which a longer span is asked for, is rejected.
        timeout_seconds: a video that takes longer to decode is rejected.
        max_video_bytes: a video that gives more JPEG data is rejected; a worker holds one video in memory.
    """

    short_side: int | None = Field(default=None, ge=16, le=4096)
    jpeg_quality: int = Field(default=2, ge=2, le=31)
    fps: float | None = Field(default=None, ge=0.01, le=1000)
    max_frames: int | None = Field(default=None, ge=1, le=MAX_FRAMES)
    max_seconds: float = Field(default=3600.0, gt=0, le=1e9)
    timeout_seconds: float = Field(default=120.0, gt=0, le=1e6)
    max_video_bytes: int = Field(default=128 << 20, ge=1 << 16)


@dataclass(frozen=True)
class DecodedVideo:
    """The frames of one video, in order.

    `frames` are whole JPEG files of one size, `height` x `width` pixels. `fps` is what the container says or what was asked
    for, and the mean rate of the frames that a budget has left; None if it is unknown, and for frame folders. `source_bytes` is
    the size of the raw file or files. `detail` is what the decoder complained about although the video is kept, or "".
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


@dataclass
class _Run:
    """What one run of ffmpeg gave: `num_frames` in all, of which `frames` are held, and its messages."""

    frames: list[bytes] = field(default_factory=list)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    num_frames: int = 0
    return_code: int = 0
    lines: list[str] = field(default_factory=list)


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


def decode_video(path: Path, settings: DecodeSettings, start: float | None = None, end: float | None = None) -> DecodedVideo:
    """Decode a video file, upright and with square pixels, to JPEG: every frame at its own time, unless `settings` differ.

    The first video stream that is not a cover picture is taken; frames are those that ffmpeg decodes, whatever the container
    counts. The same file, settings and ffmpeg give the same bytes.

    Args:
        path: a local file.
        settings: see `DecodeSettings`.
        start: seconds from the beginning of the file; frames with start <= time < end are taken. None means the beginning.
        end: None means the end.

    Raises:
        VideoRejectedError: if the video cannot be used.
        OSError: if the machine, not the video, is at fault (no space for messages, ffmpeg killed from outside).
        PipelineError: if ffmpeg is missing.
    """
    path = path.absolute()
    source_bytes = _require_regular_file(path)
    span = _checked_span(start, end)
    run = _run_ffmpeg(path, settings, span, picks=None)
    detail = _judge(run, path)
    fps = settings.fps or output_rate(run.lines)
    if settings.max_frames is not None and run.num_frames > settings.max_frames:
        num_frames = run.num_frames
        if len(run.frames) == num_frames:
            run.frames = [run.frames[index] for index in chosen_frames(num_frames, settings.max_frames)]
        else:
            run = _run_ffmpeg(path, settings, span, picks=(num_frames, settings.max_frames))
            detail = _judge(run, path)
        fps = None if fps is None else fps * settings.max_frames / num_frames
    height, width = common_size(run.sizes)
    return DecodedVideo(run.frames, fps, height, width, source_bytes, detail)


def chosen_frames(num_frames: int, max_frames: int | None) -> Sequence[int]:
    """The indices of the frames that a budget leaves: all, or `max_frames` of them in the middles of equal spans.

    Example:
        >>> chosen_frames(10, 4)
        [1, 3, 6, 8]
    """
    if max_frames is None or num_frames <= max_frames:
        return range(num_frames)
    return [(2 * index + 1) * num_frames // (2 * max_frames) for index in range(max_frames)]


def common_size(sizes: set[tuple[int, int]]) -> tuple[int, int]:
    """The one (height, width) that all frames have.

    Raises:
        VideoRejectedError: if there are several.
    """
    if len(sizes) > 1:
        raise VideoRejectedError(
            "size_changes", f"frames have {len(sizes)} sizes, for example {sorted(sizes)[:3]} (height, width)"
        )
    (size,) = sizes
    return size


def too_many_bytes(settings: DecodeSettings) -> VideoRejectedError:
    """The rejection of a video that gives more JPEG data than `settings.max_video_bytes`."""
    advice = "raise shards.max_video_bytes, or set a smaller shards.short_side, shards.fps or shards.max_frames"
    return VideoRejectedError("too_large", f"more than {settings.max_video_bytes} bytes of JPEG data; {advice}")


def _ffmpeg_command(
    path: Path, settings: DecodeSettings, span: tuple[float, float], picks: tuple[int, int] | None
) -> list[str]:
    """The command line; `picks` is the number of frames that come and of those to keep, None for all."""
    seek, trim = _times(path, settings, span)
    source = ffmpeg.input(
        f"file:{path}",
        protocol_whitelist="file,pipe",
        format_whitelist=_DEMUXERS,
        max_pixels=MAX_PIXELS,
        max_streams=64,
        threads=1,
        # Frames of another size go through the same filters, which make them like the first, instead of starting a new count.
        reinit_filter=0,
        flags="+bitexact",
        **seek,
    )
    # ffmpeg encodes too. Planes through the pipe and libjpeg-turbo in the worker cost a tenth less processor time in all, but
    # at the same quality (45.8 dB of luma, 49.4 of chroma, the tests' clips at 256 px) a fifth to two fifths more bytes.
    output = source["V:0"].output(
        "pipe:1",
        format="image2pipe",
        vcodec="mjpeg",
        vf=",".join([*trim, *_filters(settings, picks)]),
        enc_time_base="1/1000",
        pix_fmt="yuvj420p",
        threads=1,
        huffman="default",
        map_metadata=-1,
        **{"flags:v": "+bitexact", "q:v": settings.jpeg_quality},
        **_passthrough(ffmpeg_version()),
    )
    limits = ["-max_alloc", str(_MAX_ALLOC_BYTES), "-max_error_rate", str(_MAX_ERROR_RATE), "-filter_threads", "1"]
    quiet = ["-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info"]
    command: list[str] = output.compile(cmd=[ffmpeg_path(), *quiet, *limits])
    return command


def _filters(settings: DecodeSettings, picks: tuple[int, int] | None) -> list[str]:
    filters = []
    if settings.fps is not None:
        filters.append(f"fps=fps={settings.fps!r}:round=up")
    if picks is not None:
        # The number of picks up to a frame is ceil((n + 1) * kept / total - 1/2); where it grows, the frame is one of them.
        total, kept = picks
        before, after = (f"ceil(({count}*{2 * kept}-{total})/{2 * total})" for count in ("n", "(n+1)"))
        filters.append(f"select='gt({after},{before})'")
    if settings.short_side is None:
        width, height = f"round(iw*max({_PIXEL_SHAPE},1))", f"round(ih/min({_PIXEL_SHAPE},1))"
    else:
        side, shape = settings.short_side, f"(iw/ih*{_PIXEL_SHAPE})"
        width, height = f"if(gte({shape},1),round({side}*{shape}),{side})", f"if(gte({shape},1),{side},round({side}/{shape}))"
    # `bitexact` alone gives the same bytes with and without SIMD here. `accurate_rnd` beside it changes no byte of the clips of
    # the tests (ffmpeg 9.0), and costs a tenth of a millisecond a frame where only the range changes.
    filters.append(f"scale=w='{width}':h='{height}':out_range=full:flags=bicubic+bitexact")
    # JPEG means BT.601 at full range, and nothing in the file can say otherwise. The matrix has its own step, after
    # the scaling: ffmpeg goes through RGB for it, which costs half as much there, and nothing for sources of that matrix.
    filters.append("scale=in_range=full:out_range=full:out_color_matrix=bt601:flags=bicubic+bitexact")
    # Frames are numbered anew, since the encoder refuses equal times.
    return [*filters, "setsar=1", "settb=1/1000", "setpts=N"]


def _times(path: Path, settings: DecodeSettings, span: tuple[float, float]) -> tuple[dict[str, str], list[str]]:
    """Options of the input and filters that take the frames with start <= time < end."""
    start, end = span
    # A frame after the limit is told in a message instead of being taken; what a container says of its length is often wrong.
    limit = "select='if(gte(t,{:.6f}),0*print(t),1)'"
    if start <= 0 and math.isinf(end):
        return {}, [limit.format(settings.max_seconds)]
    with path.open("rb") as file:
        seekable = _SEEKABLE.match(file.read(16)) is not None
    # After a seek times begin at 0 again; a whole second before the span is exact in all units of time.
    begin = max(0, math.floor(start) - 1) if seekable else 0
    trim = f"trim=start={start - begin:.6f}" + ("" if math.isinf(end) else f":end={end - begin:.6f}")
    # A container's own unit of time may be as long as a frame; the comparison is made in microseconds.
    filters = ["settb=1/1000000", trim, limit.format(start - begin + settings.max_seconds)]
    return {"ss": str(begin)} if begin else {}, filters


def _passthrough(version: str) -> dict[str, str]:
    """The option that keeps every frame at its own time; it was renamed in ffmpeg 5.1."""
    found = re.match(r"n?(\d+)\.(\d+)", version)
    old = found is not None and (int(found[1]), int(found[2])) < (5, 1)
    return {"vsync": "passthrough"} if old else {"fps_mode": "passthrough"}


def _run_ffmpeg(path: Path, settings: DecodeSettings, span: tuple[float, float], picks: tuple[int, int] | None) -> _Run:
    """Run to the end or to a limit; if a frame budget is set and there is too much to hold, the frames are only counted."""
    try:
        with start_sandboxed(_ffmpeg_command(path, settings, span, picks), settings.timeout_seconds) as process:
            return _collect(process, settings, may_drop=settings.max_frames is not None and picks is None)
    except TimeLimitError as error:
        raise VideoRejectedError("timeout", f"ffmpeg {error}; raise shards.timeout_seconds if the video is sound") from error
    except MessageLimitError as error:
        raise VideoRejectedError("damaged", f"ffmpeg {error}") from error


def _collect(process: SandboxedProcess, settings: DecodeSettings, *, may_drop: bool) -> _Run:
    run = _Run()
    splitter = JpegSplitter()
    num_bytes = 0
    for chunk in process.chunks():
        if not chunk:
            _require_short(process.messages(), settings)
        frames = splitter.feed(chunk)
        run.num_frames += len(frames)
        if run.num_frames > MAX_FRAMES:
            raise VideoRejectedError("too_large", f"more than {MAX_FRAMES} frames; set shards.fps, or take a shorter span")
        num_bytes += len(chunk)
        if num_bytes <= settings.max_video_bytes:
            run.frames += frames
        elif may_drop:
            run.frames.clear()
        else:
            raise too_many_bytes(settings)
    run.return_code = process.wait()
    run.sizes, run.lines = splitter.sizes, process.messages()
    _require_short(run.lines, settings)
    return run


def _require_short(lines: list[str], settings: DecodeSettings) -> None:
    if says_too_long(lines):
        detail = f"there are frames after {settings.max_seconds:g} s; raise shards.max_seconds or take a shorter span"
        raise VideoRejectedError("too_long", detail)


def _judge(run: _Run, path: Path) -> str:
    """Reject a run that went wrong or gave no frame; returns what the decoder complained about all the same."""
    serious, cut = complaints(run.lines)
    detail = clean_detail(serious, path)
    if run.num_frames and cut:
        raise VideoRejectedError("truncated", clean_detail(cut[:1] + serious, path))
    if run.return_code != 0:
        code = f"killed by signal {-run.return_code}" if run.return_code < 0 else f"exit code {run.return_code}"
        kind = "damaged" if run.num_frames else "undecodable"
        raise VideoRejectedError(kind, f"ffmpeg {code} after {run.num_frames} frames: {detail}")
    if not run.num_frames:
        raise VideoRejectedError("no_frames", detail or "ffmpeg ended well but gave no frame")
    return detail


def _checked_span(start: float | None, end: float | None) -> tuple[float, float]:
    span = 0.0 if start is None else start, math.inf if end is None else end
    if not span[0] < span[1] or math.isinf(span[0]):  # true for numbers that are none
        raise VideoRejectedError("no_frames", f"the span from {start} to {end} s holds no time; check the annotations")
    return max(0.0, span[0]), span[1]


def _require_regular_file(path: Path) -> int:
    """The file's size in bytes, if it is a file and not empty."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoRejectedError("missing", f"no file of that name: {path.name}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno in {errno.ENAMETOOLONG, errno.ELOOP}:
            raise VideoRejectedError("missing", f"no file can have that name: {printable(path.name)}") from error
        raise
    if not stat.S_ISREG(status.st_mode):
        raise VideoRejectedError("odd_file", f"{path.name} is no regular file")
    if status.st_size == 0:
        raise VideoRejectedError("empty", "the file has 0 bytes")
    return status.st_size
