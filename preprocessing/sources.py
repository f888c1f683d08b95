"""Where the frames of a planned video come from; what a shard is written from."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from infra.filesystems import Folder
from preprocessing.decode import DecodedVideo, DecodeSettings, VideoRejectedError, decode_video
from preprocessing.frames import read_frame_folder, read_remote_frame_folder
from preprocessing.planning import PlannedVideo


class Source(Protocol):
    """Gives the frames of planned videos; picklable, since Ray tasks carry it to the workers."""

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:
        """Decode one video of the shard with that file name.

        Raises:
            VideoRejectedError: if the video cannot be used.
            OSError: if the machine, not the video, is at fault.
        """
        ...


@dataclass(frozen=True)
class FolderSource:
    """Raw videos in a folder: frame folders or video files.

    Args:
        root: the dataset's folder, to which the plan's paths are relative; a remote video file is copied to this machine while
            it is decoded.
    """

    root: Folder | Path

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:  # noqa: ARG002
        """See `Source.read`."""
        root = Folder(self.root)
        _require_inside(video.path)
        try:
            if video.kind != "frames":
                with root.fetch(video.path) as path:
                    return decode_video(path, settings, video.start, video.end)
            if video.start is not None or video.end is not None:
                detail = f"a span from {video.start} to {video.end} s is asked for, but a folder of frames knows no times"
                raise VideoRejectedError("no_times", detail)
            if root.local is None:
                return read_remote_frame_folder(root / video.path, settings)
            return read_frame_folder(root.local / video.path, settings)
        except PermissionError as error:
            raise VideoRejectedError("unreadable", error.strerror or "permission denied") from error
        except FileNotFoundError as error:
            if root.local is not None:
                raise
            raise VideoRejectedError("missing", f"no object of that name: {PurePosixPath(video.path).name}") from error


def _require_inside(path: str) -> None:
    """Annotations come from outside too: a path that leads out of the dataset's folder is not followed."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise VideoRejectedError("odd_file", f"{path!r} does not lie in the dataset's folder")
