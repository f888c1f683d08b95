"""The cost forecast: what writing the shards of an experiment will take, from a sample of its videos written here and now.

`sagsm plan EXPERIMENT --estimate` decodes videos drawn at random, one after the other in this process, into shards that are
thrown away, and scales up. The forecast stays in `<workdir>/estimates/`, so that the shards stage can say how wrong it was.
"""

import os
import random
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError, PipelineError
from infra.filesystems import Folder
from infra.progress import OnProgress
from infra.storage import write_json
from pipelines.evaluation.metrics import wilson_interval
from pipelines.forecast import Estimate, Spread
from pipelines.run import Request, plan_experiment
from preprocessing.datasets import VideoIndex, find_archive, index_videos, load_video_index
from preprocessing.decode import DecodedVideo, DecodeSettings, VideoRejectedError
from preprocessing.planning import PlannedVideo, ShardPlan, ShardPlans, plan_shards
from preprocessing.shards import ShardSettings, read_sidecar, write_shard
from preprocessing.sources import FolderSource, Source

MAX_SECONDS = 60.0
MAX_BUDGET_SECONDS = 50.0  # the last videos must be written too
DEFAULT_SECONDS = 20.0
_UNFINISHED = "unfinished"
_MAX_PROBED = 20_000
_GROUP_VIDEOS, _GROUP_BYTES = 16, 64 << 20
_DRAWS, _LOW, _HIGH = 400, 5, 95


@dataclass(frozen=True)
class ProbedVideo:
    """One video of the probe: seconds to decode and write it, its frames, its bytes in the tar, and its reason if rejected."""

    seconds: float
    num_frames: int
    tar_bytes: int
    reason: str = ""


def estimate_shards(request: Request, seconds: float = DEFAULT_SECONDS, on_progress: OnProgress | None = None) -> Estimate:
    """Probe the raw videos of an experiment and forecast its shards stage; keeps the result for `forecast_error`.

    Args:
        request: which experiment; no cluster is started and no stage is run.
        seconds: how long new videos are begun, up to `MAX_BUDGET_SECONDS`; with fewer videos it is over sooner.
        on_progress: called with seconds gone and in all.

    Raises:
        ConfigError: if there are no raw videos to probe yet, or they are in an archive, which can only be read as a whole.
        DataError: if the annotations are missing or wrong.
    """
    planned = {item.stage.name: item for item in plan_experiment(request)}
    source, found = _open(request, planned["index"].artifact)
    settings = request.config.shards
    plans = plan_shards(found.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    folder = request.workdir / "estimates"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".tmp-probe-", dir=folder) as place:
        budget = min(seconds, MAX_BUDGET_SECONDS)
        probed, shard_seconds = probe(plans, source, settings, Path(place), budget, on_progress=on_progress)
    estimate = summarise_probe(
        probed,
        plans,
        experiment=request.experiment,
        fingerprint=planned["shards"].fingerprint,
        probe_seconds=time.perf_counter() - started,
        shard_seconds=shard_seconds,
        max_bad_fraction=settings.max_bad_fraction,
    )
    write_json(folder / f"{estimate.fingerprint}.json", estimate.model_dump(mode="json"))
    return estimate


def probe(
    plans: ShardPlans,
    source: Source,
    settings: ShardSettings,
    folder: Path,
    budget_seconds: float,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[list[ProbedVideo], float]:
    """Write videos drawn at random, without replacement, until the time is up or all are written; at least one.

    A video that would take longer than what is left of `MAX_SECONDS` is ended there and counts with that time, as "unfinished".

    Args:
        plans: of the whole shard set.
        source: gives the frames.
        settings: as for the shard set.
        folder: an empty one, for the shards of the probe.
        budget_seconds: after this no video is begun.
        seed: of the draw.
        on_progress: called with seconds gone and in all.

    Returns:
        the videos, and the seconds that a shard takes without any.
    """
    started = time.perf_counter()
    num_probed = min(plans.num_videos, _MAX_PROBED)
    rows = iter(random.Random(seed).sample(range(plans.num_videos), num_probed))
    ends = list(accumulate(plans.num_videos_of(position) for position in range(len(plans))))
    _write_group(0, [], settings, folder)  # once in vain: ffmpeg is asked for its version, modules are loaded
    shard_seconds = _write_group(1, [], settings, folder)[0]
    found: list[ProbedVideo] = []
    group: list[tuple[PlannedVideo, DecodedVideo | VideoRejectedError, float]] = []
    number, row = 2, next(rows, None)
    while row is not None:
        plan, video = _planned(plans, ends, row)
        begun = time.perf_counter()
        left = max(1.0, MAX_SECONDS - (begun - started))
        result = _read(source, video, plan.name, settings, left)
        group.append((video, result, time.perf_counter() - begun))
        if on_progress is not None:
            gone = min(round(time.perf_counter() - started), round(budget_seconds))
            on_progress(gone, round(budget_seconds), f"s at most; {len(found) + len(group):,} videos probed")
        row = next(rows, None) if time.perf_counter() - started < budget_seconds else None
        size = sum(sum(map(len, result.frames)) for _, result, _ in group if isinstance(result, DecodedVideo))
        if row is None or len(group) == _GROUP_VIDEOS or size > _GROUP_BYTES:
            found += _probed(number, group, settings, folder, shard_seconds)
            number, group = number + 1, []
    return found, shard_seconds


def summarise_probe(
    probed: Sequence[ProbedVideo],
    plans: ShardPlans,
    *,
    experiment: str,
    fingerprint: str,
    probe_seconds: float,
    shard_seconds: float,
    max_bad_fraction: float,
) -> Estimate:
    """Means of the probed videos with their spread, drawn again 400 times with replacement (the bootstrap)."""
    seconds, frames, tar_bytes = _bootstrap(np.array([(one.seconds, one.num_frames, one.tar_bytes) for one in probed], float))
    rejected = Counter(one.reason for one in probed if one.reason not in ("", _UNFINISHED))
    low, high = wilson_interval(rejected.total(), len(probed))
    return Estimate(
        experiment=experiment,
        fingerprint=fingerprint,
        num_videos=plans.num_videos,
        num_probed=len(probed),
        probe_seconds=probe_seconds,
        seconds=seconds,
        frames=frames,
        tar_bytes=tar_bytes,
        shard_seconds=shard_seconds,
        rejected=dict(rejected.most_common()),
        rejected_share=Spread(mean=rejected.total() / len(probed), low=low, high=high),
        max_bad_fraction=max_bad_fraction,
        shard_sizes=sorted(Counter(plans.num_videos_of(position) for position in range(len(plans))).items(), reverse=True),
    )


def machine_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _open(request: Request, index: Any) -> tuple[Source, VideoIndex]:
    """Where the raw videos are, and the list of them: that of the index stage if it has run."""
    dataset = request.config.dataset
    if dataset.synthetic is not None:
        if index is None:
            raise ConfigError(
                f"the videos of {request.experiment} are generated by its index stage, which has not run, so there is nothing "
                f"to probe; first do: sagsm run {request.experiment} --only index, with the same --set and --workdir"
            )
        return FolderSource(index.path / index.summary["root"]), load_video_index(index.path)
    assert dataset.root is not None  # the plan has refused a dataset without any source
    archive = find_archive(dataset, dataset.root)
    if archive is not None:
        raise ConfigError(
            f"the videos are in the archive {archive}, which can only be read from its beginning, so none can be drawn at "
            "random; expected a folder of videos: unpack some and probe those, or run without --estimate"
        )
    return FolderSource(Folder(dataset.root)), load_video_index(index.path) if index else index_videos(dataset, dataset.root)


def _planned(plans: ShardPlans, ends: Sequence[int], row: int) -> tuple[ShardPlan, PlannedVideo]:
    position = bisect_right(ends, row)
    plan = plans[position]
    return plan, plan.videos[row - ends[position]]


def _read(
    source: Source, video: PlannedVideo, shard: str, settings: DecodeSettings, seconds_left: float
) -> DecodedVideo | VideoRejectedError:
    limit = min(settings.timeout_seconds, seconds_left)
    try:
        return source.read(video, shard, settings.model_copy(update={"timeout_seconds": limit}))
    except VideoRejectedError as error:
        cut = error.reason == "timeout" and limit < settings.timeout_seconds
        return VideoRejectedError(_UNFINISHED, error.detail) if cut else error
    except OSError as error:
        raise PipelineError(f"{video.path} cannot be read: {error}; check the disk or network and try again") from error


@dataclass(frozen=True)
class _Decoded:
    """A source of videos that were decoded before, so that writing can be timed alone."""

    results: dict[str, DecodedVideo | VideoRejectedError]

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:  # noqa: ARG002
        result = self.results[video.key]
        if isinstance(result, VideoRejectedError):
            raise result
        return result


def _write_group(
    number: int,
    group: Sequence[tuple[PlannedVideo, DecodedVideo | VideoRejectedError, float]],
    settings: ShardSettings,
    folder: Path,
) -> tuple[float, list[dict[str, Any]]]:
    """Write one shard of the probe and remove it. Returns the seconds that it took, and the rows of its sidecar."""
    plan = ShardPlan(f"probe-{number:06d}.tar", "probe", tuple(video for video, _, _ in group))
    source = _Decoded({video.key: result for video, result, _ in group})
    begun = time.perf_counter()
    write_shard(plan, source, folder, settings)
    seconds = time.perf_counter() - begun
    table, _ = read_sidecar(folder, plan.sidecar_name)
    for name in (plan.name, plan.sidecar_name):
        (folder / name).unlink()
    return seconds, table.select(["num_frames", "sample_bytes", "reason"]).to_pylist()


def _probed(
    number: int,
    group: Sequence[tuple[PlannedVideo, DecodedVideo | VideoRejectedError, float]],
    settings: ShardSettings,
    folder: Path,
    shard_seconds: float,
) -> list[ProbedVideo]:
    """The time of writing is shared out by bytes."""
    seconds, rows = _write_group(number, group, settings, folder)
    sizes = [row["sample_bytes"] or 0 for row in rows]
    rate = max(0.0, seconds - shard_seconds) / max(1, sum(sizes))
    return [
        ProbedVideo(decoding + size * rate, row["num_frames"], size, row["reason"] or "")
        for (_, _, decoding), row, size in zip(group, rows, sizes, strict=True)
    ]


def _bootstrap(values: npt.NDArray[np.float64]) -> list[Spread]:
    """Mean and spread of each column. Shape of values: [videos, columns]."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), len(values))].mean(axis=0) for _ in range(_DRAWS)]
    low, high = np.percentile(means, (_LOW, _HIGH), axis=0)
    middle = values.mean(axis=0)
    # A few far-off values can put the mean outside its own percentiles.
    return [
        Spread(mean=float(mean), low=float(min(mean, start)), high=float(max(mean, end)))
        for mean, start, end in zip(middle, low, high, strict=True)
    ]
