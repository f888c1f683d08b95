"""How many workers a training gets: what was asked for, what the cluster has, and what of it is free now."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from infra.cluster import describe_use, node_resources, reclaim_reservations
from infra.errors import ClusterError
from pipelines.training.settings import TrainSettings

_SECONDS_BETWEEN_TRIES = 0.5
_SECONDS_UNTOLD = 1.0  # what workers or tasks of our own have just given back takes a moment to show
_SECONDS_FOR_ALL = 5.0  # before fewer workers than the nodes could hold are taken


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers there are, and what each one reserves."""

    num_workers: int
    cpus: int
    use_gpu: bool

    @property
    def bundle(self) -> dict[str, float]:
        """What a worker reserves, as Ray names it."""
        return {"CPU": self.cpus, **({"GPU": 1} if self.use_gpu else {})}

    def __str__(self) -> str:
        cpus = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        return f"{self.num_workers} workers with {cpus}{' and 1 GPU' if self.use_gpu else ''} each"


def plan_workers(num_workers: int, nodes: Sequence[Mapping[str, float]], min_workers: int | None = None) -> WorkerPlan:
    """Divide the cluster's CPUs and GPUs over the workers.

    Args:
        num_workers: as asked for; 0 means one a GPU, or one without GPUs.
        nodes: `CPU` and `GPU` of each node, in use or not.
        min_workers: how few will do; None: no fewer.

    Returns:
        As many workers as there may be, each with as many whole CPUs as all can have, and one GPU if the cluster has any.

    Raises:
        ClusterError: if the cluster could never hold so many workers, with what was asked for and what there is.
    """
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    use_gpu = sum(gpus) > 0
    wanted = num_workers or sum(gpus) or 1
    least = min(min_workers or wanted, wanted)
    for count in range(wanted, least - 1, -1):
        for each in range(max(1, sum(cpus) // count), 0, -1):
            places = [min(cpu // each, gpu) if use_gpu else cpu // each for cpu, gpu in zip(cpus, gpus, strict=True)]
            if sum(places) >= count:
                return WorkerPlan(count, each, use_gpu)
    there = "; ".join(f"{cpu} CPUs, {gpu} GPUs" for cpu, gpu in zip(cpus, gpus, strict=True))
    setting = "train.num_workers" if least == wanted else "train.min_workers"
    raise ClusterError(
        f"{setting} asks for {least} workers with 1 CPU{' and 1 GPU' if use_gpu else ''} each; "
        f"the cluster has {len(nodes)} nodes ({there}). Lower {setting} or add nodes"
    )


def share_of(num_workers: int, nodes: Sequence[Mapping[str, float]], at_once: int) -> WorkerPlan:
    """The workers of one of several trainings that divide the cluster evenly among them.

    Args:
        num_workers: of each training, as asked for; 0 means its part of the GPUs, or one without GPUs.
        nodes: as for `plan_workers`.
        at_once: how many trainings there are.

    Raises:
        ClusterError: if the cluster could never hold them all.
    """
    wanted = num_workers or max(1, sum(int(node.get("GPU", 0)) for node in nodes) // at_once)
    try:
        plan = plan_workers(wanted * at_once, nodes)
    except ClusterError as error:
        raise ClusterError(f"{at_once} trainings at a time: {error}, or lower at_once") from None
    return replace(plan, num_workers=wanted)


def count_places(plan: WorkerPlan, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many of the plan's workers these nodes could hold."""
    return sum(min(int(node.get(name, 0) // amount) for name, amount in plan.bundle.items()) for node in nodes)


def find_room(
    settings: TrainSettings, say: Callable[[str], None], *, is_restart: bool, fixed: WorkerPlan | None = None
) -> WorkerPlan:
    """The largest plan for which there is room now; waits `settings.wait_seconds` for it, and then takes fewer CPUs a worker.

    With `fixed` it is that plan, with no CPU less.

    Raises:
        ClusterError: if there is none. At the first start also at once, if it could not even hold on an idle cluster; later,
            lost nodes may come back.
    """
    started = time.monotonic()
    while True:
        seconds = time.monotonic() - started
        is_last = seconds >= settings.wait_seconds
        try:
            plan = fixed or plan_workers(settings.num_workers, node_resources(), settings.min_workers)
        except ClusterError as error:
            if not is_restart or is_last:
                raise
            say(f"waiting for nodes, {settings.wait_seconds:.0f} s at most: {error}")
            time.sleep(_SECONDS_BETWEEN_TRIES)
            continue
        least = min(settings.min_workers or plan.num_workers, plan.num_workers)
        accepted = least if is_last or seconds >= _SECONDS_FOR_ALL else plan.num_workers
        for cpus in range(plan.cpus, 0 if is_last and fixed is None else plan.cpus - 1, -1):
            narrow = replace(plan, cpus=cpus)
            count = min(count_places(narrow, node_resources(free=True)), plan.num_workers)
            if count >= accepted:
                return replace(narrow, num_workers=count)
        reclaim_reservations()
        if is_last:
            wanted = fixed or replace(plan, num_workers=least, cpus=1)
            raise ClusterError(
                f"training asks for {wanted}, and the cluster had no room for them within "
                f"train.wait_seconds={settings.wait_seconds:g}: {describe_use()}. "
                "End what holds it, or lower train.num_workers"
            )
        if seconds >= _SECONDS_UNTOLD:
            say(f"waiting for room for {plan}, {settings.wait_seconds:.0f} s at most; {describe_use()}")
        time.sleep(_SECONDS_BETWEEN_TRIES)
