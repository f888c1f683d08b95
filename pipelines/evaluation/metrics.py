"""What scores say: numbers, tables and how far to trust them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import DataError, PipelineError

TOP5 = 5
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
        `top1`, `top5` (of min(5, K)), `mean_class_accuracy`: fractions;
        `loss`: mean cross-entropy in nats;
        `chance`: 1 / K; `largest_class_share`: what always answering the commonest class would score;
        `top1_interval`: low and high, Wilson, 95 %;
        `num_clips`, `num_unlabelled`, `num_classes`; `absent_classes`: names;
        `confusion`: counts, rows are true classes and columns answers;
        `per_class`, `worst_pairs`: lists of dicts.

    Raises:
        DataError: if no clip has a label, or a label is none of the names.
        PipelineError: if a logit is not finite.
    """
    from scipy.special import log_softmax
    from sklearn.metrics import confusion_matrix

    _require_sound(logits, labels, label_names)
    labelled = labels >= 0
    num_unlabelled = int((~labelled).sum())
    logits, labels = logits[labelled].astype(np.float64), labels[labelled]
    num_clips, num_classes = logits.shape
    order = np.argsort(-logits, axis=1, kind="stable")
    in_top1 = order[:, 0] == labels
    in_top5 = (order[:, : min(TOP5, num_classes)] == labels[:, None]).any(axis=1)
    confusion = confusion_matrix(labels, order[:, 0], labels=np.arange(num_classes))
    num_of_class = confusion.sum(axis=1)
    present = num_of_class > 0
    return {
        "top1": float(in_top1.mean()),
        "top5": float(in_top5.mean()),
        "mean_class_accuracy": float((confusion.diagonal()[present] / num_of_class[present]).mean()),
        "loss": float(-log_softmax(logits, axis=1)[np.arange(num_clips), labels].mean()),
        "chance": 1 / num_classes,
        "largest_class_share": float(num_of_class.max() / num_clips),
        "top1_interval": list(wilson_interval(int(in_top1.sum()), num_clips)),
        "num_clips": num_clips,
        "num_unlabelled": num_unlabelled,
        "num_classes": num_classes,
        "absent_classes": [name for name, there in zip(label_names, present, strict=True) if not there],
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
