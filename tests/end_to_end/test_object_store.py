"""Shards in an object store: the whole pipeline with `shards.output` in a bucket of a server that the test starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.filesystems import Folder
from preprocessing.verify import verify_shards

pytestmark = pytest.mark.slow

SETTINGS = [
    "dataset.synthetic.num_train=32",
    "dataset.synthetic.num_validation=16",
    "dataset.synthetic.num_broken=1",
    "shards.max_bad_fraction=0.1",
    "shards.videos_per_shard=16",
    "search.num_trials=0",
    "train.epochs=1",
    "train.warmup_epochs=0",
    "train.num_segments=2",
    "train.pixels=48",
]


def test_the_pipeline_runs_with_its_shards_in_a_bucket(s3_url, tmp_path):
    place = f"{s3_url}/sets"
    settings = [item for assignment in [*SETTINGS, f"shards.output={place}"] for item in ("--set", assignment)]
    command = [str(Path(sys.executable).with_name("sagsm")), "run", "demo", "--workdir", str(tmp_path), "--json", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert {stage["status"] for stage in stages.values()} == {"ran"}
    shards = Folder(place) / Path(stages["shards"]["path"]).name
    assert {name for name in shards.list() if name.endswith((".tar", ".json"))} == {
        "dataset.json",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "validation-000000.tar",
    }
    assert verify_shards(shards) == []
    assert not list(Path(stages["shards"]["path"]).glob("*.tar"))
