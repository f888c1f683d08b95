"""Runs looked up by their tags. The client is given, so that this file does not name mlflow."""

from collections.abc import Mapping, Sequence
from typing import Any

_RUNS_PER_PAGE = 1000
_NEWEST_FIRST = ["start_time DESC"]


def newest_run(client: Any, experiment_id: str, tags: Mapping[str, str]) -> Any:
    """The newest run that carries all of `tags`, or None."""
    found = client.search_runs([experiment_id], _condition(tags), order_by=_NEWEST_FIRST, max_results=1)
    return found[0] if found else None


def all_runs(client: Any, experiment_ids: Sequence[str], tags: Mapping[str, str]) -> list[Any]:
    """All runs of these experiments that carry all of `tags`, the newest first."""
    found: list[Any] = []
    token = None
    while experiment_ids:  # without one, MLflow would look into its default one
        page = client.search_runs(
            experiment_ids, _condition(tags), order_by=_NEWEST_FIRST, max_results=_RUNS_PER_PAGE, page_token=token
        )
        found += page
        token = page.token
        if not token:
            break
    return found


def _condition(tags: Mapping[str, str]) -> str:
    """In MLflow's search language: carries all of `tags`."""
    return " and ".join(f"tags.`{name}` = {_quoted(text)}" for name, text in tags.items())


def _quoted(text: str) -> str:
    """A string of that language, which knows no escape for a quote of its own kind."""
    return f'"{text}"' if "'" in text else f"'{text}'"
