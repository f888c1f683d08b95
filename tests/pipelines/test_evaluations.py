import json
import shutil

import pytest

from infra.errors import PipelineError
from pipelines.evaluations import find_evaluation


def test_an_evaluation_comes_with_what_it_was_made_of(finish, tmp_path):
    made = finish({"train.epochs": 7})
    finish({"train.epochs": 8})
    found = find_evaluation(tmp_path, made.fingerprint[:8])
    assert found.evaluate == made
    assert found.config.train.epochs == 7
    assert found.config.model.name == "sa_gsm_bn_inception"
    assert [artifact.stage for artifact in (found.shards, found.train)] == ["shards", "train"]


def test_a_path_leads_into_another_store(finish, tmp_path):
    made = finish()
    shutil.copytree(tmp_path / "store", tmp_path / "elsewhere" / "store")
    copy = tmp_path / "elsewhere" / "store" / "evaluate" / made.fingerprint
    assert find_evaluation(tmp_path / "empty", str(copy)).train.path.is_relative_to(tmp_path / "elsewhere")


def test_the_settings_are_those_that_were_trained_with(finish, tmp_path):
    chosen = {"train.learning_rate": 0.02, "model.placement": "5a,5b"}
    made = finish({"search.num_trials": 2}, search={"overrides": chosen, "trials": [{}, {}]})
    found = find_evaluation(tmp_path, made.fingerprint)
    assert (found.config.train.learning_rate, found.config.model.placement) == (0.02, "5a,5b")
    assert (found.config.search.num_trials, found.num_trials) == (0, 2)


def test_what_it_was_made_of_must_be_whole(finish, tmp_path):
    made = finish()
    train = find_evaluation(tmp_path, made.fingerprint).train
    (train.path / "history.json").unlink()
    with pytest.raises(PipelineError, match=rf"train {train.fingerprint} in .* history.json is gone from the store; run its"):
        find_evaluation(tmp_path, made.fingerprint)


def test_settings_of_another_version_are_named(finish, tmp_path):
    made = finish()
    manifest = json.loads((made.path / "artifact.json").read_bytes())
    manifest["config"]["evaluate"]["num_eyes"] = 3
    (made.path / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(PipelineError, match=r"another version of this program.*evaluate\.num_eyes"):
        find_evaluation(tmp_path, made.fingerprint)
