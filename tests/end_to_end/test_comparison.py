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
OF_EACH = ["search", "train", "evaluate"]
NODES = ["index", "shards", "audit", *(f"{stage}:{name}" for name in ("gsm", "sa_gsm") for stage in OF_EACH), "compare"]


def sagsm(verb, workdir, *more):
    settings = [item for assignment in [*TINY, *more] for item in ("--set", assignment)]
    command = [SAGSM, verb, "curves", "--workdir", str(workdir), *settings]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=500, check=False)
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
    assert list(results["variants"]) == ["gsm", "sa_gsm"]
    for row in results["variants"].values():
        assert row["top1"] == row["seeds"]["0"]["top1"] <= row["seeds"]["0"]["top5"] <= 1
        assert row["top1_interval"][0] <= row["top1"] <= row["top1_interval"][1]
    assert results["variants"]["gsm"]["parameters"] < results["variants"]["sa_gsm"]["parameters"]
    assert list(results["differences"]) == ["sa_gsm"]
    assert results["num_clips"] == 16
    assert results["passes"] is None
    assert results["verdict"].startswith("Top-1 on 16 validation clips: gsm ")


def test_the_second_time_nothing_runs_and_one_more_seed_trains_that_seed_alone(first):
    workdir, document = first
    again = sagsm("run", workdir)
    assert {stage["name"]: stage["status"] for stage in again["stages"]} == dict.fromkeys(NODES, "cached")
    assert again["results"] == document["results"]
    planned = {stage["name"]: stage["status"] for stage in sagsm("plan", workdir, "seeds=[0,1]")["stages"]}
    new = [f"{stage}:{name}:s1" for name in ("gsm", "sa_gsm") for stage in OF_EACH]
    assert sorted(name for name, status in planned.items() if status == "run") == sorted([*new, "compare"])


def test_mlflow_names_the_variants_and_opens_with_the_verdict(first):
    workdir, document = first
    with sqlite3.connect(workdir / "mlflow.db") as database:
        names = dict(database.execute("select run_uuid, name from runs"))
        tags = {(run, key): value for run, key, value in database.execute("select run_uuid, key, value from tags")}
    stages = [*(f"{name} {stage} p01" for name in ("gsm", "sa_gsm") for stage in OF_EACH)]
    assert sorted(names.values()) == sorted(["p01 curves", "index p01", "shards p01", "audit p01", "compare p01", *stages])
    pipeline = next(run for run, name in names.items() if name == "p01 curves")
    assert all(tags[run, "mlflow.parentRunId"] == pipeline for run in names if run != pipeline)
    assert {tags.get((run, "variant")) for run in names} == {None, "gsm", "sa_gsm"}
    assert tags[pipeline, "mlflow.note.content"].startswith(document["results"]["verdict"])
    kept = workdir / "mlflow-artifacts" / pipeline / "artifacts"
    assert {"index.html"} == {path.name for path in (kept / "report").iterdir()}
    assert {"curves.png", "top1.png"} == {path.name for path in (kept / "figures").iterdir()}
