"""The page of a search, made from a study of plain Optuna, and read as a browser would."""

import json
from types import SimpleNamespace

import numpy as np
import optuna
import pytest

from models import describe_model, parse_placement
from pipelines.reports.search import describe_search, doubts, search_metrics, summarise_search, write_search
from pipelines.searching import Searched, SearchTask
from pipelines.training.job import TrainJob
from pipelines.training.settings import ModelSettings, TrainSettings
from pipelines.verdict import Question, untested
from tuning.leaderboard import leaderboard
from tuning.settings import Range, SearchSettings
from tuning.space import search_space, suggest
from tuning.trials import (
    STUDY_NAME,
    SearchResult,
    best_record,
    end_trial,
    open_storage,
    overrides_in,
    read_records,
    start_trial,
)

QUESTION = Question("4e,5b", trial=3, others={"train.learning_rate": 0.03}, won=True)
TESTED = {
    **{"tested": True, "sentence": "Attention at 4e,5b adds 1.9 points.", "placement": "4e,5b", "trial": 3, "others": {}},
    **{"top1": 0.019, "interval": [0.004, 0.031], "mcnemar": {"1": 0.00001, "2": 0.2}, "separable": True, "seeds": [1, 2]},
    **{"by_seed": {"1": [0.61, 0.59], "2": [0.6, 0.58]}, "num_clips": 160, "num_failed": 0},
}


@pytest.fixture
def make(tmp_path):
    """Makes a search of so many trials in which 4e helps, every fifth is stopped, and one fails."""

    def make(num_trials, verdict=TESTED, supernet=None, error="out of memory"):
        search = SearchSettings(
            num_trials=num_trials, placement="booleans", space={"train.learning_rate": Range(low=0.01, high=0.1, log=True)}
        )
        rng, space = np.random.default_rng(0), search_space(search)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
        for number in range(num_trials):
            trial = study.ask()
            params = suggest(trial, space)
            start_trial(trial, params, space)
            helps = "4e" in parse_placement(overrides_in(trial)["model.placement"])
            value = 0.4 + 0.15 * helps + 0.02 * rng.random() + params["train.learning_rate"] / 10
            state = "failed" if number == 1 else "stopped" if number % 5 == 4 else "completed"
            trial.report(value, 1)
            if state == "completed":
                trial.report(value + 0.01, 2)
            end_trial(study, trial, state, 12.0, error if state == "failed" else "")
        records = read_records(study)
        with open_storage(tmp_path) as storage:
            optuna.create_study(study_name=STUDY_NAME, storage=storage, direction="maximize").add_trials(study.trials)
        job = TrainJob("placement", "nowhere", ModelSettings(), TrainSettings(num_segments=4))
        result = SearchResult(records, best_record(records))
        task = SearchTask(job, search, num_val_clips=160, num_classes=8)
        return Searched(task, result, supernet, verdict, leaderboard(result, "sagsm run '<b>placement</b>'"))

    return make


def text_of(page):
    return " ".join(" ".join(page.text).split())


def test_the_page_says_the_verdict_first_and_holds_every_trial(make, tmp_path, read_page, hostile_names):
    searched = make(24, error=hostile_names[0])
    results = write_search(tmp_path, "sagsm: placement", searched, study_dir=tmp_path)
    page = read_page(tmp_path / "index.html")
    text = text_of(page)
    parts = ("Attention at 4e,5b adds 1.9 points.", "What to distrust", "The verdict", "Where attention helps", "Importance")
    order = [text.index(part) for part in (*parts, "Pairs", "Accuracy and cost", "Trials Best first", "History", "How it was")]
    assert order == sorted(order)
    assert page.tags.count("img") == 4
    for row in results["rows"]:
        assert row["command"] in text
        assert row["placement"] in text
    assert hostile_names[0] in text  # as text, not as a tag
    assert json.loads((tmp_path / "search.json").read_bytes())["winner"] == results["winner"]
    assert (tmp_path / "index.html").stat().st_size < 2_000_000


def test_importance_finds_the_slot_that_was_planted(make):
    found = summarise_search(make(30))["importance"]
    assert next(iter(found["fanova"])) == "4e"
    effects = {slot["slot"]: slot["effect"] for slot in found["slots"]}
    assert max(effects, key=effects.get) == "4e"
    assert effects["4e"] == pytest.approx(0.15, abs=0.03)


def test_costs_are_those_of_the_networks_and_the_front_is_not_beaten(make):
    rows = summarise_search(make(12))["rows"]
    for row in rows[:3]:
        facts = describe_model("sa_gsm_bn_inception", 8, 4, placement=row["placement"])
        assert row["mmacs"] == pytest.approx(facts.macs_per_clip / 1e6, abs=0.06)
    alive = [row for row in rows if row["state"] != "failed"]
    front = [row for row in alive if row["is_pareto"]]
    assert rows[0] in front
    for row in alive:
        beaten = any(other["top1"] >= row["top1"] and other["cost"] <= row["cost"] and other is not row for other in front)
        assert beaten != row["is_pareto"]


def test_intervals_are_of_the_clips(make):
    rows = summarise_search(make(6))["rows"]
    low, high = rows[0]["interval"]
    assert low < rows[0]["top1"] < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.55 * 0.45 / 160), rel=0.1)


def test_an_untested_winner_says_how_to_test_it(make, tmp_path, read_page):
    searched = make(3, verdict=untested(QUESTION, "sagsm run placement --set search.num_trials=3"))
    results = write_search(tmp_path, "sagsm: placement", searched, study_dir=tmp_path)
    text = text_of(read_page(tmp_path / "index.html"))
    assert "was not tested" in text
    assert "sagsm run placement --set search.num_trials=3 --set search.verdict_seeds=3" in text
    assert "Only 2 trials can be compared" in text
    assert results["importance"]["fanova"] == {}
    assert describe_search(results, "r1").startswith(searched.verdict["sentence"])


def test_a_thousand_trials_leave_a_page_that_can_be_opened(make, tmp_path, read_page):
    searched = make(30)
    many = Searched(searched.task, searched.result, None, TESTED, searched.rows * 10)
    results = write_search(tmp_path, "sagsm: placement", many, study_dir=tmp_path)
    page = read_page(tmp_path / "index.html")
    assert page.tags.count("code") == 100
    assert "the best 100 of 300" in text_of(page)
    assert len(results["rows"]) == 300
    assert len(describe_search(results, "r1")) < 8000


def test_the_interactive_page_loads_nothing(make, tmp_path):
    write_search(tmp_path, "sagsm: placement", make(12), study_dir=tmp_path)
    text = (tmp_path / "interactive.html").read_text()
    assert text.count("plotly.js v") == 1
    assert "<script src" not in text
    assert "Optimisation history" in text
    assert "Parallel coordinates" in text
    assert "default-src 'none'" in text


def test_the_supernet_is_shown_with_its_agreement(make, tmp_path, read_page):
    scores = {str(parse_placement(mask)): 0.2 + 0.1 * (mask >> 7 & 1) + mask / 1e5 for mask in range(1024)}
    top = sorted(scores, key=scores.get, reverse=True)[:5]
    supernet = SimpleNamespace(scores=scores, top=top, seconds_training=100.0, seconds_scoring=40.0)
    results = write_search(tmp_path, "sagsm: placement", make(16, supernet=supernet), study_dir=tmp_path)
    text = text_of(read_page(tmp_path / "index.html"))
    agreement = results["supernet"]["agreement"]
    assert agreement["low"] <= agreement["rho"] <= agreement["high"]
    assert f"{agreement['rho']:.2f}" in text
    assert "scored 1,024 placements" in text
    assert top[0] in text
    assert search_metrics(results)["supernet/spearman"] == agreement["rho"]


@pytest.mark.parametrize(
    "expected",
    [
        "2 seeds each: the spread between seeds is itself hardly known",
        "2 of 12 trials were stopped early",
        "1 of 12 trials failed",
        "lie inside the winner's interval",
    ],
)
def test_doubts_fit_the_search(make, expected):
    found = doubts(summarise_search(make(12)))
    assert any(expected in doubt for doubt in found), found
