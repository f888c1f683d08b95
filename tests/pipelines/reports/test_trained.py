import pytest

from infra.storage import sha256_json
from pipelines.comparison import Trained, Training
from pipelines.evaluations import find_evaluation
from pipelines.reports.trained import describe_data, found_numbers, training_facts
from preprocessing.reader import open_shards


@pytest.fixture
def trained(finish, tmp_path):
    """A finished training with the given settings and shards."""

    def trained(overrides, **options):
        found = find_evaluation(tmp_path, finish(overrides, **options).fingerprint)
        return Trained(Training("a", found.config.train.seed, "a", found.config), found.train, found.evaluate, found.shards)

    return trained


@pytest.mark.parametrize(("subset", "num_clips"), [(None, 80), (20, 20), (500, 80)])
def test_the_training_clips_are_told_by_number_share_and_hash(trained, shards_dir, subset, num_clips):
    facts = training_facts([trained({"train.subset": subset}, shards={"place": str(shards_dir)})])
    keys = open_shards(shards_dir, "train").keys
    assert facts["training"] == {
        "num_clips": num_clips,
        "fraction": num_clips / 80,
        "clips_hash": sha256_json(keys[:num_clips])[:12],
    }
    assert facts["videos_per_second"] == 40 / 2.0


def test_clips_are_the_same_whatever_their_order(trained):
    one, other = (trained({"train.seed": seed}) for seed in (0, 1))  # the seed of made-up scores is that of their order
    data = describe_data([one, other])
    assert (data["dataset"], data["label_passport"], data["split"], data["num_clips"]) == (
        "something_v1", "5ca1ab1e", "validation", 40,
    )  # fmt: skip


def test_numbers_are_those_of_the_evaluation_and_the_largest_gamma_of_the_last_epoch(trained):
    item = trained({}, share=0.75)
    assert found_numbers(item.train, item.evaluate) == {
        "top1": 0.75,
        "top5": 1.0,
        "mean_class_accuracy": 0.75,
        "largest_gamma": 0.25,
    }
