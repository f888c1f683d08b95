"""A comparison as a user runs it: two variants on a few generated videos, and again from the store."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SAGSM = str(Path(sys.executable).with_name("sagsm"))
TINY = [
    "dataset.root=null",
    "dataset.synthetic={num_train: 16, num_validation: 16, num_broken: 0}",
    "shards.videos_per_shard=16",
    "seeds=[0]",
    "at_once=2",
    "train.epochs=2",
    "train.warmup_epochs=1",
    "train.batch_size=8",
    "train.num_segments=2",
    "train.pixels=32",
    "train.precision=fp32",
]
# The published code's recipe, undone: so that `test_time` judges the very network that `gamma` has trained.
AS_FROZEN = [
    "model.input_format=unit_rgb",
    "model.backbone_weights=null",
    "train.accumulation=1",
    "train.subset=null",
    "train.flip=swap",
    "train.validate_every_epochs=1",
    "train.num_workers=0",
    "train.compat={freeze_gamma: true}",
]
OF_EACH = ["search", "train", "evaluate"]
VARIANTS = ["frozen", "trained"]
NODES = ["index", "shards", "audit", *(f"{stage}:{name}" for name in VARIANTS for stage in OF_EACH), "compare"]


def sagsm(verb, workdir, *more, experiment="gamma"):
    settings = [item for assignment in [*TINY, *more] for item in ("--set", assignment)]
    return call(verb, experiment, *settings, workdir=workdir)


def call(*arguments, workdir):
    command = [SAGSM, *arguments, "--workdir", str(workdir), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("comparison")
    return workdir, sagsm("run", workdir)


def test_every_node_runs_and_the_document_has_results_by_variant(first):
    _, document = first
    assert {stage["name"]: stage["status"] for stage in document["stages"]} == dict.fromkeys(NODES, "ran")
    results = document["results"]
    assert list(results["variants"]) == VARIANTS
    for row in results["variants"].values():
        assert row["top1"] == row["seeds"]["0"]["top1"] <= row["seeds"]["0"]["top5"] <= 1
        assert row["top1_interval"][0] <= row["top1"] <= row["top1_interval"][1]
        assert (row["training"]["num_clips"], row["training"]["fraction"]) == (16, 1.0)
        assert row["training"]["clips_hash"]
        assert row["videos_per_second"] > 0
    assert results["variants"]["frozen"]["parameters"] == results["variants"]["trained"]["parameters"]
    assert list(results["differences"]) == ["trained"]
    assert results["num_clips"] == 16
    assert results["verdict"].startswith("As expected, top-1 on 16 validation clips: frozen ")
    assert "the noise of clips" in results["verdict"]


def test_the_card_of_gamma_says_that_only_the_trained_gammas_moved(first):
    card = first[1]["card"]
    assert card == first[1]["results"]["card"]
    assert [(line["variant"], line["metric"], line["within"]) for line in card["lines"]] == [
        ("frozen", "largest |gamma|", True),
        ("trained", "largest |gamma|", True),
    ]
    assert card["lines"][0]["got"] == 0 < card["lines"][1]["got"]
    assert card["passes"]
    assert {"seeds", "dataset.synthetic", "train.epochs", "train.pixels"} <= set(card["changed"])


def test_the_card_of_test_time_is_of_the_same_network_by_more_views(first):
    workdir, document = first
    judged = sagsm("run", workdir, *AS_FROZEN, experiment="test_time")
    statuses = {stage["name"]: stage["status"] for stage in judged["stages"]}
    made = {stage["name"]: stage["fingerprint"] for stage in [*document["stages"], *judged["stages"]]}
    assert made["train"] == made["train:frozen"]
    views = list(judged["results"]["variants"])
    assert {name for name, status in statuses.items() if status == "ran"} == {
        "compare",
        *(f"evaluate:{name}" for name in views[1:]),
    }
    frozen = document["results"]["variants"]["frozen"]
    assert judged["results"]["variants"]["one_view"]["top1"] == frozen["top1"]
    card = judged["card"]
    assert [(line["metric"], line["expected"]) for line in card["lines"]] == [
        ("top-1", "30.0 % to 34.0 %"),
        ("top-5", "60.0 % to 64.0 %"),
        ("mean class accuracy", "27.2 % to 31.2 %"),
    ]
    assert card["lines"][0]["got"] == frozen["top1"]
    assert "train.compat.lr_by_epoch" in card["changed"]
    assert f"{len(card['changed'])} settings changed" in card["sentence"]


def test_evaluations_of_both_experiments_are_compared_from_the_store(first):
    workdir, document = first
    made = {stage["name"]: stage for stage in document["stages"]}
    runs = [made["evaluate:frozen"]["fingerprint"][:8], made["evaluate:trained"]["path"]]
    found = call("compare", *runs, workdir=workdir)
    results = document["results"]
    for name in VARIANTS:
        assert found["variants"][name] == results["variants"][name] | {"expected_top1": None}
    assert found["differences"] == results["differences"]
    assert found["data"] == results["data"]


def test_the_second_time_nothing_runs_and_one_more_seed_trains_that_seed_alone(first):
    workdir, document = first
    again = sagsm("run", workdir)
    assert {stage["name"]: stage["status"] for stage in again["stages"]} == dict.fromkeys(NODES, "cached")
    assert again["results"] == document["results"]
    planned = {stage["name"]: stage["status"] for stage in sagsm("plan", workdir, "seeds=[0,1]")["stages"]}
    new = [f"{stage}:{name}:s1" for name in VARIANTS for stage in OF_EACH]
    assert sorted(name for name, status in planned.items() if status == "run") == sorted([*new, "compare"])


def test_mlflow_names_the_variants_and_opens_with_the_verdict(first):
    workdir, document = first
    with sqlite3.connect(workdir / "mlflow.db") as database:
        names = dict(database.execute("select run_uuid, name from runs where name like '%p01%'"))
        tags = {(run, key): value for run, key, value in database.execute("select run_uuid, key, value from tags")}
    stages = [*(f"{name} {stage} p01" for name in VARIANTS for stage in OF_EACH)]
    assert sorted(names.values()) == sorted(["p01 gamma", "index p01", "shards p01", "audit p01", "compare p01", *stages])
    pipeline = next(run for run, name in names.items() if name == "p01 gamma")
    assert all(tags[run, "mlflow.parentRunId"] == pipeline for run in names if run != pipeline)
    assert {tags.get((run, "variant")) for run in names} == {None, *VARIANTS}
    description = tags[pipeline, "mlflow.note.content"]
    assert description.startswith(document["results"]["verdict"])
    assert document["card"]["sentence"] in description
    assert "| largest |gamma| of frozen".replace("|gamma|", "\\|gamma\\|") in description
    kept = workdir / "mlflow-artifacts" / pipeline / "artifacts"
    assert {"index.html"} == {path.name for path in (kept / "report").iterdir()}
    assert {"curves.png", "top1.png"} == {path.name for path in (kept / "figures").iterdir()}
