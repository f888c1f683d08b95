"""Optuna's plots: pieces of a page, for studies of one and of two objectives, and for one in which nothing was completed."""

import optuna
import pytest

from tuning.plots import interactive_plots
from tuning.trials import STUDY_NAME, open_storage


def make_study(folder, num_trials, directions=("maximize",)):
    sampler = optuna.samplers.RandomSampler(seed=0)
    with open_storage(folder) as storage:
        study = optuna.create_study(study_name=STUDY_NAME, storage=storage, directions=directions, sampler=sampler)
        for _ in range(num_trials):
            trial = study.ask()
            rate = trial.suggest_float("train.learning_rate", 0.01, 0.1)
            study.tell(trial, [rate, 1 - rate][: len(directions)])


@pytest.mark.parametrize(("directions", "own"), [(("maximize",), "Value by epoch"), (("maximize", "minimize"), "Pareto front")])
def test_plots_load_nothing_and_fit_the_objectives(tmp_path, directions, own):
    make_study(tmp_path, 12, directions)
    plots = interactive_plots(tmp_path, "val/top1")
    assert {"Optimisation history", "Parallel coordinates", "Importance (fANOVA)", own} <= set(plots)
    for plot in plots.values():
        assert "Plotly.newPlot" in plot
        assert "<script src" not in plot


def test_a_study_without_completed_trials_has_few_plots(tmp_path):
    make_study(tmp_path, 0)
    assert list(interactive_plots(tmp_path, "val/top1")) == ["Timeline"]
