"""Ray tasks: the same bytes for any number of workers and after any fault; errors name the shard and the first cause."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from infra.errors import PipelineError
from preprocessing import decode
from preprocessing.datasets import VIDEO_SCHEMA
from preprocessing.decode import ffmpeg_path
from preprocessing.planning import ShardPlan, plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.tasks import write_shards

ray = pytest.importorskip("ray")

NUM_VIDEOS = 12
SETTINGS = ShardSettings(videos_per_shard=3, timeout_seconds=60)


@pytest.fixture(scope="module")
def kill_marker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """While this file exists, ffmpeg removes it and kills the process that started it, as the machine might."""
    folder = tmp_path_factory.mktemp("bin")
    marker = folder / "kill-the-parent"
    program = folder / "ffmpeg"
    real = ffmpeg_path()
    program.write_text(f'#!/bin/sh\nif rm "{marker}" 2>/dev/null; then kill -9 $PPID; exit 1; fi\nexec "{real}" "$@"\n')
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        decode.ffmpeg_path.cache_clear()
        yield marker
    decode.ffmpeg_path.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def cluster(kill_marker: Path) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 * 1024 * 1024, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven small mp4 files; the twelfth, v7, is missing."""
    root = tmp_path_factory.mktemp("raw")
    for number in range(NUM_VIDEOS):
        if number != 7:
            source = ["-f", "lavfi", "-i", f"testsrc=size=64x48:rate=10:duration=0.{number % 4 + 3}"]
            subprocess.run([ffmpeg_path(), "-v", "error", *source, f"{root}/v{number}.mp4"], check=True)
    return root


@pytest.fixture(scope="module")
def plans() -> list[ShardPlan]:
    rows = [
        {"video_id": f"v{number}", "path": f"v{number}.mp4", "kind": "video", "split": "train", "label": number % 2}
        for number in range(NUM_VIDEOS)
    ]
    return plan_shards(
        pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), videos_per_shard=SETTINGS.videos_per_shard, seed=SETTINGS.seed
    )


@pytest.fixture(scope="module")
def expected(root: Path, plans: list[ShardPlan], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tars as one process writes them, in reverse order."""
    folder = tmp_path_factory.mktemp("expected")
    for plan in reversed(plans):
        write_shard(plan, FolderSource(root), folder, SETTINGS)
    return tars(folder)


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_same_bytes_and_progress_for_any_number_of_workers(
    max_in_flight: int, root: Path, plans: list[ShardPlan], expected: dict[str, bytes], tmp_path: Path
) -> None:
    calls: list[tuple[int, int, str]] = []
    folder = tmp_path / "new" / "shards"
    reports = write_shards(plans, FolderSource(root), folder, SETTINGS, lambda *call: calls.append(call), max_in_flight)
    assert tars(folder) == expected
    assert [report.name for report in reports] == [plan.name for plan in plans]
    assert [call[:2] for call in calls] == [(done, NUM_VIDEOS) for done in (0, 3, 6, 9, 12)]
    assert calls[-1][2].endswith("frames/s, 1 rejected")
    assert sum(report.num_rejected for report in reports) == 1


def test_interrupted_set_goes_on_with_what_is_missing(
    root: Path, plans: list[ShardPlan], expected: dict[str, bytes], tmp_path: Path
) -> None:
    write_shards(plans[:2], FolderSource(root), tmp_path, SETTINGS)
    (tmp_path / plans[1].sidecar_name).unlink()
    (tmp_path / ".tmp-00000000-train-000002.tar").write_bytes(b"half")
    reports = write_shards(plans, FolderSource(root), tmp_path, SETTINGS)
    assert [report.skipped for report in reports] == [True, False, False, False]
    assert tars(tmp_path) == expected
    assert not list(tmp_path.glob(".tmp-*"))


def test_killed_worker_is_replaced_and_the_bytes_are_the_same(
    kill_marker: Path, root: Path, plans: list[ShardPlan], expected: dict[str, bytes], tmp_path: Path
) -> None:
    kill_marker.touch()
    write_shards(plans, FolderSource(root), tmp_path, SETTINGS)
    assert not kill_marker.exists()
    assert tars(tmp_path) == expected
    assert not list(tmp_path.glob(".tmp-*"))


def test_full_disk_names_the_shard_and_stops_the_others(root: Path, plans: list[ShardPlan], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], check=False).returncode != 0:
        pytest.skip("this machine does not allow a tmpfs mount")
    try:
        (tmp_path / "filler").write_bytes(bytes(60_000))
        with pytest.raises(PipelineError, match=r"^shard train-00000\d\.tar: no space left for shard .*; free some space"):
            write_shards(plans, FolderSource(root), tmp_path, SETTINGS)
        assert not list(tmp_path.glob("*.parquet"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_error_of_the_operating_system_is_tried_again_and_then_told(root: Path, plans: list[ShardPlan], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (folder / plans[0].name).mkdir(parents=True)  # a folder stands where the tar should go
    with pytest.raises(PipelineError, match=r"shard train-000000\.tar was tried 4 times and failed with IsADirectoryError"):
        write_shards(plans[:1], FolderSource(root), folder, SETTINGS)
