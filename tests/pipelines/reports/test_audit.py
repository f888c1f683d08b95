import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg

from infra.errors import DataError
from pipelines.reports.audit import audit_metrics, describe_audit, write_audit
from preprocessing.datasets import VIDEO_SCHEMA, DatasetSettings, VideoIndex, index_videos
from preprocessing.finish import finish_shard_set
from preprocessing.planning import plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource

BROKEN = ("train", 3)
REAL = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "real_mini"


def make_shards(tmp_path: Path, hostile_names: list[str], copies: dict[str, tuple[str, str]]) -> Path:
    """Two videos of each label but the last in train, one in validation, an unlabelled test video; one video is broken.

    `copies`: video id -> (the folder whose frames it has, split).
    """
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
    for video_id, (folder_name, split) in copies.items():
        rows.append({"video_id": video_id, "path": folder_name, "kind": "frames", "split": split, "label": 0})
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), names)
    settings = ShardSettings(videos_per_shard=8, max_bad_fraction=0.5)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    for plan in plans:
        write_shard(plan, FolderSource(root), output_dir, settings)
    finish_shard_set(output_dir, index, plans, settings, "something_v1")
    return output_dir


@pytest.fixture
def shard_dir(tmp_path: Path, hostile_names: list[str]) -> Path:
    return make_shards(tmp_path, hostile_names, {})


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
    assert "Another set in the layout of Something-Something V1" in text
    assert "No two videos have the same frames." in text
    assert "validation-1, 4 frames" in text  # clips go by the ids of their videos, not by their keys in the tar
    assert "Moving something from left to right Moving something from right to left" in text  # the pair
    assert "7 x" not in text  # nothing was computed in a template
    num_strips = 6 * 2 + 6 + 1  # of train, of validation with a video a class, of test
    assert page.tags.count("img") == 3 + 8 * num_strips
    figures = {path.name for path in (output_dir / "figures").iterdir()}
    clips = {"clips_test.png", "clips_train.png", "clips_validation.png"}
    assert figures == clips | {"frame_bytes.png", "labels.png", "num_frames.png"}


def test_the_table_of_rejected_videos_holds_no_formula(shard_dir: Path, output_dir: Path) -> None:
    write_audit(shard_dir, output_dir)
    text = (output_dir / "tables" / "rejected.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 1
    assert rows[0]["video_id"] == "'=1+1"
    assert rows[0]["split"] == "train"
    assert rows[0]["reason"]


def test_a_leak_is_named(tmp_path: Path, hostile_names: list[str], output_dir: Path, read_page: Callable[[Path], Any]) -> None:
    copies = {"<b>twin</b>": ("train-0", "validation"), "-again": ("train-1", "train")}
    summary = write_audit(make_shards(tmp_path, hostile_names, copies), output_dir)
    assert (summary["duplicates"], summary["leaks"]) == (2, 1)
    text = " ".join(" ".join(read_page(output_dir / "page.html").text).split())
    assert "every video" not in text
    assert "1 video is in more than one split." in text
    assert (
        "LEAK: 1 video is in more than one split, byte by byte, for example train-0 of train and <b>twin</b> of validation"
        in text
    )
    rows = list(csv.DictReader(io.StringIO((output_dir / "tables" / "duplicates.csv").read_text(encoding="utf-8"))))
    found = [(row["group"], row["kind"], row["video_id"], row["split"]) for row in rows]
    assert found == [
        ("1", "LEAK", "train-0", "train"),
        ("1", "LEAK", "<b>twin</b>", "validation"),
        ("2", "duplicate", "'-again", "train"),
        ("2", "duplicate", "train-1", "train"),
    ]
    metrics = audit_metrics(summary)
    assert (metrics["audit/leaks"], metrics["audit/duplicates"], metrics["audit/problems"]) == (1, 2, 0)
    assert (metrics["audit/short_8"], metrics["audit/short_16"]) == (24, 24)


def test_the_text_of_the_run_begins_with_the_verdict(shard_dir: Path, output_dir: Path) -> None:
    summary = write_audit(shard_dir, output_dir)
    text = describe_audit(summary, "abc")
    assert text.splitlines()[0] == summary["verdict"]
    assert "get-artifact?path=figures/labels.png&run_uuid=abc" in text
    assert (output_dir / "figures" / "labels.png").is_file()
    assert "| train | 13 | 1 |" in text
    json.dumps(summary, allow_nan=False)  # it becomes a part of artifact.json


def test_every_label_is_in_the_table_of_labels(shard_dir: Path, output_dir: Path) -> None:
    write_audit(shard_dir, output_dir)
    rows = list(csv.DictReader(io.StringIO((output_dir / "tables" / "labels.csv").read_text(encoding="utf-8"), newline="")))
    assert [row["train"] for row in rows] == ["2", "2", "2", "1", "2", "2", "2", "0"]
    assert rows[1]["label_name"].startswith("'=cmd")


@pytest.mark.parametrize("name", ["something_v1", "diving48"])
def test_real_footage(name: str, tmp_path: Path, output_dir: Path, read_page: Callable[[Path], Any]) -> None:
    root = REAL / name
    if not root.is_dir():
        pytest.skip(f"{root} is not on this machine")
    found = index_videos(DatasetSettings(name=name, root=root), root)
    videos = found.videos.slice(0, 8)
    index = VideoIndex(videos, found.label_names)
    settings = ShardSettings(short_side=64)
    plans = plan_shards(videos, videos_per_shard=4, seed=0)
    (tmp_path / "shards").mkdir()
    for plan in plans:
        write_shard(plan, FolderSource(root), tmp_path / "shards", settings)
    finish_shard_set(tmp_path / "shards", index, plans, settings, name)
    summary = write_audit(tmp_path / "shards", output_dir)
    assert summary["problems"] == []
    text = " ".join(" ".join(read_page(output_dir / "page.html").text).split())
    assert "A part of " in text
    assert " fewer" in text


def test_damage_is_reported_and_does_not_stop_the_audit(
    shard_dir: Path, output_dir: Path, read_page: Callable[[Path], Any]
) -> None:
    shard = sorted(shard_dir.glob("train-*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    summary = write_audit(shard_dir, output_dir)
    assert summary["problems"]
    assert all(isinstance(problem, str) and shard.name in problem for problem in summary["problems"])
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
