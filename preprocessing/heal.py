"""Healing: a new shard set in which rejected videos were tried again and damaged shards were written again.

A finished shard set is never changed: stages that were cached depend on it. The new set takes over the shards that need
nothing, as hard links where the disk allows; only the others are written again, each from the plan that its sidecar holds.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from infra.errors import DataError, PipelineError
from infra.filesystems import Folder
from infra.progress import OnProgress
from infra.settings import explain_validation_error
from infra.storage import sha256_file
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.decode import ffmpeg_version
from preprocessing.finish import finish_shard_set
from preprocessing.index import DATASET_NAME, DatasetInfo, ShardInfo, read_dataset_info, read_ledger
from preprocessing.planning import ShardPlan, ShardPlans, sidecar_name
from preprocessing.shards import ShardReport, ShardSettings, read_sidecar

WriteShards = Callable[[Sequence[ShardPlan], Folder, ShardSettings], Sequence[ShardReport]]
"""Called as `write(plans, output, settings)`; writes those shards, as `tasks.write_shards` and `shards.write_shard` do."""

_HASH_THREADS = 4
_SHOWN = 5
_LONG = ("video_id", "path")  # together they can pass the 2 GiB of Arrow's short texts
# Of a sidecar: its plan, and what came of each video.
_COLUMNS = [*VIDEO_SCHEMA.names, "status", "reason", "detail", "content_sha256"]


@dataclass(frozen=True)
class TriedVideo:
    """A rejected video that was tried again: `reason` and `detail` of the rejection, the former one if it is healed now."""

    video_id: str
    shard: str
    reason: str
    detail: str


@dataclass(frozen=True)
class HealReport:
    """What came of healing a shard set.

    Attributes:
        output: the new shard set.
        num_shards: of the set.
        rewritten: why each shard was written again, by its file name; the others were taken over.
        healed: videos that were rejected and are kept now.
        rejected: videos that are rejected still.
        changed: ids of videos in rewritten shards that were kept and are kept, but whose frames have other bytes now.
        counts: the `counts` of the new dataset.json.
        notes: what the user should know, a sentence each.
    """

    output: str
    num_shards: int
    rewritten: dict[str, str]
    healed: list[TriedVideo]
    rejected: list[TriedVideo]
    changed: list[str]
    counts: dict[str, Any]
    notes: list[str]


def heal_shards(old: Path | str, new: Path | str, write: WriteShards, on_progress: OnProgress | None = None) -> HealReport:
    """Make the shard set `new` out of the finished set `old`: rejected videos are tried again, damaged shards written again.

    A shard is written again if the ledger rejects one of its videos, or if its tar does not have the size and SHA-256 that
    dataset.json states (every tar is read for that). The plan and the settings are those of the old set, so the tars are, byte
    for byte, those of an undisturbed run on the raw videos as they are now. Interrupted, the same call goes on.

    Args:
        old: a finished shard set, local or remote; not changed.
        new: the folder to write, local or remote; made if it does not exist.
        write: writes the shards that need it; not called if none does.
        on_progress: called with shards checked and in all.

    Raises:
        DataError: if `old` is no whole shard set but for its tars, was indexed from tars made elsewhere, or a video that it
            keeps cannot be read from the raw videos any more (nothing is lost by healing; such shards are removed from `new`).
        PipelineError: if `new` is a finished shard set, or the disk is full.
    """
    source, target = Folder(old), Folder(new)
    info = read_dataset_info(source)
    settings = _settings(info, source)
    if target.size(DATASET_NAME) is not None:
        raise PipelineError(
            f"{target} is a finished shard set, and such a set is never changed; heal that one into another folder "
            "(--output NEW), or remove it first"
        )
    rejected = read_ledger(source, ["shard", "status"]).filter(pc.field("status") == "rejected")
    sidecars = _read_sidecars(source, info)
    plans = _plans(sidecars, info)
    reasons = _reasons(source, info, rejected, on_progress)
    target.make()
    for name, shard in info.shards.items():
        if name in reasons:
            _remove_if_damaged(name, shard.split, target)
        else:
            _take_over(name, shard.bytes, source, target)
    if reasons:
        todo = [plans[position] for position, name in enumerate(plans.names) if name in reasons]
        # Few shards, those with the rejected videos: the fraction means the whole set, and is looked at below.
        write(todo, target, settings.model_copy(update={"max_bad_fraction": 1.0}))
    healed, still, changed = _compare({name: sidecars[name] for name in reasons}, target)
    videos = pa.concat_tables([table.select(VIDEO_SCHEMA.names) for table in sidecars.values()])
    counts = finish_shard_set(target, VideoIndex(videos, info.label_names), plans, settings, info.dataset)
    notes = _notes(info, reasons, changed)
    return HealReport(str(target), len(plans), reasons, healed, still, changed, counts, notes)


def _settings(info: DatasetInfo, source: Folder) -> ShardSettings:
    if info.settings.get("foreign"):
        raise DataError(
            f"{source} was indexed from tars made elsewhere, so its raw videos are not known and it cannot be healed; "
            "make the tars again where they came from"
        )
    try:
        return ShardSettings.model_validate(info.settings)
    except ValidationError as error:
        raise DataError(
            f"the settings in {source}/{DATASET_NAME} are not those of this program: {explain_validation_error(error)}; "
            "run the shards stage again"
        ) from error


def _read_sidecars(source: Folder, info: DatasetInfo) -> dict[str, pa.Table]:
    """The sidecar of every shard, checked against dataset.json."""
    tables, broken = {}, []
    for name, shard in info.shards.items():
        try:
            table, commit = read_sidecar(source, sidecar_name(name))
        except DataError as error:
            broken.append(f"{name} ({error})")
            continue
        num_kept = pc.sum(pc.equal(table["status"], "kept")).as_py() or 0
        if (commit.tar_sha256, commit.tar_bytes, num_kept) != (shard.sha256, shard.bytes, shard.samples):
            broken.append(f"{name} (its sidecar belongs to another tar than dataset.json)")
        tables[name] = table.select(_COLUMNS).replace_schema_metadata(None)  # not the frames' places, most of it by far
    if broken:
        raise DataError(
            f"{len(broken)} of {len(info.shards)} shards of {source} cannot be healed, since their sidecars, which say what "
            f"belongs into them, are damaged: {'; '.join(broken[:_SHOWN])}; run the shards stage again"
        )
    num_videos = sum(table.num_rows for table in tables.values())
    if num_videos != info.counts.get("videos"):
        raise DataError(
            f"the sidecars of {source} list {num_videos} videos, dataset.json counts {info.counts.get('videos')}; "
            "run the shards stage again"
        )
    return tables


def _plans(sidecars: dict[str, pa.Table], info: DatasetInfo) -> ShardPlans:
    """The plans that the shards were written from, in the order of dataset.json."""
    videos = pa.concat_tables([table.select(VIDEO_SCHEMA.names) for table in sidecars.values()])
    for position, name in enumerate(videos.column_names):
        if name in _LONG:
            videos = videos.set_column(position, name, videos[name].cast(pa.large_string()))
    cuts = [0, *itertools.accumulate(table.num_rows for table in sidecars.values())]
    names = [(name, info.shards[name].split) for name in sidecars]
    return ShardPlans(videos.combine_chunks(), np.arange(videos.num_rows, dtype=np.uint32), names, cuts)


def _reasons(source: Folder, info: DatasetInfo, rejected: pa.Table, on_progress: OnProgress | None) -> dict[str, str]:
    """Why shards must be written again, by their names, in the order of dataset.json."""
    by_shard = rejected.group_by("shard").aggregate([([], "count_all")]).to_pylist()
    counts = {row["shard"]: row["count_all"] for row in by_shard}
    reasons = {}
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        damage = pool.map(lambda name: _damage(source, name, info.shards[name]), info.shards)
        for done, (name, found) in enumerate(zip(info.shards, damage, strict=True), start=1):
            parts = [f"{counts[name]} rejected"] if name in counts else []
            parts += [found] if found else []
            if parts:
                reasons[name] = ", ".join(parts)
            if on_progress is not None:
                on_progress(done, len(info.shards), f"shards checked, {len(reasons)} to write again")
    return reasons


def _damage(folder: Folder, name: str, shard: ShardInfo) -> str:
    """What is wrong with a tar; "" if nothing is."""
    num_bytes = folder.size(name)
    if num_bytes is None:
        return "missing"
    if num_bytes != shard.bytes:
        return f"{num_bytes} bytes instead of {shard.bytes}"
    try:
        with folder.fetch(name) as path:
            return "" if sha256_file(path) == shard.sha256 else "another SHA-256 than when it was written"
    except OSError as error:
        if folder.local is None:  # the network, most likely, which is no reason to write the shard again
            raise
        return f"cannot be read ({error.strerror})"


def _remove_if_damaged(name: str, split: str, target: Folder) -> None:
    """An earlier call may have left a link to a tar that was whole then; `write_shard` looks at its size only."""
    try:
        rows, commit = read_sidecar(target, sidecar_name(name))
    except DataError:
        return
    # A video that an earlier call rejected may have been repaired since.
    has_rejected = pc.any(pc.equal(rows["status"], "rejected")).as_py()
    shard = ShardInfo(sha256=commit.tar_sha256, bytes=commit.tar_bytes, samples=0, split=split)
    if has_rejected or _damage(target, name, shard):
        _remove(name, target)


def _remove(name: str, target: Folder) -> None:
    target.delete(sidecar_name(name))
    target.delete(name)


def _take_over(tar_name: str, tar_bytes: int, source: Folder, target: Folder) -> None:
    """Link or copy a whole shard, the tar before its sidecar."""
    sidecar = sidecar_name(tar_name)
    if target.size(sidecar) == source.size(sidecar) and target.size(tar_name) == tar_bytes:
        return
    for name in (tar_name, sidecar):
        target.delete(name)
        if source.local is not None and target.local is not None:
            try:
                os.link(source.local / name, target.local / name)
                continue
            except OSError:  # another disk, or one without links
                pass
        with source.fetch(name) as original, target.create(name) as copy:
            shutil.copyfile(original, copy)


def _compare(sidecars: dict[str, pa.Table], target: Folder) -> tuple[list[TriedVideo], list[TriedVideo], list[str]]:
    """Healed videos, those rejected still, and the ids of kept ones with other frames; refuses to lose a video."""
    healed: list[TriedVideo] = []
    still: list[TriedVideo] = []
    lost: list[TriedVideo] = []
    changed: list[str] = []
    columns = ["video_id", "status", "reason", "detail", "content_sha256"]
    for name, table in sidecars.items():
        now, _ = read_sidecar(target, sidecar_name(name))
        lost_before = len(lost)
        for before, after in zip(table.select(columns).to_pylist(), now.select(columns).to_pylist(), strict=True):
            video_id = after["video_id"]
            if after["status"] == "rejected":
                tried = TriedVideo(video_id, name, after["reason"], after["detail"])
                (still if before["status"] == "rejected" else lost).append(tried)
            elif before["status"] == "rejected":
                healed.append(TriedVideo(video_id, name, before["reason"], before["detail"]))
            elif before["content_sha256"] != after["content_sha256"]:
                changed.append(video_id)
        if len(lost) > lost_before:
            _remove(name, target)
    if lost:
        raise _lost(lost)
    return healed, still, changed


def _lost(lost: Sequence[TriedVideo]) -> DataError:
    examples = "; ".join(f"{video.video_id} in {video.shard} ({video.reason}: {video.detail})" for video in lost[:_SHOWN])
    return DataError(
        f"{len(lost)} videos that the shard set keeps cannot be read from the raw videos any more: {examples}; healing "
        "loses no video, so the new set is not finished; give the folder that the set was made from with --root (archives "
        "unpacked), bring those videos back and run the same command again"
    )


def _notes(info: DatasetInfo, reasons: dict[str, str], changed: list[str]) -> list[str]:
    notes = []
    if reasons and info.ffmpeg_version != ffmpeg_version():
        notes.append(
            f"the set was made with ffmpeg {info.ffmpeg_version}, the {len(reasons)} rewritten shards with {ffmpeg_version()}: "
            "frames of video files can differ in their bytes from those of the run before"
        )
    if changed:
        names = ", ".join(changed[:_SHOWN])
        notes.append(f"{len(changed)} videos that were kept before have other frames now, for example {names}")
    return notes
