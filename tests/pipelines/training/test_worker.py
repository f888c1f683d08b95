"""Training on a real Ray cluster of two nodes, with all that can happen to workers and nodes on the way."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from infra import cluster
from infra.errors import ClusterError, DataError, PipelineError
from infra.storage import sha256_file
from pipelines.training import worker
from pipelines.training.job import TrainJob
from pipelines.training.rank import train_locally
from pipelines.training.settings import ModelSettings, TrainSettings
from pipelines.training.worker import train_on_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray reads its own old options there
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray's nodes, whose output nobody closes
]

STEPS_PER_EPOCH = 6
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def job_of(shards_dir, **changes):
    arguments = {"epochs": 3, "batch_size": 2, "warmup_epochs": 0.5, "pixels": 32, "num_segments": 2, "num_workers": 2}
    arguments |= {"loader_threads": 1, "flip": "none", "checkpoint_every_steps": 1, "max_failures": 1, "wait_seconds": 60}
    model = ModelSettings(name="gsm_bn_inception", dropout=0.25)
    return TrainJob("test", str(shards_dir), model, TrainSettings(**(arguments | changes)))


class Told:
    """Collects what the driver is told."""

    def __init__(self):
        self.epochs = []
        self.places = []
        self.texts = []

    def on_epoch(self, metrics):
        self.epochs.append(metrics)

    def on_progress(self, done, total, text):
        self.places.append((done, total))
        self.texts.append(text)

    def num_starts(self):
        return sum(text.startswith("starting ") for text in self.texts)


def workers():
    """The processes of Ray Train's workers on this machine, the oldest first."""
    found = [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]
    return sorted(found, key=lambda process: process.create_time())


def newest_step(storage_dir):
    return max((int(path.name[5:]) for path in (storage_dir / "checkpoints").glob("step-*")), default=0)


@contextmanager
def training(job, storage_dir, told):
    """Training in a thread, as a stage does it, while the block runs: nodes can be added in the main thread only.

    Yields `wait_for(condition)`, which raises what training raises, and `wait_for_step(step)`.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            train_on_cluster, job, storage_dir=storage_dir, on_epoch=told.on_epoch, on_progress=told.on_progress
        )

        def wait_for(condition):
            while not condition():
                if future.done():
                    raise AssertionError(f"training ended before its time: {future.exception() or future.result()}")
                time.sleep(0.02)

        yield future, wait_for, lambda step: wait_for(lambda: newest_step(storage_dir) >= step)


@pytest.fixture(scope="module")
def nodes():
    """A cluster whose driver's node has no CPU, and two nodes with one each; the fixture is the cluster and the two."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # else every `ray.init()` on this machine joins this cluster
    try:
        both = [made.add_node(**NODE) for _ in range(2)]
        with cluster.session(made.address):
            yield made, both
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def undisturbed(nodes, shards_dir, tmp_path_factory):
    storage_dir, told = tmp_path_factory.mktemp("undisturbed"), Told()
    result = train_on_cluster(job_of(shards_dir), storage_dir=storage_dir, on_epoch=told.on_epoch, on_progress=told.on_progress)
    return result, told


def test_two_workers_train_and_the_driver_hears_of_epochs_and_steps(undisturbed):
    result, told = undisturbed
    assert result.completed
    assert told.epochs == result.history
    assert [epoch.epoch for epoch in told.epochs] == [0, 1, 2]
    storage_dir = result.last_weights.parents[2]
    assert [path.name for path in storage_dir.iterdir()] == ["checkpoints"]
    assert told.texts[0] == "starting 2 workers with 1 CPU each"
    assert told.places == sorted(told.places)
    assert (told.places[0], told.places[-1][1]) == ((0, 3), 3 * STEPS_PER_EPOCH)
    assert any("clips/s" in text and "waiting for data" in text for text in told.texts)


def test_workers_and_a_node_are_lost_and_the_weights_are_those_of_the_undisturbed_run(undisturbed, nodes, shards_dir, tmp_path):
    """A worker killed without a second try; then, in one go: SIGTERM to a worker, a node killed, and another that joins."""
    made, both = nodes
    with training(job_of(shards_dir, max_failures=0), tmp_path, Told()) as (future, _, wait_for_step):
        wait_for_step(2)
        os.kill(workers()[-1].pid, signal.SIGKILL)
    assert isinstance(future.exception(), PipelineError)
    assert "training test failed more than train.max_failures=0 times, last with rank " in str(future.exception())
    assert "Run again to go on from the last checkpoint" in str(future.exception())
    first_step = newest_step(tmp_path)
    assert 2 <= first_step < 2 * STEPS_PER_EPOCH
    snapshot = tmp_path / "ray" / "test" / "checkpoint_manager_snapshot.json"  # Ray's own, cut
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(b"{")
    told = Told()
    with training(job_of(shards_dir), tmp_path, told) as (future, wait_for, wait_for_step):
        wait_for_step(first_step + 2)
        os.kill(workers()[-1].pid, signal.SIGTERM)
        wait_for(lambda: told.num_starts() == 2)
        wait_for_step(newest_step(tmp_path) + 2)
        made.remove_node(both.pop(), allow_graceful=False)
        wait_for(lambda: told.texts[-1].startswith("waiting for "))
        both.append(made.add_node(**NODE))
    result = future.result()
    assert told.num_starts() == 3
    assert result.resumed_from_step >= first_step + 4
    assert told.epochs == result.history
    assert [epoch.epoch for epoch in told.epochs] == [0, 1, 2]
    assert [epoch.ledger for epoch in told.epochs] == [epoch.ledger for epoch in undisturbed[1].epochs]
    assert sha256_file(result.last_weights) == sha256_file(undisturbed[0].last_weights)


def drain(made, node):
    """What a cloud does with a machine that it will take away."""
    import ray
    from ray.core.generated import autoscaler_pb2

    reason, deadline = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, time.time_ns() // 10**6 + 120_000
    accepted, refusal = ray._raylet.GcsClient(address=made.address).drain_node(node.node_id, reason, "a test", deadline)
    assert accepted, refusal


def test_the_number_of_workers_follows_the_nodes(undisturbed, nodes, shards_dir, tmp_path, monkeypatch):
    """One node, then two, then one again since the other is drained; not one failure is allowed."""
    made, both = nodes
    monkeypatch.setattr(worker, "_SECONDS_BETWEEN_RESIZES", 1.0)
    made.remove_node(both.pop())
    told = Told()

    job = job_of(shards_dir, min_workers=1, max_failures=0, epochs=4)
    with training(job, tmp_path, told) as (future, wait_for, wait_for_step):
        wait_for_step(1)
        both.append(made.add_node(**NODE))
        wait_for(lambda: told.num_starts() == 2)
        wait_for_step(newest_step(tmp_path) + 1)
        drain(made, both[1])
    result = future.result()
    made.remove_node(both.pop())
    both.append(made.add_node(**NODE))
    starts = [text for text in told.texts if text.startswith("starting")]
    assert starts == [f"starting {n} workers with 1 CPU each" for n in (1, 2, 1)]
    assert [epoch.epoch for epoch in told.epochs] == [0, 1, 2, 3]
    assert {epoch.ledger for epoch in told.epochs} == {epoch.ledger for epoch in undisturbed[1].epochs}  # each clip once
    assert told.epochs == result.history


def test_an_error_in_a_worker_comes_out_as_itself_and_is_not_tried_again(nodes, tmp_path):
    told = Told()
    with pytest.raises(DataError, match="no_such_folder"):
        train_on_cluster(job_of(tmp_path / "no_such_folder"), storage_dir=tmp_path, on_progress=told.on_progress)
    assert told.texts == ["starting 2 workers with 1 CPU each"]


def test_an_error_of_the_listener_comes_late_and_one_worker_gives_the_bits_of_local_training(nodes, shards_dir, tmp_path):
    def refuse(metrics):
        raise PipelineError(f"cannot record epoch {metrics.epoch}")

    job = job_of(shards_dir, epochs=1, num_workers=1)
    with pytest.raises(PipelineError, match="cannot record epoch 0"):
        train_on_cluster(job, storage_dir=tmp_path, on_epoch=refuse)
    told = Told()
    result = train_locally(job, storage_dir=tmp_path / "local", on_epoch=told.on_epoch, on_progress=told.on_progress)
    assert told.epochs == result.history
    there = tmp_path / result.last_weights.relative_to(tmp_path / "local")
    assert sha256_file(there) == sha256_file(result.last_weights)


def test_what_cannot_be_scheduled_fails_soon_and_says_what_holds_the_cluster(nodes, shards_dir, tmp_path):
    import ray

    with pytest.raises(ClusterError, match=r"train\.num_workers asks for 999 workers with 1 CPU"):
        train_on_cluster(job_of(shards_dir, num_workers=999), storage_dir=tmp_path)

    class Holder:
        """Somebody else's."""

        def is_there(self):
            return True

    held = ray.remote(num_cpus=1)(Holder).remote()
    assert ray.get(held.is_there.remote())
    told = Told()
    started = time.monotonic()
    with pytest.raises(ClusterError) as error:
        train_on_cluster(job_of(shards_dir, wait_seconds=2), storage_dir=tmp_path, on_progress=told.on_progress)
    assert time.monotonic() - started < 20
    for part in ("asks for 2 workers with 1 CPU each", "within train.wait_seconds=2", "of 2 CPUs and 0 GPUs 1 and 0 are free"):
        assert part in str(error.value)
    assert "Holder" in str(error.value)
    assert told.texts[0].startswith("waiting for room for 2 workers with 1 CPU each, 2 s at most")
    ray.kill(held)
