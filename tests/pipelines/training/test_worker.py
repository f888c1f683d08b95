import os
import signal

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import cluster
from infra.errors import ClusterError, DataError, PipelineError
from infra.storage import sha256_file
from pipelines.training.job import TrainJob
from pipelines.training.settings import ModelSettings, TrainSettings
from pipelines.training.worker import plan_workers, train_on_cluster

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray reads its own old options there

NODES = st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 9), "GPU": st.integers(0, 3)}), min_size=1, max_size=4)


@given(num_workers=st.integers(0, 8), nodes=NODES)
def test_a_plan_fits_the_nodes_and_uses_as_many_cpus_as_it_can(num_workers, nodes):
    gpus = sum(node["GPU"] for node in nodes)

    def num_places(cpus):
        return sum(min(node["CPU"] // cpus, node["GPU"]) if gpus else node["CPU"] // cpus for node in nodes)

    wanted = num_workers or gpus or 1
    if num_places(1) < wanted:
        with pytest.raises(ClusterError, match=rf"train.num_workers asks for {wanted} workers with 1 CPU"):
            plan_workers(num_workers, nodes)
        return
    plan = plan_workers(num_workers, nodes)
    assert (plan.num_workers, plan.use_gpu) == (wanted, gpus > 0)
    assert num_places(plan.cpus) >= wanted > num_places(plan.cpus + 1)


def test_what_cannot_be_scheduled_says_what_was_asked_for_and_what_is_there():
    with pytest.raises(ClusterError) as error:
        plan_workers(3, [{"CPU": 2.0, "memory": 1e9}, {"node:10.0.0.2": 1.0}])
    assert str(error.value) == (
        "train.num_workers asks for 3 workers with 1 CPU each; the cluster has 2 nodes (2 CPUs, 0 GPUs; 0 CPUs, 0 GPUs). "
        "Lower train.num_workers or add nodes"
    )
    with pytest.raises(ClusterError, match="4 workers with 1 CPU and 1 GPU each"):
        plan_workers(4, [{"CPU": 16, "GPU": 2}])


def job_of(shards_dir, **changes):
    arguments = {"epochs": 3, "batch_size": 4, "warmup_epochs": 0.5, "pixels": 32, "num_segments": 2, "num_workers": 2}
    arguments |= {"loader_threads": 1, "flip": "none", "checkpoint_every_steps": 1, "max_failures": 1}
    model = ModelSettings(name="gsm_bn_inception", dropout=0.25)
    return TrainJob("test", shards_dir, model, TrainSettings(**(arguments | changes)))


def kill_a_worker():
    workers = [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    os.kill(workers[-1].pid, signal.SIGKILL)


class Epochs(list):
    """Collects epochs, and kills a worker when the first has come."""

    def __init__(self, *, kill):
        super().__init__()
        self.kill = kill

    def __call__(self, metrics):
        self.append(metrics)
        if self.kill and len(self) == 1:
            kill_a_worker()


@pytest.fixture(scope="module")
def ray_session():
    with cluster.session(None):
        yield


@pytest.fixture(scope="module")
def undisturbed(ray_session, shards_dir, tmp_path_factory):
    storage_dir, epochs = tmp_path_factory.mktemp("undisturbed"), Epochs(kill=False)
    return train_on_cluster(job_of(shards_dir), storage_dir=storage_dir, on_epoch=epochs), epochs


@pytest.mark.slow
def test_two_workers_train_and_the_driver_hears_of_each_epoch_once(undisturbed):
    result, epochs = undisturbed
    assert result.completed
    assert epochs == result.history
    assert [epoch.epoch for epoch in epochs] == [0, 1, 2]
    storage_dir = result.last_weights.parents[2]
    assert [path.name for path in storage_dir.iterdir()] == ["checkpoints"]


@pytest.mark.slow
def test_training_goes_on_when_a_worker_is_killed_and_ends_with_the_same_weights(undisturbed, shards_dir, tmp_path):
    epochs = Epochs(kill=True)
    result = train_on_cluster(job_of(shards_dir), storage_dir=tmp_path, on_epoch=epochs)
    assert result.resumed_from_step >= 3
    assert epochs == result.history
    assert sha256_file(result.last_weights) == sha256_file(undisturbed[0].last_weights)


@pytest.mark.slow
def test_too_many_failures_are_an_error_and_the_next_call_goes_on(undisturbed, shards_dir, tmp_path):
    job = job_of(shards_dir, max_failures=0)
    with pytest.raises(PipelineError) as error:
        train_on_cluster(job, storage_dir=tmp_path, on_epoch=Epochs(kill=True))
    assert "training test failed more than train.max_failures=0 times, last with rank " in str(error.value)
    assert "Run again to go on from the last checkpoint" in str(error.value)
    epochs = Epochs(kill=False)
    result = train_on_cluster(job, storage_dir=tmp_path, on_epoch=epochs)
    assert result.resumed_from_step >= 3
    assert epochs == result.history
    assert sha256_file(result.last_weights) == sha256_file(undisturbed[0].last_weights)


@pytest.mark.slow
@pytest.mark.parametrize("max_failures", [0, 2])
def test_an_error_in_a_worker_comes_out_as_itself(ray_session, tmp_path, max_failures):
    with pytest.raises(DataError, match="no_such_folder"):
        train_on_cluster(job_of(tmp_path / "no_such_folder", max_failures=max_failures), storage_dir=tmp_path)


@pytest.mark.slow
def test_an_error_of_the_listener_ends_training_late_but_is_not_lost(ray_session, shards_dir, tmp_path):
    def refuse(metrics):
        raise PipelineError(f"cannot record epoch {metrics.epoch}")

    with pytest.raises(PipelineError, match="cannot record epoch 0"):
        train_on_cluster(job_of(shards_dir, epochs=1, num_workers=1), storage_dir=tmp_path, on_epoch=refuse)
    assert (tmp_path / "checkpoints" / "step-00000006" / "manifest.json").exists()


@pytest.mark.slow
def test_too_many_workers_for_the_cluster_fail_at_once(ray_session, shards_dir, tmp_path):
    with pytest.raises(ClusterError, match=r"train\.num_workers asks for 999 workers with 1 CPU"):
        train_on_cluster(job_of(shards_dir, num_workers=999), storage_dir=tmp_path)
