"""Scoring on a real cluster: as many workers as fit, and numbers that do not depend on how many they are."""

import numpy as np
import pytest

from infra import cluster
from infra.errors import DataError
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.evaluation.scores import read_scores
from pipelines.training.scoring import Workers, plan_workers, score_on_cluster
from preprocessing.reader import open_shards


@pytest.mark.parametrize(
    ("nodes", "num_batches", "expected"),
    [
        ([{"CPU": 2}], 10, Workers(1, 2, 0)),
        ([{"CPU": 8}], 10, Workers(4, 2, 0)),
        ([{"CPU": 8}, {"CPU": 5}], 100, Workers(6, 2, 0)),
        ([{"CPU": 64}], 3, Workers(3, 2, 0)),
        ([{"CPU": 1}], 10, Workers(1, 1, 0)),
        ([{"CPU": 1}, {"CPU": 1}, {}], 10, Workers(2, 1, 0)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 2}], 10, Workers(6, 1, 1)),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 64}], 10, Workers(4, 1, 1)),
        ([{"CPU": 2, "GPU": 8}], 10, Workers(2, 1, 1)),
        ([], 10, Workers(1, 1, 0)),
    ],
)
def test_workers_fit_the_nodes_and_the_batches(nodes, num_batches, expected):
    assert plan_workers(nodes, num_batches) == expected
    for node in nodes:
        assert expected.num_cpus <= max(node.get("CPU", 0) for node in nodes)


@pytest.fixture(scope="module")
def four_cpus():
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_one_and_two_and_three_workers_give_the_same_numbers_to_the_last_bit(four_cpus, shards_dir, model_dir, tmp_path):
    """24 clips, 5 at a time: 5 batches of 5 and 4 clips, for one worker, two and three of them."""
    settings, told = EvaluateSettings(split="train", batch_size=5, protocol="2clips", loader_threads=1), []
    assert plan_workers(cluster.node_resources(), 5) == Workers(2, 2, 0)
    found = {}
    for count in (1, 2, 3):
        path = tmp_path / f"{count}.parquet"
        workers = None if count == 2 else Workers(count, 1, 0)
        summary = score_on_cluster(
            model_dir, str(shards_dir), settings, path, workers=workers, on_progress=lambda *told_now: told.append(told_now)
        )
        found[count] = summary, read_scores(path)
    assert [told_now[:2] for told_now in told] == [(1, 1), (1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]
    (first, scores), *others = found.values()
    assert scores.keys == open_shards(shards_dir, "train").keys
    for summary, same in others:
        assert summary == first
        assert same.keys == scores.keys
        assert np.array_equal(same.scores, scores.scores)
    assert first["num_clips"] == 24


@pytest.mark.slow
def test_the_error_of_a_worker_is_the_users(four_cpus, shards_dir, tmp_path):
    with pytest.raises(DataError, match="holds no model"):
        score_on_cluster(tmp_path, str(shards_dir), EvaluateSettings(split="train"), tmp_path / "scores.parquet")
