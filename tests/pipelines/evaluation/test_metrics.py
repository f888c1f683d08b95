import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, log_loss, top_k_accuracy_score

from infra.errors import DataError, PipelineError
from pipelines.evaluation.metrics import summarise, wilson_interval


def names(num_classes: int) -> list[str]:
    return [f"class {index}" for index in range(num_classes)]


def test_numbers_computed_by_hand() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1]], dtype=np.float32))
    found = summarise(logits, np.array([0, 1, 1, 0]), names(3))
    assert found["top1"] == 0.5
    assert found["top5"] == 1.0  # of three classes
    assert found["mean_class_accuracy"] == 0.5
    assert found["loss"] == pytest.approx(-np.log([0.7, 0.4, 0.8, 0.2]).mean(), rel=1e-6)
    assert found["chance"] == pytest.approx(1 / 3)
    assert found["largest_class_share"] == 0.5
    assert found["confusion"] == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert found["absent_classes"] == ["class 2"]
    assert found["per_class"][0] == {
        "label": 0,
        "name": "class 0",
        "num_clips": 2,
        "top1": 0.5,
        "top5": 1.0,
        "most_confused_with": "class 1",
    }
    assert [row["name"] for row in found["per_class"]] == ["class 0", "class 1"]
    assert found["worst_pairs"] == [
        {"true": "class 0", "answer": "class 1", "num_clips": 1, "share": 0.5},
        {"true": "class 1", "answer": "class 0", "num_clips": 1, "share": 0.5},
    ]


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(7, 12))
def test_numbers_agree_with_sklearn(seed: int, num_clips: int, num_classes: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_clips, num_classes)).astype(np.float32) * 3
    labels = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, num_clips)])
    logits = np.concatenate([rng.normal(size=(num_classes, num_classes)).astype(np.float32), logits])
    found = summarise(logits, labels, names(num_classes))
    scores = np.exp(logits.astype(np.float64))
    scores /= scores.sum(axis=1, keepdims=True)
    assert found["top1"] == pytest.approx(top_k_accuracy_score(labels, scores, k=1))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    assert found["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(axis=1)))
    assert found["loss"] == pytest.approx(log_loss(labels, scores), rel=1e-6)
    assert sum(row["num_clips"] for row in found["per_class"]) == found["num_clips"] == len(labels)
    assert sum(map(sum, found["confusion"])) == len(labels)
    low, high = found["top1_interval"]
    assert 0 <= low <= found["top1"] <= high <= 1
    json.dumps(found, allow_nan=False)


def test_clips_without_a_label_do_not_count() -> None:
    logits = np.eye(3, dtype=np.float32)
    with_unlabelled = summarise(np.concatenate([logits, logits]), np.array([0, 1, 2, -1, -1, -1]), names(3))
    assert with_unlabelled.pop("num_unlabelled") == 3
    alone = summarise(logits, np.array([0, 1, 2]), names(3))
    assert alone.pop("num_unlabelled") == 0
    assert with_unlabelled == alone


def test_equal_logits_are_answered_by_the_first_class() -> None:
    found = summarise(np.zeros((8, 8), np.float32), np.arange(8), names(8))
    assert (found["top1"], found["top5"]) == (1 / 8, 5 / 8)
    assert found["loss"] == pytest.approx(np.log(8))


def test_huge_logits_do_not_overflow() -> None:
    found = summarise(np.array([[1e4, -1e4], [1e4, -1e4]], np.float32), np.array([0, 1]), names(2))
    assert found["loss"] == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (np.zeros((2, 3)), [-1, -1], DataError, r"none of 2 clips has a label; expected .* --set evaluate.split=validation"),
        (np.full((2, 3), np.nan), [0, 1], PipelineError, r"2 of 2 clips have scores that are not finite; .* diverged"),
        (np.zeros((2, 4)), [0, 1], DataError, r"shape \[2, 4\]; expected \[2, 3\] .* the same shard set"),
        (np.zeros((2, 3)), [0, 3], DataError, r"found label 3; expected at most 2, .* run the shards stage again"),
    ],
)
def test_what_cannot_be_judged_is_an_error(logits: np.ndarray, labels: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        summarise(logits, np.array(labels), names(3))


@pytest.mark.parametrize(
    ("num_correct", "num_clips", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],  # the last: Newcombe (1998), table I, method 3
)
def test_the_interval_is_wilsons(num_correct: int, num_clips: int, low: float, high: float) -> None:
    assert wilson_interval(num_correct, num_clips) == pytest.approx((low, high), abs=5e-5)
