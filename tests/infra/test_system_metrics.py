import time
from collections.abc import Callable

import pytest

from infra.system_metrics import watch_machine
from infra.tracking import Tracker


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_load_of_the_machine_is_recorded_while_the_block_runs(tracker: Tracker) -> None:
    def recorded() -> dict[str, float]:
        metrics: dict[str, float] = tracker._client.get_run(run.run_id).data.metrics
        return metrics

    with tracker.start_run("train") as run:
        with watch_machine(run, seconds=0.1):
            wait_for(recorded)
        before = time.time()
    metrics = recorded()
    assert {name.split("_")[0] for name in metrics} >= {"system/cpu", "system/system", "system/disk", "system/network"}
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100
    points = tracker._client.get_metric_history(run.run_id, "system/cpu_utilization_percentage")
    assert all(0 <= point.value <= 100 and before - 60 < point.step <= before for point in points)


def test_what_goes_wrong_ends_the_watching_not_the_work(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    run = tracker.start_run("train")
    tracker.close()  # nothing more can be recorded
    with watch_machine(run, seconds=0.01):
        wait_for(lambda: "this machine is not watched any more: PipelineError" in caplog.text)
