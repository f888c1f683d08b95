"""Ray tasks that write shards, one task a shard; the only file of this package that names Ray."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.errors import ClusterError, PipelineError, SagsmError
from infra.filesystems import Folder
from infra.progress import OnProgress
from preprocessing.planning import ShardPlan
from preprocessing.shards import ShardReport, ShardSettings, write_shard
from preprocessing.sources import Source

_MAX_RETRIES = 3
_SECONDS_TO_STOP = 20.0


def write_shards(
    plans: Sequence[ShardPlan],
    source: Source,
    output: Folder | Path,
    settings: ShardSettings,
    on_progress: OnProgress | None = None,
    max_in_flight: int | None = None,
) -> list[ShardReport]:
    """Write all shards on the connected cluster; those that are complete already are kept.

    A worker or node that dies, and an error of the operating system, make the task run again, at most three times; that is
    safe, since a shard is whole or absent and its bytes do not depend on who writes it. Local folders must be visible under the
    same path on every node. On an error or a signal the other tasks are cancelled before this returns.

    Args:
        plans: from `plan_shards`.
        source: gives the frames.
        output: made if it does not exist.
        settings: the same for all shards.
        on_progress: called with videos done and in all, and a text such as "412 frames/s, 3 rejected".
        max_in_flight: shards handed to the cluster at a time; None means twice as many as it has CPUs, so that none is idle.

    Returns:
        A report a shard, in the order of `plans`.

    Raises:
        PipelineError, DataError: the first cause, with the shard's name.
        ClusterError: if workers died more often than that.
    """
    import ray

    output = Folder(output)
    output.make()
    # Any, since Ray's annotation of retry_exceptions knows no list of exceptions, which its documentation describes.
    # AttributeError: a fresh worker raised one once, in November 2026, and not in six tries to see it again; most likely two
    # of its threads were importing one package at the same time. A real one is raised after the last try all the same.
    options: dict[str, Any] = {"num_cpus": 1, "max_retries": _MAX_RETRIES, "retry_exceptions": [OSError, AttributeError]}
    task = ray.remote(**options)(write_shard)
    limit = max_in_flight or max(2, 2 * int(ray.cluster_resources()["CPU"]))  # type: ignore[no-untyped-call]  # Ray leaves it
    waiting = list(reversed(plans))
    in_flight: dict[Any, ShardPlan] = {}
    reports: dict[str, ShardReport] = {}
    progress = _Progress(on_progress, sum(len(plan.videos) for plan in plans))
    try:
        while waiting or in_flight:
            while waiting and len(in_flight) < limit:
                plan = waiting.pop()
                in_flight[task.remote(plan, source, output, settings)] = plan
            ready, _ = ray.wait(list(in_flight), num_returns=1)
            plan = in_flight.pop(ready[0])
            reports[plan.name] = _result(ready[0], plan)
            progress.add(reports[plan.name], len(plan.videos))
    finally:
        _cancel(list(in_flight))
    return [reports[plan.name] for plan in plans]


class _Progress:
    """Counts what the tasks report; shards that were there already do not count in the rate."""

    def __init__(self, on_progress: OnProgress | None, num_videos: int) -> None:
        self._on_progress = on_progress
        self._num_videos = num_videos
        self._started = time.monotonic()
        self._videos_done = self._num_frames = self._num_rejected = 0
        self._show("starting")

    def add(self, report: ShardReport, num_videos: int) -> None:
        self._videos_done += num_videos
        self._num_frames += 0 if report.skipped else report.num_frames
        self._num_rejected += report.num_rejected
        rate = self._num_frames / max(time.monotonic() - self._started, 1e-9)
        self._show(f"{rate:.0f} frames/s, {self._num_rejected} rejected")

    def _show(self, text: str) -> None:
        if self._on_progress is not None:
            self._on_progress(self._videos_done, self._num_videos, text)


def _result(reference: Any, plan: ShardPlan) -> ShardReport:
    """The report of a finished task, or its first cause with the shard's name."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        report: ShardReport = ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SagsmError):
            raise type(cause)(f"shard {plan.name}: {cause}") from error
        if isinstance(cause, OSError):
            tried = f"shard {plan.name} was tried {_MAX_RETRIES + 1} times and failed with {cause!r}"
            raise PipelineError(f"{tried}; check the disk and memory of that machine and run again") from error
        error.add_note(f"while writing shard {plan.name}")
        raise
    except RayError as error:
        tried = f"the workers that wrote shard {plan.name} died {_MAX_RETRIES + 1} times: {error}"
        raise ClusterError(f"{tried}; check `ray status` and the memory of the nodes, then run again") from error
    return report


def _cancel(references: list[Any]) -> None:
    """Interrupt tasks and wait for them to clean up, so that nothing writes into the folder any more."""
    import ray

    for reference in references:
        ray.cancel(reference)
    if references:
        ray.wait(references, num_returns=len(references), timeout=_SECONDS_TO_STOP)
