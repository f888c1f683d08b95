"""Addresses of pages of the MLflow server, as MLflow 3 understands them."""

from urllib.parse import quote

_MODE = "?workflowType=machine_learning"  # without it a fresh browser shows menus and empty pages about GenAI


def run_url(base: str, experiment_id: str, run_id: str, artifact: str = "") -> str:
    """Address of a run's page, or of one of its files as the page shows it."""
    page = f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"{page}/artifacts/{quote(artifact)}{_MODE}" if artifact else f"{page}{_MODE}"


def runs_url(base: str, experiment_id: str) -> str:
    """Address of the table of pipelines and their stages, as a tree, without the trials of searches.

    The table's first page is the newest hundred runs: a search of a thousand trials would fill the first ten.
    """
    return _table(base, experiment_id, 'tags.stage != "trial"')


def trials_url(base: str, experiment_id: str, metric: str) -> str:
    """Address of the table of all trials of all searches, those with the highest `metric` first.

    Any order but by time makes it flat: in a tree the table would show their parents, with the trials hidden inside.
    """
    order = f"&orderByKey={quote(f'metrics.`{metric}`', safe='')}&orderByAsc=false"
    return _table(base, experiment_id, 'tags.stage = "trial"') + order


def _table(base: str, experiment_id: str, condition: str) -> str:
    page = f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs"
    return f"{page}{_MODE}&searchFilter={quote(condition, safe='')}"
