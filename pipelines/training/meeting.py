"""How the processes of a training meet: behind Ray's token, on the address by which the cluster knows their node.

Left alone, they meet at a TCP store of torch (2.13), which listens on all addresses of rank 0's machine and does what anybody
asks, and gloo listens where the host's name leads: on Debian to 127.0.1.1, where no other machine gets, or to another network.
"""

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

_SECONDS_BETWEEN_LOOKS = 0.02


class Meeting:
    """What the processes tell each other while they connect, by key; an actor."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        """Keep `value` under `key`, in place of another."""
        self._values[key] = value

    def get(self, key: str) -> bytes | None:
        """What is kept under `key`; None if nothing is."""
        return self._values.get(key)

    def add(self, key: str, amount: int) -> int:
        """Count on; the first one counts from 0."""
        total = int(self._values.get(key, b"0")) + amount
        self._values[key] = str(total).encode()
        return total

    def has(self, keys: Sequence[str]) -> bool:
        """Whether there is something under each."""
        return all(key in self._values for key in keys)


class MeetingStore(dist.Store):  # type: ignore[name-defined, misc]  # torch has it under a condition
    """The store that `init_process_group` wants, kept by a `Meeting`.

    Args:
        meeting: handle of the actor.
        patience: how long `get` and `wait` wait for a key, by default.
    """

    def __init__(self, meeting: Any, patience: timedelta) -> None:
        super().__init__()
        self._meeting, self._patience = meeting, patience

    def set(self, key: str, value: bytes | str) -> None:
        """Tell all others."""
        _ask(self._meeting.set, key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        """What somebody told, once it is there; RuntimeError if it does not come."""
        self.wait([key])
        found: bytes = _ask(self._meeting.get, key)
        return found

    def add(self, key: str, amount: int) -> int:
        """Count on, and return how far the count is."""
        total: int = _ask(self._meeting.add, key, amount)
        return total

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all are there now."""
        return bool(_ask(self._meeting.has, list(keys)))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return once all are there; RuntimeError, as torch's own stores raise, if they do not come."""
        patience = timeout or self._patience
        give_up = time.monotonic() + patience.total_seconds()
        while not self.check(keys):
            if time.monotonic() > give_up:
                raise RuntimeError(f"waited {patience.total_seconds():g} s for {', '.join(keys)}; expected all ranks to come")
            time.sleep(_SECONDS_BETWEEN_LOOKS)


class GuardedTorchConfig(TorchConfig):
    """Ray Train's configuration of torch, with the meeting of this module where gloo is the backend (CPUs).

    With GPUs it is Ray Train's own, with a TCP store: NCCL's ports ask for nothing either, and want a network of their own.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What Ray Train asks to connect the workers."""
        return _GuardedBackend


class _GuardedBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        import ray

        if worker_group.get_resources_per_worker().get("GPU", 0) > 0:
            super().on_start(worker_group, backend_config)
            return
        worker_group.execute(_set_torch_distributed_env_vars)
        meeting, world_size = ray.remote(num_cpus=0)(Meeting).remote(), len(worker_group)
        patience = timedelta(seconds=backend_config.timeout_s)
        joining = [
            worker_group.execute_single_async(rank, _join, meeting, rank, world_size, patience) for rank in range(world_size)
        ]
        ray.get(joining)


def _join(meeting: Any, rank: int, world_size: int, patience: timedelta) -> None:
    """For a worker: connect to the others, and listen for them on this node's address alone."""
    import ray

    interface = interface_of(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray leaves it untyped
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store = MeetingStore(meeting, patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has the address; None if none has, as behind a translation of addresses."""
    interfaces = psutil.net_if_addrs().items()
    return next((str(name) for name, found in interfaces if address in {one.address for one in found}), None)


def _ask(method: Any, *arguments: Any) -> Any:
    import ray

    return ray.get(method.remote(*arguments))
