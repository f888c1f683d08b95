"""Ray tasks that write shards, one task a shard; the only file of this package that names Ray."""

import faulthandler
import math
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from infra.errors import ClusterError, PipelineError, SagsmError
from infra.filesystems import Folder
from infra.progress import OnProgress
from preprocessing.decode import DecodedVideo, DecodeSettings
from preprocessing.finish import VIDEOS_SHOWN, rejected_examples, require_few_rejected
from preprocessing.planning import PlannedVideo, ShardPlan, ShardPlans, sidecar_name
from preprocessing.shards import ShardReport, ShardSettings, finished_report, plan_sha256, read_sidecar, write_shard
from preprocessing.sources import Source

_MAX_RETRIES = 3
# Declared to Ray, so that it puts no more tasks on a node than fit: one video's JPEG data, rows and ffmpeg's own buffers.
_TASK_BYTES = 512 * 2**20
_SECONDS_TO_STOP = 20.0
_SECONDS_OF_RATE = 30.0
_SECONDS_BETWEEN_LOOKS = 10.0
_SIDECAR_READERS = 16
# What a source may take for one video beside decoding: fetching it over a slow network, or finding it in an archive.
_SECONDS_BESIDE_DECODING = 900.0
_SECONDS_TO_CLEAN_UP = 30.0
_STANDARD_ERROR = 2


def write_shards(
    plans: Sequence[ShardPlan],
    source: Source,
    output: Folder | Path,
    settings: ShardSettings,
    on_progress: OnProgress | None = None,
    max_in_flight: int | None = None,
    seconds_without_video: float | None = None,
) -> list[ShardReport]:
    """Write all shards on the connected cluster; those that are complete already are kept.

    When a worker or node dies, the operating system reports an error or a task stands still, the shard is written again,
    at most three times; that is safe, since a shard is whole or absent and its bytes do not depend on who writes it. Local
    folders must be visible under the same path on every node. On an error or a signal the other tasks are cancelled before
    this returns.

    Args:
        plans: from `plan_shards`.
        source: gives the frames.
        output: made if it does not exist.
        settings: the same for all shards.
        on_progress: called with videos done and in all, and a text such as "3 rejected, 120 videos/s, 4,100 frames/s, 52 MB/s"
            (MB of raw video read).
        max_in_flight: shards handed to the cluster at a time; None means twice as many as it has CPUs, so that none is idle.
        seconds_without_video: a task that finishes no video for so long is ended; None means the video's limit and 15 minutes.

    Returns:
        A report a shard, in the order of `plans`.

    Raises:
        PipelineError: if more than `settings.max_bad_fraction` of all videos are rejected already, with the top reasons.
        PipelineError, DataError: the first cause, with the shard's name.
        ClusterError: if workers died more often than that, or the cluster has no CPU.
    """
    output = Folder(output)
    output.make()
    plans = ShardPlans.of(plans)
    reports: list[ShardReport | None] = [None] * len(plans)
    progress = _Progress(on_progress, plans.num_videos)
    for position, report in _finished(plans, output, settings):
        reports[position] = report
        progress.add(report, plans.num_videos_of(position))
    if None in reports:
        _require_hope(progress, reports, output, settings)
        seconds = seconds_without_video or settings.timeout_seconds + _SECONDS_BESIDE_DECODING
        fixed = (_once(source), output, settings, seconds)
        _write_missing(plans, reports, fixed, progress, _Room(max_in_flight))
    return [report for report in reports if report is not None]


def _once(source: Source) -> Any:
    """A reference to the source, which thus travels once and not with each task, however large it is."""
    import ray

    return ray.put(source)


def _write_missing(
    plans: ShardPlans, reports: list[ShardReport | None], fixed: tuple[Any, ...], progress: "_Progress", room: "_Room"
) -> None:
    """Run a task for each shard without a report and fill that in; `fixed` are the arguments of `_write` after the plan."""
    _, output, settings, _ = fixed
    task = _task()
    waiting = deque(position for position, report in enumerate(reports) if report is None)
    in_flight: dict[Any, int] = {}
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < room.limit():
                position = waiting.popleft()
                in_flight[task.remote(plans[position], *fixed)] = position
            for reference in _ready(list(in_flight)):
                position = in_flight.pop(reference)
                reports[position] = report = _result(reference, plans.shards[position][0])
                progress.add(report, plans.num_videos_of(position))
            if waiting or in_flight:
                _require_hope(progress, reports, output, settings)
    finally:
        _cancel(list(in_flight))


def _task() -> Any:
    """`_write` as a Ray task."""
    import ray

    # Any, since Ray's annotation of retry_exceptions knows no list of exceptions, which its documentation describes.
    # AttributeError: a fresh worker raised one once, in November 2026, and not in six tries to see it again; most likely two
    # of its threads were importing one package at the same time. A real one is raised after the last try all the same.
    options: dict[str, Any] = {"max_retries": _MAX_RETRIES, "retry_exceptions": [OSError, AttributeError]}
    return ray.remote(num_cpus=1, memory=_TASK_BYTES, scheduling_strategy="SPREAD", **options)(_write)


def _write(plan: ShardPlan, source: Source, output: Folder, settings: ShardSettings, seconds: float) -> ShardReport:
    """`write_shard` in a worker process, ended when no video is finished for `seconds`.

    Raises:
        TimeoutError: at that moment; if the process does not even react to that, it ends itself, and Ray sees a dead worker.
    """
    try:
        with _stopwatch(seconds) as restart:
            return write_shard(plan, _TimedSource(source, restart), output, settings)
    except _StandsStillError:
        raise TimeoutError(f"no video was finished for {seconds:g} seconds") from None


class _StandsStillError(BaseException):
    """No `Exception`: no code on the way may take it for the fault of a video."""


@dataclass(frozen=True)
class _TimedSource:
    """Restarts the stopwatch with each video."""

    source: Source
    restart: Any

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:
        self.restart()
        return self.source.read(video, shard, settings)


@contextmanager
def _stopwatch(seconds: float) -> Iterator[Any]:
    """Interrupt the block with `_StandsStillError` if the yielded function is not called for `seconds`.

    A block that hangs inside C code does not see the signal; a thread of `faulthandler`, which needs no interpreter, then ends
    the process.
    """
    armed_at = -math.inf

    def restart() -> None:
        nonlocal armed_at
        signal.setitimer(signal.ITIMER_REAL, seconds)
        now = time.monotonic()
        if now - armed_at > _SECONDS_TO_CLEAN_UP / 2:  # not with each video: it starts a thread
            faulthandler.dump_traceback_later(seconds + _SECONDS_TO_CLEAN_UP, exit=True, file=_STANDARD_ERROR)
            armed_at = now

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _StandsStillError

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        restart()
        yield restart
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, previous)


def _finished(plans: ShardPlans, output: Folder, settings: ShardSettings) -> Iterator[tuple[int, ShardReport]]:
    """Positions and reports of the shards that are complete. Lists the folder once and reads the footers of the sidecars."""
    sizes = output.list()

    def look(position: int) -> ShardReport | None:
        name = plans.shards[position][0]
        return finished_report(output, name, plan_sha256(plans.digest(position), settings), sizes[name])

    there = [position for position, name in enumerate(plans.names) if name in sizes and sidecar_name(name) in sizes]
    with ThreadPoolExecutor(_SIDECAR_READERS) as pool:
        for begin in range(0, len(there), 1024):
            part = there[begin : begin + 1024]
            for position, report in zip(part, pool.map(look, part), strict=True):
                if report is not None:
                    yield position, report


class _Room:
    """How many shards may be with the cluster; follows it when nodes come and go."""

    def __init__(self, max_in_flight: int | None) -> None:
        self._fixed = max_in_flight
        self._found = 0
        self._looked_at = -_SECONDS_BETWEEN_LOOKS

    def limit(self) -> int:
        import ray

        if self._fixed is not None:
            return self._fixed
        if time.monotonic() - self._looked_at >= _SECONDS_BETWEEN_LOOKS:
            num_cpus = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]  # Ray leaves it
            if not num_cpus and not self._found:
                raise ClusterError("the Ray cluster has no CPU to write shards with; see `ray status` and add a node")
            self._found = max(2, 2 * int(num_cpus))
            self._looked_at = time.monotonic()
        return self._found


class _Progress:
    """Counts what the tasks report; shards that were there already do not count in the rates."""

    def __init__(self, on_progress: OnProgress | None, num_videos: int) -> None:
        self._on_progress = on_progress
        self.num_videos = num_videos
        self.reasons: Counter[str] = Counter()
        self._videos_done = 0
        # (time, videos, frames, bytes), the latest last; the rates are those between the first and the last entry.
        self._written = deque([(time.monotonic(), 0, 0, 0)])
        self._show("starting")

    def add(self, report: ShardReport, num_videos: int) -> None:
        """Count a shard."""
        self._videos_done += num_videos
        self.reasons.update(report.reasons)
        rejected = f"{self.reasons.total():,} rejected"
        if report.skipped:
            self._show(f"written before, {rejected}")
        else:
            now, (_, videos, frames, source_bytes) = time.monotonic(), self._written[-1]
            self._written.append((now, videos + num_videos, frames + report.num_frames, source_bytes + report.source_bytes))
            while len(self._written) > 2 and self._written[1][0] < now - _SECONDS_OF_RATE:
                self._written.popleft()
            self._show(f"{rejected}, {self._rates()}")  # a narrow terminal cuts the end

    def _rates(self) -> str:
        first, last = self._written[0], self._written[-1]
        seconds = max(last[0] - first[0], 1e-9)
        videos, frames, source_bytes = ((last[place] - first[place]) / seconds for place in (1, 2, 3))
        return f"{videos:,.{0 if videos >= 10 else 1}f} videos/s, {frames:,.0f} frames/s, {source_bytes / 1e6:,.1f} MB/s"

    def _show(self, text: str) -> None:
        if self._on_progress is not None:
            self._on_progress(self._videos_done, self.num_videos, text)


def _require_hope(progress: _Progress, reports: Sequence[ShardReport | None], output: Folder, settings: ShardSettings) -> None:
    """Stop at once when so many videos are rejected that the set will be refused, whatever becomes of the others."""
    if progress.reasons.total() <= settings.max_bad_fraction * progress.num_videos:
        return
    examples: list[str] = []
    for report in reports:
        if report is not None and report.num_rejected and len(examples) < VIDEOS_SHOWN:
            rows, _ = read_sidecar(output, sidecar_name(report.name))
            examples += rejected_examples(rows, VIDEOS_SHOWN - len(examples))
    require_few_rejected(progress.num_videos, progress.reasons, settings, examples)


def _ready(references: list[Any]) -> list[Any]:
    """Wait for one task to end, and give all that have ended by then: a look at thousands for each one would be slow."""
    import ray

    ready, waiting = ray.wait(references, num_returns=1, fetch_local=False)
    if waiting:
        more, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        ready += more
    return list(ready)


def _result(reference: Any, name: str) -> ShardReport:
    """The report of a finished task, or its first cause with the shard's name."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        report: ShardReport = ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SagsmError):
            raise type(cause)(str(cause) if name in str(cause) else f"shard {name}: {cause}") from error
        tried = f"shard {name} was tried {_MAX_RETRIES + 1} times and failed with {cause!r}"
        if isinstance(cause, TimeoutError):
            raise ClusterError(f"{tried}; look at its videos and at the nodes' disks and network, then run again") from error
        if isinstance(cause, OSError):
            raise PipelineError(f"{tried}; check the disk and memory of that machine and run again") from error
        error.add_note(f"while writing shard {name}")
        raise
    except RayError as error:
        tried = f"the workers that wrote shard {name} died {_MAX_RETRIES + 1} times: {error}"
        raise ClusterError(f"{tried}; check `ray status` and the memory of the nodes, then run again") from error
    return report


def _cancel(references: list[Any]) -> None:
    """Interrupt tasks and wait for them to clean up, so that nothing writes into the folder any more."""
    import ray

    for reference in references:
        ray.cancel(reference)
    if references:
        ray.wait(references, num_returns=len(references), timeout=_SECONDS_TO_STOP)
