"""From frames in memory to a video file, by ffmpeg."""

from pathlib import Path

import ffmpeg
import numpy as np
import numpy.typing as npt

from infra.errors import DataError
from preprocessing.decode import ffmpeg_path


def encode_mp4(frames: npt.NDArray[np.uint8], fps: str, path: Path) -> None:
    """Write H.264 with libx264 (yuv420p, crf 18), the metadata last; the bytes depend on the ffmpeg version alone.

    Args:
        frames: RGB, height and width even. Shape: [T, H, W, 3].
        fps: frames a second, as ffmpeg reads it: "25", "30000/1001".
        path: ends in ".mp4"; what stands there is replaced, and what is left there after an error is not whole.

    Raises:
        DataError: if ffmpeg cannot do it, for example because it has no libx264.
        PipelineError: if ffmpeg is missing.
    """
    _, height, width, _ = frames.shape
    source = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{width}x{height}", r=fps)
    target = source.output(
        f"file:{path}", vcodec="libx264", pix_fmt="yuv420p", crf=18, preset="veryfast", threads=1, an=None,
        **{"x264-params": "cpu-independent=1", "flags:v": "+bitexact", "fflags": "+bitexact"},
    )  # fmt: skip
    options = ("-hide_banner", "-loglevel", "error", "-y")
    try:
        target.global_args(*options).run(cmd=ffmpeg_path(), input=frames.tobytes(), quiet=True)
    except ffmpeg.Error as error:
        message = error.stderr.decode(errors="replace").strip()[-500:]
        raise DataError(f"{ffmpeg_path()} could not encode {path.name}: {message}; expected one with libx264") from error
