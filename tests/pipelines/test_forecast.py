import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.forecast import EFFICIENCY, Estimate, Spread, estimate_document, estimate_text, forecast_error

SIZES = st.dictionaries(st.integers(1, 300), st.integers(1, 40), min_size=1, max_size=4).map(
    lambda sizes: sorted(sizes.items(), reverse=True)
)


def make_estimate(sizes: list[tuple[int, int]], seconds: float = 2.0, shard_seconds: float = 0.0) -> Estimate:
    return Estimate(
        experiment="demo",
        fingerprint="ab12",
        num_videos=sum(size * times for size, times in sizes),
        num_probed=10,
        probe_seconds=20.0,
        seconds=Spread(mean=seconds, low=seconds / 2, high=seconds * 2),
        frames=Spread(mean=40.0, low=30.0, high=50.0),
        tar_bytes=Spread(mean=1e6, low=9e5, high=2e6),
        shard_seconds=shard_seconds,
        rejected={"missing": 1},
        rejected_share=Spread(mean=0.1, low=0.05, high=0.4),
        max_bad_fraction=0.2,
        shard_sizes=sizes,
    )


@settings(max_examples=50)
@given(SIZES, st.integers(1, 500))
def test_no_number_of_cpus_beats_the_work_or_the_largest_shard(sizes: list[tuple[int, int]], num_cpus: int) -> None:
    estimate = make_estimate(sizes)
    wall = estimate.wall_seconds(num_cpus).mean
    efficiency = 1.0 if num_cpus == 1 else EFFICIENCY
    total, largest = estimate.num_videos * 2.0, sizes[0][0] * 2.0
    least = max(total / num_cpus, largest) / efficiency
    assert wall >= least * (1 - 1e-9)
    assert wall <= (total / num_cpus + largest) / efficiency * (1 + 1e-9)  # Graham's bound for such queues


def test_one_cpu_takes_the_sum() -> None:
    estimate = make_estimate([(4, 2), (3, 1)], seconds=2.0, shard_seconds=0.5)
    assert estimate.wall_seconds(1).mean == pytest.approx(11 * 2.0 + 3 * 0.5)
    assert estimate.wall_seconds(1).low == pytest.approx(11 * 1.0 + 3 * 0.5)


def test_more_cpus_than_shards_leave_some_idle() -> None:
    estimate = make_estimate([(4, 2)])
    assert estimate.wall_seconds(2).mean == estimate.wall_seconds(1000).mean == pytest.approx(4 * 2.0 / EFFICIENCY)


def test_the_document_is_json_and_ordered() -> None:
    document = json.loads(json.dumps(estimate_document(make_estimate([(10, 8)]), [1, 4]), allow_nan=False))
    assert [row["cpus"] for row in document["forecasts"]] == [1, 4]
    one, four = document["forecasts"]
    assert four["videos_per_second"] == pytest.approx(one["videos_per_second"] * 4 * EFFICIENCY)
    assert one["frames_per_second"] == pytest.approx(one["videos_per_second"] * 40)
    assert document["num_shards"] == 8
    assert document["rejected"] == {"mean": pytest.approx(8), "low": pytest.approx(4), "high": pytest.approx(32)}
    for spread in (one["hours"], document["gigabytes"], document["frames"]):
        assert spread["low"] <= spread["mean"] <= spread["high"]


def test_people_read_times_and_reasons() -> None:
    text = estimate_text(make_estimate([(1000, 20)]), [1, 2])
    assert "from 10 of 20,000 videos" in text
    assert "11.1 h (5.6 h to 22.2 h)" in text
    assert "20.0 GB (18.0 GB to 40.0 GB)" in text
    assert "in the sample: 1 missing" in text
    assert "90 %" in text
    assert "refused" not in text
    few = make_estimate([(1000, 20)]).model_copy(update={"max_bad_fraction": 0.09})
    assert "the run would be refused: expected at most 9.0 % (shards.max_bad_fraction)" in estimate_text(few, [1])


def test_the_error_of_a_forecast(tmp_path: Path) -> None:
    estimate = make_estimate([(10, 1)])
    shards_dir = tmp_path / "store" / "shards" / "ab12.partial"
    assert forecast_error(shards_dir, num_cpus=1, seconds=1.0, num_bytes=1) is None
    (tmp_path / "estimates").mkdir()
    (tmp_path / "estimates" / "ab12.json").write_text(estimate.model_dump_json())
    found = forecast_error(shards_dir, num_cpus=1, seconds=30.0, num_bytes=9_006_144)
    assert found is not None
    metrics, text = found
    assert metrics["estimate/hours"] == pytest.approx(20 / 3600)
    assert metrics["estimate/error"] == pytest.approx(0.5)
    assert metrics["estimate/bytes_error"] == pytest.approx(-0.1, abs=1e-3)
    assert text == "30.0 s of 20.0 s forecast (+50 %), bytes -10.0 % against the forecast"
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"experiment": 3}', "\0"])
def test_a_damaged_forecast_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "estimates").mkdir()
    (tmp_path / "estimates" / "ab12.json").write_text(content)
    assert forecast_error(tmp_path / "store" / "shards" / "ab12", num_cpus=1, seconds=1.0, num_bytes=1) is None
