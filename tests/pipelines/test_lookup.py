import shutil
import subprocess
import sys

import pytest

from infra.errors import ConfigError, PipelineError
from infra.tracking import Tracker, tracking_uri
from pipelines.evaluation.ensemble import find_scores
from pipelines.lookup import EVALUATIONS, find_evaluated


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def record(tmp_path, empty_database):
    """Records runs as `sagsm run` does: of a pipeline, and of the evaluations that it made rather than reused."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    tracker = Tracker(tracking_uri(tmp_path), "sagsm-something_v1", tmp_path / "mlflow-artifacts")

    def record(name, made, reused=()):
        judged = " ".join(item.fingerprint for item in (*made.values(), *reused))
        with tracker.start_run(name, tags={"stage": "pipeline", EVALUATIONS: judged}) as pipeline:
            for run, item in made.items():
                tags = {"stage": "evaluate", "fingerprint": item.fingerprint}
                with tracker.start_run(run, parent=pipeline.run_id, tags=tags):
                    pass
        return pipeline.run_id

    yield record
    tracker.close()


def test_an_evaluation_is_found_in_the_store_by_whatever_a_person_has_at_hand(finish, tmp_path):
    made = finish({"train.epochs": 7})
    finish({"train.epochs": 8})
    fingerprint = made.fingerprint
    for name in (fingerprint, fingerprint[:8], str(made.path), f"evaluate-{fingerprint}", f"evaluate-{fingerprint[:8]}"):
        assert find_evaluated(tmp_path, name) == made
        assert find_scores(name, tmp_path) == made.path / "scores.parquet"


def test_mlflow_names_an_evaluation_by_its_run_and_by_every_pipeline_that_has_it(finish, tmp_path, record):
    first, second = (finish({"train.epochs": epochs}) for epochs in (7, 8))
    record("p01 demo", {"evaluate p01": first})
    run_id = record("p02 demo", {}, reused=[first])
    record("p03 demo", {"evaluate p03": second})
    for name in ("p01 demo", "p01", "evaluate p01", "p02 demo", run_id, run_id[:12]):
        assert find_evaluated(tmp_path, name) == first
        assert find_scores(name, tmp_path) == first.path / "scores.parquet"
    assert find_evaluated(tmp_path, "p03") == second


def test_a_pipeline_of_several_evaluations_is_refused_with_the_names_of_each(finish, tmp_path, record):
    gsm, tsm = finish(experiment="curves", variant="gsm"), finish({"train.epochs": 5}, experiment="curves", variant="tsm")
    record("p01 curves", {"gsm evaluate p01": gsm, "tsm evaluate p01": tsm})
    with pytest.raises(
        ConfigError, match=r"'p01 curves' fits 2 evaluations: .*; give more of it, or name one of them"
    ) as error:
        find_evaluated(tmp_path, "p01 curves")
    for item in (gsm, tsm):
        assert f"{item.fingerprint} (" in str(error.value)
    assert find_evaluated(tmp_path, "tsm evaluate p01") == tsm
    with pytest.raises(ConfigError, match=r"'p' fits 2 evaluations"):
        find_evaluated(tmp_path, "p")


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(finish, tmp_path, record):
    record("p01 demo", {"evaluate p01": finish()})
    record("p02 shards only", {})
    with pytest.raises(ConfigError, match=r"'p1 demo' is no evaluation in .*; did you mean p01 demo\?; the newest are: "):
        find_evaluated(tmp_path, "p1 demo")
    with pytest.raises(ConfigError, match=r"'p02 shards only' is no evaluation in "):
        find_evaluated(tmp_path, "p02 shards only")


def test_what_mlflow_knows_and_the_store_does_not_is_said(finish, tmp_path, record):
    made = finish()
    record("p01 demo", {"evaluate p01": made})
    shutil.rmtree(made.path)
    with pytest.raises(
        ConfigError, match=rf"'p01 demo' is in MLflow, but its evaluation {made.fingerprint} is not in .*--workdir"
    ):
        find_evaluated(tmp_path, "p01 demo")


def test_what_is_not_there_is_refused_with_what_is(finish, tmp_path):
    with pytest.raises(ConfigError, match=r"'abc' is no evaluation in .*; the newest are: none yet"):
        find_evaluated(tmp_path, "abc")
    assert not (tmp_path / "mlflow.db").exists()  # who asks makes no database
    made = finish(experiment="curves", variant="gsm:s1")
    with pytest.raises(ConfigError, match=rf"'xyz' is no evaluation .*{made.fingerprint} \(curves gsm:s1, top-1 50.0%\)"):
        find_evaluated(tmp_path, "xyz")
    with pytest.raises(ConfigError, match="'' is no evaluation"):
        find_evaluated(tmp_path, "")


def test_a_server_that_is_away_is_told_and_needed_for_names_alone(finish, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    made = finish()
    assert find_evaluated(tmp_path, made.fingerprint[:6]) == made
    with pytest.raises(
        ConfigError, match=r"'p01 demo' is no evaluation .*; names of runs were not looked up: tracking at http"
    ):
        find_evaluated(tmp_path, "p01 demo")


def test_a_beginning_that_fits_several_asks_for_more(finish, tmp_path):
    made = [finish({"train.epochs": epochs}).fingerprint for epochs in range(5, 23)]
    first = next(name[0] for name in made if sum(other[0] == name[0] for other in made) > 1)
    with pytest.raises(ConfigError, match=rf"'{first}' fits \d evaluations: .* give more of it"):
        find_evaluated(tmp_path, first)


def test_another_stage_and_an_unfinished_one_are_refused(finish, tmp_path):
    made = finish()
    train = tmp_path / "store" / "train" / made.manifest["inputs"]["train"]
    with pytest.raises(ConfigError, match="is of the stage train; expected one of the stage evaluate"):
        find_evaluated(tmp_path, str(train))
    made.path.rename(made.path.with_suffix(".partial"))
    with pytest.raises(ConfigError, match=rf"'{made.fingerprint[:6]}' is no evaluation in "):
        find_evaluated(tmp_path, made.fingerprint[:6])


def test_one_that_is_not_whole_is_refused(finish, tmp_path):
    made = finish()
    (made.path / "scores.parquet").unlink()
    for name in (made.fingerprint, str(made.path)):
        with pytest.raises(PipelineError, match=r"scores.parquet is gone from the store; run its experiment again"):
            find_evaluated(tmp_path, name)


def test_what_the_store_knows_needs_no_engine(finish, tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipelines.lookup import find_evaluated\n"
        f"find_evaluated(Path({str(tmp_path)!r}), {finish().fingerprint!r})\n"
        "assert not {'ray', 'mlflow', 'torch', 'optuna'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
