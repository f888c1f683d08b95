"""Which finished evaluation a person means: the one rule of `sagsm compare`, `gap` and `ensemble`.

The store is asked first; MLflow, which takes seconds to load, only for what the store does not know.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from infra.errors import ConfigError, PipelineError
from infra.settings import near
from infra.tracking import RecordedRun, recorded_runs, tracking_uri
from pipelines.artifacts import Artifact, Store, is_artifact

EVALUATIONS = "evaluations"  # tag of a pipeline's run: fingerprints of its evaluations, those that were there already as well
_STAGE = "evaluate"
_NAMED = 5


def find_evaluated(workdir: Path, text: str) -> Artifact:
    """The artifact of the stage `evaluate` that is meant.

    Args:
        workdir: its store is searched, and the MLflow on which it records.
        text: the path of the artifact, in any store; its fingerprint; the id or the name of its MLflow run ("evaluate p01"), or
            of the pipeline's run that made or reused it ("p01 demo"). Of all but a path the beginning is enough if it fits one
            evaluation alone.

    Raises:
        ConfigError: if there is none, or more than one; near names and the newest evaluations are listed.
        PipelineError: if it is no longer whole.
    """
    folder = Path(text).absolute()
    if text and is_artifact(folder):
        if folder.parent.name != _STAGE:
            raise ConfigError(f"{text} is of the stage {folder.parent.name}; expected one of the stage {_STAGE}")
        return Store(folder.parents[1]).require(_STAGE, folder.name)
    store = Store(workdir.absolute() / "store")
    known = {item.fingerprint: item for item in store.finished(_STAGE)}
    meant = _meant(_store_handles(known.values()), text)
    recorded: list[RecordedRun] = []
    away = ""
    if not meant:
        recorded, away = _ask_mlflow(workdir)
        meant = _meant(_run_handles(recorded), text)
    there = [item for item in known.values() if item.fingerprint in meant]
    if len(there) == 1:
        return store.require(_STAGE, there[0].fingerprint)
    if there:
        raise ConfigError(
            f"{text!r} fits {len(there)} evaluations: {_list(there, recorded)}; give more of it, or name one of them"
        )
    if meant:
        raise ConfigError(
            f"{text!r} is in MLflow, but its evaluation {' or '.join(sorted(meant))} is not in {store.root}; run the "
            "experiment to the end, or give the right --workdir"
        )
    close = near(text, _run_handles(recorded))
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(
        f"{text!r} is no evaluation in {store.root}; expected the path or the fingerprint of one, or the name or id of its "
        f"MLflow run or of the pipeline's, such as 'p01 demo'{hint}{away}; the newest are: {_list(known.values(), recorded)}"
    )


def _meant(handles: Mapping[str, set[str]], text: str) -> set[str]:
    """Fingerprints of what is called so, else of what begins so."""
    if not text:
        return set()
    found = [handles[text]] if text in handles else [made for handle, made in handles.items() if handle.startswith(text)]
    return {fingerprint for made in found for fingerprint in made}


def _store_handles(known: Iterable[Artifact]) -> dict[str, set[str]]:
    return {handle: {item.fingerprint} for item in known for handle in (item.fingerprint, item.mlflow_run_id) if handle}


def _run_handles(recorded: Iterable[RecordedRun]) -> dict[str, set[str]]:
    """Fingerprints by name and by id of runs; two runs may have one name."""
    handles: dict[str, set[str]] = {}
    for run in recorded:
        for handle in (run.name, run.run_id):
            handles.setdefault(handle, set()).update(_fingerprints(run))
    return {handle: made for handle, made in handles.items() if made}


def _fingerprints(run: RecordedRun) -> list[str]:
    return run.tags.get(EVALUATIONS, run.tags.get("fingerprint", "")).split()


def _ask_mlflow(workdir: Path) -> tuple[list[RecordedRun], str]:
    """Runs of pipelines and of the stage, and what to say if it cannot be asked."""
    uri = tracking_uri(workdir)
    try:
        return [*recorded_runs(uri, "pipeline"), *recorded_runs(uri, _STAGE)], ""
    except PipelineError as error:
        return [], f"; names of runs were not looked up: {error}"


def _list(found: Iterable[Artifact], recorded: Iterable[RecordedRun]) -> str:
    """The first of them, each with what a person knows it by."""
    names = {run.run_id: run.name for run in recorded}
    items = list(found)
    told = []
    for item in items[:_NAMED]:
        made_by = " ".join([item.manifest["experiment"], item.manifest.get("variant", "")]).strip()
        name = names.get(item.mlflow_run_id or "")
        told.append(f"{item.fingerprint} ({f'{name!r}, ' if name else ''}{made_by}, {item.summary['text']})")
    return ", ".join(told) + (", ..." if len(items) > _NAMED else "") if told else "none yet"
