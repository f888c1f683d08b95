"""What scores say: numbers, tables and how far to trust them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import DataError, PipelineError
from pipelines.evaluation.significance import class_accuracy_interval
from preprocessing.labels import mirror_labels

TOP5 = 5
NUM_BINS = 15
_CONFIDENCE = 0.95
_NUM_WORST_PAIRS = 10


def summarise(logits: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.int64], label_names: list[str]) -> dict[str, Any]:
    """All that a report says of a split; plain data for JSON.

    Of equal logits the class with the lower id wins. Clips without a label (-1) are counted and left out. Classes without a
    clip are named and left out of the mean class accuracy.

    Args:
        logits: Shape: [N, K].
        labels: class ids, -1 if unlabelled. Shape: [N].
        label_names: K names.

    Returns:
        a dict of
        `top1`, `top5` (of min(5, K)), `mean_class_accuracy`: fractions; the same names with `_interval`: low and high, 95 %,
        Wilson's, of the last by the bootstrap;
        `loss`: mean cross-entropy in nats; `ece`: see `calibration_error`; `mean_confidence`: mean score of the answers;
        `left_right`: see `left_right_confusion`;
        `chance`: 1 / K; `largest_class_share`: what always answering the commonest class would score;
        `num_clips`, `num_unlabelled`, `num_classes`; `absent_classes`: names;
        `confusion`: counts, rows are true classes and columns answers;
        `per_class`, `worst_pairs`: lists of dicts.

    Raises:
        DataError: if no clip has a label, or a label is none of the names.
        PipelineError: if a logit is not finite.
    """
    from scipy.special import log_softmax

    _require_sound(logits, labels, label_names)
    labelled = labels >= 0
    logits, labels = logits[labelled].astype(np.float64), labels[labelled]
    (num_clips, num_classes), rows = logits.shape, np.arange(len(labels))
    order = np.argsort(-logits, axis=1, kind="stable")
    in_top1 = order[:, 0] == labels
    in_top5 = (order[:, : min(TOP5, num_classes)] == labels[:, None]).any(axis=1)
    log_scores = log_softmax(logits, axis=1)
    confidences = np.exp(log_scores[rows, order[:, 0]])
    # As sklearn's confusion_matrix, which warns of a single class.
    confusion = np.bincount(labels * num_classes + order[:, 0], minlength=num_classes**2).reshape(num_classes, num_classes)
    num_of_class = confusion.sum(axis=1)
    return {
        **_accuracies(in_top1, in_top5, confusion),
        "loss": float(-log_scores[rows, labels].mean()),
        "ece": calibration_error(confidences, in_top1),
        "mean_confidence": float(confidences.mean()),
        "left_right": left_right_confusion(confusion, label_names),
        "chance": 1 / num_classes,
        "largest_class_share": float(num_of_class.max() / num_clips),
        "num_clips": num_clips,
        "num_unlabelled": len(labelled) - num_clips,
        "num_classes": num_classes,
        "absent_classes": [name for name, count in zip(label_names, num_of_class, strict=True) if not count],
        "confusion": confusion.tolist(),
        "per_class": _per_class(confusion, in_top5, labels, label_names),
        "worst_pairs": _worst_pairs(confusion, label_names),
    }


def wilson_interval(num_correct: int, num_clips: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, after Wilson (1927): what the number of clips alone leaves open.

    Unlike the usual p +- 1.96 sigma it stays inside [0, 1] and is not empty at 0 or 1. It knows nothing of seeds.

    Example:
        >>> low, high = wilson_interval(9, 10)
        >>> round(low, 3), round(high, 3)
        (0.596, 0.982)
    """
    from scipy.stats import binomtest

    interval = binomtest(num_correct, num_clips).proportion_ci(_CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def calibration_error(confidences: npt.NDArray[np.float64], hits: npt.NDArray[np.bool_]) -> float:
    """How far confidence is from accuracy: the expected calibration error (ECE) of the answers, in 15 bins of equal width.

    Guo et al.: On Calibration of Modern Neural Networks, ICML 2017, https://arxiv.org/abs/1706.04599, equation 3; each bin has
    its upper end. With few clips it is above 0 also for a calibrated network, so that it has no interval here.

    Args:
        confidences: the score of each answer, in (0, 1]. Shape: [N].
        hits: whether it is right. Shape: [N].

    Example:
        >>> round(calibration_error(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, True, True, False])), 6)
        0.1
    """
    bins = np.digitize(confidences, np.linspace(0, 1, NUM_BINS + 1)[1:-1], right=True)
    gaps = np.bincount(bins, weights=confidences - hits)
    return float(np.abs(gaps).sum() / len(hits))


def left_right_confusion(confusion: npt.NDArray[np.int64], label_names: list[str]) -> dict[str, Any] | None:
    """How often a class that only direction tells from its mirror twin ("left to right", "right to left") is answered with it.

    Args:
        confusion: counts; rows are true classes, columns answers. Shape: [K, K].
        label_names: K names, by which twins are known (`preprocessing.labels.mirror_labels`).

    Returns:
        `num_clips` of classes with a twin, `num_right` and `num_twin` of them, `share` (`num_twin` of `num_clips`), `classes`
        (their names); None if there is no such clip.
    """
    twins = mirror_labels(label_names)
    pairs = [(label, twin) for label, twin in enumerate(twins) if twin not in (label, -1) and confusion[label].any()]
    if not pairs:
        return None
    num_clips, num_right, num_twin = (
        int(sum(counts))
        for counts in zip(*((confusion[a].sum(), confusion[a, a], confusion[a, b]) for a, b in pairs), strict=True)
    )
    counts = {"num_clips": num_clips, "num_right": num_right, "num_twin": num_twin}
    return {**counts, "share": num_twin / num_clips, "classes": [label_names[label] for label, _ in pairs]}


def _accuracies(
    in_top1: npt.NDArray[np.bool_], in_top5: npt.NDArray[np.bool_], confusion: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """The three accuracies, each with its interval."""
    num_of_class = confusion.sum(axis=1)
    present = num_of_class > 0
    num_right, num_of_class = confusion.diagonal()[present], num_of_class[present]
    return {
        "top1": float(in_top1.mean()),
        "top1_interval": list(wilson_interval(int(in_top1.sum()), len(in_top1))),
        "top5": float(in_top5.mean()),
        "top5_interval": list(wilson_interval(int(in_top5.sum()), len(in_top5))),
        "mean_class_accuracy": float((num_right / num_of_class).mean()),
        "mean_class_accuracy_interval": list(class_accuracy_interval(num_right, num_of_class)),
    }


def _require_sound(logits: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.int64], label_names: list[str]) -> None:
    if logits.shape != (len(labels), len(label_names)):
        raise DataError(
            f"the scores have shape {list(logits.shape)}; expected [{len(labels)}, {len(label_names)}] for {len(labels)} clips "
            f"and {len(label_names)} label names; train and evaluate on the same shard set"
        )
    num_bad = int((~np.isfinite(logits)).any(axis=1).sum())
    if num_bad:
        raise PipelineError(
            f"{num_bad} of {len(labels)} clips have scores that are not finite; expected numbers; the training has diverged: "
            "train again with a smaller train.learning_rate"
        )
    if not (labels >= 0).any():
        raise DataError(
            f"none of {len(labels)} clips has a label; expected a labelled split; "
            "choose another, for example with --set evaluate.split=validation"
        )
    if labels.max() >= len(label_names):
        raise DataError(
            f"found label {labels.max()}; expected at most {len(label_names) - 1}, since there are {len(label_names)} names; "
            "run the shards stage again"
        )


def _per_class(
    confusion: npt.NDArray[np.int64], in_top5: npt.NDArray[np.bool_], labels: npt.NDArray[np.int64], label_names: list[str]
) -> list[dict[str, Any]]:
    """A row a class that has clips, in the order of the classes."""
    rows = []
    for label, name in enumerate(label_names):
        num_clips = int(confusion[label].sum())
        if not num_clips:
            continue
        wrong = confusion[label].copy()
        wrong[label] = 0
        rows.append(
            {
                "label": label,
                "name": name,
                "num_clips": num_clips,
                "top1": float(confusion[label, label] / num_clips),
                "top5": float(in_top5[labels == label].mean()),
                "most_confused_with": label_names[int(wrong.argmax())] if wrong.any() else "",
            }
        )
    return rows


def _worst_pairs(confusion: npt.NDArray[np.int64], label_names: list[str]) -> list[dict[str, Any]]:
    """The commonest wrong answers; of equally common ones the lower class ids first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    worst = np.argsort(-wrong, axis=None, kind="stable")[:_NUM_WORST_PAIRS]
    pairs = [divmod(int(place), len(label_names)) for place in worst if wrong.flat[place]]
    return [
        {
            "true": label_names[true],
            "answer": label_names[answer],
            "num_clips": int(wrong[true, answer]),
            "share": float(wrong[true, answer] / confusion[true].sum()),
        }
        for true, answer in pairs
    ]
