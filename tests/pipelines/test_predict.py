"""Videos asked singly against the same videos in a shard set, judged as the stage `evaluate` does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax

from infra.errors import DataError
from pipelines.evaluation.evaluate import EvaluateSettings, score_clips
from pipelines.predict import Prediction, load_predictor, read_video
from pipelines.training.job import load_model, score_model
from preprocessing.clips import centre_clip
from preprocessing.decode import DecodeSettings
from preprocessing.loader import make_loader
from preprocessing.planning import sample_key
from preprocessing.reader import open_shards
from preprocessing.synthetic import LABEL_NAMES


def test_the_logits_are_those_of_evaluate_whatever_the_format(asked, tmp_path):
    model, train, _ = load_model(asked.artifact / "model")
    shards = open_shards(asked.shards_dir, "train")
    loader = make_loader(shards, num_segments=train.num_segments, batch_size=5, train=False, seed=0, pixels=train.pixels)
    scores = score_clips(model, loader, torch.device("cpu"))
    expected = dict(zip(scores.keys, scores.logits, strict=True))
    predictor = load_predictor(asked.artifact)
    found = {name: predictor.predict(asked.raw / name) for name in asked.names}
    assert len(expected) == len(found) == 5
    for name, prediction in found.items():
        np.testing.assert_allclose(prediction.logits, expected[sample_key(name)], rtol=0, atol=1e-5, err_msg=name)
    spread = np.ptp([prediction.logits for prediction in found.values()], axis=0).max()
    assert spread > 1e-3  # the network tells the videos apart, or the comparison would be empty
    # And the stage itself sees the same: its accuracy is that of these predictions.
    summary = score_model(
        asked.artifact / "model", str(asked.shards_dir), EvaluateSettings(split="train"), tmp_path / "s.parquet"
    )
    right = [found[name].top(1)[0][0] == number for number, name in enumerate(asked.names)]
    assert summary["top1"] == pytest.approx(np.mean(right))


def test_the_decoding_of_the_shards_belongs_to_the_model(asked, tmp_path, caplog):
    """A model of before that was recorded still loads, says so, and takes the defaults."""
    predictor = load_predictor(asked.artifact)
    assert (predictor.decoding.short_side, predictor.decoding.jpeg_quality) == (40, 5)
    assert not caplog.records
    shutil.copytree(asked.artifact / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_bytes()).items() if name != "decoding"}))
    old = load_predictor(tmp_path)
    assert old.decoding == DecodeSettings()
    assert "does not say how its videos were decoded" in caplog.text
    name = "film.mp4"
    assert not np.allclose(old.predict(asked.raw / name).logits, predictor.predict(asked.raw / name).logits, rtol=0, atol=1e-5)


def test_a_video_that_cannot_be_used_is_a_prediction_with_a_reason(asked, tmp_path):
    predictor = load_predictor(asked.artifact / "model")
    whole = (asked.raw / "film.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").touch()
    shutil.copytree(asked.raw / "frames", tmp_path / "gap")
    (tmp_path / "gap" / "00002.jpg").unlink()
    names = ["cut.mp4", "text.mp4", "empty.mp4", "gap", "not there.mp4", "n" * 300]
    found = {name: predictor.predict(tmp_path / name) for name in names}
    assert all(prediction.logits is None and prediction.detail for prediction in found.values())
    reasons = {name: prediction.reason for name, prediction in found.items()}
    assert reasons["cut.mp4"] in ("undecodable", "truncated")
    assert [reasons[name] for name in names[1:]] == ["undecodable", "empty", "gap", "missing", "missing"]
    assert predictor.describe(found["gap"], 5)["top"] == []


def test_what_is_filmed_is_what_was_judged(attending):
    predictor = load_predictor(attending.artifact)
    for name in attending.names:
        prediction, clip = predictor.watch(attending.raw / name)
        np.testing.assert_array_equal(prediction.logits, predictor.predict(attending.raw / name).logits)
        ((label, score),) = prediction.top(1)
        assert (clip.title, clip.answer, clip.probability, clip.label) == (name, LABEL_NAMES[label], score, None)
        assert [(slot.name, slot.gamma) for slot in clip.slots] == [("layer1.0", pytest.approx(0.4)), ("layer2.0", 0.0)]
        assert clip.slots[0].weight.mean() == pytest.approx(0.4)
        assert not clip.slots[1].weight.any()
        # The frames are those that the network saw, only larger.
        seen = centre_clip(read_video(attending.raw / name, predictor.decoding), predictor.sampling, predictor.pixels)
        small = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float()
        small = torch.nn.functional.interpolate(small, seen.shape[1:3], mode="area").permute(0, 2, 3, 1).numpy()
        assert np.abs(small - seen).mean() < 5


@pytest.mark.parametrize("spelling", ["film.mp4", "./film.mp4", "sub/../film.mp4"])
def test_a_path_may_be_relative(asked, monkeypatch, spelling):
    monkeypatch.chdir(asked.raw)
    expected = read_video(asked.raw / "film.mp4", DecodeSettings())
    assert read_video(Path(spelling), DecodeSettings()).frames == expected.frames
    assert read_video(Path("frames"), DecodeSettings()).frames == read_video(asked.raw / "frames", DecodeSettings()).frames


def test_the_top_classes_are_the_most_probable_ones():
    logits = np.array([0.5, 2.0, -1.0, 2.0], np.float32)
    prediction = Prediction("x", logits)
    assert [label for label, _ in prediction.top(9)] == [1, 3, 0, 2]
    assert [score for _, score in prediction.top(2)] == pytest.approx(softmax(logits)[[1, 3]].tolist())
    assert prediction.scores.sum() == pytest.approx(1)


def test_a_model_does_not_need_the_weights_that_its_training_began_with(asked, tmp_path):
    shutil.copytree(asked.artifact / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    facts = json.loads(path.read_bytes())
    facts["model"] |= {"backbone_weights": "/nowhere/resnet18.pth", "backbone_sha256": "0123"}
    path.write_text(json.dumps(facts))
    assert load_predictor(tmp_path).label_names == facts["label_names"]


def test_a_folder_without_a_model_or_with_another_one_is_told(asked, tmp_path):
    with pytest.raises(DataError, match="holds no model"):
        load_predictor(tmp_path)
    shutil.copytree(asked.artifact / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format_version": 7}))
    with pytest.raises(DataError, match="has format version 7, this program reads 1"):
        load_predictor(tmp_path)
