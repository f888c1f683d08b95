from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError, DataError
from pipelines.evaluation.ensemble import Member, average_scores, describe_ensemble, find_scores, read_members
from pipelines.evaluation.scores import ClipScores, Origin

ORIGIN = Origin(("up", "down", "left", "right"), "validation", "centre")
NUM_CLIPS = 9


def scores_of(seed: int, order: "np.ndarray | None" = None, **changes: object) -> ClipScores:
    """Scores of the same nine clips, in this order."""
    rows = np.arange(NUM_CLIPS) if order is None else order
    scores = np.random.default_rng(seed).dirichlet(np.full(4, 0.05), size=NUM_CLIPS)[rows]
    made = ClipScores([f"v{row}" for row in rows], rows % 5 - 1, scores, ORIGIN)  # -1: some are unlabelled
    return replace(made, **changes)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=7))
def test_a_run_with_itself_changes_nothing_to_the_last_bit(seed: int, weights: list[float]) -> None:
    alone = scores_of(seed)
    shuffled = scores_of(seed, np.random.default_rng(seed).permutation(NUM_CLIPS))
    others = [Member("again", (alone, shuffled)[index % 2], weight) for index, weight in enumerate(weights)]
    together = average_scores([Member("first", alone), *others])
    assert together.keys == alone.keys
    assert together.origin == alone.origin
    assert np.array_equal(together.scores, alone.scores)
    assert together.summarise() == alone.summarise()


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_scores_are_the_weighted_mean_of_each_clip_whatever_the_order(seed: int, weights: list[float]) -> None:
    rng = np.random.default_rng(seed)
    members = [
        Member(f"m{index}", scores_of(seed + index, rng.permutation(NUM_CLIPS)), weight) for index, weight in enumerate(weights)
    ]
    together = average_scores(members)
    rows = [[member.scores.keys.index(key) for key in together.keys] for member in members]
    expected = np.average(
        [member.scores.scores[own] for member, own in zip(members, rows, strict=True)], axis=0, weights=weights
    )
    np.testing.assert_allclose(together.scores, expected, rtol=1e-9, atol=1e-15)
    assert (together.scores >= 0).all()
    np.testing.assert_allclose(together.scores.sum(axis=1), 1)


def test_the_protocols_of_the_members_are_named() -> None:
    protocols = ("2clips", "centre", "2clips")
    members = [Member("m", scores_of(seed, origin=replace(ORIGIN, protocol=name))) for seed, name in enumerate(protocols)]
    assert average_scores(members).origin == replace(ORIGIN, protocol="2clips + centre")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"origin": replace(ORIGIN, label_names=("down", "up", "left", "right"))},
            r"a has label passport [0-9a-f]{16} and b has [0-9a-f]{16}; expected the same",
        ),
        ({"origin": replace(ORIGIN, split="test")}, "a has split validation and b has test; expected the same"),
        ({"keys": [f"v{row + 1}" for row in range(NUM_CLIPS)]}, r"a has 9 clips and b has 9, 8 are the same; v0 is only in a"),
        ({"labels": np.zeros(NUM_CLIPS, np.int64)}, r"b has other labels than a for 7 clips, such as v0"),
    ],
)
def test_what_is_not_of_the_same_clips_and_labels_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        average_scores([Member("a", scores_of(0)), Member("b", scores_of(1, **changes))])


def test_clips_that_one_lacks_are_refused() -> None:
    whole = scores_of(0)
    part = ClipScores(whole.keys[:-2], whole.labels[:-2], whole.scores[:-2], ORIGIN)
    with pytest.raises(DataError, match=r"part has 7 clips and whole has 9, 7 are the same; v7 is only in whole"):
        average_scores([Member("part", part), Member("whole", whole)])


def test_the_document_has_each_member_and_the_summary_of_the_ensemble() -> None:
    members = [Member("a", scores_of(0), 2.0), Member("b", scores_of(1))]
    found = describe_ensemble(members, average_scores(members))
    assert [(row["name"], row["weight"], row["protocol"]) for row in found["members"]] == [
        ("a", 2.0, "centre"),
        ("b", 1.0, "centre"),
    ]
    for row, member in zip(found["members"], members, strict=True):
        summary = member.scores.summarise()
        for name in ("top1", "top5", "mean_class_accuracy"):
            assert row[name] == summary[name]
            assert row[f"{name}_interval"][0] <= row[name] <= row[f"{name}_interval"][1]
    whole = found["ensemble"]
    assert (whole["split"], whole["protocol"], whole["label_passport"]) == ("validation", "centre", ORIGIN.label_passport)
    assert whole["num_clips"] + whole["num_unlabelled"] == NUM_CLIPS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scores that lie anywhere."""
    scores_of(0).save(tmp_path / "scores.parquet")
    return tmp_path


def test_scores_are_found_by_file_and_folder_and_keep_the_name_that_they_were_asked_by(folder: Path) -> None:
    names = [str(folder / "scores.parquet"), str(folder)]
    assert [find_scores(name, folder / "work") for name in names] == [folder / "scores.parquet"] * 2
    assert [member.name for member in read_members(names, None, folder / "work")] == names


@pytest.mark.parametrize("text", ["dead", "../x*", ""])
def test_what_names_no_scores_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is no evaluation in"):
        find_scores(text, folder / "work")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_do_not_fit_are_refused(folder: Path, weights: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"found weights 1.*; expected 2 numbers above 0"):
        read_members([str(folder), str(folder)], weights, folder / "work")
