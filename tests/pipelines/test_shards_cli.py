"""`sagsm shards`: what each command prints, and that user errors are one message with exit code 2."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from typer.testing import CliRunner, Result

from infra.errors import ConfigError, DataError
from pipelines.cli import app
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.finish import finish_shard_set
from preprocessing.planning import plan_shards
from preprocessing.reader import open_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource

SAGSM = str(Path(sys.executable).with_name("sagsm"))
SETTINGS = ShardSettings(videos_per_shard=2, max_bad_fraction=1.0)


def jpeg(number: int) -> bytes:
    return simplejpeg.encode_jpeg(np.full((16, 24, 3), 20 * number, np.uint8))


def invoke(*arguments: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["shards", *map(str, arguments)])


def run(*arguments: Any) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def document(result: Result) -> Any:
    """The JSON on standard output; whatever is on standard error stands before it there."""
    return json.loads(result.stdout)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Six frame folders; [v4] is missing one frame."""
    root = tmp_path / "raw"
    for number in range(6):
        (root / f"[v{number}]").mkdir(parents=True)
        for index in range(3):
            if (number, index) != (4, 1):
                (root / f"[v{number}]" / f"{index + 1}.jpg").write_bytes(jpeg(number + index))
    return root


@pytest.fixture
def shard_set(raw: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [
        {"video_id": f"[v{number}]", "path": f"[v{number}]", "kind": "frames", "split": "train", "label": number % 2}
        for number in range(6)
    ]
    index = VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), ["going [bold]up", "down"])
    plans = plan_shards(index.videos, videos_per_shard=SETTINGS.videos_per_shard, seed=SETTINGS.seed)
    for plan in plans:
        write_shard(plan, FolderSource(raw), folder, SETTINGS)
    finish_shard_set(folder, index, plans, SETTINGS, "something_v1")
    return folder


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for name in ("0.tar", "1.tar"):
        with tarfile.open(folder / name, "w") as tar:
            for key in ("a", "b"):
                for suffix, data in ((".000.jpg", jpeg(1)), (".001.jpg", jpeg(2)), (".json", b'{"label": "down"}')):
                    info = tarfile.TarInfo(key + suffix)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("command", ["verify", "stats", "heal", "index"])
def test_help_teaches_by_an_example(command: str) -> None:
    text = " ".join(run(command, "--help").stdout.split())
    assert f"Example: sagsm shards {command} " in text


def test_verify(shard_set: Path) -> None:
    assert "every shard has the bytes that were written" in run("verify", shard_set).stdout
    assert document(run("verify", shard_set, "--json")) == {"problems": []}
    (shard_set / "train-000001.tar").unlink()
    result = invoke("verify", shard_set)
    assert isinstance(result.exception, DataError)
    assert "train-000001.tar" in str(result.exception)


def test_stats(shard_set: Path) -> None:
    text = run("stats", shard_set).stdout
    for part in ("2 classes", "3 shards", "going [bold]up (2)", "16x24 (5)", "unknown (5)", "rejected: 1 gap"):
        assert part in text
    table = {
        line.rsplit(maxsplit=1)[0]: line.split()[-1] for line in text.splitlines() if line.startswith(("kept", "frames a"))
    }
    assert table == {"kept": "5", **{f"frames a video, {word}": "3" for word in ("min", "median", "mean", "max")}}
    stats = document(run("stats", shard_set, "--json"))
    assert stats["splits"]["train"]["kept"] == 5
    assert stats["reasons"] == {"gap": 1}


def test_heal_without_anything_to_heal_starts_no_cluster(
    raw: Path, shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: str | None) -> None:
        raise AssertionError("a cluster was started")

    healthy = tmp_path / "healthy"
    (raw / "[v4]" / "2.jpg").write_bytes(jpeg(5))
    heal_here(monkeypatch)
    run("heal", shard_set, "--root", raw, "--output", healthy)
    monkeypatch.setattr("infra.cluster.session", refuse)
    text = run("heal", healthy, "--root", raw).stdout
    assert "no video was rejected and no shard is damaged; all 3 shards were taken over" in text
    assert document(run("verify", f"{healthy}-healed", "--json")) == {"problems": []}


def heal_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the shards in this process instead of on a cluster."""

    def writer(root: str, address: str | None, on_progress: Any) -> Any:
        return lambda plans, output, settings: [write_shard(plan, FolderSource(Path(root)), output, settings) for plan in plans]

    monkeypatch.setattr("pipelines.shards_cli._writer", writer)


def test_heal_tells_what_is_healed_and_what_is_not(raw: Path, shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heal_here(monkeypatch)
    text = run("heal", shard_set, "--root", raw, "--output", f"{shard_set}-1").stdout
    assert "0 videos healed, 1 still rejected; 1 of 3 shards written again" in text
    assert "[v4]" in text
    assert "frame 2 is missing" in text
    (raw / "[v4]" / "2.jpg").write_bytes(jpeg(5))
    result = document(run("heal", f"{shard_set}-1/", "--root", raw, "--json"))
    assert result["output"] == f"{shard_set}-1-healed"
    assert [(video["video_id"], video["reason"]) for video in result["healed"]] == [("[v4]", "gap")]
    assert (result["rejected"], result["counts"]["kept"]) == ([], 6)


def test_heal_checks_the_root_first(shard_set: Path, tmp_path: Path) -> None:
    archive = tmp_path / "raw.tgz"
    archive.touch()
    for root, message in ((archive, "is a file; archives must be unpacked first"), (tmp_path / "no", "does not exist")):
        result = invoke("heal", shard_set, "--root", root)
        assert isinstance(result.exception, DataError)
        assert f"--root {root} {message}; expected the folder of raw videos" in str(result.exception)


def test_index(tars: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("up\ndown\n")
    more = ["--labels", labels, "--split", "train=0*", "--split", "validation=1*", "--output", tmp_path / "set"]
    text = run("index", tars, *more).stdout
    assert "4 samples kept, 0 rejected, 8 frames in 2 tars" in text
    assert open_shards(tmp_path / "set", "validation").labels == [1, 1]
    assert "16x24 (4)" in run("stats", tmp_path / "set").stdout
    assert sorted(path.name for path in tars.iterdir()) == ["0.tar", "1.tar"]


def test_index_beside_the_tars(tars: Path) -> None:
    result = invoke("index", tars)
    assert isinstance(result.exception, DataError)
    assert "4 bad_label" in str(result.exception)
    assert "(--labels)" in str(result.exception)
    (tars / "labels.json").write_text('["up", "down"]')
    counts = document(run("index", tars, "--labels", tars / "labels.json", "--json"))
    assert (counts["output"], counts["kept"], counts["shards"]) == (str(tars), 4, 2)


@pytest.mark.parametrize("split", ["train", "train=", "=x"])
def test_index_explains_how_splits_are_given(tars: Path, split: str) -> None:
    result = invoke("index", tars, "--split", split)
    assert isinstance(result.exception, ConfigError)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["stats", "."], ["dataset.json"]),
        (["heal", "nowhere", "--root", "."], ["is no finished shard set"]),
        (["index", "."], ["holds no file named *.tar"]),
    ],
)
def test_user_errors_are_one_message_and_exit_code_2(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    done = subprocess.run([SAGSM, "shards", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (2, "", False)
    for part in ["error: ", *parts]:
        assert part in done.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_heal_on_a_cluster(raw: Path, shard_set: Path, tmp_path: Path) -> None:
    """The program itself; Ray tasks write. A second try after a kill in the middle would only write less."""
    (raw / "[v4]" / "2.jpg").write_bytes(jpeg(5))
    command = [SAGSM, "shards", "heal", shard_set, "--root", raw, "--output", tmp_path / "new", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert ([video["video_id"] for video in result["healed"]], result["rejected"]) == (["[v4]"], [])
    assert document(run("verify", tmp_path / "new", "--json")) == {"problems": []}
    shutil.rmtree(tmp_path / "new")
