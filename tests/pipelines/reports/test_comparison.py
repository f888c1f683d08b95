import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infra.errors import PipelineError
from infra.settings import apply_overrides
from pipelines.artifacts import Artifact
from pipelines.comparison import Comparison, Published, Trained
from pipelines.evaluation.evaluate import Scores
from pipelines.evaluation.scores import Origin
from pipelines.experiments import find_experiment
from pipelines.reports.comparison import compare_trained, doubts, write_comparison
from pipelines.reproduction import Band

CLASSES = 4
BANDS = {"a": (Band(high=0.35, source="seen"),), "b": (Band(low=0.9, source="table 2"),)}


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


def _artifacts(folder: Path, share: float, num_clips: int, seed: int) -> tuple[Artifact, Artifact, Artifact]:
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
    evaluate = {"seconds": 10.0, "summary": {"metrics": metrics, "num_clips": num_clips}}
    shards = {"dataset": "something_v1", "label_passport": "5ca1ab1e", "place": None, "by_split": {"train": {"kept": 80}}}
    return (
        Artifact("train", "ab12", folder / "train", train),
        Artifact("evaluate", "cd34", folder / "evaluate", evaluate),
        Artifact("shards", "ef56", folder / "shards", {"summary": shards}),
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
    assert results["card"] is None
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


def test_what_was_expected_decides_and_noise_is_judged_all_the_same(make):
    good = compare_trained(*make({"a": 0.2, "b": 0.95}, expected=BANDS), experiment="compare")
    assert good["card"]["passes"]
    assert good["verdict"].startswith(
        "As expected, top-1 on 500 validation clips: a 20.0 %, b 95.0 %. b is 75.0 points above a"
    )
    assert good["variants"]["a"]["expected_top1"] == [0.0, 0.35]


def test_what_was_not_as_expected_is_named(make):
    bad = compare_trained(*make({"a": 0.2, "b": 0.5}, expected=BANDS), experiment="compare", changed={"train.epochs": 3})
    assert bad["card"]["passes"] is False
    assert bad["verdict"].startswith("Not as expected, ")
    assert "b has top-1 50.0 %, expected at least 90.0 %." in bad["verdict"]
    assert [line["within"] for line in bad["card"]["lines"]] == [True, False]
    assert bad["card"]["changed"] == {"train.epochs": 3}


def test_of_another_number_than_accuracy_the_mean_over_seeds_is_judged(make):
    comparison, trained = make({"a": 0.2, "b": 0.5}, seeds=(0, 1))
    for item, gamma in zip(trained, (0.0, 0.0, 0.2, -0.4), strict=True):
        history = json.loads((item.train.path / "history.json").read_bytes())
        history[-1]["gammas"] = {"3a": gamma, "3b": gamma / 2}
        (item.train.path / "history.json").write_text(json.dumps(history))
    bands = {
        "a": (Band(metric="largest_gamma", low=0.0, high=0.0, source="D1"),),
        "b": (Band(metric="largest_gamma", low=0.25, source="D1"),),
    }
    judged = Comparison.model_validate(comparison.model_dump() | {"expected": bands})
    lines = compare_trained(judged, trained, experiment="gamma")["card"]["lines"]
    assert [(line["got"], line["within"]) for line in lines] == [(0.0, True), (pytest.approx(0.3), True)]


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
    other = Trained(trained[1].training, *_artifacts(tmp_path / "other", 0.5, 499, 0))
    with pytest.raises(PipelineError, match=r"b cannot be compared with a: .*\(num clips 499 instead of 500; clips hash"):
        compare_trained(comparison, [trained[0], other])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("label_passport", "0ddba11", r"label passport 0ddba11 instead of 5ca1ab1e\)"),
        ("dataset", "diving48_v1", r"dataset diving48_v1 instead of something_v1\)"),
    ],
)
def test_other_labels_and_other_versions_of_a_dataset_are_refused(make, name, value, message):
    comparison, trained = make({"a": 0.2, "b": 0.5})
    shards = trained[1].shards
    changed = replace(shards, manifest={"summary": shards.summary | {name: value}})
    with pytest.raises(PipelineError, match=message):
        compare_trained(comparison, [trained[0], replace(trained[1], shards=changed)])


def test_a_subset_of_the_clips_and_the_speed_are_told(make):
    variants = compare_trained(*make({"a": 0.2, "b": 0.5}, seeds=(0, 1), **{"train.subset": 20}))["variants"]
    for row in variants.values():
        assert row["training"] == {"num_clips": 20, "fraction": 0.25, "clips_hash": None}  # there are no shards here
        assert row["videos_per_second"] == pytest.approx(1000 / 20.0)


def test_the_variants_own_published_number_goes_first(make):
    comparison, trained = make({"a": 0.2, "b": 0.5}, **{"dataset.synthetic": None, "dataset.root": "somewhere"})
    published = {"a": Published(top1=0.47, source="16 frames; table 2")}
    found = compare_trained(Comparison.model_validate(comparison.model_dump() | {"published": published}), trained)["variants"]
    assert (found["a"]["published_top1"], found["a"]["published_source"]) == (0.47, "16 frames; table 2")
    assert found["b"]["published_top1"] is None


def test_the_page_says_the_verdict_first_and_holds_all_numbers(make, tmp_path, read_page):
    comparison, trained = make({"a": 0.2, "b": 0.95, "c": 0.93}, seeds=(0, 1), expected={"b": BANDS["b"]})
    results = compare_trained(comparison, trained, experiment="compare", changed={"seeds": [0, 1]})
    path = write_comparison(tmp_path, "sagsm: <b>compare</b>", comparison, trained, results)
    assert path.name == "index.html"
    page = read_page(path)
    text = " ".join(" ".join(page.text).split())
    order = [
        text.index(part)
        for part in (results["verdict"], "Reproduction of compare", "What to distrust", "Differences to a", "Trainings")
    ]
    assert order == sorted(order)
    shown = (
        "20.0 %",
        "95.0 %",
        "+75.0",
        "model.name",
        "sa_gsm_resnet18",
        "61.5 s",
        "4 of 4",
        "at least 90.0 %",
        "< 0.0001",
        "table 2",
    )
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
