"""Many videos into one Parquet file: every one has a row, in a fixed order, with the numbers that it gets alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from infra.errors import ConfigError, DataError
from pipelines.batch_predict import PREDICTION_SCHEMA, find_videos, predict_to_parquet
from pipelines.cli import app
from pipelines.predict import load_predictor
from preprocessing.synthetic import LABEL_NAMES

SAGSM = str(Path(sys.executable).with_name("sagsm"))


@pytest.fixture
def folder(asked, tmp_path):
    """19 videos in two folders, of which three are broken, and what must not be asked about."""
    root = tmp_path / "videos"
    (root / "more").mkdir(parents=True)
    for number, name in enumerate(asked.names * 3):
        place = root / "more" if number % 2 else root
        if "." in name:
            shutil.copy(asked.raw / name, place / f"{number:02d}-{name}")
        else:
            shutil.copytree(asked.raw / name, place / f"{number:02d}-{name}")
    (root / "cover.jpg").write_bytes((asked.raw / "frames" / "00001.jpg").read_bytes())
    (root / "notes.txt").write_text("no video")
    (root / "empty.mp4").touch()
    (root / "more" / "loop").symlink_to(root)
    (root / ".hidden.mp4").write_text("not looked at")
    return root


def test_the_videos_of_a_folder_are_sorted_and_a_folder_of_frames_is_one(asked, folder):
    found = find_videos([asked.raw / "film.mp4", folder, asked.raw / "frames"])
    assert (found[0], found[-1]) == (asked.raw / "film.mp4", asked.raw / "frames")
    inside = [str(path.relative_to(folder)) for path in found[1:-1]]
    assert inside == sorted(inside, key=lambda name: name.split("/"))
    assert {"cover.jpg", "notes.txt", "empty.mp4", "more/loop", "04-frames", "more/09-frames"} <= set(inside)
    assert len(inside) == 15 + 4
    assert find_videos([asked.raw / "gone.mp4"]) == [asked.raw / "gone.mp4"]


def test_what_cannot_be_begun_is_told_before_anything_starts(asked, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no file in there"):
        find_videos([tmp_path / "nothing"])
    with pytest.raises(ConfigError, match="there is no folder"):
        predict_to_parquet(asked.artifact, [asked.raw / "film.mp4"], tmp_path / "gone" / "out.parquet", 5)
    result = CliRunner().invoke(app, ["predict", "--model", str(asked.artifact), str(asked.raw)])
    assert isinstance(result.exception, ConfigError)
    assert "say with --output FILE.parquet where" in str(result.exception)


@pytest.mark.slow
def test_every_video_has_a_row_with_the_numbers_that_it_gets_alone(asked, folder, tmp_path):
    output = tmp_path / "out.parquet"
    output.write_text("an older file")
    command = [SAGSM, "predict", "--model", asked.artifact, folder, "--output", output, "--top", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(output)
    assert table.schema.equals(PREDICTION_SCHEMA)
    assert json.loads(table.schema.metadata[b"sagsm.label_names"]) == list(LABEL_NAMES)
    rows = {row["path"]: row for row in table.to_pylist()}
    videos = find_videos([folder])
    assert list(rows) == [str(video) for video in videos]
    assert len(videos) == 19  # more than two tasks
    predictor = load_predictor(asked.artifact)
    for video in videos:
        row, alone = rows[str(video)], predictor.predict(video)
        assert (row["status"], row["reason"], row["detail"]) == (
            "ok" if alone.logits is not None else "rejected",
            alone.reason,
            alone.detail,
        )
        if alone.logits is None:
            assert (row["classes"], row["probabilities"], row["scores"]) == (None, None, None)
            continue
        np.testing.assert_allclose(row["scores"], alone.scores, rtol=0, atol=1e-5)
        assert row["classes"] == [LABEL_NAMES[label] for label, _ in alone.top(3)]
        assert row["probabilities"] == pytest.approx([score for _, score in alone.top(3)], abs=1e-5)
    reasons = [row["reason"] for row in rows.values() if row["reason"]]
    document = json.loads(done.stdout)
    assert document == {
        "output": str(output),
        "ok": 15,
        "rejected": 4,
        "by_reason": {reason: reasons.count(reason) for reason in set(reasons)},
    }
    assert sorted(path.name for path in tmp_path.iterdir() if "tmp" in path.name) == []
