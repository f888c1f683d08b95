from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.insight.feature_map import map_features, map_section, measure_purity
from pipelines.insight.features import ClipFeatures
from pipelines.insight.subject import Subject


def vectors_of(seed: int, count: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def by_brute_force(vectors: np.ndarray, labels: np.ndarray, num_neighbours: int) -> list[float]:
    shares = []
    for row, vector in enumerate(vectors):
        distances = [(float(np.linalg.norm(vector - other)), place) for place, other in enumerate(vectors) if place != row]
        nearest = [place for _, place in sorted(distances)[:num_neighbours]]
        shares.append(sum(bool(labels[place] == labels[row]) for place in nearest) / len(nearest))
    return shares


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 12), st.integers(2, 5))
def test_purity_is_what_brute_force_says(seed: int, count: int, num_neighbours: int, num_classes: int) -> None:
    vectors, labels = vectors_of(seed, count), np.random.default_rng(seed + 1).integers(num_classes, size=count)
    found = measure_purity(vectors, labels, num_neighbours)
    if len(set(labels.tolist())) < 2:
        assert found is None
        return
    assert found is not None
    assert found.num_neighbours == min(num_neighbours, count - 1)
    assert found.shares.tolist() == by_brute_force(vectors, labels, found.num_neighbours)
    pairs = [labels[a] == labels[b] for a in range(count) for b in range(count) if a != b]
    assert found.chance == pytest.approx(np.mean(pairs))
    assert 0 <= found.mean <= found.most + 1e-12 <= 1 + 1e-12


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 8))
def test_classes_that_lie_apart_are_as_pure_as_their_clips_allow(seed: int, count: int, num_neighbours: int) -> None:
    labels = np.arange(2 * count) % 2
    vectors = vectors_of(seed, 2 * count) + 1000 * labels[:, None]
    found = measure_purity(vectors, labels, num_neighbours)
    assert found is not None
    assert found.mean == pytest.approx(found.most)
    assert found.most == pytest.approx(min(1, (count - 1) / found.num_neighbours))


@given(st.integers(0, 10**6))
def test_purity_does_not_depend_on_the_order_or_the_place_of_the_clips(seed: int) -> None:
    vectors, labels = vectors_of(seed, 30), np.arange(30) % 3
    order = np.random.default_rng(seed).permutation(30)
    first, second = measure_purity(vectors, labels, 4), measure_purity(vectors[order] + 2.0, labels[order], 4)
    assert first is not None
    assert second is not None
    assert second.shares.tolist() == first.shares[order].tolist()


@pytest.mark.parametrize("count", [5, 6, 20, 40])
def test_a_map_has_a_place_for_each_clip_the_same_each_time(count: int) -> None:
    vectors = vectors_of(1, count)
    first, second = map_features(vectors), map_features(vectors)
    assert first is not None
    assert second is not None
    assert first.shape == (count, 2)
    assert np.isfinite(first).all()
    assert first.tobytes() == second.tobytes()


def test_groups_that_lie_apart_do_so_on_the_map() -> None:
    labels = np.arange(60) % 2
    places = map_features(vectors_of(2, 60) + 30 * labels[:, None].astype(np.float32))
    assert places is not None
    found = measure_purity(places, labels, 5)
    assert found is not None
    assert found.mean == 1


@pytest.mark.parametrize("vectors", [vectors_of(3, 1), vectors_of(3, 4), np.ones((50, 6), np.float32)])
def test_there_is_no_map_of_few_clips_or_of_clips_that_are_all_the_same(vectors: np.ndarray) -> None:
    assert map_features(vectors) is None


def features_of(subject: Subject, rows: list[int]) -> ClipFeatures:
    keys, labels = (np.array(values)[rows] for values in (subject.split.keys, subject.split.labels))
    return ClipFeatures(keys.tolist(), labels, vectors_of(4, len(rows)))


def test_the_section_has_the_number_the_map_and_the_tables(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(num_neighbours=3)
    features = features_of(subject, subject.rows)
    section = map_section(subject, features)
    purity = measure_purity(features.vectors, features.labels, 3)
    assert purity is not None
    assert section.sentence == (
        f"Of the 3 clips nearest in feature space {100 * purity.mean:.1f} % are of the same class; by chance it would be "
        "47.8 % (24 clips, 2 classes)."
    )
    assert section.metrics == {"insight/purity": purity.mean, "insight/purity_chance": pytest.approx(11 / 23)}
    assert [number for number, _ in section.numbers] == [f"{100 * purity.mean:.1f} %", "47.8 %"]
    assert not section.doubts
    (picture,) = section.pictures
    assert picture.path.is_file()
    assert "24 clips of 2 classes" in picture.alt
    classes, clips = section.tables
    assert [row["num_clips"] for row in classes.rows] == [12, 12]
    shares = [row["purity"] for row in classes.rows]
    assert shares == sorted(shares)
    assert np.mean(shares) == pytest.approx(purity.mean)
    assert [row["key"] for row in clips.rows] == features.keys


def test_few_clips_are_said_to_be_few(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(max_clips=1)
    section = map_section(subject, features_of(subject, subject.rows))
    assert section.sentence.startswith("1 clip: no neighbours of other classes")
    assert section.doubts[0].startswith("No map: 1 clips are too few")
    assert section.doubts[1].startswith("1 of 24 clips were looked at")
    assert not section.metrics
    assert not section.pictures


def test_one_class_has_a_map_and_no_purity(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(classes=["getting darker"])
    section = map_section(subject, features_of(subject, subject.rows))
    assert section.sentence.startswith("12 clips of one class")
    assert len(section.pictures) == 1
    assert not section.metrics


def test_a_class_of_few_clips_bounds_what_can_be_reached(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(num_neighbours=5)
    labels = subject.split.labels
    rows = [row for row, label in enumerate(labels) if label][:2] + [row for row, label in enumerate(labels) if not label]
    (doubt,) = [doubt for doubt in map_section(subject, features_of(subject, rows)).doubts if "at most" in doubt]
    assert "at most 88.6 % of the neighbours" in doubt  # two of 14 clips have one possible neighbour of five
