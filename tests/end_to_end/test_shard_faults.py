"""Faults of the cluster: a node and the driver are killed, and the shards are the same, byte for byte; memory stays flat."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg

from infra.cluster import session
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.decode import DecodedVideo, DecodeSettings
from preprocessing.finish import finish_shard_set
from preprocessing.index import read_dataset_info
from preprocessing.planning import PlannedVideo, plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.tasks import write_shards
from preprocessing.verify import verify_shards

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]

SETTINGS = ShardSettings(videos_per_shard=3)
NUM_KILLS = 20
HANG_SECONDS = 300
CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class TinyFrames:
    """Stands in for decoding: two JPEG files of 16 x 16 pixels a video, made of its id, after `seconds`."""

    seconds: float = 0.0
    nodes: Path | None = None
    memory: Path | None = None

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:
        import ray

        time.sleep(self.seconds)
        if self.nodes is not None and ray.is_initialized():
            (self.nodes / ray.get_runtime_context().get_node_id()).touch()
        if self.memory is not None:
            (self.memory / str(os.getpid())).write_text(peak_memory())
        pixels = np.random.default_rng(list(video.video_id.encode())).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
        return DecodedVideo([simplejpeg.encode_jpeg(frame) for frame in pixels], None, 16, 16, 1000, "")


def peak_memory() -> str:
    """Most bytes of memory that this process has held. Not getrusage: it counts what the parent held at the fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("VmHWM"))


def video_index(num_videos: int) -> VideoIndex:
    rows = [
        {"video_id": f"v{number}", "path": "-", "kind": "video", "split": "train" if number % 4 else "validation", "label": 0}
        for number in range(num_videos)
    ]
    return VideoIndex(pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), ["one"])


def run(folder: Path, num_videos: int, source: TinyFrames, settings: ShardSettings = SETTINGS) -> None:
    """What the shards stage does, on the cluster that is connected."""
    index = video_index(num_videos)
    plans = plan_shards(index.videos, videos_per_shard=settings.videos_per_shard, seed=settings.seed)
    write_shards(plans, source, folder, settings)
    finish_shard_set(folder, index, plans, settings, "tiny")


def undisturbed(folder: Path, num_videos: int) -> Path:
    """As one process without a cluster writes the set."""
    index = video_index(num_videos)
    plans = plan_shards(index.videos, videos_per_shard=SETTINGS.videos_per_shard, seed=SETTINGS.seed)
    folder.mkdir(parents=True)
    for plan in plans:
        write_shard(plan, TinyFrames(), folder, SETTINGS)
    finish_shard_set(folder, index, plans, SETTINGS, "tiny")
    return folder


def content(folder: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way; the ledger and the sidecars hold seconds."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".tar"}
    info = read_dataset_info(folder).model_dump()
    del info["files"]["ledger.parquet"]
    sidecars = sorted(path.name for path in folder.iterdir() if path.suffix != ".tar")
    return found | {"index": (folder / "index.parquet").read_bytes(), "info": info, "others": sidecars}


@pytest.fixture
def by_value() -> Iterator[None]:
    """Workers cannot import this module: the sources travel with their code."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


def hide_address() -> None:
    """`Cluster` notes its address where each `ray.init()` on this machine looks first, whoever calls it."""
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)


@pytest.mark.usefixtures("by_value")
def test_a_node_killed_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    nodes, folder = tmp_path / "nodes", tmp_path / "shards"
    nodes.mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
    hide_address()
    try:
        added = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(2)]
        killed_at: list[int] = []

        def kill_one() -> None:
            """When both have worked and a good part is still to come."""
            while len(list(nodes.iterdir())) < 2 or len(list(folder.glob("*.parquet"))) < 6:
                time.sleep(0.05)
            killed_at.append(len(list(folder.glob("*.parquet"))))
            cluster.remove_node(added[1], allow_graceful=False)

        killer = threading.Thread(target=kill_one, daemon=True)
        with session(cluster.address):
            killer.start()
            run(folder, 90, TinyFrames(seconds=0.1, nodes=nodes))
            killer.join(HANG_SECONDS)
        assert killed_at
        assert killed_at[0] < 25  # of 31: it came in the middle
        assert {path.name for path in nodes.iterdir()} == {node.node_id for node in added}
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert content(folder) == content(undisturbed(tmp_path / "undisturbed", 90))
    assert verify_shards(folder) == []
    assert not list(folder.glob(".tmp-*"))


def start_driver(address: str, folder: Path, num_videos: int, seconds: float) -> subprocess.Popen[str]:
    """A driver of its own; prints "go" when it is connected."""
    code = (
        "import sys\n"
        f"sys.path[:0] = [{str(CHECKOUT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\n"
        "import ray, test_shard_faults\n"
        "ray.cloudpickle.register_pickle_by_value(test_shard_faults)\n"
        f"ray.init(address={address!r}, log_to_driver=False, logging_level='error')\n"
        "print('go', flush=True)\n"
        f"test_shard_faults.run(Path({str(folder)!r}), {num_videos}, test_shard_faults.TinyFrames(seconds={seconds}))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CHECKOUT
    )


def files_in(folder: Path) -> int:
    return len([path for path in folder.iterdir() if not path.name.startswith(".tmp-")]) if folder.is_dir() else 0


@pytest.mark.usefixtures("by_value")
def test_the_driver_killed_at_random_moments_changes_nothing(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    num_videos = 24
    expected = content(undisturbed(tmp_path / "undisturbed", num_videos))
    num_files = files_in(tmp_path / "undisturbed")
    rng = random.Random(0)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    hide_address()
    unfinished = 0
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")  # for the reruns
        for trial in range(NUM_KILLS):
            folder = tmp_path / f"trial-{trial}"
            after = rng.randrange(num_files + 1) if trial else num_files
            with start_driver(cluster.address, folder, num_videos, 0.03) as driver:
                assert driver.stdout is not None
                assert driver.stdout.readline() == "go\n"
                until = time.monotonic() + HANG_SECONDS
                while files_in(folder) < after and driver.poll() is None and time.monotonic() < until:
                    time.sleep(0.002)
                time.sleep(rng.random() * 0.1)
                driver.send_signal(signal.SIGKILL)
            unfinished += not (folder / "dataset.json").exists()
            run(folder, num_videos, TinyFrames())
            assert content(folder) == expected, f"trial {trial}, killed after {after} of {num_files} files"
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert unfinished >= NUM_KILLS // 2


def test_memory_stays_flat_from_1_000_to_20_000_videos(tmp_path: Path) -> None:
    peaks = {}
    for num_videos in (1_000, 20_000):
        folder = tmp_path / str(num_videos)
        (folder / "memory").mkdir(parents=True)
        code = (
            "import sys\n"
            f"sys.path[:0] = [{str(CHECKOUT)!r}, {str(Path(__file__).parent)!r}]\n"
            "from pathlib import Path\n"
            "import json, ray, test_shard_faults\n"
            "ray.cloudpickle.register_pickle_by_value(test_shard_faults)\n"
            "ray.init('local', num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)\n"
            f"folder = Path({str(folder)!r})\n"
            "source = test_shard_faults.TinyFrames(memory=folder / 'memory')\n"
            "settings = test_shard_faults.ShardSettings(videos_per_shard=100)\n"
            f"test_shard_faults.run(folder / 'shards', {num_videos}, source, settings)\n"
            "workers = [int(path.read_text()) for path in (folder / 'memory').iterdir()]\n"
            "print(json.dumps({'driver': int(test_shard_faults.peak_memory()), 'worker': max(workers)}))\n"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_SECONDS, cwd=CHECKOUT)
        assert done.returncode == 0, done.stderr
        peaks[num_videos] = json.loads(done.stdout.splitlines()[-1])
    for process in ("driver", "worker"):
        assert peaks[20_000][process] <= 1.2 * peaks[1_000][process], peaks
