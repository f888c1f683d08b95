"""Addresses of pages of the MLflow server, as MLflow 3 understands them."""

import json
from urllib.parse import quote


def run_url(base: str, experiment_id: str, run_id: str, artifact: str = "") -> str:
    """Address of a run's page, or of one of its files as the page shows it."""
    page = f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"{page}/artifacts/{quote(artifact)}" if artifact else page


def runs_url(base: str, experiment_id: str, *, stage: str = "", order_by: str = "", charts: bool = False) -> str:
    """Address of the runs table, with its mode in the address: without it a fresh browser opens an empty page about GenAI.

    Args:
        base: address of the server.
        experiment_id: of the experiment.
        stage: show only the runs of this stage ("trial"), as a flat list.
        order_by: the metric that sorts that list, best first; by name if empty.
        charts: show the runs' charts in place of the table.
    """
    address = f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    if stage:
        # Sorted by creation, the table would show the stage's parents with the matches hidden inside them.
        key = f"metrics.`{order_by}`" if order_by else "attributes.run_name"
        condition = f'tags.stage="{stage}"'
        address += f"&searchFilter={quote(condition, safe='')}&orderByKey={quote(key, safe='')}&orderByAsc=false"
    return address + ("&compareRunsMode=CHART" if charts else "")


def compare_url(base: str, experiment_id: str, run_ids: list[str]) -> str:
    """Address of the page that compares runs (parallel coordinates of parameters and a metric)."""
    runs, experiments = (quote(json.dumps(ids), safe="") for ids in (run_ids, [experiment_id]))
    return f"{base.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}"
