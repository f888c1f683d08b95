import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from typer.testing import CliRunner

from infra.errors import ConfigError, DataError
from infra.progress import StageProgress
from infra.settings import apply_overrides
from pipelines.cli import app
from pipelines.estimate import ProbedVideo, estimate_shards, probe, summarise_probe
from pipelines.experiments import find_experiment
from pipelines.run import Request, run_experiment
from preprocessing.datasets import VIDEO_SCHEMA, index_videos
from preprocessing.decode import DecodedVideo, DecodeSettings, VideoRejectedError
from preprocessing.planning import PlannedVideo, ShardPlans, plan_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.synthetic import SyntheticSettings, generate

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "real_mini"
JPEG = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))


class Pretended:
    """Every video has frames of one kind; those whose id ends with 7 are rejected."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.read_ids: list[str] = []
        self.limits: list[float] = []

    def read(self, video: PlannedVideo, shard: str, settings: DecodeSettings) -> DecodedVideo:
        self.read_ids.append(video.video_id)
        self.limits.append(settings.timeout_seconds)
        time.sleep(self.seconds)
        if video.video_id.endswith("7"):
            raise VideoRejectedError("missing", "gone")
        return DecodedVideo([JPEG] * 5, None, 16, 16, 100, "")


def make_plans(count: int, videos_per_shard: int = 16) -> ShardPlans:
    rows = [{"video_id": f"v{number}", "path": f"v{number}", "kind": "video", "split": "train"} for number in range(count)]
    videos = pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA)
    return plan_shards(videos, videos_per_shard=videos_per_shard, seed=0)


def make_request(root: Path, workdir: Path) -> Request:
    changes = {"dataset.root": str(root), "shards.videos_per_shard": 8, "shards.max_bad_fraction": 0.5}
    config = apply_overrides(find_experiment("something_v1_smoke")(), changes)
    return Request("something_v1_smoke", config, workdir)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    generate(SyntheticSettings(num_train=16, num_validation=8, num_broken=2), root, "something_v1", None)
    return root


def test_small_sets_are_probed_whole_and_each_video_once(tmp_path: Path) -> None:
    source, plans, calls = Pretended(), make_plans(40), []
    found, shard_seconds = probe(plans, source, ShardSettings(), tmp_path, 60.0, on_progress=lambda *call: calls.append(call))
    assert calls[-1][1:] == (60, "s at most; 40 videos probed")
    assert sorted(source.read_ids) == sorted(f"v{number}" for number in range(40))
    assert [one.reason for one in found].count("missing") == 4
    assert {one.num_frames for one in found if not one.reason} == {5}
    assert {one.tar_bytes for one in found if one.reason} == {0}
    assert all(one.seconds >= 0 for one in found)
    assert shard_seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_the_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    orders = []
    for seed in (0, 0, 1):
        source = Pretended()
        probe(make_plans(30), source, ShardSettings(), tmp_path, 60.0, seed)
        orders.append(source.read_ids)
    assert orders[0] == orders[1] != orders[2]


def test_no_time_still_gives_one_video(tmp_path: Path) -> None:
    source = Pretended()
    found, _ = probe(make_plans(30), source, ShardSettings(), tmp_path, 0.0)
    assert len(found) == len(source.read_ids) == 1


def test_a_video_gets_no_more_time_than_the_probe_has(tmp_path: Path) -> None:
    source = Pretended()
    probe(make_plans(5), source, ShardSettings(timeout_seconds=500.0), tmp_path, 60.0)
    assert max(source.limits) <= 60.0
    assert min(source.limits) >= 1.0


def test_the_forecast_of_a_whole_set_is_its_size(raw: Path, tmp_path: Path) -> None:
    """All videos are in the sample, so bytes, frames and rejects must come out as they do in the run."""
    request = make_request(raw, tmp_path / "work")
    estimate = estimate_shards(request, 50.0)
    assert estimate.num_probed == estimate.num_videos == 26
    found = index_videos(request.config.dataset, raw)
    plans = plan_shards(found.videos, videos_per_shard=8, seed=request.config.shards.seed)
    (tmp_path / "shards").mkdir()
    reports = [write_shard(plan, FolderSource(raw), tmp_path / "shards", request.config.shards) for plan in plans]
    assert estimate.num_shards == len(plans)
    assert estimate.total_bytes.mean == pytest.approx(sum(report.num_bytes for report in reports), rel=0.02)
    assert estimate.frames.mean * 26 == pytest.approx(sum(report.num_frames for report in reports))
    assert sum(estimate.rejected.values()) == sum(report.num_rejected for report in reports) == 2
    kept = [path.relative_to(tmp_path / "work") for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert kept == [Path("estimates") / f"{estimate.fingerprint}.json"]


def test_the_spread_holds_the_mean_and_shrinks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plans = make_plans(1000)
    widths = []
    for count in (20, 500):
        probed = [ProbedVideo(float(seconds), 40, 1000) for seconds in rng.exponential(1.0, count)]
        estimate = summarise_probe(
            probed, plans, experiment="e", fingerprint="f", probe_seconds=1.0, shard_seconds=0.1, max_bad_fraction=0.02
        )
        assert estimate.seconds.low <= estimate.seconds.mean <= estimate.seconds.high
        assert estimate.frames.low == estimate.frames.high == 40
        assert estimate.rejected_share.mean == 0
        assert estimate.rejected_share.high > 0
        widths.append(estimate.seconds.high - estimate.seconds.low)
    assert widths[1] < widths[0] / 2


def test_an_archive_is_refused(raw: Path, tmp_path: Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    for path in raw.glob("*.csv"):
        (root / path.name).write_bytes(path.read_bytes())
    (root / "20bn-something-something-v1-00").write_bytes(b"part")
    with pytest.raises(ConfigError, match=r"archive 20bn-something-something-v1-\?\?.*only be read from its beginning"):
        estimate_shards(make_request(root, tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_no_dataset_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.root"):
        estimate_shards(make_request(tmp_path / "nowhere", tmp_path / "work"))


def test_generated_videos_must_be_there_first(tmp_path: Path) -> None:
    request = Request("demo", find_experiment("demo")(), tmp_path / "work")
    with pytest.raises(ConfigError, match=r"sagsm run demo --only index"):
        estimate_shards(request)


@pytest.mark.parametrize("name", ["something_v1", "diving48"])
def test_real_footage(name: str, tmp_path: Path) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is not on this machine")
    config = apply_overrides(find_experiment(f"{name}_smoke")(), {"dataset.root": str(REAL / name)})
    estimate = estimate_shards(Request(f"{name}_smoke", config, tmp_path / "work"), 1.0)
    assert estimate.num_probed >= 1
    assert estimate.rejected == {}
    assert estimate.frames.mean > 10


def test_the_command_prints_the_forecast(raw: Path, tmp_path: Path) -> None:
    command = ["plan", "something_v1_smoke", "--set", f"dataset.root={raw}", "--workdir", str(tmp_path / "work")]
    command += ["--estimate", "--cpus", "64"]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    document = json.loads(done.stdout)
    assert 64 in [row["cpus"] for row in document["estimate"]["forecasts"]]
    assert document["estimate"]["num_videos"] == 26
    assert {stage["status"] for stage in document["stages"]} == {"run"}
    text = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert "forecast for the shards, from 26 of 26 videos" in text
    assert text.startswith("stage ")
    assert "the run would be refused: expected at most 2.0 % (shards.max_bad_fraction)" in text


def test_cpus_without_estimate_is_a_user_error(raw: Path) -> None:
    command = ["plan", "something_v1_smoke", "--set", f"dataset.root={raw}", "--cpus", "64"]
    with pytest.raises(ConfigError, match="together with --estimate"):
        CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.slow
def test_the_run_says_how_wrong_the_forecast_was(raw: Path, tmp_path: Path) -> None:
    request = replace(make_request(raw, tmp_path / "work"), only="shards")
    estimate_shards(request, 5.0)
    with StageProgress() as progress:
        outcome = run_experiment(request, progress)
    assert outcome.error is None
    text = next(result.artifact.summary["text"] for result in outcome.stages if result.name == "shards" and result.artifact)
    found = re.search(r"s forecast \(([+-]\d+) %\), bytes ([+-][\d.]+) % against the forecast", text)
    assert found is not None, text
    assert abs(float(found[2])) < 2.0
