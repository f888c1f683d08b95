"""The verdict: what is compared, with which seeds, and when it calls a difference one."""

import json

import numpy as np
import pytest

from pipelines.evaluation.evaluate import Scores
from pipelines.evaluation.scores import Origin
from pipelines.verdict import Question, judge, pose_question, untested, verdict_metrics, verdict_settings
from tuning.settings import SearchSettings
from tuning.trials import SearchResult, TrialRecord, best_record

CLASSES, CLIPS = 4, 400
QUESTION = Question("4e,5b", trial=7, others={"train.learning_rate": 0.03}, won=True)


def record(number, placement, top1=0.5, state="completed", **others):
    overrides = {"model.placement": placement, **others}
    return TrialRecord(number, overrides, placement, 0, None, top1, [top1], 1, state, 1.0, "")


@pytest.fixture
def train(tmp_path):
    """Writes the scores of trainings (placement, seed, right clips) as the verdict's trials leave them."""

    def train(*trainings):
        records = []
        for number, (placement, seed, right) in enumerate(trainings):
            labels = np.arange(CLIPS) % CLASSES
            answers = np.where(right, labels, (labels + 1) % CLASSES)
            folder = tmp_path / f"{number:05d}"
            folder.mkdir()
            scores = Scores([f"v{clip:03d}" for clip in range(CLIPS)], labels, 4 * np.eye(CLASSES, dtype=np.float32)[answers])
            scores.save(folder / "scores.parquet", Origin(tuple("pqrs"), "validation", "centre"))
            records.append(record(number, placement, **{"train.seed": seed}))
        return records

    return train


def hits(share, seed):
    """Clips that a network with this top-1 gets right, with noise of its own."""
    return np.random.default_rng(seed).random(CLIPS) < share


def test_two_copies_of_one_network_are_not_separable(train, tmp_path):
    trained = train(*((placement, seed, hits(0.6, seed)) for placement in ("4e,5b", "none") for seed in (1, 2)))
    found = judge(QUESTION, trained, tmp_path)
    assert not found["separable"]
    assert found["top1"] == 0
    assert found["mcnemar"] == {"1": 1.0, "2": 1.0}
    assert found["sentence"].startswith("Attention at 4e,5b is not separable from seed noise: +0.0 points")


@pytest.mark.parametrize("draw", range(5))
def test_one_network_with_noise_of_its_own_in_every_training_is_not_separable(train, tmp_path, draw):
    noise = iter(range(100 * draw, 100 * draw + 6))
    trained = train(*((name, seed, hits(0.6, next(noise))) for name in ("4e,5b", "none") for seed in (1, 2, 3)))
    assert not judge(QUESTION, trained, tmp_path)["separable"]


def test_a_clear_gain_is_separable_and_told_in_points(train, tmp_path):
    trained = train(
        *(("4e,5b", seed, hits(0.6, seed) | (hits(0.5, seed + 50))) for seed in (1, 2, 3)),
        *(("none", seed, hits(0.6, seed)) for seed in (1, 2, 3)),
    )
    found = judge(QUESTION, trained, tmp_path)
    low, high = found["interval"]
    assert found["separable"]
    assert 0 < low < found["top1"] < high
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}; 3 paired seeds, 400 clips"
    assert found["sentence"] == f"Attention at 4e,5b adds {100 * found['top1']:.1f} points of top-1 ({interval})."
    assert verdict_metrics(found)["verdict/difference"] == found["top1"]
    json.dumps(found, allow_nan=False)


def test_a_clear_loss_is_told_as_one(train, tmp_path):
    trained = train(
        *(("4e,5b", seed, hits(0.3, seed)) for seed in (1, 2)), *(("none", seed, hits(0.8, seed)) for seed in (1, 2))
    )
    lost = Question("4e,5b", trial=7, others={}, won=False)
    found = judge(lost, trained, tmp_path)
    assert found["separable"]
    assert found["sentence"].startswith("The search's winner has no attention; attention at 4e,5b costs ")


def test_a_seed_without_its_partner_is_left_out(train, tmp_path):
    trained = train(("4e,5b", 1, hits(0.6, 1)), ("none", 1, hits(0.6, 1)), ("4e,5b", 2, hits(0.9, 2)))
    trained.append(record(3, "none", None, state="failed", **{"train.seed": 2}))
    found = judge(QUESTION, trained, tmp_path)
    assert (found["seeds"], found["num_failed"], found["top1"]) == ([1], 1, 0)
    assert "one seed, whose noise is not known" in found["sentence"]
    assert judge(QUESTION, trained[2:], tmp_path)["tested"] is False


def test_the_winner_stands_against_none_and_none_against_the_best_with_attention():
    trials = [record(0, "none", 0.5, **{"train.learning_rate": 0.01}), record(1, "5b", 0.6), record(2, "3a", 0.9, "failed")]
    won = pose_question(SearchResult(trials, best_record(trials)), configured="all")
    assert won == Question("5b", 1, {}, won=True)
    trials[0] = record(0, "none", 0.7, **{"train.learning_rate": 0.01})
    assert pose_question(SearchResult(trials, best_record(trials)), configured="all") == Question("5b", 1, {}, won=False)
    assert pose_question(SearchResult(trials[:1], trials[0]), configured="all") is None


def test_the_grid_pairs_fresh_seeds_and_nothing_is_stopped():
    search = SearchSettings(num_trials=24, verdict_seeds=3, placement="booleans", max_hours=1.0)
    grid = verdict_settings(search, QUESTION, first_seed=5)
    assert grid.num_trials == 6
    assert grid.space["train.seed"].values == (5, 6, 7)
    assert grid.space["model.placement"].values == ("4e,5b", "none")
    assert grid.fixed == {"train.learning_rate": 0.03}
    assert (grid.sampler, grid.scheduler, grid.placement, grid.baselines, grid.max_hours) == (
        "grid",
        "none",
        "fixed",
        False,
        None,
    )


def test_without_seeds_the_command_says_how_to_test():
    found = untested(QUESTION, "sagsm run placement")
    assert found["command"] == "sagsm run placement --set search.verdict_seeds=3"
    assert "was not tested" in found["sentence"]
    assert verdict_metrics(found) == {}
    assert "no trial with attention" in untested(None, "sagsm run placement")["sentence"]
