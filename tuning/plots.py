"""Optuna's own interactive plots of a study, as pieces of HTML that need Plotly's script once on their page."""

from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from tuning.importance import MIN_TRIALS
from tuning.trials import STUDY_NAME, open_storage


def plotly_script() -> str:
    """The script that draws the plots, 4.5 MB, for a page that loads nothing."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def interactive_plots(storage_dir: Path, metric: str) -> dict[str, str]:
    """Plots by title; those that would be empty are left out.

    Args:
        storage_dir: of the search, with `study.db`.
        metric: name of the first objective, the only one that is plotted but for the Pareto front.
    """
    import optuna
    from optuna import visualization
    from optuna.importance import FanovaImportanceEvaluator

    with open_storage(storage_dir) as storage:
        study = optuna.load_study(study_name=STUDY_NAME, storage=storage)
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        has_cost = len(study.directions) > 1
        value: dict[str, Any] = {"target": lambda trial: trial.values[0], "target_name": metric}
        figures = {}
        if completed:
            figures["Optimisation history"] = visualization.plot_optimization_history(study, **value)
            if has_cost:
                figures["Pareto front"] = visualization.plot_pareto_front(study)
            else:
                figures["Value by epoch"] = visualization.plot_intermediate_values(study)
            figures["Parallel coordinates"] = visualization.plot_parallel_coordinate(study, **value)
            figures["Slices"] = visualization.plot_slice(study, **value)
            figures["Distribution of values"] = visualization.plot_edf(study, **value)
        if len(completed) >= MIN_TRIALS and len({trial.values[0] for trial in completed}) > 1:
            fanova = FanovaImportanceEvaluator(seed=0)
            figures["Importance (fANOVA)"] = visualization.plot_param_importances(study, evaluator=fanova, **value)
        figures["Timeline"] = visualization.plot_timeline(study)
    options = {"displaylogo": False, "responsive": True}
    return {title: figure.to_html(full_html=False, include_plotlyjs=False, config=options) for title, figure in figures.items()}
