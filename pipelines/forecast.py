"""What a forecast of the shards stage holds and says: totals, times for a number of CPUs, and how wrong it was."""

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from infra.settings import Settings

# Of N processes side by side each does this share of what one does alone; two processes on two cores were measured.
EFFICIENCY = 0.9
_END_BYTES = 6_144  # of a tar: two blocks of zeros, and on average half a record


class Spread(Settings):
    """A forecast number: `mean`, and the 5 % and 95 % points of what other samples of the same size would have given."""

    mean: float
    low: float
    high: float


class Estimate(Settings):
    """What a probe found, for a whole shard set.

    `num_probed` of `num_videos` videos were written in `probe_seconds`; `seconds`, `frames` and `tar_bytes` are a video's,
    `shard_seconds` is what opening and closing a shard adds. `rejected` are probed videos by reason; `rejected_share` has the
    95 % interval after Wilson, `max_bad_fraction` is what the settings allow. `shard_sizes` are (videos of a shard, number of
    such shards).
    """

    experiment: str
    fingerprint: str
    num_videos: int
    num_probed: int
    probe_seconds: float
    seconds: Spread
    frames: Spread
    tar_bytes: Spread
    shard_seconds: float
    rejected: dict[str, int]
    rejected_share: Spread
    max_bad_fraction: float
    shard_sizes: list[tuple[int, int]]

    @property
    def num_shards(self) -> int:
        """Shards of the whole set."""
        return sum(times for _, times in self.shard_sizes)

    @property
    def total_bytes(self) -> Spread:
        """Size of all tars."""
        end = _END_BYTES * self.num_shards
        return _scale(self.tar_bytes, self.num_videos, end)

    def wall_seconds(self, num_cpus: int) -> Spread:
        """Time to write all shards with that many CPUs, a shard on one CPU at a time; without the start of a cluster.

        Many CPUs have a few shards to write at the end, or none at all: the longest queue counts.
        """
        videos, shards = _longest_queue(self.shard_sizes, num_cpus)
        slower = 1.0 if num_cpus == 1 else 1 / EFFICIENCY
        return _scale(self.seconds, videos * slower, shards * self.shard_seconds * slower)


def estimate_document(estimate: Estimate, cpus: Sequence[int]) -> dict[str, Any]:
    """The forecast as plain data for JSON: what was probed, the totals, and a row for each number of CPUs."""
    rows = []
    for num_cpus in cpus:
        wall = estimate.wall_seconds(num_cpus)
        rate = estimate.num_videos / max(wall.mean, 1e-9)
        rows.append(
            {
                "cpus": num_cpus,
                "videos_per_second": rate,
                "frames_per_second": rate * estimate.frames.mean,
                "hours": _scale(wall, 1 / 3600).model_dump(),
            }
        )
    return {
        "num_probed": estimate.num_probed,
        "probe_seconds": estimate.probe_seconds,
        "num_videos": estimate.num_videos,
        "num_shards": estimate.num_shards,
        "frames": _scale(estimate.frames, estimate.num_videos).model_dump(),
        "gigabytes": _scale(estimate.total_bytes, 1e-9).model_dump(),
        "rejected": _scale(estimate.rejected_share, estimate.num_videos).model_dump(),
        "rejected_in_probe": estimate.rejected,
        "efficiency": EFFICIENCY,
        "forecasts": rows,
    }


def estimate_text(estimate: Estimate, cpus: Sequence[int]) -> str:
    """The forecast for people."""
    document = estimate_document(estimate, cpus)
    size, bad, frames = document["gigabytes"], document["rejected"], document["frames"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in estimate.rejected.items())
    lines = [
        f"forecast for the shards, from {estimate.num_probed:,} of {estimate.num_videos:,} videos written here in "
        f"{estimate.probe_seconds:.0f} s (in brackets: 5 % to 95 % of what other samples would say)",
        "",
        f"{'CPUs':>6}{'videos/s':>12}{'frames/s':>12}   time",
    ]
    for row in document["forecasts"]:
        hours = row["hours"]
        lines.append(
            f"{row['cpus']:>6}{row['videos_per_second']:>12,.1f}{row['frames_per_second']:>12,.0f}   "
            f"{_duration(hours['mean'])} ({_duration(hours['low'])} to {_duration(hours['high'])})"
        )
    lines += [
        "",
        f"shards    {estimate.num_shards:,}, {_gigabytes(size['mean'])} "
        f"({_gigabytes(size['low'])} to {_gigabytes(size['high'])}), {frames['mean']:,.0f} frames",
        f"rejected  {bad['mean']:,.0f} ({bad['low']:,.0f} to {bad['high']:,.0f}, 95 %); in the sample: {reasons or 'none'}",
    ]
    if estimate.rejected_share.mean > estimate.max_bad_fraction:
        allowed = f"{100 * estimate.max_bad_fraction:.1f} % (shards.max_bad_fraction)"
        lines.append(f"          with so many rejected the run would be refused: expected at most {allowed}")
    lines += [
        f"More than one CPU counts at {100 * EFFICIENCY:.0f} % of one alone, and as fast as this machine's; left out are the "
        "start of a cluster and its workers (seconds) and disks or networks that all CPUs share.",
    ]
    return "\n".join(lines)


def forecast_error(shards_dir: Path, *, num_cpus: int, seconds: float, num_bytes: int) -> tuple[dict[str, float], str] | None:
    """How wrong the forecast of a shards stage was; None if none was made.

    Args:
        shards_dir: the stage's folder in the store, `<workdir>/store/shards/<fingerprint>`, finished or partial.
        num_cpus: that wrote the shards.
        seconds: that it took.
        num_bytes: of all tars.

    Returns:
        metrics `estimate/hours`, `estimate/gigabytes`, `estimate/error` and `estimate/bytes_error` (measured / forecast - 1);
        and a few words on them.
    """
    path = shards_dir.parents[2] / "estimates" / f"{shards_dir.name.split('.')[0]}.json"
    try:
        estimate = Estimate.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):  # none was made, or by another version
        return None
    wall, size = estimate.wall_seconds(max(1, num_cpus)).mean, estimate.total_bytes.mean
    metrics = {"estimate/hours": wall / 3600, "estimate/gigabytes": size / 1e9}
    metrics |= {"estimate/error": seconds / max(wall, 1e-9) - 1, "estimate/bytes_error": num_bytes / max(size, 1.0) - 1}
    late, larger = 100 * metrics["estimate/error"], 100 * metrics["estimate/bytes_error"]
    text = f"{seconds:.1f} s of {wall:.1f} s forecast ({late:+.0f} %), bytes {larger:+.1f} % against the forecast"
    return metrics, text


def _longest_queue(shard_sizes: Sequence[tuple[int, int]], num_cpus: int) -> tuple[int, int]:
    """Videos and shards of the CPU that ends last, if each takes the next shard as soon as it is free."""
    num_cpus = min(num_cpus, sum(times for _, times in shard_sizes))
    queues = [(0, 0)] * max(1, num_cpus)
    for size, times in shard_sizes:
        for _ in range(times):
            videos, shards = queues[0]
            heapq.heapreplace(queues, (videos + size, shards + 1))
    return max(queues)


def _scale(spread: Spread, factor: float, offset: float = 0.0) -> Spread:
    low, mean, high = (value * factor + offset for value in (spread.low, spread.mean, spread.high))
    return Spread(mean=mean, low=low, high=high)


def _duration(hours: float) -> str:
    if hours < 2 / 60:
        return f"{hours * 3600:.1f} s" if hours < 10 / 3600 else f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.1f} h"


def _gigabytes(size: float) -> str:
    return f"{size * 1000:,.1f} MB" if size < 1 else f"{size:,.1f} GB"
