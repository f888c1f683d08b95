"""Videos straight from a tar that is plain or gzip, whole or cut into parts: read once, in order, and sorted by shard.

A tgz can only be read from its beginning, while shards take videos in a shuffled order. So one pass over the archive
(`partition`) appends the members of each listed video to a spool file of its shard (`spool.py`); they are never unpacked to
files of their own. A member belongs to the video at whose path it would lie if the archive were unpacked in the dataset's
folder.

An archive is hostile until proven otherwise. Only regular files with plain names are taken; the others are counted, and where
they are aimed at a listed video that video is rejected.
"""

import json
import tarfile
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.filesystems import Folder
from infra.progress import OnProgress
from infra.storage import require_free_space, write_json
from preprocessing.annotations import short
from preprocessing.datasets import archive_parts
from preprocessing.planning import ShardPlan, plan_digest
from preprocessing.shards import ShardSettings, finished_report, plan_sha256
from preprocessing.sources import FolderSource, Source
from preprocessing.spool import SpoolSource, SpoolWriter
from preprocessing.tar_stream import ArchiveStream, data_bytes, read_members

_BLOCK_BYTES = 512
_MAX_NAME_CHARS = 1000
_NAMES_SHOWN = 20
_COMMIT = "complete.json"
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass
class PartitionReport:
    """What one pass over an archive found.

    Attributes:
        num_members: regular files that were spooled.
        num_bytes: of these.
        num_strays: regular files that belong to no video of the wanted shards.
        strays: the names of the first 20 of them.
        num_hostile: members that were not taken: links, devices, names that lead elsewhere, ...
        hostile: name (as `repr`) and reason of the first 20 of them.
    """

    num_members: int = 0
    num_bytes: int = 0
    num_strays: int = 0
    strays: list[str] = field(default_factory=list)
    num_hostile: int = 0
    hostile: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Wanted:
    """A path that videos are cut from: their shards (files may be windows of one video), and what was spooled so far."""

    kind: str
    shards: list[int]
    num_bytes: int = 0
    rejected: bool = False


def partition(
    root: Folder,
    pattern: str,
    plans: Sequence[ShardPlan],
    spool: Path,
    *,
    max_video_bytes: int,
    on_progress: OnProgress | None = None,
) -> PartitionReport:
    """Read an archive once and write a spool file for each shard into `spool`, synced to the disk.

    The disk of `spool` takes as many bytes as the wanted members have, which for JPEG and mp4 is about the size of the archive.
    Memory does not grow with the archive.

    Args:
        root: the folder that holds the parts.
        pattern: of their names; the parts, sorted by name, are one stream, cut at any byte.
        plans: the shards whose videos are wanted.
        spool: an existing folder on a local disk, emptied before.
        max_video_bytes: a video with more bytes in the archive is rejected as `too_large`.
        on_progress: called with bytes read and in all, of the parts.

    Raises:
        DataError: if a part is missing, damaged or cut, the archive is no tar, or it inflates to more than 200 times its size.
        PipelineError: if the disk is full or a part cannot be read.
    """
    stream = ArchiveStream(root, archive_parts(root, pattern), on_progress)
    wanted: dict[str, _Wanted] = {}
    for number, plan in enumerate(plans):
        for video in plan.videos:
            shards = wanted.setdefault(video.path, _Wanted(video.kind, [])).shards
            if number not in shards:
                shards.append(number)
    report = PartitionReport()
    with SpoolWriter(spool, [plan.name for plan in plans]) as writer:
        sorter = _Sorter(stream, wanted, writer, report, max_video_bytes)
        for member in read_members(stream):
            sorter.add(member)
    return report


def open_source(
    root: Folder,
    archive: str | None,
    plans: Sequence[ShardPlan],
    spool: Path,
    output: Folder | Path,
    settings: ShardSettings,
    on_progress: OnProgress | None = None,
) -> tuple[Source, PartitionReport | None]:
    """Where the videos of a dataset come from: its folder, or the spools of its archive, which are made first.

    Shards that are complete already are not spooled; spools that an interrupted run has completed are taken as they are, unless
    the archive, the plans or the limit have changed.

    Args:
        root: the dataset's folder.
        archive: from `datasets.find_archive`.
        plans: of all shards.
        spool: a folder for the spools, which all nodes see under the same path; remove it when the shards are written.
        output: the folder of the shards.
        settings: of the shards.
        on_progress: see `partition`.

    Returns:
        The source, and what was found in the archive; None where none had to be read.

    Raises:
        DataError, PipelineError: see `partition`.
    """
    if archive is None:
        return FolderSource(root), None
    sizes = Folder(output).list()
    waiting = [
        plan
        for plan in plans
        if finished_report(output, plan.name, plan_sha256(plan_digest(plan), settings), sizes.get(plan.name)) is None
    ]
    parts = archive_parts(root, archive)
    facts = {"parts": [[part.name, part.size, part.modified_ns] for part in parts], "max_video_bytes": settings.max_video_bytes}
    digests = {plan.name: plan_digest(plan) for plan in waiting}
    if not waiting:
        return SpoolSource(spool), None
    report = _finished_partition(spool, facts, digests)
    if report is None:
        spool.mkdir(parents=True, exist_ok=True)
        (spool / _COMMIT).unlink(missing_ok=True)
        share = sum(len(plan.videos) for plan in waiting) / sum(len(plan.videos) for plan in plans)
        num_bytes = int(share * sum(part.size for part in parts))
        require_free_space(spool, num_bytes, "sorting the archive by shard")
        limit = settings.max_video_bytes
        report = partition(root, archive, waiting, spool, max_video_bytes=limit, on_progress=on_progress)
        write_json(spool / _COMMIT, {"facts": facts, "shards": digests, "report": asdict(report)})
    return SpoolSource(spool), report


def _finished_partition(spool: Path, facts: dict[str, Any], digests: dict[str, str]) -> PartitionReport | None:
    """The report of the pass that wrote these spools; None if they are not complete or were written for something else."""
    try:
        commit = json.loads((spool / _COMMIT).read_bytes())
        fits = commit["facts"] == facts and digests.items() <= commit["shards"].items()
        return PartitionReport(**commit["report"]) if fits else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class _Sorter:
    """Sends each member to the spools of its video."""

    def __init__(
        self,
        stream: ArchiveStream,
        wanted: dict[str, _Wanted],
        writer: SpoolWriter,
        report: PartitionReport,
        max_video_bytes: int,
    ) -> None:
        self._stream = stream
        self._wanted = wanted
        self._writer = writer
        self._report = report
        self._max_video_bytes = max_video_bytes

    def add(self, member: tarfile.TarInfo) -> None:
        """Spool one member, or skip its data."""
        size = data_bytes(member)
        padding = -size % _BLOCK_BYTES
        name = member.name.removeprefix("./")
        reason = _hostile_reason(name, member)
        if reason:
            self._refuse(name, reason)
        elif member.isdir():
            video = self._wanted.get(name)
            if video is not None and video.kind == "frames":
                self._writer.add_folder(video.shards, name)
        elif (found := self._find(name)) is None:
            self._report.num_strays += 1
            if len(self._report.strays) < _NAMES_SHOWN:
                self._report.strays.append(name)
        elif self._has_room(*found, size):
            self._report.num_members += 1
            self._report.num_bytes += size
            path, video = found
            self._writer.add_file(video.shards, path, name.rpartition("/")[2], size, self._stream.pieces(size))
            size = 0
        for _ in self._stream.pieces(size + padding):
            pass

    def _find(self, name: str) -> tuple[str, _Wanted] | None:
        """The video of a regular file: itself, or the folder of frames that it lies in."""
        video = self._wanted.get(name)
        if video is not None and video.kind == "video":
            return name, video
        folder = name.rpartition("/")[0]
        video = self._wanted.get(folder)
        return (folder, video) if video is not None and video.kind == "frames" else None

    def _has_room(self, path: str, video: _Wanted, size: int) -> bool:
        video.num_bytes += size
        if video.num_bytes > self._max_video_bytes and not video.rejected:
            video.rejected = True
            self._writer.add_rejection(
                video.shards, path, "too_large", f"more than {self._max_video_bytes} bytes in the archive"
            )
        return not video.rejected

    def _refuse(self, name: str, reason: str) -> None:
        """Count a hostile member, and reject the video that it is aimed at: the first listed path that its name begins with."""
        shown = short(name)
        self._report.num_hostile += 1
        if len(self._report.hostile) < _NAMES_SHOWN:
            self._report.hostile.append((shown, reason))
        parts = [part for part in name[: 4 * _MAX_NAME_CHARS].split("/") if part not in ("", ".")]
        for count in range(1, min(len(parts), 64) + 1):
            path = "/".join(parts[:count])
            video = self._wanted.get(path)
            if video is not None:
                if not video.rejected:
                    video.rejected = True
                    self._writer.add_rejection(video.shards, path, "hostile_member", f"{shown} in the archive is {reason}")
                return


def _hostile_reason(name: str, member: tarfile.TarInfo) -> str:
    """Why a member must not be taken; "" if it may."""
    if name.startswith("/"):
        return "an absolute path"
    if ".." in name and ".." in name.split("/"):
        return "a path with '..'"
    if not name.isprintable() and not all(char.isprintable() or unicodedata.category(char) == "Zs" for char in name):
        return "a name that is not printable UTF-8"
    if len(name) > _MAX_NAME_CHARS:
        return f"a name of more than {_MAX_NAME_CHARS} characters"
    if member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        return ""
    return _KINDS.get(member.type, f"of the unknown type {member.type!r}")
