"""Where the frames of a planned video come from; what a shard is written from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from infra.filesystems import Folder
from preprocessing.decode import DecodedVideo, DecodeSettings, VideoRejectedError, decode_video, read_frame_folder
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
        root: the dataset's folder, to which the plan's paths are relative.
    """

    root: Folder | Path

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:  # noqa: ARG002
        """See `Source.read`."""
        root = Folder(self.root)
        try:
            if video.kind == "frames":
                with root.fetch(video.path) as path:
                    return read_frame_folder(path, settings)
            with root.fetch(video.path) as path:
                return decode_video(path, settings)
        except PermissionError as error:
            raise VideoRejectedError("unreadable", error.strerror or "permission denied") from error
