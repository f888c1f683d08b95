from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import DataError
from pipelines.evaluation.scores import ClipScores, Origin, read_scores
from preprocessing.labels import label_passport

ORIGIN = Origin(("up", "down, slowly", "left \ud800"), "validation", "10x3")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[ClipScores, Path]:
    scores = np.random.default_rng(0).dirichlet(np.full(3, 0.01), size=5)  # many of them nearly 0
    made = ClipScores([f"v{row}" for row in range(5)], np.array([0, 1, 2, -1, 2]), scores, ORIGIN)
    made.save(tmp_path / "scores.parquet")
    return made, tmp_path / "scores.parquet"


def test_what_is_written_is_read_to_the_last_bit(saved: tuple[ClipScores, Path]) -> None:
    made, path = saved
    found = read_scores(path)
    assert (found.keys, found.origin) == (made.keys, ORIGIN)
    assert np.array_equal(found.labels, made.labels)
    assert np.array_equal(found.scores, made.scores)
    assert found.summarise() == made.summarise()


def test_other_programs_see_what_the_scores_are_of(saved: tuple[ClipScores, Path]) -> None:
    schema = pq.read_schema(saved[1])
    assert schema.names == ["key", "label", "scores"]
    assert schema.metadata[b"label_passport"].decode() == label_passport(ORIGIN.label_names) == ORIGIN.label_passport
    assert (schema.metadata[b"split"], schema.metadata[b"protocol"]) == (b"validation", b"10x3")


def test_a_score_of_zero_can_be_judged() -> None:
    scores = ClipScores(["a"], np.array([1]), np.array([[1.0, 0.0]]), Origin(("x", "y"), "test", "centre"))
    assert scores.summarise()["loss"] == pytest.approx(744.44, abs=0.01)


def rewrite(path: Path, change: dict[str, object] | None = None, **metadata: str | None) -> None:
    """The same file with other columns or other metadata, as another program might have written it."""
    table = pq.read_table(path)
    for name, column in (change or {}).items():
        table = (
            table.drop_columns([name]) if column is None else table.set_column(table.schema.get_field_index(name), name, column)
        )
    facts = {name.decode(): value.decode() for name, value in pq.read_schema(path).metadata.items()} | metadata
    pq.write_table(table.replace_schema_metadata({name: text for name, text in facts.items() if text is not None}), path)


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        ({}, {"protocol": None}, r"does not say its protocol: an earlier version wrote it"),
        ({}, {"label_passport": "0" * 16}, r"has label passport 0000000000000000, but its label names have [0-9a-f]{16}"),
        ({"label": None}, {}, r"cannot be read as scores: .* expected a scores.parquet .* key, label and scores"),
        ({"key": pa.array(["v0", "v1", "v0", "v3", "v4"])}, {}, r"has 5 clips of 4 videos; expected each once"),
        ({"scores": pa.array([[0.5, 0.5]] * 5)}, {}, r"has a clip with 2 scores; expected 3, a score a label name"),
        ({"scores": pa.array([[0.5, 0.5, 0.0]] * 4 + [None])}, {}, r"has a clip with -1 scores; expected 3"),
        (
            {"scores": pa.array([[0.5, 0.5, 0.0]] * 4 + [[0.5, float("nan"), 0.5]])},
            {},
            r"scores of 1 of 5 clips, .* v4, are no",
        ),
        (
            {"scores": pa.array([[0.5, 0.5, 0.0]] * 4 + [[0.5, float("inf"), 0.5]])},
            {},
            r"no numbers from 0 to 1 that sum to 1 \(sum inf\)",
        ),
        (
            {"scores": pa.array([[3.0, -2.0, 0.0]] + [[0.5, 0.5, 0.0]] * 4)},
            {},
            r"scores of 1 of 5 clips, the first is v0, are no",
        ),
    ],
)
def test_what_are_no_scores_is_refused_by_name(
    saved: tuple[ClipScores, Path], change: dict[str, object], metadata: dict[str, str | None], message: str
) -> None:
    rewrite(saved[1], change, **metadata)
    with pytest.raises(DataError, match=message) as caught:
        read_scores(saved[1])
    assert str(caught.value).startswith(str(saved[1]))


def test_a_file_that_is_not_there_or_is_cut_is_a_message(saved: tuple[ClipScores, Path], tmp_path: Path) -> None:
    saved[1].write_bytes(saved[1].read_bytes()[:100])
    for path in (saved[1], tmp_path / "none.parquet"):
        with pytest.raises(DataError, match=rf"{path} cannot be read as scores"):
            read_scores(path)


def test_scores_in_float32_are_taken(saved: tuple[ClipScores, Path]) -> None:
    made, path = saved
    rewrite(path, {"scores": pa.array(made.scores.astype(np.float32).tolist(), pa.list_(pa.float32()))})
    np.testing.assert_allclose(read_scores(path).scores, made.scores, rtol=1e-6)


def test_an_unlabelled_split_is_read_and_cannot_be_judged(saved: tuple[ClipScores, Path], tmp_path: Path) -> None:
    replace(saved[0], labels=np.full(5, -1)).save(tmp_path / "test.parquet")
    with pytest.raises(DataError, match="none of 5 clips has a label"):
        read_scores(tmp_path / "test.parquet").summarise()
