"""Numbers of a shard set: they equal what plain Python counts, for any content."""

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import DataError
from infra.storage import sha256_file
from preprocessing.index import INDEX_SCHEMA, LEDGER_SCHEMA, DatasetInfo, FileInfo, ShardInfo, dataset_json
from preprocessing.labels import label_passport
from preprocessing.shards import FORMAT_VERSION
from preprocessing.stats import shard_stats

TABLES = ("ledger.parquet", "index.parquet")
NAMES = [f"class {number}" for number in range(8)]

video = st.fixed_dictionaries(
    {
        "split": st.sampled_from(["train", "validation", "test"]),
        "label": st.none() | st.integers(0, len(NAMES) - 1),
        "reason": st.sampled_from(["", "", "gap", "missing"]),
        "num_frames": st.integers(1, 300),
        "num_bytes": st.integers(1, 2**33),
        "source_bytes": st.integers(1, 2**33),
        "seconds": st.just(0.25),
        "height": st.sampled_from([100, 240]),
        "width": st.sampled_from([176, 320, 427]),
        "fps": st.sampled_from([None, 12.0, 25.0, 29.97, 29.970001]),
    }
)


def write_set(folder: Path, videos: list[dict[str, Any]]) -> None:
    rows = []
    for number, facts in enumerate(videos):
        row = dict(facts, video_id=f"v{number}", key=f"k{number}", shard=f"{facts['split']}-000000.tar", detail="")
        row["status"] = "rejected" if facts["reason"] else "kept"
        if facts["reason"]:
            row |= dict.fromkeys(["num_frames", "num_bytes"], 0) | dict.fromkeys(["height", "width", "fps"])
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), folder / "ledger.parquet")
    kept = [row for row in rows if row["status"] == "kept"]
    pq.write_table(pa.Table.from_pylist(kept, schema=INDEX_SCHEMA), folder / "index.parquet")
    sizes = {"train-000000.tar": 10240, "validation-000000.tar": 20480, "test-000000.tar": 30720}
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        dataset="somebody's",
        label_names=NAMES,
        label_passport=label_passport(NAMES),
        settings={},
        ffmpeg_version="n7",
        counts={},
        files={name: FileInfo(sha256=sha256_file(folder / name), bytes=(folder / name).stat().st_size) for name in TABLES},
        shards={name: ShardInfo(sha256="", bytes=size, samples=0, split=name[:-11]) for name, size in sizes.items()},
    )
    (folder / "dataset.json").write_bytes(dataset_json(info))


def spread(values: list[int]) -> dict[str, float]:
    return {
        "min": min(values),
        "mean": pytest.approx(statistics.mean(values)),
        "median": statistics.median(values),
        "max": max(values),
    }


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(video, min_size=1, max_size=40))
def test_numbers_are_those_that_python_counts(tmp_path_factory: pytest.TempPathFactory, videos: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, videos)
    stats = shard_stats(folder)
    json.dumps(stats, allow_nan=False)
    order = [split for split in ("train", "validation", "test") if any(video["split"] == split for video in videos)]
    assert list(stats["splits"]) == order
    every = [video for video in videos if not video["reason"]]
    for split, found in stats["splits"].items():
        mine = [video for video in every if video["split"] == split]
        frames = [video["num_frames"] for video in mine]
        assert found["kept"] == len(mine)
        assert found["rejected"] == sum(video["split"] == split for video in videos) - len(mine)
        assert found["unlabelled"] == sum(video["label"] is None for video in mine)
        assert (found["frames"], found["jpeg_bytes"]) == (sum(frames), sum(video["num_bytes"] for video in mine))
        assert found["frames_per_video"] == (spread(frames) if frames else None)
        assert found["bytes_per_frame"] == (pytest.approx(found["jpeg_bytes"] / sum(frames)) if frames else None)
        counts = Counter(video["label"] for video in mine if video["label"] is not None)
        classes = found["videos_per_class"]
        assert (classes is None) == (not counts)
        if counts:
            sizes = [(name, counts[label]) for label, name in enumerate(NAMES)]
            assert {key: classes[key] for key in ("min", "mean", "median", "max")} == spread([size for _, size in sizes])
            assert classes["smallest"] == [list(item) for item in sorted(sizes, key=lambda item: item[1])[:5]]
            assert classes["largest"] == [list(item) for item in sorted(sizes, key=lambda item: -item[1])[:5]]
    pixels = Counter(f"{video['height']}x{video['width']}" for video in every)
    assert len(stats["sizes"]) == min(5, len(pixels))
    assert sorted(stats["sizes"].values(), reverse=True) == [count for _, count in pixels.most_common(5)]
    assert all(pixels[size] == count for size, count in stats["sizes"].items())
    rates = Counter(video["fps"] and round(video["fps"], 3) for video in every)
    assert {row["fps"]: row["videos"] for row in stats["fps"]} == rates
    assert stats["reasons"] == Counter(video["reason"] for video in videos if video["reason"])
    assert stats["decoding_seconds"] == len(videos) / 4
    sizes = {"count": 3, "bytes": 61440, "min_bytes": 10240, "mean_bytes": 20480, "max_bytes": 30720}
    assert stats["shards"] == sizes


def test_a_set_as_it_is_written(tiny_shard_dir: Path) -> None:
    stats = shard_stats(str(tiny_shard_dir))
    assert (stats["dataset"], stats["num_classes"], stats["sizes"]) == ("something_v1", 4, {"20x28": 28})
    assert stats["fps"] == [{"fps": None, "videos": 28}]
    assert stats["splits"]["train"]["kept"] == 23
    assert stats["splits"]["test"]["unlabelled"] == 5
    assert stats["splits"]["test"]["videos_per_class"] is None
    assert stats["shards"]["bytes"] == sum(path.stat().st_size for path in tiny_shard_dir.glob("*.tar"))


def test_no_tar_is_read(tmp_path: Path) -> None:
    write_set(tmp_path, [{"split": "train", "label": 0, "reason": "gap", "seconds": None}])
    stats = shard_stats(tmp_path)
    assert stats["splits"]["train"]["frames_per_video"] is None
    assert (stats["sizes"], stats["fps"], stats["decoding_seconds"]) == ({}, [], 0)


def test_damaged_tables_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no finished shard set"):
        shard_stats(tmp_path)
    write_set(tmp_path, [{"split": "train", "label": 0, "reason": "", "seconds": 1.0}])
    ledger, index = tmp_path / "ledger.parquet", tmp_path / "index.parquet"
    index.write_bytes(ledger.read_bytes())
    with pytest.raises(DataError, match=r"index\.parquet has "):
        shard_stats(tmp_path)
    ledger.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"ledger\.parquet has .* bytes, dataset\.json says"):
        shard_stats(tmp_path)
    ledger.unlink()
    with pytest.raises(DataError, match=r"ledger\.parquet is missing"):
        shard_stats(tmp_path)
