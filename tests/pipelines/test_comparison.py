import json
import threading
from collections import Counter

import pytest

from infra.errors import ConfigError, DataError
from infra.settings import apply_overrides
from infra.tracking_run import TrackedRun
from infra.tracking_spool import Spool
from pipelines.artifacts import Store
from pipelines.comparison import Comparison, plan_comparison
from pipelines.experiments import EXPERIMENTS, find_experiment
from pipelines.graph import Stage, StageContext, run_graph, select
from pipelines.reproduction import Band
from pipelines.stages import STAGES


@pytest.fixture
def comparison():
    config = apply_overrides(find_experiment("demo")(), {"search.num_trials": 0})
    variants = {name: apply_overrides(config, {"model.name": f"{name}_resnet18"}) for name in ("tsn", "gsm")}
    return Comparison(variants=variants, baseline="tsn", seeds=(0, 1))


class Runner:
    """Commits real artifacts into a real store; nodes named in `broken` fail. Notes what ran, and what ran at the same time."""

    def __init__(self, store, broken=()):
        self.store, self.broken, self.ran, self.most = store, broken, [], 0
        self._on_cluster, self._lock = 0, threading.Lock()

    def __call__(self, item, inputs):
        assert sorted(inputs) == sorted(item.needs)
        with self._lock:
            self.ran.append(item.name)
            self._on_cluster += item.stage.takes_cluster
            self.most = max(self.most, self._on_cluster)
        if item.name in self.broken:
            raise DataError(f"{item.name} is broken")
        with self.store.work_on(item.stage.name, item.fingerprint) as folder:
            extra = {"experiment": "compare", "variant": item.variant, "summary": {}, "mlflow_run_id": None}
            artifact = self.store.commit(folder, item.provenance, item.fingerprint, extra)
        with self._lock:
            self._on_cluster -= item.stage.takes_cluster
        return artifact


def plan(comparison, store):
    return plan_comparison(STAGES, comparison, "compare", store)


def run(comparison, store, broken=()):
    runner = Runner(store, broken)
    results = run_graph(plan(comparison, store), runner, lambda result: None, comparison.at_once)
    return {result.name: result.status for result in results}, runner


SHARED = ["index", "shards", "audit"]
OF_EACH = ["search", "train", "evaluate"]
LABELS = ["tsn:s0", "tsn:s1", "gsm:s0", "gsm:s1"]
NODES = [*SHARED, *(f"{stage}:{label}" for label in LABELS for stage in OF_EACH), "compare"]


def test_what_variants_share_is_one_node_and_the_rest_has_one_each(tmp_path, comparison):
    planned = plan(comparison, Store(tmp_path))
    assert [item.name for item in planned] == NODES
    assert len({(item.stage.name, item.fingerprint) for item in planned}) == len(NODES)
    by_name = {item.name: item for item in planned}
    assert by_name["train:gsm:s1"].needs == {"shards": "shards", "search": "search:gsm:s1"}
    assert by_name["train:gsm:s1"].config.train.seed == 1
    assert by_name["train:gsm:s1"].config.model.name == "gsm_resnet18"
    made = {f"{stage}:{label}" for label in LABELS for stage in ("train", "evaluate")}
    assert set(by_name["compare"].needs.values()) == {"shards", *made}


def test_one_seed_needs_no_mark(tmp_path, comparison):
    names = [item.name for item in plan(comparison.with_overrides({"seeds": [3]}), Store(tmp_path))]
    assert names == [*SHARED, *(f"{stage}:{name}" for name in ("tsn", "gsm") for stage in OF_EACH), "compare"]


def test_variants_that_differ_in_the_evaluation_alone_share_the_training(tmp_path, comparison):
    one = comparison.config
    other = apply_overrides(one, {"evaluate.batch_size": 3})
    planned = plan(Comparison(variants={"one": one, "other": other}, baseline="one"), Store(tmp_path))
    assert [item.name for item in planned] == [*SHARED, "search", "train", "evaluate:one", "evaluate:other", "compare"]


def test_a_plain_pipeline_and_a_comparison_share_artifacts(tmp_path, comparison):
    from pipelines.graph import plan as plan_pipeline

    store = Store(tmp_path)
    seed_1 = apply_overrides(comparison.config, {"train.seed": 1})
    run_graph(plan_pipeline(STAGES, seed_1, "demo", store), Runner(store), lambda result: None)
    cached = [item.name for item in plan(comparison, store) if item.artifact]
    assert cached == [*SHARED, *(f"{stage}:tsn:s1" for stage in OF_EACH)]


def test_everything_runs_once_one_training_at_a_time_and_is_cached_afterwards(tmp_path, comparison):
    store = Store(tmp_path)
    statuses, runner = run(comparison, store)
    assert statuses == dict.fromkeys(NODES, "ran")
    assert Counter(runner.ran) == Counter(NODES)
    assert runner.most == 1
    on_cluster = [name for name in runner.ran if name.partition(":")[0] in OF_EACH]
    assert on_cluster == [name for name in NODES if name in on_cluster]  # a variant is evaluated before the next is trained
    statuses, runner = run(comparison, store)
    assert statuses == dict.fromkeys(NODES, "cached")
    assert runner.ran == []


def test_two_at_a_time_share_the_cluster_and_never_a_third(tmp_path, comparison):
    store, pair, two = Store(tmp_path), threading.Barrier(2, timeout=60), comparison.with_overrides({"at_once": 2})
    runner = Runner(store)

    def run_stage(item, inputs):
        if item.stage.name == "train":
            pair.wait()
        return runner(item, inputs)

    results = run_graph(plan(two, store), run_stage, lambda result: None, two.at_once)
    assert {result.status for result in results} == {"ran"}
    assert runner.most <= 2
    assert two.variants == comparison.variants


def test_a_failed_training_stops_only_what_needs_it_and_the_next_run_goes_on(tmp_path, comparison):
    store = Store(tmp_path)
    statuses, _ = run(comparison, store, broken=("train:tsn:s1",))
    lost = {"train:tsn:s1": "failed", "evaluate:tsn:s1": "skipped", "compare": "skipped"}
    assert statuses == dict.fromkeys(NODES, "ran") | lost
    statuses, _ = run(comparison, store)
    assert statuses == dict.fromkeys(NODES, "cached") | dict.fromkeys(lost, "ran")


def test_more_seeds_train_only_those_and_reasons_compare_a_variant_with_itself(tmp_path, comparison):
    store = Store(tmp_path)
    run(comparison, store)
    more = {item.name: item.reason for item in plan(comparison.with_overrides({"seeds": [0, 1, 2]}), store)}
    new = [f"{stage}:{name}:s2" for name in ("tsn", "gsm") for stage in OF_EACH]
    assert [name for name, reason in more.items() if reason] == [*new, "compare"]
    assert more["train:gsm:s2"] == "never ran"
    changed = plan(comparison.with_overrides({"train.epochs": 5}), store)
    assert {item.reason for item in changed if item.stage.name == "train"} == {
        "train.epochs 13 -> 5; needs search, which changed"
    }


def test_only_takes_one_node_or_all_of_a_stage(tmp_path, comparison):
    planned = plan(comparison, Store(tmp_path))
    assert [item.name for item in select(planned, "train:gsm:s0")] == ["index", "shards", "search:gsm:s0", "train:gsm:s0"]
    assert [item.name for item in select(planned, "train")] == [
        name for name in NODES if name not in ("audit", "compare") and not name.startswith("evaluate")
    ]
    with pytest.raises(ConfigError, match=r"'train:gsn:s0', which is no stage; did you mean .*train:gsm:s0"):
        select(planned, "train:gsn:s0")


def test_settings_apply_to_all_variants(comparison):
    changed = comparison.with_overrides({"train.pixels": 32, "seeds": [5]})
    assert {config.train.pixels for config in changed.variants.values()} == {32}
    assert changed.seeds == (5,)
    assert [config.model.name for config in changed.variants.values()] == ["tsn_resnet18", "gsm_resnet18"]
    assert changed.differences() == {"tsn": {}, "gsm": {"model.name": "gsm_resnet18"}}


def test_what_was_changed_is_named_as_it_was_set(comparison):
    overrides = {"train.pixels": 32, "seeds": [5], "preset": "gsm", "train.epochs": 20}
    changed = comparison.with_overrides(overrides).changed_from(comparison)
    assert overrides.items() <= changed.items()
    assert comparison.with_overrides(changed) == comparison.with_overrides(overrides)
    assert comparison.changed_from(comparison) == {}


def test_a_preset_applies_to_all_variants_and_other_settings_after_it(comparison):
    changed = comparison.with_overrides({"preset": "seed_code", "train.epochs": 3, "train.warmup_epochs": 1})
    assert {config.preset for config in changed.variants.values()} == {"seed_code"}
    assert {config.train.compat.freeze_gamma for config in changed.variants.values()} == {True}
    assert {config.train.epochs for config in changed.variants.values()} == {3}
    assert changed.differences()["gsm"] == {"model.name": "gsm_resnet18"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.seed": 4}, r"train.seed is 4, but a comparison trains each variant with seeds=\[0, 1\]"),
        ({"at_once": 0}, "at_once: Input should be greater than or equal to 1"),
        ({"at_once": 2, "train.local": True}, "at_once is 2, but variant tsn trains in this process; leave train.local out"),
        ({"seeds": []}, "seeds: Tuple should have at least 1 item"),
        ({"seeds": [1, 1]}, r"seeds are \[1, 1\]; expected different"),
        ({"model.name": "tsn_resnet18"}, "variants tsn and gsm have the same settings"),
        ({"search.num_trials": 3, "search.placement": "fixed"}, "variant tsn has search.num_trials=3; expected 0"),
        ({"train.lr": 0.1}, "train.lr is not a setting"),
    ],
)
def test_what_cannot_be_compared_is_refused(comparison, overrides, message):
    with pytest.raises(ConfigError, match=message):
        comparison.with_overrides(overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset.synthetic.seed": 1}, "variants a and b differ in dataset"),
        ({"shards.jpeg_quality": 3}, "variants a and b differ in shards"),
        ({"evaluate.split": "train"}, "variants a and b are judged on different splits"),
    ],
)
def test_variants_with_other_clips_are_refused(comparison, change, message):
    with pytest.raises(ValueError, match=message):
        Comparison(variants={"a": comparison.config, "b": apply_overrides(comparison.config, change)}, baseline="a")


@pytest.mark.parametrize(("baseline", "expected"), [("c", {}), ("a", {"c": (Band(low=0.1, source="seen"),)}), ("a b", {})])
def test_names_that_are_no_variants_are_refused(comparison, baseline, expected):
    variants = {name: comparison.variants[old] for name, old in (("a", "tsn"), ("b", "gsm"))}
    with pytest.raises(ValueError, match=r"there is no variant c|cannot be part of a run's name"):
        Comparison(variants=variants, baseline=baseline, expected=expected)


def test_raw_data_is_listed_once_for_all_variants(tmp_path, comparison):
    calls = []

    def listing(config):
        calls.append(config.dataset)
        return "listing"

    index = Stage("index", lambda context, dataset: {}, settings=("dataset",), raw=listing)
    plan_comparison([index, *STAGES[1:]], comparison, "compare", Store(tmp_path))
    assert len(calls) == 1


@pytest.mark.parametrize("name", [name for name, make in EXPERIMENTS.items() if isinstance(make(), Comparison)])
def test_every_comparison_is_plain_data_that_gives_itself_back(name):
    made = find_experiment(name)()
    assert Comparison.model_validate(json.loads(made.model_dump_json())) == made
    assert made.with_overrides({}) == made


def test_the_stage_judges_the_named_experiment_and_says_it_where_people_look(tmp_path, made_up):
    overrides = {"dataset.root": None, "dataset.synthetic": {"num_train": 80, "num_validation": 40}, "seeds": [0]}
    comparison = find_experiment("gamma")().with_overrides(overrides)
    store, told = Store(tmp_path / "store"), []
    spool = Spool(tmp_path / "spool", lambda entries: told.extend(entries) or len(entries), "it")
    stages = made_up(store, "gamma", "", 0.5, 40, {}, {})

    def run_stage(item, inputs):
        if item.name != "compare":
            return stages(item, inputs)
        with store.work_on("compare", item.fingerprint) as folder:
            run = TrackedRun("local-1", "compare p01", spool, {})
            summary = item.stage.function(StageContext(folder, run, None, None, "gamma", item.config), **inputs)
            extra = {"experiment": "gamma", "summary": summary, "mlflow_run_id": None}
            return store.commit(folder, item.provenance, item.fingerprint, extra)

    results = {result.name: result for result in run_graph(plan(comparison, store), run_stage, lambda result: None)}
    spool.close(5)
    assert results["compare"].artifact, results["compare"].error
    summary = results["compare"].artifact.summary
    card = summary["results"]["card"]
    assert [(line["variant"], line["got"], line["within"]) for line in card["lines"]] == [
        ("frozen", 0.25, False),  # made up: every gamma is -0.25
        ("trained", 0.25, True),
    ]
    assert set(card["changed"]) == set(overrides)
    assert summary["text"].startswith("Not as expected, top-1 on 40 validation clips: frozen 50.0 %")
    (described,) = [
        entry["values"]["mlflow.note.content"] for entry in told if "mlflow.note.content" in entry.get("values", {})
    ]
    assert described == summary["markdown"]
    assert described.index(summary["text"]) < described.index(card["sentence"]) < described.index("get-artifact")
    assert "Reproduction of gamma" in (results["compare"].artifact.path / "index.html").read_text()
