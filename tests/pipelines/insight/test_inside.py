"""What is seen inside a network against the same computed on its own."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.insight import attention_maps, gate_activity
from pipelines.insight.examples import Judgement
from pipelines.insight.inside import choose_pairs, look_inside
from pipelines.insight.subject import Subject
from pipelines.training.job import load_model
from preprocessing.loader import make_loader


def judgement(key: int, label: int, answer: int, score: float) -> Judgement:
    return Judgement(f"v{key}", label, answer, None, score, score if label == answer else 1 - score, 0.5, 0.5)


JUDGEMENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0.5, 1.0)), max_size=20).map(
    lambda drawn: [judgement(key, *facts) for key, facts in enumerate(drawn)]
)


@given(JUDGEMENTS, st.integers(0, 5))
def test_pairs_hold_a_right_and_a_wrong_answer_and_no_clip_twice(judged: list[Judgement], num_pairs: int) -> None:
    pairs = choose_pairs(judged, num_pairs)
    shown = [clip for pair in pairs for clip in pair]
    assert len({clip.key for clip in shown}) == len(shown)
    assert all(pairs)
    right, wrong = ([clip for clip in judged if (clip.label == clip.answer) == is_right] for is_right in (True, False))
    assert len(pairs) == min(num_pairs, max(len(right), len(wrong)))
    shown_wrong = [clip for clip in shown if clip.label != clip.answer]
    assert len(shown_wrong) == min(len(wrong), num_pairs)
    # Every class that is taken for another one has its turn before any has its second.
    assert len({clip.label for clip in shown_wrong}) == min(len({clip.label for clip in wrong}), num_pairs)
    for pair in pairs:
        assert [clip.label == clip.answer for clip in pair] in ([True], [False], [True, False])
    if wrong and num_pairs:
        surest = max(clip.answer_score for clip in wrong)
        assert pairs[0][-1].answer_score == surest
        of_the_class = [clip.answer_score for clip in right if clip.label == pairs[0][-1].label]
        if of_the_class:
            assert (pairs[0][0].label, pairs[0][0].answer_score) == (pairs[0][-1].label, max(of_the_class))


def test_it_is_what_the_network_does_on_the_clips_of_the_evaluation(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    measured, shown = [0, 3, 4, 9, 23], [[9, 2], [17]]
    inside = look_inside(subject.model_dir, subject.shards_place, subject.one_view, shown, measured)
    model, train, _ = load_model(subject.model_dir)
    loader = make_loader(
        subject.split, num_segments=train.num_segments, batch_size=24, train=False, seed=0, pixels=train.pixels
    )
    (batch,) = loader
    logits, maps = attention_maps(model, model.prepare(batch.clips))
    assert inside.num_measured == 5
    for slot, opened in gate_activity(model, model.prepare(batch.clips)).items():
        np.testing.assert_allclose(inside.gates[slot], opened[measured].mean(dim=0), rtol=1e-4, atol=1e-7)
    assert inside.gates["layer1.1"].min() > 0  # the gate that the fixture has opened
    assert {name: gamma for name, (gamma, _) in inside.attention.items()} == {
        "layer1.0": pytest.approx(0.4),
        "layer2.0": 0.0,
    }
    for found in maps:
        assert inside.attention[found.name][1] == pytest.approx(found.spread[measured].mean().item(), rel=1e-4)
    for pair, rows in zip(inside.pairs, shown, strict=True):
        for clip, row in zip(pair, rows, strict=True):
            assert (clip.key, clip.label) == (subject.split.keys[row], subject.split.labels[row])
            assert clip.answer == int(logits[row].argmax())
            assert clip.probability == pytest.approx(float(logits[row].softmax(dim=0).max()), rel=1e-4)
            small = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float()
            small = torch.nn.functional.interpolate(small, (train.pixels, train.pixels), mode="area")
            assert (small - batch.clips[row]).abs().mean() < 6
            for slot, found in zip(clip.slots, maps, strict=True):
                assert (slot.name, slot.gamma) == (found.name, found.gamma)
                np.testing.assert_allclose(slot.weight, found.weight[row], rtol=1e-3, atol=1e-6)
            assert clip.raised_answer.shape == clip.raised_label.shape == (4, 1, 1)


def test_nothing_need_be_shown(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    inside = look_inside(subject.model_dir, subject.shards_place, subject.one_view, [], [1])
    assert inside.pairs == []
    assert inside.gates
