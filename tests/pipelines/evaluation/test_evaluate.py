import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.special import softmax
from torch import Tensor, nn

from infra.errors import ConfigError, PipelineError
from infra.settings import apply_overrides
from pipelines.evaluation.evaluate import EvaluateSettings, Scores, join_scores, score_clips
from pipelines.evaluation.scores import Origin, read_scores
from preprocessing.loader import Batch


class TinyClassifier(nn.Module):
    """Mean colour to logits: what evaluation uses of `VideoClassifier`, with dropout that must be off."""

    num_segments = 2

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 4))

    def prepare(self, clips: Tensor) -> Tensor:
        return clips.float() / 255

    def forward(self, clips: Tensor) -> Tensor:
        logits: Tensor = self.classify(clips.mean(dim=(1, 3, 4)))
        return logits


class FixedBatches:
    def __init__(self, clips: Tensor, batch_size: int, keys: list[str] | None = None) -> None:
        self.clips, self.batch_size = clips, batch_size
        self.keys = keys or [f"v{index}" for index in range(len(clips))]

    def __len__(self) -> int:
        return -(-len(self.clips) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.clips), self.batch_size):
            part = self.clips[start : start + self.batch_size]
            labels = torch.arange(start, start + len(part)) % 4
            yield Batch(part, labels, self.keys[start : start + len(part)], len(part))


@pytest.fixture
def clips() -> Tensor:
    return torch.randint(0, 256, (7, 2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


CPU = torch.device("cpu")


def test_every_clip_is_scored_once_whatever_the_batch_size(clips: Tensor) -> None:
    model = TinyClassifier()
    expected = model.eval()(model.prepare(clips)).detach().numpy()
    model.train()
    heard: list[tuple[int, int]] = []
    for batch_size in (1, 3, 7):
        heard.clear()
        scores = score_clips(
            model, FixedBatches(clips, batch_size), CPU, on_progress=lambda done, total, _: heard.append((done, total))
        )
        assert scores.keys == [f"v{index}" for index in range(7)]
        assert scores.labels.tolist() == [0, 1, 2, 3, 0, 1, 2]
        np.testing.assert_allclose(scores.logits, expected, rtol=1e-5, atol=1e-6)
        assert scores.logits.dtype == np.float32
        assert heard == [(done, -(-7 // batch_size)) for done in range(1, -(-7 // batch_size) + 1)]
    assert model.training


@pytest.mark.parametrize("num_views", [1, 2, 6])
def test_scores_are_averaged_over_views(num_views: int) -> None:
    views = torch.randint(0, 256, (5 * num_views, 2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    model = TinyClassifier()
    with torch.no_grad():
        model.classify[1].weight.mul_(50)  # type: ignore[operator, union-attr]
    keys, labels = list("abcde"), torch.arange(5) % 4
    batches = [Batch(views[: 3 * num_views], labels[:3], keys[:3], 3, num_views)]
    batches.append(Batch(views[3 * num_views :], labels[3:], keys[3:], 2, num_views))
    scores = score_clips(model, batches, CPU)
    assert scores.keys == keys
    expected = model.eval()(model.prepare(views)).detach()
    np.testing.assert_allclose(
        softmax(scores.logits, axis=1), expected.softmax(1).view(5, num_views, 4).mean(1), rtol=1e-4, atol=1e-6
    )
    if num_views == 1:
        np.testing.assert_allclose(scores.logits, expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(scores.logits).all()


@pytest.mark.parametrize("num_views", [1, 3])
def test_a_cpu_gets_few_clips_at_a_time_whatever_the_batch(num_views: int) -> None:
    views = torch.zeros(7 * num_views, 2, 3, 8, 8, dtype=torch.uint8)
    model = TinyClassifier()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))  # the copy that is asked has it too
    score_clips(model, [Batch(views, torch.zeros(7, dtype=torch.int64), list("abcdefg"), 7, num_views)], CPU)
    assert sum(seen[1:]) == 7 * num_views  # the first is the pass in which batch norms are looked for
    assert max(seen) <= 4


def test_bf16_gives_float32_scores_that_are_close(clips: Tensor) -> None:
    model = TinyClassifier()
    exact, rough = (score_clips(model, FixedBatches(clips, 4), CPU, precision) for precision in ("fp32", "bf16"))
    assert rough.logits.dtype == np.float32
    np.testing.assert_allclose(rough.logits, exact.logits, atol=0.05)


def test_a_clip_that_comes_twice_is_an_error(clips: Tensor) -> None:
    keys = ["same"] * 2 + list("abcde")
    with pytest.raises(PipelineError, match=r"7 clips of 6 videos; expected one clip of each video, .* train=False"):
        score_clips(TinyClassifier(), FixedBatches(clips, 3, keys), CPU)


def test_no_clips_are_an_error(clips: Tensor) -> None:
    with pytest.raises(PipelineError, match="found 0 clips"):
        score_clips(TinyClassifier(), FixedBatches(clips[:0], 3), CPU)


def test_saved_scores_can_be_read_back(tmp_path: Path) -> None:
    logits = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 100.0]], np.float32)
    origin = Origin(("x", "y", "z"), "validation", "centre")
    Scores(["a", "b"], np.array([2, -1]), logits).save(tmp_path / "scores.parquet", origin)
    assert read_scores(tmp_path / "scores.parquet").origin == origin
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table["key"].to_pylist() == ["a", "b"]
    assert table["label"].to_pylist() == [2, None]
    np.testing.assert_allclose(np.array(table["scores"].to_pylist()), softmax(logits.astype(np.float64), axis=1), rtol=1e-12)


def test_the_summary_uses_the_label_names() -> None:
    scores = Scores(["a", "b"], np.array([0, 0]), np.array([[2.0, 1.0], [1.0, 2.0]], np.float32))
    assert scores.summarise(["up", "down"])["worst_pairs"][0]["answer"] == "down"


def test_a_file_says_the_same_as_the_logits(tmp_path: Path) -> None:
    """Also where one score is near 1: rounded to float32 the others would tie, and top-5 would be chance."""
    rng = np.random.default_rng(0)
    names = tuple(f"c{index}" for index in range(20))
    logits = (rng.normal(size=(50, 20)) * 60).astype(np.float32)
    scores = Scores([f"v{index}" for index in range(50)], rng.integers(0, 20, 50), logits)
    scores.save(tmp_path / "scores.parquet", Origin(names, "validation", "centre"))
    live, read = scores.summarise(list(names)), read_scores(tmp_path / "scores.parquet").summarise()
    for name in ("loss", "ece", "mean_confidence"):
        assert read.pop(name) == pytest.approx(live.pop(name), rel=1e-9)
    assert read == live


def test_parts_are_joined_in_their_order(clips: Tensor) -> None:
    model = TinyClassifier()
    whole = score_clips(model, FixedBatches(clips, 3), CPU)
    parts = [
        Scores(whole.keys[start:stop], whole.labels[start:stop], whole.logits[start:stop]) for start, stop in ((0, 3), (3, 7))
    ]
    joined = join_scores(parts)
    assert joined.keys == whole.keys
    assert np.array_equal(joined.labels, whole.labels)
    assert np.array_equal(joined.logits, whole.logits)


def test_the_networks_input_can_be_made_otherwise(clips: Tensor) -> None:
    model = TinyClassifier()
    found = score_clips(model, FixedBatches(clips, 3), CPU, prepare=lambda part: model.prepare(part) + 1)
    with torch.no_grad():
        expected = model.eval()(model.prepare(clips) + 1)
    np.testing.assert_allclose(found.logits, expected, rtol=1e-5, atol=1e-6)


def test_a_protocol_has_one_name_in_the_settings() -> None:
    assert EvaluateSettings(protocol="1x1") == EvaluateSettings()
    assert apply_overrides(EvaluateSettings(), {"protocol": "1x3"}).protocol == "3crops"
    assert [EvaluateSettings(protocol=name).videos_at_a_time for name in ("centre", "10x3", "full")] == [16, 16, 1]
    with pytest.raises(
        ConfigError, match=r"protocol: found protocol '4crops'; expected one of centre, 2clips, .*seed_code, or"
    ):
        apply_overrides(EvaluateSettings(), {"protocol": "4crops"})


def test_reading_the_settings_loads_no_torch() -> None:
    code = "import pipelines.evaluation.evaluate, sys; assert not {'torch', 'sklearn', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
