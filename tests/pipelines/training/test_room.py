import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ClusterError
from pipelines.training import room
from pipelines.training.room import WorkerPlan, count_places, find_room, plan_workers, share_of
from pipelines.training.settings import TrainSettings

NODES = st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 9), "GPU": st.integers(0, 3)}), min_size=1, max_size=4)


@given(num_workers=st.integers(0, 8), min_workers=st.none() | st.integers(1, 8), nodes=NODES)
def test_a_plan_fits_the_nodes_and_uses_as_many_workers_and_cpus_as_it_can(num_workers, min_workers, nodes):
    gpus = sum(node["GPU"] for node in nodes)

    def num_places(cpus):
        return sum(min(node["CPU"] // cpus, node["GPU"]) if gpus else node["CPU"] // cpus for node in nodes)

    wanted = num_workers or gpus or 1
    least = min(min_workers or wanted, wanted)
    if num_places(1) < least:
        with pytest.raises(ClusterError, match=rf"train\.(num|min)_workers asks for {least} workers with 1 CPU"):
            plan_workers(num_workers, nodes, min_workers)
        return
    plan = plan_workers(num_workers, nodes, min_workers)
    assert (plan.num_workers, plan.use_gpu) == (min(wanted, num_places(1)), gpus > 0)
    assert num_places(plan.cpus) >= plan.num_workers > num_places(plan.cpus + 1)
    assert count_places(plan, nodes) == num_places(plan.cpus)


@given(num_workers=st.integers(0, 3), at_once=st.integers(1, 4), nodes=NODES)
def test_trainings_that_share_a_cluster_all_fit_at_the_same_time(num_workers, at_once, nodes):
    gpus = sum(node["GPU"] for node in nodes)
    wanted = num_workers or max(1, gpus // at_once)
    if sum(min(node["CPU"], node["GPU"]) if gpus else node["CPU"] for node in nodes) < at_once * wanted:
        with pytest.raises(ClusterError, match=f"{at_once} trainings at a time: .* add nodes, or lower at_once"):
            share_of(num_workers, nodes, at_once)
        return
    plan = share_of(num_workers, nodes, at_once)
    assert plan.num_workers == wanted
    assert count_places(plan, nodes) >= at_once * plan.num_workers
    if at_once == 1:
        assert plan == plan_workers(num_workers, nodes)


def test_what_cannot_be_scheduled_says_what_was_asked_for_and_what_is_there():
    with pytest.raises(ClusterError) as error:
        plan_workers(3, [{"CPU": 2.0, "memory": 1e9}, {"node:10.0.0.2": 1.0}])
    assert str(error.value) == (
        "train.num_workers asks for 3 workers with 1 CPU each; the cluster has 2 nodes (2 CPUs, 0 GPUs; 0 CPUs, 0 GPUs). "
        "Lower train.num_workers or add nodes"
    )
    with pytest.raises(ClusterError, match="4 workers with 1 CPU and 1 GPU each"):
        plan_workers(4, [{"CPU": 16, "GPU": 2}])
    with pytest.raises(ClusterError, match=r"train.min_workers asks for 3 workers .* Lower train.min_workers"):
        plan_workers(4, [{"CPU": 2}], 3)


@pytest.mark.parametrize("settings", [{"num_workers": 2, "min_workers": 3}, {"num_workers": 2, "local": True}])
def test_settings_of_workers_that_do_not_fit_together_are_refused(settings):
    with pytest.raises(ValueError, match="num_workers is 2"):
        TrainSettings(**settings)


class FakeCluster:
    """Nodes with one CPU each, by a clock that moves when somebody sleeps: `free` and `nodes` by the second."""

    def __init__(self, monkeypatch, nodes, free):
        self.seconds, self.nodes, self.free = 0.0, nodes, free
        monkeypatch.setattr(room, "node_resources", self.resources)
        monkeypatch.setattr(room, "describe_use", lambda: "somebody holds it")
        monkeypatch.setattr(room, "reclaim_reservations", lambda: 0)
        monkeypatch.setattr(room.time, "monotonic", lambda: self.seconds)
        monkeypatch.setattr(room.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.seconds += seconds

    def resources(self, *, free=False):
        return [{"CPU": cpus} for cpus in (self.free if free else self.nodes)(self.seconds)]


@pytest.mark.parametrize(
    ("settings", "nodes", "free", "expected", "seconds"),
    [
        ({"num_workers": 2}, [1, 1], lambda s: [1, 1], (2, 1), (0, 0)),
        ({"num_workers": 2}, [1, 1], lambda s: [1, 1] if s >= 20 else [1, 0], (2, 1), (20, 21)),
        ({"num_workers": 2, "min_workers": 1}, [1, 1], lambda s: [1, 1], (2, 1), (0, 0)),
        ({"num_workers": 2, "min_workers": 1}, [1, 1], lambda s: [1, 0], (1, 1), (5, 6)),
        ({"num_workers": 2, "min_workers": 1}, [1], lambda s: [1], (1, 1), (0, 0)),
        ({"num_workers": 1}, [4], lambda s: [3], (1, 3), (30, 31)),
        ({"num_workers": 2}, [4, 4], lambda s: [4, 1], (2, 2), (30, 31)),
    ],
    ids=["free", "soon", "elastic", "elastic-held", "elastic-few", "fewer-cpus", "fewer-cpus-each"],
)
def test_room_is_found_as_soon_as_it_is_there(monkeypatch, settings, nodes, free, expected, seconds):
    fake = FakeCluster(monkeypatch, lambda _: nodes, free)
    texts = []
    plan = find_room(TrainSettings(**settings), texts.append, is_restart=False)
    assert (plan.num_workers, plan.cpus) == expected
    assert seconds[0] <= fake.seconds <= seconds[1]
    assert bool(texts) == (fake.seconds > 1)


def test_a_wait_for_room_ends_and_says_what_was_asked_for_and_who_has_it(monkeypatch):
    fake = FakeCluster(monkeypatch, lambda _: [1, 1], lambda _: [0, 1])
    texts = []
    with pytest.raises(
        ClusterError, match=r"2 workers with 1 CPU each, .* train\.wait_seconds=7: somebody holds it\. End what"
    ):
        find_room(TrainSettings(num_workers=2, wait_seconds=7), texts.append, is_restart=False)
    assert 7 <= fake.seconds < 8
    assert texts[0] == "waiting for room for 2 workers with 1 CPU each, 7 s at most; somebody holds it"


def test_lost_nodes_are_waited_for_but_nodes_that_never_were_are_not(monkeypatch):
    fake = FakeCluster(monkeypatch, lambda s: [1, 1] if s >= 10 else [1], lambda s: [1, 1] if s >= 10 else [1])
    settings, texts = TrainSettings(num_workers=2), []
    with pytest.raises(ClusterError, match="asks for 2 workers"):
        find_room(settings, texts.append, is_restart=False)
    assert (fake.seconds, texts) == (0, [])
    assert find_room(settings, texts.append, is_restart=True) == WorkerPlan(2, 1, use_gpu=False)
    assert 10 <= fake.seconds < 11
    assert texts[0].startswith("waiting for nodes, 30 s at most: train.num_workers asks for 2 workers")
    fake.nodes = lambda _: [1]
    with pytest.raises(ClusterError, match="asks for 2 workers"):
        find_room(settings, texts.append, is_restart=True)
    assert 40 <= fake.seconds < 42


def test_a_fixed_plan_is_waited_for_and_never_narrowed(monkeypatch):
    plan = WorkerPlan(2, 2, use_gpu=False)
    fake = FakeCluster(monkeypatch, lambda _: [4, 4], lambda s: [4] if s >= 10 else [3])
    assert find_room(TrainSettings(), lambda _: None, is_restart=False, fixed=plan) == plan
    assert 10 <= fake.seconds < 11
    fake.free, fake.seconds = lambda _: [3], 0.0
    with pytest.raises(ClusterError, match="asks for 2 workers with 2 CPUs each"):
        find_room(TrainSettings(), lambda _: None, is_restart=False, fixed=plan)
