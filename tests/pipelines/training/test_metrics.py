import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import cross_entropy

from pipelines.evaluation.metrics import summarise
from pipelines.training.metrics import EpochMetrics, Sums, best_epoch
from preprocessing.clip_ledger import ClipLedger

CPU = torch.device("cpu")


def epoch_metrics(epoch=0, **changes):
    numbers = {"train_loss": 1.5, "train_top1": 0.25, "val_loss": 1.0, "val_top1": 0.5, "val_top5": 0.75}
    rest = {"learning_rate": 0.01, "seconds": 3.0, "clips_per_second": 10.0, "gammas": {"3a": 0.125}, "data_wait": 0.25}
    rest |= {"effective_batch": 7.5, "world_size": 2, "peak_memory_bytes": 1000, "gates": {"3a_mean_abs": 0.5}}
    rest |= {"ledger": str(ClipLedger(30, 5 << 76)), "dead_gates": ["gamma has not moved"]}
    return EpochMetrics(epoch=epoch, step=10 * (epoch + 1), **(numbers | rest | changes))


def sums_of(logits, labels, batch_sizes):
    sums = Sums(CPU)
    for part, part_labels in zip(logits.split(batch_sizes), labels.split(batch_sizes), strict=True):
        sums.add(cross_entropy(part, part_labels, reduction="none"), part, part_labels)
    return sums


@given(cuts=st.lists(st.integers(1, 30), max_size=4), num_classes=st.integers(2, 9))
def test_the_means_do_not_depend_on_how_clips_are_batched(cuts, num_classes):
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(31, num_classes, generator=generator)
    labels = torch.randint(0, num_classes, (31,), generator=generator)
    bounds = [0, *sorted(set(cuts)), 31]
    means = sums_of(logits, labels, [stop - start for start, stop in itertools.pairwise(bounds)]).means()
    assert means.loss == pytest.approx(cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert means.top1 == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert means.top5 == pytest.approx((ranks < 5).float().mean().item())
    assert means.num_clips == 31


@given(arrays(np.float32, (7, 6), elements=st.sampled_from([0.0, 1.0, 2.0])), arrays(np.int64, 7, elements=st.integers(0, 5)))
def test_with_ties_training_and_evaluation_count_the_same_hits(logits, labels):
    sums = Sums(CPU)
    sums.add(torch.zeros(7), torch.from_numpy(logits), torch.from_numpy(labels))
    evaluated = summarise(logits, labels, list("abcdef"))
    assert (sums.means().top1, sums.means().top5) == pytest.approx((evaluated["top1"], evaluated["top5"]))


def test_sums_go_on_where_they_were_stored():
    logits, labels = torch.randn(20, 7), torch.arange(20) % 7
    stored = json.loads(json.dumps(sums_of(logits[:12], labels[:12], [12]).tolist()))
    resumed = Sums(CPU, stored)
    resumed.add(cross_entropy(logits[12:], labels[12:], reduction="none"), logits[12:], labels[12:])
    assert resumed.tolist() == sums_of(logits, labels, [12, 8]).tolist()
    assert resumed.gather() == [resumed.tolist()]


def test_names_are_those_of_mlflow_and_what_was_not_measured_is_left_out():
    named = epoch_metrics(val_loss=None, val_top1=None, val_top5=None).to_dict()
    assert named == {
        "train/loss": 1.5,
        "train/top1": 0.25,
        "train/lr": 0.01,
        "work/clips_per_second": 10.0,
        "work/epoch_seconds": 3.0,
        "work/effective_batch": 7.5,
        "work/workers": 2,
        "work/data_wait": 0.25,
        "work/peak_memory_bytes": 1000,
        "work/ledger": 5.0,
        "weights/dead_gates": 1,
        "weights/gamma_3a": 0.125,
        "weights/gate_3a_mean_abs": 0.5,
    }
    assert epoch_metrics().to_dict()["val/top1"] == 0.5


@given(loss=st.floats(allow_nan=False, allow_infinity=False))
def test_metrics_survive_json_to_the_last_bit(loss):
    metrics = epoch_metrics(train_loss=loss)
    assert EpochMetrics(**json.loads(json.dumps(metrics.to_json()))) == metrics


def test_the_first_of_equal_epochs_is_the_best_and_unvalidated_ones_do_not_count():
    history = [epoch_metrics(epoch, val_top1=top1) for epoch, top1 in enumerate([None, 0.0, 0.75, 0.75, 0.5])]
    best = best_epoch(history)
    assert best is history[2]
    assert best_epoch(history[:1]) is None
    assert best_epoch(history[:2]) is history[1]
    assert not math.isnan(best.val_top1)
