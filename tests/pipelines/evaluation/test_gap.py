from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights

from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.evaluation.gap import STEPS, StepBatches, measure_gap
from pipelines.evaluation.metrics import summarise
from pipelines.training.job import TrainJob, save_model
from pipelines.training.settings import ModelSettings, TrainSettings, build_model
from preprocessing.loader import make_loader
from preprocessing.reader import open_shards

TRAIN = TrainSettings(epochs=1, warmup_epochs=0.0, pixels=32, num_segments=3, precision="fp32", seed=5)
MODEL = ModelSettings(name="tsn_resnet18")
SETTINGS = EvaluateSettings(batch_size=3)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def split(shards_dir):
    return open_shards(shards_dir, "validation")


def by_key(batches):
    """The views of each video."""
    found = {}
    for batch in batches:
        for key, views in zip(batch.keys, batch.clips.unflatten(0, (-1, batch.num_views)), strict=True):
            found[key] = views
    return found


def shown(split, step):
    return by_key(StepBatches(split, TRAIN, step, SETTINGS))


def loaded(split, **options):
    loader = make_loader(split, num_segments=3, batch_size=4, seed=5, num_workers=0, pixels=32, **options)
    return by_key(loader)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, views in expected.items():
        assert torch.equal(found[key], views)


def test_each_step_changes_one_thing():
    for one, other in pairwise(STEPS):
        changed = {name for name, value in asdict(other).items() if asdict(one)[name] != value}
        assert len(changed - {"name", "change"}) == 1
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_it_begins_with_what_training_shows_and_the_published_code_validates_with(split):
    expected = loaded(split, train=True, flip="naive")
    assert_same(shown(split, STEPS[0]), expected)
    assert_same(shown(split, STEPS[1]), expected)


@pytest.mark.parametrize(("step", "num_clips", "num_crops"), [(3, 1, 1), (4, 2, 1), (5, 2, 3)])
def test_it_ends_with_what_an_evaluation_shows(split, step, num_clips, num_crops):
    assert_same(shown(split, STEPS[step]), loaded(split, train=False, num_clips=num_clips, num_crops=num_crops))


def test_between_them_the_segments_are_still_random_and_the_crop_is_not(split):
    random_crop, centre, fixed = (StepBatches(split, TRAIN, step, SETTINGS) for step in STEPS[1:4])
    for row in range(len(split)):
        video = split.video(row)
        drawn, found, last = (batches.views(video)[0] for batches in (random_crop, centre, fixed))
        assert found.frame_indices == drawn.frame_indices
        assert (found.crop, found.mirrored) == (last.crop, False)
    assert any(
        centre.views(split.video(row))[0].frame_indices != fixed.views(split.video(row))[0].frame_indices
        for row in range(len(split))
    )


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_batches_do_not_change_what_is_shown(split, batch_size):
    settings = EvaluateSettings(batch_size=batch_size, loader_threads=0)
    batches = StepBatches(split, TRAIN, STEPS[0], settings)
    assert len(list(batches)) == len(batches) == -(-len(split) // batch_size)
    assert_same(by_key(batches), shown(split, STEPS[0]))


@pytest.fixture
def model_dir(tmp_path, shards_dir):
    torch.manual_seed(3)
    network = build_model(MODEL, num_classes=2, num_segments=3)
    torch.nn.init.normal_(network.new_fc.weight)
    save_weights(network, tmp_path / "weights.safetensors")
    save_model(tmp_path / "model", TrainJob("job", str(shards_dir), MODEL, TRAIN), tmp_path / "weights.safetensors")
    return tmp_path / "model"


def test_the_steps_add_up_and_are_what_the_network_says_of_what_is_shown(model_dir, shards_dir, split):
    told = []
    rows = measure_gap(model_dir, str(shards_dir), SETTINGS, lambda done, total, text: told.append((done, total, text)))
    assert [row["name"] for row in rows] == [step.name for step in STEPS]
    assert rows[0]["gain"] is None
    assert rows[0]["top1"] + sum(row["gain"]["top1"] for row in rows[1:]) == pytest.approx(rows[-1]["top1"])
    for row in rows[1:]:
        assert row["gain"]["interval"][0] <= row["gain"]["top1"] <= row["gain"]["interval"][1]
    assert [done for done, _, _ in told] == list(range(1, len(STEPS) + 1))
    network = build_model(MODEL, num_classes=2, num_segments=3)
    load_weights(network, model_dir / "model.safetensors")
    labels = dict(zip(split.keys, split.labels, strict=True))
    for step, row in ((STEPS[0], rows[0]), (STEPS[3], rows[3])):
        views = shown(split, step)
        clips = torch.cat(list(views.values()))
        pixels = clips / 255 if not step.normalised else network.prepare(clips)
        with torch.no_grad():
            logits = network.eval()(pixels).numpy()
        expected = summarise(logits, np.array([labels[key] for key in views]), split.label_names)
        assert row["top1"] == expected["top1"]


def test_another_seed_draws_other_views_and_leaves_fixed_ones_alone(split):
    reseeded = TRAIN.model_copy(update={"seed": 6})
    first, fixed = (by_key(StepBatches(split, reseeded, step, SETTINGS)) for step in (STEPS[0], STEPS[3]))
    assert any(not torch.equal(views, first[key]) for key, views in shown(split, STEPS[0]).items())
    assert_same(fixed, shown(split, STEPS[3]))
