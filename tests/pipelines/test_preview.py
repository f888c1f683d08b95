from types import SimpleNamespace

import pytest

from pipelines.experiments.demo import demo
from pipelines.experiments.folder import folder
from pipelines.presets import apply_preset
from pipelines.preview import preview, preview_text
from pipelines.training.optim import learning_rate_at


def finished_shards(kept):
    artifact = SimpleNamespace(summary={"by_split": {"train": {"kept": kept, "rejected": 3}}})
    return [SimpleNamespace(stage=SimpleNamespace(name="shards"), artifact=artifact)]


def test_rates_are_those_of_the_first_steps():
    config = apply_preset(demo(), {"preset": "seed_code"})
    found = preview(config, [])
    assert found["learning_rates"] == [learning_rate_at(100 * epoch, 100, config.train) for epoch in range(15)]
    assert found["learning_rates"][10] == 0.01


@pytest.mark.parametrize(
    ("changes", "clips", "expected"),
    [
        ({"train.num_workers": 3}, None, (24, 27)),  # 640 generated videos
        ({"train.num_workers": 3, "train.accumulation": 2}, 481, (48, 11)),
        ({"train.num_workers": 1, "train.subset": 17}, 481, (8, 3)),
        ({"train.num_workers": 1, "train.subset": 4000}, 481, (8, 61)),
        ({"train.num_workers": 0}, 481, (None, None)),
    ],
)
def test_steps_an_epoch_follow_from_the_clips_and_the_effective_batch(changes, clips, expected):
    found = preview(apply_preset(demo(), changes), finished_shards(clips) if clips else [])
    assert (found["effective_batch"], found["steps_per_epoch"]) == expected


def test_what_is_not_known_is_not_said():
    text = preview_text(preview(apply_preset(folder(), {"search.num_trials": 0, "train.epochs": 4}), []))
    assert text == (
        "learning rate by epoch: 1: 0.001, 2: 0.004, 3: 0.007, 4: 0.01\n"
        "batch: 32 clips a step for each worker (micro batch 32 x accumulation 1); preset fixed"
    )


def test_the_text_shows_ends_and_peak_of_a_long_training():
    changes = {"preset": "gsm", "train.num_workers": 2, "train.epochs": 100, "search.num_trials": 5}
    first, second = preview_text(preview(apply_preset(demo(), changes), [])).splitlines()
    assert first.startswith("learning rate by epoch: 1: 0.001, 11: 0.01, ")
    assert ", 100: " in first
    assert first.count(": 0") <= 9
    assert first.endswith("; the search may choose another peak")
    assert second == "batch: 64 clips a step (micro batch 16 x accumulation 2 x workers 2), 10 steps an epoch; preset gsm"
