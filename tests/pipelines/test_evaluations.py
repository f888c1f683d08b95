import json
import shutil

import pytest

from infra.errors import ConfigError, PipelineError
from pipelines.evaluations import find_evaluation


def test_an_evaluation_is_found_by_whatever_a_person_has_at_hand(finish, tmp_path):
    made = finish({"train.epochs": 7})
    finish({"train.epochs": 8})
    names = [made.fingerprint, made.fingerprint[:8], str(made.path), f"evaluate-{made.fingerprint}"]
    found = [find_evaluation(tmp_path, name) for name in names]
    assert {item.evaluate.fingerprint for item in found} == {made.fingerprint}
    assert found[0].config.train.epochs == 7
    assert found[0].config.model.name == "sa_gsm_bn_inception"
    assert [artifact.stage for artifact in (found[0].shards, found[0].train)] == ["shards", "train"]


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


def test_what_is_not_there_is_refused_with_what_is(finish, tmp_path):
    with pytest.raises(ConfigError, match=r"'abc' is no evaluation in .*; the newest are: none yet"):
        find_evaluation(tmp_path, "abc")
    made = finish(experiment="curves", variant="gsm:s1")
    with pytest.raises(ConfigError, match=rf"'xyz' is no evaluation .*{made.fingerprint} \(curves gsm:s1, top-1 50.0%\)"):
        find_evaluation(tmp_path, "xyz")
    with pytest.raises(ConfigError, match="'' is no evaluation"):
        find_evaluation(tmp_path, "")


def test_a_beginning_that_fits_several_asks_for_more(finish, tmp_path):
    made = [finish({"train.epochs": epochs}).fingerprint for epochs in range(5, 23)]
    first = next(name[0] for name in made if sum(other[0] == name[0] for other in made) > 1)
    with pytest.raises(ConfigError, match=rf"'{first}' begins \d fingerprints: .* give more digits"):
        find_evaluation(tmp_path, first)


def test_another_stage_is_refused(finish, tmp_path):
    train = find_evaluation(tmp_path, finish().fingerprint).train
    with pytest.raises(ConfigError, match="is of the stage train; expected one of the stage evaluate"):
        find_evaluation(tmp_path, str(train.path))


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
