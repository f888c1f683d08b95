import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, recall_score, top_k_accuracy_score
from torchmetrics.functional import classification as theirs

from infra.errors import DataError, PipelineError
from pipelines.evaluation.metrics import NUM_BINS, calibration_error, summarise, wilson_interval


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


@st.composite
def edge_inputs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Logits with many ties, labels of which some classes are absent; also one class alone."""
    num_classes, num_clips = draw(st.integers(1, 9)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.integers(-2, 3, size=(num_clips, num_classes)).astype(np.float32)
    labels = rng.integers(0, draw(st.integers(1, num_classes)), num_clips)
    return logits, labels, num_classes


@settings(max_examples=60)
@given(edge_inputs())
def test_ties_absent_classes_and_one_class_agree_with_sklearn(inputs: tuple[np.ndarray, np.ndarray, int]) -> None:
    logits, labels, num_classes = inputs
    found = summarise(logits, labels, names(num_classes))
    own = logits[np.arange(len(labels)), labels]
    # How many classes come before the true one: sklearn decides ties by chance, we by the class id.
    is_lower = np.arange(num_classes) < labels[:, None]
    rank = ((logits > own[:, None]) | ((logits == own[:, None]) & is_lower)).sum(axis=1)
    assert found["top1"] == pytest.approx((rank == 0).mean())
    assert found["top5"] == pytest.approx((rank < 5).mean())
    answers, present = logits.argmax(axis=1), np.unique(labels)
    assert found["mean_class_accuracy"] == pytest.approx(recall_score(labels, answers, labels=present, average="macro"))
    if num_classes > 1:  # sklearn warns of one
        assert found["confusion"] == confusion_matrix(labels, answers, labels=np.arange(num_classes)).tolist()
    assert found["absent_classes"] == [f"class {label}" for label in range(num_classes) if label not in present]
    for name in ("top1", "top5", "mean_class_accuracy"):
        low, high = found[f"{name}_interval"]
        assert 0 <= low <= found[name] <= high <= 1
    json.dumps(found, allow_nan=False)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(2, 12))
def test_numbers_agree_with_torchmetrics(seed: int, num_clips: int, num_classes: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(num_clips, num_classes)) * 2)
    labels = torch.from_numpy(rng.integers(0, num_classes, num_clips))
    found = summarise(logits.numpy(), labels.numpy(), names(num_classes))
    scores = logits.softmax(dim=1)
    for name, top_k in (("top1", 1), ("top5", min(5, num_classes))):
        expected = theirs.multiclass_accuracy(scores, labels, num_classes, average="micro", top_k=top_k)
        assert found[name] == pytest.approx(expected.item(), abs=1e-6)
    of_class = theirs.multiclass_accuracy(scores, labels, num_classes, average="none")[labels.unique()]
    assert found["mean_class_accuracy"] == pytest.approx(of_class.mean().item(), abs=1e-6)
    assert found["confusion"] == theirs.multiclass_confusion_matrix(scores, labels, num_classes).tolist()
    expected = theirs.multiclass_calibration_error(scores, labels, num_classes, n_bins=NUM_BINS, norm="l1")
    assert found["ece"] == pytest.approx(expected.item(), abs=1e-6)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(1e-6, 1), st.booleans()), min_size=1, max_size=50))
def test_the_calibration_error_is_that_of_its_formula(answers: list[tuple[float, bool]]) -> None:
    confidences, hits = (np.array(column) for column in zip(*answers, strict=True))
    expected = 0.0
    for number in range(NUM_BINS):
        edges = np.linspace(0, 1, NUM_BINS + 1)[number : number + 2]
        inside = (confidences > edges[0]) & (confidences <= edges[1])
        if inside.any():
            expected += inside.mean() * abs(hits[inside].mean() - confidences[inside].mean())
    found = calibration_error(confidences, hits)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 <= found <= 1


def test_who_is_sure_and_right_is_calibrated_and_who_is_sure_and_wrong_is_not() -> None:
    sure = np.eye(4) * 50
    assert summarise(sure, np.arange(4), names(4))["ece"] == pytest.approx(0, abs=1e-12)
    assert summarise(sure, np.array([1, 2, 3, 0]), names(4))["ece"] == pytest.approx(1)


def test_left_and_right_are_counted_where_the_names_are_mirror_twins() -> None:
    labels = ["turning left", "turning right", "clockwise", "going left", "up"]  # two have no twin here
    answers = np.array([0, 0, 1, 4, 1, 0, 3, 2, 4])
    truth = np.array([0, 0, 0, 0, 1, 1, 3, 2, 4])
    found = summarise(np.eye(5)[answers], truth, labels)["left_right"]
    assert found == {"num_clips": 6, "num_right": 3, "num_twin": 2, "share": 1 / 3, "classes": labels[:2]}
    assert summarise(np.eye(5), np.arange(5), names(5))["left_right"] is None
    only_others = summarise(np.eye(5)[[2, 4]], np.array([2, 4]), labels)
    assert only_others["left_right"] is None  # no clip of such a class


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
        (np.array([[0, 1, np.inf], [0, 1, 2]]), [0, 1], PipelineError, r"1 of 2 clips have scores that are not finite"),
        (np.array([[0, 1, 2], [0, np.nan, 2]]), [0, -1], PipelineError, r"1 of 2 clips have scores that are not finite"),
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
