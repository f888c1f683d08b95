import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg

from infra.errors import DataError
from pipelines.reports.audit import write_audit
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.finish import finish_shard_set
from preprocessing.planning import plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource

BROKEN = ("train", 3)


@pytest.fixture
def shard_dir(tmp_path: Path, hostile_names: list[str]) -> Path:
    """Two videos of each label but the last in train, one in validation, an unlabelled test video; one video is broken."""
    root, output_dir = tmp_path / "raw", tmp_path / "shards"
    output_dir.mkdir()
    names = [name.encode("utf-8", "replace").decode() for name in hostile_names]  # dataset.json cannot hold half a character
    rng = np.random.default_rng(0)
    rows = []
    for split, labels in (("train", [*range(7), *range(7)]), ("validation", range(8)), ("test", [None])):
        for number, label in enumerate(labels):
            folder = root / f"{split}-{number}"
            folder.mkdir(parents=True)
            for frame in range(3 + number % 3):
                pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
                (folder / f"{frame + 1:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))
            if (split, number) == BROKEN:
                (folder / "00002.jpg").write_bytes(b"no jpeg")
            video_id = "=1+1" if (split, number) == BROKEN else folder.name
            rows.append({"video_id": video_id, "path": folder.name, "kind": "frames", "split": split, "label": label})
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), names)
    settings = ShardSettings(videos_per_shard=8, max_bad_fraction=0.5)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for plan in plans:
        write_shard(plan, FolderSource(root), output_dir, settings)
    finish_shard_set(output_dir, index, plans, settings, "something_v1")
    return output_dir


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "audit"
    folder.mkdir()
    return folder


def test_the_books_add_up(shard_dir: Path, output_dir: Path) -> None:
    summary = write_audit(shard_dir, output_dir)
    assert (summary["num_videos"], summary["num_kept"], summary["num_rejected"]) == (23, 22, 1)
    assert list(summary["by_split"]) == ["train", "validation", "test"]
    assert [(row["kept"], row["rejected"], row["unlabelled"]) for row in summary["by_split"].values()] == [
        (13, 1, 0),
        (8, 0, 0),
        (1, 0, 1),
    ]
    assert sum(summary["reasons"].values()) == 1
    assert summary["num_bytes"] == sum(path.stat().st_size for path in shard_dir.glob("*.tar"))
    assert summary["num_bytes"] == sum(row["bytes"] for row in summary["by_split"].values())
    assert summary["num_frames"] == sum(row["frames"] for row in summary["by_split"].values())
    assert summary["num_shards"] == len(list(shard_dir.glob("*.tar")))
    assert summary["absent_classes"] == {"train": ["Moving something from right to left"]}
    assert summary["problems"] == []


def test_the_page_shows_everything_and_runs_nothing(
    shard_dir: Path, output_dir: Path, read_page: Callable[[Path], Any], hostile_names: list[str]
) -> None:
    write_audit(shard_dir, output_dir)
    page = read_page(output_dir / "page.html")
    text = " ".join(" ".join(page.text).split())
    assert "The shard set is whole; 1 of 23 videos were rejected." in text
    assert "Classes without a video in train: 1 (Moving something from right to left)." in text
    assert "1 of 1 videos of test have no label" in text
    for name in hostile_names[:5]:
        assert name in "".join(page.text)
    assert page.tags.count("img") == 4
    assert sorted(path.name for path in (output_dir / "figures").iterdir()) == [
        "clips_test.png",
        "clips_train.png",
        "clips_validation.png",
        "num_frames.png",
    ]


def test_the_table_of_rejected_videos_holds_no_formula(shard_dir: Path, output_dir: Path) -> None:
    write_audit(shard_dir, output_dir)
    text = (output_dir / "tables" / "rejected.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 1
    assert rows[0]["video_id"] == "'=1+1"
    assert rows[0]["split"] == "train"
    assert rows[0]["reason"]


def test_damage_is_reported_and_does_not_stop_the_audit(
    shard_dir: Path, output_dir: Path, read_page: Callable[[Path], Any]
) -> None:
    shard = sorted(shard_dir.glob("train-*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    summary = write_audit(shard_dir, output_dir)
    assert len(summary["problems"]) == 1
    assert shard.name in summary["problems"][0]
    text = " ".join(" ".join(read_page(output_dir / "page.html").text).split())
    assert "The shard set is damaged; 1 of 23 videos were rejected." in text
    assert not (output_dir / "figures" / "clips_train.png").exists()
    assert (output_dir / "figures" / "clips_validation.png").exists()


def test_the_same_shards_give_the_same_files(shard_dir: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_audit(shard_dir, tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert contents[0] == contents[1]


def test_a_folder_that_is_no_shard_set_is_an_error(tmp_path: Path, output_dir: Path) -> None:
    with pytest.raises(DataError, match=r"is no finished shard set: it has no dataset.json; run the shards stage"):
        write_audit(tmp_path, output_dir)
