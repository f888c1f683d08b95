import json
from pathlib import Path

import numpy as np
import pytest

from infra.errors import PipelineError
from infra.settings import apply_overrides
from pipelines.artifacts import Artifact
from pipelines.comparison import Comparison, Trained
from pipelines.evaluation.evaluate import Scores
from pipelines.evaluation.scores import Origin
from pipelines.experiments import find_experiment
from pipelines.reports.comparison import compare_trained, doubts, write_comparison

CLASSES = 4


@pytest.fixture
def make(tmp_path: Path):
    """Makes a comparison of a, b and c, and artifacts in which each has the given share of `num_clips` right."""

    def make(shares, *, num_clips=500, seeds=(0,), expected=None, **changes):
        demo = apply_overrides(find_experiment("demo")(), {"search.num_trials": 0, **changes})
        variants = {
            name: apply_overrides(demo, {"model.name": f"{method}_resnet18"})
            for name, method in zip(shares, ("tsn", "gsm", "sa_gsm"), strict=False)
        }
        comparison = Comparison(variants=variants, baseline=next(iter(shares)), seeds=seeds, expected=expected or {})
        trained = [
            Trained(training, *_artifacts(tmp_path / training.label, shares[training.variant], num_clips, training.seed))
            for training in comparison.trainings()
        ]
        return comparison, trained

    return make


def _artifacts(folder: Path, share: float, num_clips: int, seed: int) -> tuple[Artifact, Artifact]:
    (folder / "train").mkdir(parents=True)
    (folder / "evaluate").mkdir()
    labels = np.arange(num_clips) % CLASSES
    answers = np.where(np.arange(num_clips) < round(share * num_clips), labels, (labels + 1) % CLASSES)
    order = np.random.default_rng(seed).permutation(num_clips)  # scores need not come in one order
    scores = Scores(
        [f"v{number:04d}" for number in order], labels[order], 4 * np.eye(CLASSES, dtype=np.float32)[answers[order]]
    )
    scores.save(folder / "evaluate" / "scores.parquet", Origin(tuple("pqrs"), "validation", "centre"))
    summary = scores.summarise(["p", "q", "r", "s"])
    (folder / "evaluate" / "evaluation.json").write_text(json.dumps(summary))
    history = [
        {"epoch": epoch, "train_loss": 2 / (epoch + 1), "val_loss": 1.0, "val_top1": share * epoch / 3} for epoch in range(4)
    ]
    (folder / "train" / "history.json").write_text(json.dumps(history))
    metrics = {name: summary[name] for name in ("top1", "top5", "mean_class_accuracy", "loss")}
    train = {"seconds": 61.5, "summary": {"best_epoch": 3, "best_val_top1": share, "epochs": 4}}
    return (
        Artifact("train", "ab12", folder / "train", train),
        Artifact("evaluate", "cd34", folder / "evaluate", {"summary": {"metrics": metrics, "num_clips": num_clips}}),
    )


def test_a_planted_difference_is_found_and_a_copy_is_not(make):
    results = compare_trained(*make({"a": 0.6, "b": 0.7, "c": 0.6}))
    assert results["variants"]["b"]["top1"] == pytest.approx(0.7)
    assert results["differences"]["b"]["separable"]
    assert not results["differences"]["c"]["separable"]
    assert results["verdict"] == (
        "Top-1 on 500 validation clips: a 60.0 %, b 70.0 %, c 60.0 %. Separable from a by more than the noise of clips (one "
        "seed each, so that of seeds is not known): b; not separable: c."
    )
    assert results["passes"] is None
    json.dumps(results, allow_nan=False)


def test_top1_is_the_mean_over_seeds_of_what_each_evaluation_says(make):
    comparison, trained = make({"a": 0.25, "b": 0.5}, seeds=(3, 4))
    results = compare_trained(comparison, trained)
    assert list(results["variants"]["a"]["seeds"]) == ["3", "4"]
    for name, row in results["variants"].items():
        by_seed = [item.evaluate.summary["metrics"]["top1"] for item in trained if item.training.variant == name]
        assert row["top1"] == pytest.approx(np.mean(by_seed))
        low, high = row["top1_interval"]
        assert low < row["top1"] < high
    assert list(results["differences"]["b"]["mcnemar"]) == ["3", "4"]
    assert results["verdict"].endswith(
        "b is 25.0 points above a (21.2 to 28.8): separable from the noise of clips and of 2 seeds."
    )


def test_what_was_expected_decides(make):
    expected = {"a": (0.0, 0.35), "b": (0.9, 1.0)}
    good = compare_trained(*make({"a": 0.2, "b": 0.95}, expected=expected))
    assert good["passes"]
    assert good["verdict"] == "As expected, top-1 on 500 validation clips: a 20.0 %, b 95.0 %."


def test_what_was_not_as_expected_is_named(make):
    bad = compare_trained(*make({"a": 0.2, "b": 0.5}, expected={"a": (0.0, 0.35), "b": (0.9, 1.0)}))
    assert bad["passes"] is False
    assert bad["verdict"].startswith("Not as expected, ")
    assert bad["verdict"].endswith("b should have 90.0 % to 100.0 %.")
    assert [row["as_expected"] for row in bad["variants"].values()] == [True, False]


def test_parameters_are_counted_and_published_numbers_only_stand_beside_their_own_dataset(make, tmp_path):
    generated = compare_trained(*make({"a": 0.2, "b": 0.5}))["variants"]
    assert generated["a"]["parameters"] < generated["b"]["parameters"]
    assert {row["published_top1"] for row in generated.values()} == {None}


def test_published_numbers(make):
    genuine = {"dataset.synthetic": None, "dataset.root": "somewhere"}
    comparison, trained = make({"a": 0.2, "b": 0.5}, **genuine)
    networks = {"a": "tsn_bn_inception", "b": "gsm_bn_inception"}
    renamed = {name: apply_overrides(comparison.variants[name], {"model.name": network}) for name, network in networks.items()}
    found = compare_trained(Comparison(variants=renamed, baseline="a"), trained)["variants"]
    assert (found["a"]["published_top1"], found["b"]["published_top1"]) == (0.1752, 0.4956)
    assert found["b"]["published_source"].startswith("16 frames")


def test_other_clips_are_refused(make, tmp_path):
    comparison, trained = make({"a": 0.2, "b": 0.5})
    train, evaluate = _artifacts(tmp_path / "other", 0.5, 499, 0)
    with pytest.raises(PipelineError, match="b was judged on other clips or labels than a: found 499, expected the same 500"):
        compare_trained(comparison, [trained[0], Trained(trained[1].training, train, evaluate)])


def test_the_page_says_the_verdict_first_and_holds_all_numbers(make, tmp_path, read_page):
    comparison, trained = make({"a": 0.2, "b": 0.95, "c": 0.93}, seeds=(0, 1), expected={"b": (0.9, 1.0)})
    results = compare_trained(comparison, trained)
    path = write_comparison(tmp_path, "sagsm: <b>compare</b>", comparison, trained, results)
    assert path.name == "index.html"
    page = read_page(path)
    text = " ".join(" ".join(page.text).split())
    order = [text.index(part) for part in (results["verdict"], "What to distrust", "Differences to a", "Curves", "Trainings")]
    assert order == sorted(order)
    shown = ("20.0 %", "95.0 %", "+75.0", "model.name", "sa_gsm_resnet18", "61.5 s", "4 of 4", "90.0 % to 100.0 %", "< 0.0001")
    assert [part for part in shown if part not in text] == []
    assert results["differences"]["c"]["sentence"] in text
    assert page.tags.count("img") == 2
    assert "<b>compare</b>" in text  # as text, not as a tag
    assert json.loads((tmp_path / "comparison.json").read_bytes())["verdict"] == results["verdict"]
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == ["curves.png", "top1.png"]


@pytest.mark.parametrize(
    ("seeds", "changes", "expected"),
    [
        ((0,), {}, "One seed each."),
        ((0, 1), {}, "2 seeds each: the spread between seeds is itself hardly known"),
        ((0,), {}, "The same clips chose the best epoch"),
        ((0,), {}, "Generated videos"),
        ((0,), {"evaluate.split": "train"}, "memory, not skill"),
        ((0,), {"evaluate.protocol": "2x3"}, "The mean over 6 views of a video"),
    ],
)
def test_doubts_fit_the_comparison(make, seeds, changes, expected):
    comparison, trained = make({"a": 0.2, "b": 0.5}, seeds=seeds, **changes)
    found = doubts(comparison, compare_trained(comparison, trained))
    assert any(expected in doubt for doubt in found), found
    assert not any("differences are judged" in doubt for doubt in found)
