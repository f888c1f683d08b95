import json

import pytest

from infra.errors import ConfigError, PipelineError
from pipelines.evaluations import find_evaluation
from pipelines.stored_comparison import compare_runs, gather

SMALL = {"model.name": "tsn_resnet18", "train.pixels": 32, "train.num_segments": 2}


def names(*artifacts):
    return [artifact.fingerprint for artifact in artifacts]


def test_seeds_of_one_configuration_are_one_variant(finish, tmp_path):
    made = [
        finish({**SMALL, "train.seed": seed, "train.learning_rate": rate}, share=share)
        for rate, share in ((0.01, 0.25), (0.02, 0.75))
        for seed in (0, 3)
    ]
    results, page = compare_runs(tmp_path, names(*made))
    first, second = results["variants"]
    assert first == f"demo-{made[0].fingerprint[:6]}"
    assert results["baseline"] == first
    assert [list(row["seeds"]) for row in results["variants"].values()] == [["0", "3"], ["0", "3"]]
    assert results["variants"][second]["settings"] == {"train.learning_rate": 0.02}
    assert results["differences"][second]["top1"] == pytest.approx(0.5)
    assert results["differences"][second]["separable"]
    assert "the noise of clips and of 2 seeds" in results["verdict"]
    assert page.is_relative_to(tmp_path / "comparisons")
    assert json.loads((page.parent / "comparison.json").read_bytes()) == json.loads(json.dumps(results))


def test_seeds_that_only_one_has_are_paired_in_their_order(finish, tmp_path):
    seeds = {"a": (1, 2, 5), "b": (2, 7)}
    made = [
        finish({**SMALL, "train.seed": seed, "model.dropout": dropout}, experiment="x", variant=f"{name}:s{seed}")
        for (name, own), dropout in zip(seeds.items(), (0.1, 0.3), strict=True)
        for seed in own
    ]
    results, _ = compare_runs(tmp_path, names(*made))
    assert list(results["variants"]) == ["a", "b"]
    assert list(results["differences"]["b"]["mcnemar"]) == ["2", "7/1"]


def test_runs_of_other_experiments_keep_their_names(finish, tmp_path):
    made = [finish({**SMALL, "train.epochs": epochs}, experiment=name) for name, epochs in (("demo", 5), ("placement", 6))]
    comparison, trained = gather([find_evaluation(tmp_path, name) for name in names(*made)])
    assert list(comparison.variants) == ["demo", "placement"]
    assert comparison.differences() == {"demo": {}, "placement": {"train.epochs": 6}}
    assert [item.training.label for item in trained] == ["demo", "placement"]


def test_seeds_of_one_configuration_alone_have_nothing_to_be_told_from(finish, tmp_path):
    made = [finish({**SMALL, "train.seed": seed}) for seed in (0, 1)]
    results, _ = compare_runs(tmp_path, names(*made))
    assert results["differences"] == {}
    assert results["verdict"].endswith("All are seeds of one configuration: there is nothing to tell apart.")


def test_a_search_that_chose_the_settings_is_doubted(finish, tmp_path, monkeypatch):
    searched = finish({**SMALL, "search.num_trials": 2, "search.placement": "fixed"}, search={"trials": [{}, {}, {}]})
    results, page = compare_runs(tmp_path, names(searched, finish({**SMALL, "train.epochs": 5})))
    assert [row["num_trials"] for row in results["variants"].values()] == [3, 0]
    assert "(best of 3)" in page.read_text()


@pytest.mark.parametrize(
    ("shards", "num_clips", "message"),
    [
        ({"label_passport": "0ddba11"}, 40, "label passport 0ddba11 instead of 5ca1ab1e"),
        ({"dataset": "diving48_v1"}, 40, "dataset diving48_v1 instead of something_v1"),
        ({}, 39, "num clips 39 instead of 40; clips hash"),
    ],
)
def test_other_labels_versions_and_clips_are_refused(finish, tmp_path, shards, num_clips, message):
    one = finish(SMALL)
    other = finish({**SMALL, "dataset.synthetic.seed": 1}, shards=shards, num_clips=num_clips)
    with pytest.raises(PipelineError, match=message):
        compare_runs(tmp_path, names(one, other))
    assert not (tmp_path / "comparisons").exists()


def test_another_split_is_refused(finish, tmp_path):
    made = names(finish(SMALL), finish({**SMALL, "evaluate.split": "test"}))
    with pytest.raises(PipelineError, match="split test instead of validation"):
        compare_runs(tmp_path, made)


def test_one_evaluation_is_nothing_to_compare(finish, tmp_path):
    made = finish(SMALL).fingerprint
    for runs in ([made], [made, made[:9]]):
        with pytest.raises(ConfigError, match="expected at least two, each of them once"):
            compare_runs(tmp_path, runs)


def test_a_folder_that_cannot_be_made_is_named(finish, tmp_path):
    made = names(finish(SMALL), finish({**SMALL, "train.epochs": 5}))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot make the folder .*choose another with --output"):
        compare_runs(tmp_path, made, tmp_path / "file" / "pages")
