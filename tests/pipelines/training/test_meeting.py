"""Processes that train together meet behind Ray's token and listen on their node's address alone."""

from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from infra.cluster import session
from pipelines.training.meeting import Meeting, MeetingStore, interface_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray reads its own old options there
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's nodes, whose output nobody closes
]


@pytest.fixture(scope="module")
def meeting():
    import ray

    with session(None):
        yield ray.remote(num_cpus=0)(Meeting).remote()


def add_up():
    """What a worker does: a sum over all ranks; returns it and on which addresses this process listens."""
    import ray.train
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(ray.train.get_context().get_world_rank() + 1)])
    dist.all_reduce(total)
    dist.barrier()
    listening = {c.laddr.ip for c in psutil.Process().net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN}
    return total.item(), dist.get_world_size(), sorted(listening)


def train(config, folder: Path):
    import ray.train
    from ray.train.torch import TorchTrainer

    scaling = ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
    trainer = TorchTrainer(
        add_up, torch_config=config, scaling_config=scaling, run_config=ray.train.RunConfig(storage_path=str(folder))
    )
    return trainer.fit().return_value


def test_ranks_meet_and_listen_on_their_own_address_alone(meeting, tmp_path):
    from ray.train.torch import TorchConfig

    from pipelines.training.meeting import GuardedTorchConfig

    total, world_size, listening = train(GuardedTorchConfig(timeout_s=60), tmp_path)
    assert (total, world_size) == (3.0, 2)
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1"}  # the second is Ray's
    total, world_size, listening = train(TorchConfig(timeout_s=60), tmp_path)  # the control: torch by itself
    assert (total, world_size) == (3.0, 2)
    assert {"0.0.0.0", "::"} & set(listening)


def test_a_store_gives_what_another_has_told(meeting):
    one, other = (MeetingStore(meeting, timedelta(seconds=30)) for _ in range(2))
    one.set("a", b"\0\xff")
    one.set("b", "text")
    assert (other.get("a"), other.get("b")) == (b"\0\xff", b"text")
    assert [one.add("n", 1), other.add("n", 2), one.add("n", 0)] == [1, 3, 3]
    assert other.check(["a", "n"])
    assert not other.check(["a", "c"])
    other.wait(["a", "b"])


def test_who_does_not_come_is_named(meeting):
    with pytest.raises(RuntimeError, match=r"waited 0\.1 s for absent; expected all ranks to come"):
        MeetingStore(meeting, timedelta(seconds=0.1)).get("absent")


def test_the_interface_of_an_address():
    name = interface_of("127.0.0.1")
    assert name is not None
    assert "127.0.0.1" in {address.address for address in psutil.net_if_addrs()[name]}
    assert interface_of("192.0.2.1") is None
