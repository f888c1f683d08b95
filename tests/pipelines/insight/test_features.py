import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import DataError, PipelineError
from infra.storage import sha256_file
from pipelines.insight.features import ClipFeatures, embed_clips
from pipelines.insight.subject import Subject
from pipelines.training.job import load_model
from preprocessing.loader import make_loader


def embed(subject: Subject, model_dir: Path | None = None) -> ClipFeatures:
    return embed_clips(model_dir or subject.model_dir, subject.shards_place, subject.one_view, subject.rows, num_threads=1)


@pytest.fixture
def spoiled(judged: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the network with other weights or facts, whose hash is right."""

    def spoil(change: Callable[[dict[str, torch.Tensor]], object], **facts: object) -> Path:
        folder = tmp_path / "spoiled"
        shutil.copytree(judged.train / "model", folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")
        known = json.loads((folder / "model.json").read_bytes())
        facts = {"sha256": sha256_file(folder / "model.safetensors"), **facts}
        (folder / "model.json").write_text(json.dumps(known | facts))
        return folder

    return spoil


def test_the_classifier_makes_the_scores_of_them_that_evaluate_kept(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    found = embed(subject)
    model, _, _ = load_model(subject.model_dir)
    with torch.inference_mode():
        scores = model.new_fc(torch.from_numpy(found.vectors)).double().softmax(dim=1)
    assert found.keys == subject.scores.keys == subject.split.keys
    np.testing.assert_allclose(scores, subject.scores.scores, atol=1e-6)
    assert found.labels.tolist() == subject.split.labels
    assert found.vectors.dtype == np.float32


def test_some_clips_have_the_vectors_that_they_have_among_all(make_subject: Callable[..., Subject]) -> None:
    everything, some = embed(make_subject()), embed(make_subject(max_clips=5, classes=["getting brighter"]))
    assert len(some.keys) == 5
    rows = [everything.keys.index(key) for key in some.keys]
    np.testing.assert_allclose(some.vectors, everything.vectors[rows], rtol=1e-4, atol=1e-5)
    assert set(some.labels.tolist()) == {1}


def test_one_view_whatever_the_protocol(make_subject: Callable[..., Subject], judged: Any) -> None:
    subject = make_subject()
    many = Subject(
        subject.model_dir,
        subject.shards_place,
        judged.settings.model_copy(update={"protocol": "10x3"}),
        subject.scores,
        subject.settings,
        subject.output_dir,
    )
    np.testing.assert_array_equal(embed(many).vectors, embed(subject).vectors)


def test_a_network_without_one_of_its_weights_is_refused(
    make_subject: Callable[..., Subject], spoiled: Callable[..., Path]
) -> None:
    folder = spoiled(lambda weights: weights.pop("base_model.conv1.weight"))
    with pytest.raises(DataError, match=r"is without base_model.conv1.weight \(1 of \d+ weights are wrong\).*train again"):
        embed(make_subject(), folder)


def test_features_that_are_no_numbers_are_refused_with_the_clip(
    make_subject: Callable[..., Subject], spoiled: Callable[..., Path]
) -> None:
    subject = make_subject()
    folder = spoiled(lambda weights: weights["base_model.layer4.1.bn2.bias"].fill_(torch.nan))
    first = subject.split.keys[0]
    with pytest.raises(PipelineError, match=f"features of 24 of 24 clips, the first is {first}, are not finite"):
        embed(subject, folder)


def test_a_network_of_other_labels_is_refused(make_subject: Callable[..., Subject], spoiled: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"was trained for labels 0123abcd, .* explain it on shards with the same label list"):
        embed(make_subject(), spoiled(lambda weights: None, label_passport="0123abcd"))


def test_the_clips_come_from_the_loader_of_the_evaluation(make_subject: Callable[..., Subject]) -> None:
    """Against a network and a loader put together by hand."""
    subject = make_subject()
    model, _, _ = load_model(subject.model_dir)
    loader = make_loader(
        subject.split, num_segments=4, batch_size=24, train=False, seed=0, num_workers=0, pixels=32
    )  # fmt: skip
    (batch,) = loader
    with torch.inference_mode():
        vectors = model.embed(model.prepare(batch.clips))
    np.testing.assert_allclose(embed(subject).vectors, vectors, rtol=1e-4, atol=1e-5)
