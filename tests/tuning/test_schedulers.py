from dataclasses import dataclass

import pytest

from tuning.schedulers import make_scheduler
from tuning.settings import SearchSettings
from tuning.trials import TrialRecord


@dataclass(frozen=True)
class FakeTrial:
    """All that a rule asks of a trial of Ray."""

    trial_id: str


def record(number, values):
    return TrialRecord(number, {}, "5b", 1, 0.01, max(values), values, len(values), "completed", 1.0, "")


def stopped_after(scheduler, asked, name, values):
    """The epoch at which the scheduler asks a trial with these values to stop; None if it does not."""
    trial = FakeTrial(name)
    scheduler.on_trial_add(None, trial)
    best = 0.0
    for epoch, value in enumerate(values, start=1):
        best = max(best, value)
        assert scheduler.on_trial_result(None, trial, {"training_iteration": epoch, "best": best}) == "CONTINUE"
        if trial in asked:
            return epoch
    scheduler.on_trial_complete(None, trial, {"training_iteration": len(values), "best": best})
    return None


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_resumed_search_stops_as_early_as_one_that_was_never_killed(name):
    settings = SearchSettings(max_epochs=9, grace_epochs=1, reduction_factor=3, scheduler=name)
    good = [record(number, [0.9, 0.8]) for number in range(4)]
    for records, epoch in (([], None), (good, 1)):
        asked = []
        scheduler = make_scheduler(settings, records, asked.append)
        assert stopped_after(scheduler, asked, "new", [0.85] * 9) == epoch


@pytest.mark.parametrize("name", ["asha", "median"])
def test_no_trial_is_stopped_in_its_grace_epochs_or_at_its_last(name):
    settings = SearchSettings(max_epochs=4, grace_epochs=3, reduction_factor=3, scheduler=name)
    asked = []
    scheduler = make_scheduler(settings, [record(number, [0.9] * 4) for number in range(4)], asked.append)
    assert stopped_after(scheduler, asked, "bad", [0.1] * 4) == 3
    asked = []
    late = make_scheduler(settings, [record(number, [0.1, 0.1, 0.1, 0.9]) for number in range(4)], asked.append)
    assert stopped_after(late, asked, "late", [0.1, 0.1, 0.2, 0.2]) is None


def test_the_median_rule_spares_the_better_half():
    settings = SearchSettings(max_epochs=6, grace_epochs=2, scheduler="median")
    earlier = [record(number, [value] * 6) for number, value in enumerate((0.1, 0.2, 0.3, 0.4, 0.5))]
    for value, epoch in ((0.29, 2), (0.31, None)):
        asked = []
        scheduler = make_scheduler(settings, earlier, asked.append)
        assert stopped_after(scheduler, asked, "new", [value] * 6) == epoch


@pytest.mark.parametrize("changes", [{"scheduler": "none"}, {"grace_epochs": 4}])
def test_nothing_is_stopped_without_need(changes):
    assert make_scheduler(SearchSettings(max_epochs=4, **changes), [], list.append) is None
