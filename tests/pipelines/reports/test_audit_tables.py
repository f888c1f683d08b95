from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.reports.audit_tables import (
    PUBLISHED,
    compare_with_published,
    count_books,
    count_labels,
    count_rates,
    count_sizes,
    find_duplicates,
    find_pairs,
    find_short,
    split_names,
    top_share,
)
from preprocessing.index import INDEX_SCHEMA, LEDGER_SCHEMA, DatasetInfo
from preprocessing.labels import label_passport

NAMES = ["Turning left", "Turning right", "Up", "Round clockwise"]
VIDEO = st.fixed_dictionaries(
    {
        "split": st.sampled_from(["train", "validation", "test", "zoo"]),
        "label": st.sampled_from([None, 0, 1, 2, 3]),
        "status": st.sampled_from(["kept", "kept", "rejected"]),
        "num_frames": st.integers(1, 20),
        "content_sha256": st.sampled_from(["a", "b", "c", "d", "e"]),
        "reason": st.sampled_from(["missing", "empty"]),
    }
)


def make_info(dataset: str = "something_v1", passport: str | None = None) -> DatasetInfo:
    return DatasetInfo(
        format_version=2,
        dataset=dataset,
        label_names=NAMES,
        label_passport=passport or label_passport(NAMES),
        settings={},
        ffmpeg_version="",
        counts={},
        files={},
        shards={},
    )


def make_ledger(rows: list[dict[str, Any]]) -> pa.Table:
    full = []
    for number, row in enumerate(rows):
        kept = row.get("status", "kept") == "kept"
        facts = {
            "video_id": f"v{number}",
            "status": "kept",
            "split": "train",
            "num_bytes": 10,
            "source_bytes": 20,
            "seconds": 0.0,
        }
        facts |= row if kept else {**row, "num_frames": 0, "content_sha256": "", "source_bytes": 0}
        full.append(facts | {"reason": "" if kept else row["reason"]})
    return pa.Table.from_pylist(full, schema=LEDGER_SCHEMA)


@settings(max_examples=30)
@given(st.lists(VIDEO, max_size=40))
def test_the_books_agree_with_counting_by_hand(rows: list[dict[str, Any]]) -> None:
    ledger = make_ledger(rows)
    books = count_books(ledger, make_info())
    kept = [row for row in rows if row["status"] == "kept"]
    assert (books["num_videos"], books["num_kept"]) == (len(rows), len(kept))
    assert books["num_frames"] == sum(row["num_frames"] for row in kept)
    assert books["source_bytes"] == 20 * len(kept)
    assert books["reasons"] == Counter(row["reason"] for row in rows if row["status"] == "rejected")
    assert list(books["reasons"].values()) == sorted(books["reasons"].values(), reverse=True)
    for split, numbers in books["by_split"].items():
        mine = [row for row in kept if row["split"] == split]
        labels = {row["label"] for row in mine} - {None}
        assert numbers["kept"] + numbers["rejected"] == sum(row["split"] == split for row in rows)
        assert (numbers["kept"], numbers["classes"]) == (len(mine), len(labels))
        assert numbers["unlabelled"] == sum(row["label"] is None for row in mine)
        assert numbers["frames"] == sum(row["num_frames"] for row in mine)
        assert numbers["max"] == max((row["num_frames"] for row in mine), default=None)
        absent = [name for label, name in enumerate(NAMES) if label not in labels]
        assert books["absent_classes"].get(split, []) == (absent if labels else [])


@settings(max_examples=30)
@given(st.lists(VIDEO, max_size=40))
def test_labels_agree_with_counting_by_hand(rows: list[dict[str, Any]]) -> None:
    counts = count_labels(make_ledger(rows), make_info())
    for split, numbers in counts.items():
        for label, number in enumerate(numbers):
            assert number == sum((row["split"], row["label"], row["status"]) == (split, label, "kept") for row in rows)


@settings(max_examples=30)
@given(st.lists(VIDEO, max_size=40))
def test_duplicates_are_all_and_only_equal_contents(rows: list[dict[str, Any]]) -> None:
    found = find_duplicates(make_ledger(rows)).to_pylist()
    contents: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row["status"] == "kept":
            contents.setdefault(row["content_sha256"], []).append(number)
    expected = {f"v{number}" for numbers in contents.values() if len(numbers) > 1 for number in numbers}
    assert {row["video_id"] for row in found} == expected
    assert len(found) == len(expected)
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(row["group"], []).append(row)
    assert list(groups) == list(range(1, len(groups) + 1))
    for members in groups.values():
        assert len({row["content_sha256"] for row in members}) == 1
        leaks = len({row["split"] for row in members}) > 1
        assert {row["kind"] for row in members} == {"LEAK" if leaks else "duplicate"}
    kinds = [members[0]["kind"] for members in groups.values()]
    assert kinds == sorted(kinds)  # "LEAK" sorts before "duplicate"


@settings(max_examples=30)
@given(st.lists(VIDEO, max_size=40))
def test_short_videos_are_listed_shortest_first(rows: list[dict[str, Any]]) -> None:
    found = find_short(make_ledger(rows))["num_frames"].to_pylist()
    assert found == sorted(row["num_frames"] for row in rows if row["status"] == "kept" and row["num_frames"] < 16)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50), st.integers(1, 60))
def test_top_share(counts: list[int], num_labels: int) -> None:
    share = top_share(np.array(counts), num_labels)
    if sum(counts) == 0:
        assert share is None
    else:
        assert share == pytest.approx(sum(sorted(counts)[-num_labels:]) / sum(counts))


def test_splits_have_their_usual_order() -> None:
    assert split_names(make_ledger([{"split": name} for name in ("zoo", "test", "train", "validation", "ark")])) == [
        "train",
        "validation",
        "test",
        "ark",
        "zoo",
    ]


def test_pairs_that_a_flip_swaps() -> None:
    pairs, alone = find_pairs(make_info(), {"train": np.array([5, 3, 1, 0])})
    assert pairs == [{"one": "Turning left", "other": "Turning right", "counts": {"train": (5, 3)}}]
    assert alone == ["Round clockwise"]


def repeat(split: str, count: int) -> pa.Table:
    columns = {"split": [split] * count, "status": ["kept"] * count, "label": np.arange(count) % 4}
    blanks = {field.name: pa.nulls(count, field.type) for field in LEDGER_SCHEMA}
    return pa.table(blanks | {name: pa.array(values, LEDGER_SCHEMA.field(name).type) for name, values in columns.items()})


@pytest.mark.parametrize(
    ("dataset", "missing", "verdict"),
    [
        ("something_v1", 0, "As many videos in every split as Something-Something V1 was published with."),
        ("something_v1", 7, "A part of Something-Something V1: 108,492 of 108,499 videos."),
        ("something_v1", -1, "Not Something-Something V1 as it was published: a split has more videos than it should."),
        ("diving48", 0, "As many videos in every split as Diving48 V2 was published with."),
        ("diving48_v1", 0, "As many videos in every split as Diving48 V1 was published with."),
    ],
)
def test_published_counts(dataset: str, missing: int, verdict: str) -> None:
    published = PUBLISHED[dataset]
    counts = dict(published.videos)
    counts["train"] -= missing
    ledger = pa.concat_tables([repeat(split, count) for split, count in counts.items()])
    info = make_info(dataset, published.label_passport)
    found = compare_with_published(ledger, info, count_labels(ledger, info))
    assert found is not None
    assert found["verdict"] == verdict
    row = found["rows"][0]
    assert row["verdict"] == ("equal" if not missing else f"{abs(missing)} {'fewer' if missing > 0 else 'more'}")
    assert any("share of the" in row["what"] for row in found["rows"]) == (dataset == "something_v1" and not missing)


def test_other_datasets_are_compared_with_nothing() -> None:
    ledger = repeat("train", 3)
    info = make_info("folder")
    assert compare_with_published(ledger, info, count_labels(ledger, info)) is None
    info = make_info("something_v1")
    found = compare_with_published(ledger, info, count_labels(ledger, info))
    assert found is not None
    assert found["rows"] == []
    assert "Another set in the layout" in found["verdict"]


def test_sizes_and_rates() -> None:
    rows = [("train", 25.0, 100, 176), ("train", 29.97, 100, 176), ("test", None, 240, 320), ("test", 29.97002, 240, 320)]
    rows.append(("test", 25.0, 240, 320))
    columns = dict(zip(("split", "fps", "height", "width"), zip(*rows, strict=True), strict=True))
    table = pa.table({name: pa.array(values, INDEX_SCHEMA.field(name).type) for name, values in columns.items()})
    assert count_sizes(table) == [("320 x 240", 3), ("176 x 100", 2)]
    assert count_rates(table, ["train", "test"]) == [("25", [1, 1]), ("29.97", [1, 1]), ("unknown", [0, 1])]
