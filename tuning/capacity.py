"""How many trials fit into the cluster at once, reckoned node by node before the first one starts.

A trial that trains by itself reserves its CPUs and GPUs on one node. A trial with workers is a light process that reserves no
CPU at all, or trials alone could fill a cluster whose workers then wait for ever; its workers may be on different nodes.
"""

from collections.abc import Mapping, Sequence

from infra.errors import ClusterError, ConfigError
from tuning.settings import SearchSettings

_ROUNDING = 1e-9  # a third of a GPU fits three times into one
_LIGHT_BYTES = 1.0  # Ray refuses a process that reserves nothing


def trial_bundle(settings: SearchSettings) -> dict[str, float]:
    """What the process of a trial reserves, as Ray names it."""
    if settings.workers_per_trial > 1:
        return {"memory": _LIGHT_BYTES}
    return {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial}


def count_trials(settings: SearchSettings, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials these nodes hold at once.

    Args:
        settings: the `search` section.
        nodes: `CPU` and `GPU` of each node.
    """
    return sum(_num_places(settings, node) for node in nodes) // settings.workers_per_trial


def plan_concurrency(settings: SearchSettings, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many trials to run at once: as many as fit, `max_concurrent_trials` at most.

    Raises:
        ClusterError: if not even one fits.
        ConfigError: if the workers of a trial would share a GPU.
    """
    if settings.workers_per_trial > 1 and settings.gpus_per_trial not in (0, 1):
        raise ConfigError(
            f"search.gpus_per_trial is {settings.gpus_per_trial:g} with search.workers_per_trial {settings.workers_per_trial}; "
            "expected 0 or 1, since each worker has one GPU of its own or none"
        )
    num_fitting = count_trials(settings, nodes)
    if num_fitting == 0:
        there = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes) or "nothing"
        raise ClusterError(
            f"a trial asks for {_asked(settings)}; the nodes of the cluster have {there}; {_advice(settings, nodes)}"
        )
    return min(num_fitting, settings.max_concurrent_trials or num_fitting)


def _num_places(settings: SearchSettings, node: Mapping[str, float]) -> int:
    """For trials, or for workers of trials."""
    by_cpu = int(node.get("CPU", 0) // settings.cpus_per_trial)
    if settings.gpus_per_trial == 0:
        return by_cpu
    if settings.gpus_per_trial > 1:
        return min(by_cpu, int(node.get("GPU", 0) // settings.gpus_per_trial))
    per_gpu = int(1 / settings.gpus_per_trial + _ROUNDING)  # a share is on one GPU
    return min(by_cpu, int(node.get("GPU", 0)) * per_gpu)


def _asked(settings: SearchSettings) -> str:
    each = f"{settings.cpus_per_trial} CPUs and {settings.gpus_per_trial:g} GPUs"
    if settings.workers_per_trial > 1:
        return f"{settings.workers_per_trial} workers with {each} each, a worker on one node"
    return f"{each} on one node"


def _advice(settings: SearchSettings, nodes: Sequence[Mapping[str, float]]) -> str:
    """Which setting to lower, and how far."""
    num_places = sum(_num_places(settings, node) for node in nodes)
    if num_places:
        return f"lower search.workers_per_trial to {num_places}, or search.cpus_per_trial"
    most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU")}
    if most["CPU"] < 1:
        return "add a node with CPUs"
    if most["CPU"] < settings.cpus_per_trial:
        return f"lower search.cpus_per_trial to {int(most['CPU'])}"
    if most["GPU"] < settings.gpus_per_trial:
        return f"lower search.gpus_per_trial to {most['GPU']:g}"
    return "no node has both; lower search.cpus_per_trial or search.gpus_per_trial"
