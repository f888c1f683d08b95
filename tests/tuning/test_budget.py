import optuna
import pytest

from tuning.budget import Budget
from tuning.settings import SearchSettings


class Clock:
    """Says what it is told."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def study():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study()


def test_hours_add_up_over_runs_and_end_the_search(study):
    settings, clock = SearchSettings(max_hours=2.0), Clock()
    budget = Budget(study, settings, clock)
    clock.seconds += 9000
    assert budget.ended_by == "", "the first trial is always allowed, however long the cluster took to start"
    study.ask()
    budget = Budget(study, settings, clock)  # what was not told before a kill is lost
    clock.seconds += 7000
    assert budget.ended_by == ""
    clock.seconds += 10_000  # nobody searched
    budget = Budget(study, settings, clock)
    clock.seconds += 199
    assert budget.ended_by == ""
    clock.seconds += 2
    assert budget.ended_by == "search.max_hours=2 is spent"
    assert Budget(study, SearchSettings(max_hours=3.0), clock).ended_by == "", "a search may be given more"


def test_gpu_hours_count_what_running_trials_hold(study):
    settings, clock = SearchSettings(max_gpu_hours=1.0, gpus_per_trial=1.0, workers_per_trial=2), Clock()
    budget = Budget(study, settings, clock)
    study.ask()
    clock.seconds += 10_000
    budget.tick(1)
    clock.seconds += 900
    budget.tick(2)
    assert (budget.gpu_seconds, budget.ended_by) == (1800, "")
    clock.seconds += 450
    assert budget.ended_by == "search.max_gpu_hours=1 is spent"
    budget.tick(0)
    clock.seconds += 1000
    budget.tick(0)
    assert budget.gpu_seconds == 3600


def test_without_limits_nothing_ends(study):
    clock = Clock()
    budget = Budget(study, SearchSettings(), clock)
    study.ask()
    clock.seconds += 1e9
    assert budget.ended_by == ""
