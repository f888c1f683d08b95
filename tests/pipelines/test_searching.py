"""The stage that searches: what is trained after a supernet, and a real search with its verdict."""

import html
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.searching import SearchTask, shortlist
from pipelines.training.job import TrainJob
from pipelines.training.settings import ModelSettings, TrainSettings
from tuning.settings import SearchSettings

SAGSM = str(Path(sys.executable).with_name("sagsm"))
TINY = [
    "dataset.synthetic.num_train=24",
    "dataset.synthetic.num_validation=16",
    "dataset.synthetic.num_broken=0",
    "shards.videos_per_shard=8",
    "search.max_epochs=1",
    "search.grace_epochs=1",
    "search.subset=16",
    "search.space={}",
    "train.epochs=1",
    "train.warmup_epochs=0",
    "train.pixels=32",
    "train.num_segments=2",
]


def search_once(workdir, *changes):
    """Run the stage as a user would; its line of the JSON document."""
    sets = [word for change in changes for word in ("--set", change)]
    command = [SAGSM, "run", "placement", "--workdir", str(workdir), "--only", "search", "--json", *sets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(stage for stage in json.loads(done.stdout)["stages"] if stage["name"] == "search")


def task(**changes):
    job = TrainJob("placement", "nowhere", ModelSettings(), TrainSettings())
    search = SearchSettings(method="supernet", scheduler="none", placement="fixed", space={}, **changes)
    return SearchTask(job, search, num_val_clips=160, num_classes=8)


def test_the_shortlist_is_baselines_then_the_best_then_random_ones():
    grid = shortlist(task(num_trials=12, seed=3), ["4e", "none", "3a,4e"])
    values = grid.space["model.placement"].values
    assert values[:5] == ("none", "all", "5a,5b", "4e", "3a,4e")
    assert len(values) == len(set(values)) == grid.num_trials == 12
    assert shortlist(task(num_trials=12, seed=3), ["4e", "none", "3a,4e"]) == grid
    assert shortlist(task(num_trials=12, seed=4), ["4e", "none", "3a,4e"]) != grid
    assert (grid.method, grid.sampler, grid.baselines) == ("trials", "grid", False)


def test_the_best_are_trained_even_if_fewer_trials_were_asked_for():
    assert shortlist(task(num_trials=1), ["4e"]).num_trials == 4


@pytest.mark.slow
def test_a_search_ends_with_a_verdict_a_page_and_every_training_in_mlflow(tmp_path):
    """Gamma is frozen at 0, so that attention computes nothing: the verdict must not call the two networks different."""
    changes = [*TINY, "search.verdict_seeds=2", "train.compat.freeze_gamma=true"]
    search_once(tmp_path, *changes, "search.num_trials=3")
    stage = search_once(tmp_path, *changes, "search.num_trials=4")  # goes on with one more trial
    folder = Path(stage["path"])
    results = json.loads((folder / "search.json").read_bytes())
    verdict = results["verdict"]
    assert verdict["tested"]
    assert not verdict["separable"]
    assert "is not separable from seed noise" in verdict["sentence"]
    assert verdict["seeds"] == [1, 2]  # no trial had these
    assert html.escape(verdict["sentence"]).replace("&#x27;", "&#39;") in (folder / "index.html").read_text()
    assert len(results["rows"]) == 4
    assert list(folder.rglob("*.safetensors")) == []  # the disk does not grow with the seeds
    assert len(list(folder.rglob("scores.parquet"))) in (4, 8)  # of the verdict before too, if there was another winner
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        kinds = dict(database.execute("select value, count(*) from tags where key = 'stage' group by value").fetchall())
        note = database.execute(
            "select value from tags where key = 'mlflow.note.content' and run_uuid = ?", (stage["mlflow_run_id"],)
        ).fetchone()[0]
    database.close()
    assert kinds["trial"] == 4
    assert kinds["verdict"] in (4, 6, 8)  # none is trained once more for each winner
    assert note.startswith(verdict["sentence"])
