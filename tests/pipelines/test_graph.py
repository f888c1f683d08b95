import threading

import pytest

from infra.errors import ConfigError, DataError, PipelineError
from infra.settings import apply_overrides
from pipelines.artifacts import Store
from pipelines.experiments import find_experiment
from pipelines.graph import Stage, check_stages, plan, run_graph, select
from pipelines.stages import STAGES


def a(context, dataset):
    return {}


def b(context, a, train):
    return {}


def c(context, a):
    return {}


def d(context, b, c):
    return {}


TABLE = [Stage("d", d, ("b", "c")), Stage("a", a, (), ("dataset",)), Stage("b", b, ("a",), ("train",)), Stage("c", c, ("a",))]


@pytest.fixture
def config():
    return find_experiment("demo")()


class Runner:
    """Commits real artifacts into a real store; stages named in `broken` fail."""

    def __init__(self, store, broken=()):
        self.store, self.broken, self.ran = store, broken, []
        self.together = threading.Barrier(2, timeout=10)

    def __call__(self, item, inputs):
        name = item.stage.name
        assert sorted(inputs) == sorted(item.stage.needs)
        if name in ("b", "c"):
            self.together.wait()  # only passes when both run at the same time
        if name in self.broken:
            raise DataError(f"{name} is broken")
        with self.store.work_on(name, item.fingerprint) as folder:
            self.ran.append(name)
            extra = {"experiment": "demo", "summary": {}, "mlflow_run_id": None}
            return self.store.commit(folder, item.provenance, item.fingerprint, extra)


def status(results):
    return {result.name: result.status for result in results}


def reasons(planned):
    return {item.stage.name: item.reason for item in planned}


def test_everything_runs_once_and_is_cached_afterwards(tmp_path, config):
    store = Store(tmp_path)
    planned = plan(TABLE, config, "demo", store)
    assert reasons(planned) == dict.fromkeys("abcd", "never ran")
    assert status(run_graph(planned, Runner(store), lambda result: None)) == dict.fromkeys("abcd", "ran")
    again = Runner(store)
    assert status(run_graph(plan(TABLE, config, "demo", store), again, lambda result: None)) == dict.fromkeys("abcd", "cached")
    assert again.ran == []


def test_a_changed_setting_reruns_what_depends_on_it_and_says_why(tmp_path, config):
    store = Store(tmp_path)
    run_graph(plan(TABLE, config, "demo", store), Runner(store), lambda result: None)
    changed = apply_overrides(config, {"train.seed": 7})
    planned = plan(TABLE, changed, "demo", store)
    assert reasons(planned) == {"a": "", "c": "", "b": "train.seed 0 -> 7", "d": "needs b, which changed"}


def test_the_code_version_and_the_raw_data_are_part_of_the_fingerprint(tmp_path, config):
    store = Store(tmp_path)
    one = [Stage("a", a, (), ("dataset",), raw=lambda config: "listing 1")]
    runner = Runner(store)
    run_graph(plan(one, config, "demo", store), runner, lambda result: None)
    two = [Stage("a", a, (), ("dataset",), version=2, raw=lambda config: "listing 2")]
    assert reasons(plan(two, config, "demo", store)) == {"a": "code version 1 -> 2; raw data changed"}


def test_a_failed_stage_stops_only_what_needs_it_and_the_next_run_goes_on(tmp_path, config):
    store = Store(tmp_path)
    results = run_graph(plan(TABLE, config, "demo", store), Runner(store, broken=("b",)), lambda result: None)
    assert status(results) == {"a": "ran", "b": "failed", "c": "ran", "d": "skipped"}
    assert [str(result.error) for result in results if result.error] == ["b is broken"]
    runner = Runner(store)
    runner.together = threading.Barrier(1)
    assert status(run_graph(plan(TABLE, config, "demo", store), runner, lambda result: None)) == {
        "a": "cached",
        "b": "ran",
        "c": "cached",
        "d": "ran",
    }


def test_only_takes_a_stage_and_what_it_needs(tmp_path, config):
    planned = plan(TABLE, config, "demo", Store(tmp_path))
    assert [item.stage.name for item in select(planned, "b")] == ["a", "b"]
    assert select(planned, None) == planned
    with pytest.raises(ConfigError, match="'trian', which is no stage"):
        select(planned, "trian")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([Stage("a", a, (), ("dataset",)), Stage("a", a, (), ("dataset",))], "same name"),
        ([Stage("c", c, ("a",))], "stage c needs a, which is no stage"),
        ([Stage("a", a)], r"its function takes \['context', 'dataset'\], its row in the table says \['context'\]"),
        (
            [Stage("d", lambda context, c: {}, ("c",)), Stage("c", lambda context, d: {}, ("d",))],
            "in a circle: [cd] -> [cd] -> [cd]",
        ),
        ([Stage("a", lambda context, lr: {}, (), ("lr",))], "reads section lr, which no experiment has"),
    ],
)
def test_a_wrong_table_is_refused(table, message):
    with pytest.raises(PipelineError, match=message):
        check_stages(table)


def test_the_pipeline_is_the_one_in_the_design():
    needs = {stage.name: set(stage.needs) for stage in check_stages(STAGES)}
    assert next(iter(needs)) == "index"
    assert needs["shards"] == {"index"}
    assert needs["audit"] == {"shards"}
    assert needs["search"] == {"shards"}
    assert needs["train"] == {"shards", "search"}
    assert needs["evaluate"] == {"shards", "train"}
    assert needs["insight"] == {"shards", "train", "evaluate"}
    assert needs["report"] == {"shards", "audit", "search", "train", "evaluate", "insight"}


def test_more_trials_rerun_the_search_and_what_follows(tmp_path, config):
    """The issue's own example: index, shards and audit stay cached."""
    store = Store(tmp_path)
    runner = Runner(store)
    run_graph(plan(STAGES, config, "demo", store), runner, lambda result: None)
    more = apply_overrides(config, {"search.num_trials": config.search.num_trials + 1})
    why = reasons(plan(STAGES, more, "demo", store))
    assert [name for name, reason in why.items() if not reason] == ["index", "shards", "audit"]
    assert why["search"] == f"search.num_trials {config.search.num_trials} -> {config.search.num_trials + 1}"
    assert why["train"] == "needs search, which changed"
