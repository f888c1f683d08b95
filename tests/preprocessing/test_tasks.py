"""Ray tasks: the same bytes for any number of workers and after any fault; errors name the shard and the first cause."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from infra.errors import ClusterError, PipelineError
from preprocessing import decode
from preprocessing.datasets import VIDEO_SCHEMA
from preprocessing.decode import DecodedVideo, DecodeSettings, VideoRejectedError, ffmpeg_path
from preprocessing.planning import PlannedVideo, ShardPlans, plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.tasks import _stopwatch, write_shards

ray = pytest.importorskip("ray")

NUM_VIDEOS = 12
SETTINGS = ShardSettings(videos_per_shard=3, timeout_seconds=60, max_bad_fraction=0.1)


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
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 1024 * 1024, log_to_driver=False)
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
def plans() -> ShardPlans:
    rows = [
        {"video_id": f"v{number}", "path": f"v{number}.mp4", "kind": "video", "split": "train", "label": number % 2}
        for number in range(NUM_VIDEOS)
    ]
    return plan_shards(
        pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), videos_per_shard=SETTINGS.videos_per_shard, seed=SETTINGS.seed
    )


@pytest.fixture(scope="module")
def expected(root: Path, plans: ShardPlans, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tars as one process writes them, in reverse order."""
    folder = tmp_path_factory.mktemp("expected")
    for plan in reversed(plans):
        write_shard(plan, FolderSource(root), folder, SETTINGS)
    return tars(folder)


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_same_bytes_and_progress_for_any_number_of_workers(
    max_in_flight: int, root: Path, plans: ShardPlans, expected: dict[str, bytes], tmp_path: Path
) -> None:
    calls: list[tuple[int, int, str]] = []
    folder = tmp_path / "new" / "shards"
    reports = write_shards(plans, FolderSource(root), folder, SETTINGS, lambda *call: calls.append(call), max_in_flight)
    assert tars(folder) == expected
    assert [report.name for report in reports] == [plan.name for plan in plans]
    assert [call[:2] for call in calls] == [(done, NUM_VIDEOS) for done in (0, 3, 6, 9, 12)]
    assert re.fullmatch(r"1 rejected, [\d.,]+ videos/s, [\d,]+ frames/s, [\d.,]+ MB/s", calls[-1][2])
    assert sum(report.num_rejected for report in reports) == 1


def test_interrupted_set_goes_on_with_what_is_missing(
    root: Path, plans: ShardPlans, expected: dict[str, bytes], tmp_path: Path
) -> None:
    write_shards(plans[:2], FolderSource(root), tmp_path, SETTINGS)
    (tmp_path / plans[1].sidecar_name).unlink()
    (tmp_path / ".tmp-00000000-train-000002.tar").write_bytes(b"half")
    reports = write_shards(plans, FolderSource(root), tmp_path, SETTINGS)
    assert [report.skipped for report in reports] == [True, False, False, False]
    assert tars(tmp_path) == expected
    assert not list(tmp_path.glob(".tmp-*"))


def test_killed_worker_is_replaced_and_the_bytes_are_the_same(
    kill_marker: Path, root: Path, plans: ShardPlans, expected: dict[str, bytes], tmp_path: Path
) -> None:
    kill_marker.touch()
    write_shards(plans, FolderSource(root), tmp_path, SETTINGS)
    assert not kill_marker.exists()
    assert tars(tmp_path) == expected
    assert not list(tmp_path.glob(".tmp-*"))


def test_full_disk_names_the_shard_and_stops_the_others(root: Path, plans: ShardPlans, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], check=False).returncode != 0:
        pytest.skip("this machine does not allow a tmpfs mount")
    try:
        (tmp_path / "filler").write_bytes(bytes(60_000))
        with pytest.raises(PipelineError, match=r"^no space left for shard train-00000\d\.tar in .*; free some space"):
            write_shards(plans, FolderSource(root), tmp_path, SETTINGS)
        assert not list(tmp_path.glob("*.parquet"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_error_of_the_operating_system_is_tried_again_and_then_told(root: Path, plans: ShardPlans, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (folder / plans[0].name).mkdir(parents=True)  # a folder stands where the tar should go
    with pytest.raises(PipelineError, match=r"shard train-000000\.tar was tried 4 times and failed with IsADirectoryError"):
        write_shards(plans[:1], FolderSource(root), folder, SETTINGS)


@dataclass(frozen=True)
class TwoFrames:
    """Stands in for decoding: two frames a video, made of its id."""

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:
        data = video.video_id.encode() * 10
        return DecodedVideo([data, data[::-1]], None, 16, 16, 100, "")


@dataclass(frozen=True)
class Sleeper(TwoFrames):
    """Hangs at v3 as often as there are files in `naps`, each of which it removes; for ever if `naps` is None."""

    naps: Path | None

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:
        if video.video_id == "v3":
            nap = None if self.naps is None else next(self.naps.iterdir(), None)
            if nap is not None:
                nap.unlink()
            if nap is not None or self.naps is None:
                time.sleep(3600)
        return super().read(video, shard, settings)


@dataclass(frozen=True)
class Rejecting(TwoFrames):
    """Rejects videos with odd numbers, and notes each video that it is asked for."""

    asked: Path

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:
        (self.asked / video.video_id).touch()
        if int(video.video_id[1:]) % 2:
            raise VideoRejectedError("damaged", f"no good: {video.video_id}")
        return super().read(video, shard, settings)


def numbered_plans(num_videos: int, videos_per_shard: int) -> ShardPlans:
    rows = [{"video_id": f"v{n}", "path": "-", "kind": "video", "split": "train", "label": 0} for n in range(num_videos)]
    return plan_shards(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), videos_per_shard=videos_per_shard, seed=0)


def test_a_task_that_stands_still_is_ended_and_tried_again(tmp_path: Path) -> None:
    naps = tmp_path / "naps"
    naps.mkdir()
    for number in range(3):
        (naps / str(number)).touch()
    few = numbered_plans(8, 2)
    write_shards(few, Sleeper(naps), tmp_path / "shards", SETTINGS, seconds_without_video=1)
    write_shards(few, TwoFrames(), tmp_path / "expected", SETTINGS)
    assert tars(tmp_path / "shards") == tars(tmp_path / "expected")
    assert len(tars(tmp_path / "shards")) == 4
    assert not list((tmp_path / "shards").glob(".tmp-*"))


def test_a_task_that_always_stands_still_is_named(tmp_path: Path) -> None:
    message = r"^shard train-00000\d\.tar was tried 4 times and failed with TimeoutError\('no video was finished for 0\.5"
    with pytest.raises(ClusterError, match=message):
        write_shards(numbered_plans(8, 2), Sleeper(None), tmp_path, SETTINGS, seconds_without_video=0.5)
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_stopwatch_ends_a_process_that_does_not_react() -> None:
    code = (
        "import signal, time\nfrom preprocessing import tasks\ntasks._SECONDS_TO_CLEAN_UP = 0.3\n"
        "with tasks._stopwatch(0.2):\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def test_the_stopwatch_restarts_and_leaves_nothing_behind() -> None:
    with _stopwatch(0.3) as restart:
        for _ in range(5):
            time.sleep(0.1)
            restart()
    time.sleep(0.4)


def test_a_hopeless_set_is_stopped_before_all_is_tried(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    asked.mkdir()
    many = numbered_plans(400, 10)
    with pytest.raises(PipelineError) as caught:
        write_shards(many, Rejecting(asked), tmp_path / "shards", SETTINGS)
    message = str(caught.value)
    assert re.match(
        r"4\d of 400 videos \(1\d\.\d%\) cannot be used: 4\d damaged; expected at most 10\.0%\. First: v\d+ ", message
    )
    assert re.search(r"First: v\d+ \(damaged: no good: v", message)
    assert "Not all videos were tried. Repair or replace those files, or accept them with --set" in message
    assert len(list(asked.iterdir())) < 250
    with pytest.raises(PipelineError, match="of 400 videos"):  # at once, by what the shards that are there say
        write_shards(many, Rejecting(tmp_path / "nowhere"), tmp_path / "shards", SETTINGS)


def test_finished_shards_need_no_task(tmp_path: Path) -> None:
    some = numbered_plans(40, 2)
    first = write_shards(some[:15], TwoFrames(), tmp_path, SETTINGS)
    (tmp_path / some.names[3]).write_bytes(b"cut")
    sidecar = tmp_path / some[5].sidecar_name
    sidecar.write_bytes(sidecar.read_bytes()[:-1])
    calls: list[tuple[int, int, str]] = []
    reports = write_shards(some, TwoFrames(), tmp_path, SETTINGS, lambda *call: calls.append(call))
    assert [position for position, report in enumerate(reports) if not report.skipped] == [3, 5, *range(15, 20)]
    assert calls[13] == (26, 40, "written before, 0 rejected")
    assert [(report.name, report.num_frames, report.sha256) for report in reports[:15]] == [
        (report.name, report.num_frames, report.sha256) for report in first
    ]
    other = SETTINGS.model_copy(update={"short_side": 32})
    assert not any(report.skipped for report in write_shards(some[:2], TwoFrames(), tmp_path, other))


def test_a_plain_list_of_plans_will_do(tmp_path: Path) -> None:
    some = numbered_plans(6, 2)
    assert [report.name for report in write_shards(list(some), TwoFrames(), tmp_path, SETTINGS)] == some.names
    assert all(report.skipped for report in write_shards(some, TwoFrames(), tmp_path, SETTINGS))
