"""The Ray cluster: one of our own on this machine, or one that is already there (`--address`)."""

import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from infra.cluster_token import provide_token, require_entry
from infra.errors import ClusterError

P = ParamSpec("P")
R = TypeVar("R")

PACKAGES = ("infra", "models", "pipelines", "preprocessing", "tuning")
"""Our code: what goes to the nodes of a cluster."""

SPILL_LIMIT = 0.95
"""Of the disk with Ray's temporary folder; where more of it is used, Ray spills no object but fails what needs it."""

# Of a cluster of our own; a node that is started by hand gets them as variables: RAY_worker_niceness=0 ray start ...
_SYSTEM_SETTINGS = {
    # As other programs. Ray's own 15 gives a worker 3 % of a core that it shares with one of them, and since the threads of a
    # training wait for each other, two of them beside one busy program then did 1.8 clips/s; at 0 they do 12.9, and alone 47.
    "worker_niceness": 0,
    # Ray's own default is to try a task that is too big for memory for ever. The driver counts, whoever started the cluster.
    "task_oom_retries": 3,
    "local_fs_capacity_threshold": SPILL_LIMIT,
}
_OBJECT_STORE_BYTES = 256 * 2**20  # data goes through files, so that only small manifests pass through Ray's object store
_CONNECT_SECONDS = 5.0


def checkout() -> Path:
    """The folder that holds our packages."""
    return Path(__file__).resolve().parent.parent


@contextmanager
def session(address: str | None) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine that ends with the `with` block.

    A cluster of our own asks for a token and listens on the loopback interface only.

    Raises:
        ClusterError: if nothing answers at `address`, it runs another Ray, or does not fit this process's token
            (`cluster_token.require_entry`); if this machine is none of its nodes; if Ray does not start.
    """
    import ray
    import ray.train.torch
    import ray.tune  # both now: two stages whose threads import one package at the same time can each see half of it

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(_SYSTEM_SETTINGS["task_oom_retries"]))
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address:
        options |= {"address": _entered(address), "runtime_env": code_environment()}
    else:
        provide_token()
        options |= {"address": "local", "include_dashboard": False}  # local: never join a cluster that happens to run here
        options |= {"object_store_memory": _OBJECT_STORE_BYTES, "_system_config": _SYSTEM_SETTINGS}
    try:
        with nullcontext() if address else _on_loopback():
            ray.init(**options)
    except Exception as error:  # Ray raises all kinds, Exception itself among them
        where = f"at {address}" if address else "on this machine"
        reason = " ".join(str(error).split()).rstrip(".")
        raise ClusterError(
            f"no Ray cluster {where}: {reason}; check `ray status`, or leave out --address to use this machine"
        ) from error
    try:
        yield
    except KeyboardInterrupt:
        # The process is about to end, and a cluster of its own with it. After a shutdown, stages that are still busy in their
        # threads would make Ray start another one.
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


def code_environment() -> dict[str, Any]:
    """Ray's `runtime_env` with which the nodes of a cluster run this very code.

    Of the checkout only our packages travel: no data, store or secret that somebody keeps in it. A job that `ray job submit`
    has started brought its code along, to the driver as to the nodes.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    if (job.get("runtime_env") or {}).get("working_dir"):
        return {}
    return {"working_dir": str(checkout()), "excludes": ["/*", "!/.", *(f"!/{name}" for name in PACKAGES), "__pycache__"]}


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray listen on 127.0.0.1, as it does on macOS; on Linux the same ports are open to the whole network (2.60)."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _entered(address: str) -> str:
    """The address as Ray needs it, once it is sure that this process can join; Ray itself tries for minutes, or aborts."""
    import ray
    from ray._private import services

    host, colon, port = address.rpartition(":")
    if "://" in address:
        raise ClusterError(
            f"--address {address}: Ray Client cannot train; expected host:port of the head (its GCS), and this command on "
            "one of the cluster's machines, for example by `ray job submit`"
        )
    hint = "expected the address that `ray status` or `ray start --head` prints; leave out --address to use this machine"
    try:
        if colon and port.isdigit():  # else "auto", or a name that Ray resolves
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        found = services.canonicalize_bootstrap_address(address)
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Ray cluster at {address}: {error}; {hint}") from error
    if found is None:
        raise ClusterError(f"no Ray cluster at {address}; {hint}")
    version = require_entry(found)
    if version != ray.__version__:
        raise ClusterError(
            f"the cluster at {address} runs Ray {version}, this process Ray {ray.__version__}; expected the same: "
            f"pip install 'ray[default,train,tune]=={version}' here, or start the cluster's nodes with {ray.__version__}"
        )
    if not services.find_node_ids():  # type: ignore[no-untyped-call]  # Ray leaves it untyped
        raise ClusterError(
            f"this machine is no node of the cluster at {address}: no raylet runs here; run this command on one of its "
            f"nodes, or make this machine one: ray start --address={address} --num-cpus=0"
        )
    return found


def resources() -> dict[str, float]:
    """CPUs and GPUs of the connected cluster, used or not."""
    import ray

    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    return {"CPU": found.get("CPU", 0.0), "GPU": found.get("GPU", 0.0)}


def node_resources(*, free: bool = False) -> list[dict[str, float]]:
    """What each node of the connected cluster has, or with `free` what of it nobody holds; nodes that are drained are left out.

    Reserving and giving back a placement group would be the public way to ask for free room, but one that is removed while it
    is being placed can take its CPUs with it for good (Ray 2.60, seen with two nodes).
    """
    import ray
    from ray._private import state

    draining = state.state.get_draining_nodes()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]  # Ray
    available = state.available_resources_per_node() if free else nodes  # type: ignore[no-untyped-call]  # Ray leaves it
    return [available.get(node_id, {}) for node_id in nodes if node_id not in draining]


def reclaim_reservations() -> int:
    """Give back what is reserved by placement groups of this job whose creator, an actor, has died; return how many.

    Ray keeps them until the job ends (2.60). The actor that Ray Train starts to remove them asks the dashboard who is alive,
    which a cluster of our own has not.
    """
    import ray
    from ray._private import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    accessor = state.state._connect_and_get_accessor()
    table_data: Any = gcs_pb2.PlacementGroupTableData  # type: ignore[attr-defined]  # made when it is imported
    groups = [table_data.FromString(data) for data in accessor.get_placement_group_table()]
    orphans = [
        group
        for group in groups
        if group.creator_job_id.hex() == job
        and group.creator_actor_dead
        and any(byte != 0xFF for byte in group.creator_actor_id)  # else the driver made it
        and group.state != table_data.REMOVED
    ]
    for group in orphans:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return len(orphans)


def describe_use() -> str:
    """What of the cluster is free, and who holds the rest, as far as Ray tells: reservations and actors (not plain tasks)."""
    import ray
    from ray._private import state  # the public API for actors needs the dashboard, which a cluster of our own has not
    from ray.util.placement_group import placement_group_table

    have, free = resources(), ray.available_resources()  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    held = Counter(str(bundle) for group in groups for bundle in group["bundles"].values())
    actors = Counter(
        str(actor["ActorClassName"]) for actor in state.actors(actor_state_name="ALIVE").values() if not actor["IsDetached"]
    )
    lists = {"reserved are": held, "actors are": actors}
    parts = [f"{name} " + ", ".join(f"{n} x {what}" for what, n in list_.items()) for name, list_ in lists.items() if list_]
    head = f"of {have['CPU']:g} CPUs and {have['GPU']:g} GPUs {free.get('CPU', 0):g} and {free.get('GPU', 0):g} are free"
    return "; ".join([head, *parts])


def call(function: Callable[P, R], *, num_cpus: float, num_gpus: float, arguments: dict[str, Any]) -> R:
    """Run `function(**arguments)` in a worker process of the cluster and return its result; see `call_each`."""
    [(_, result)] = call_each(function, num_cpus=num_cpus, num_gpus=num_gpus, arguments=[arguments])
    return result


def call_each(
    function: Callable[P, R], *, num_cpus: float, num_gpus: float, arguments: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, R]]:
    """Run `function` with each of several arguments in worker processes, as many at a time as fit.

    Args:
        function: from an importable module.
        num_cpus: cores to reserve for each; torch is told to use as many threads.
        num_gpus: GPUs to reserve for each.
        arguments: keyword arguments of each call; small, since they travel through Ray's object store.

    Yields:
        The number of a call, from 0, and its result, as they end. When the caller leaves early, the others are cancelled.

    Raises:
        ClusterError: if the cluster has not what is asked for, or the worker process died three times.
    """
    import ray

    have = resources()
    if have["CPU"] < num_cpus or have["GPU"] < num_gpus:
        raise ClusterError(
            f"{function.__name__} asks for {num_cpus:g} CPUs and {num_gpus:g} GPUs; "
            f"the cluster has {have['CPU']:g} and {have['GPU']:g}; start larger nodes, or another --address"
        )
    task: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=2)(_call)
    numbers = {task.remote(function, values): number for number, values in enumerate(arguments)}
    try:
        while numbers:
            [ready], _ = ray.wait(list(numbers))
            yield numbers.pop(ready), ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
        raise ClusterError(f"the worker process that ran {function.__name__} died three times: {error}") from error
    finally:
        for reference in numbers:
            ray.cancel(reference)


def _call(function: Callable[..., R], arguments: dict[str, Any]) -> R:
    return function(**arguments)
