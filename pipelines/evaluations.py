"""Finished evaluations: found in the store by what a person has at hand, with all that they were made of.

The store is the truth: `artifact.json` says from which training, shards and settings an evaluation came, whatever became of
MLflow or of the experiment's definition.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from infra.errors import ConfigError, PipelineError
from infra.settings import apply_overrides, explain_validation_error
from pipelines.artifacts import Artifact, Store
from pipelines.config import ExperimentConfig
from tuning.settings import SearchSettings

_NAMED = 5


@dataclass(frozen=True)
class Evaluation:
    """A trained network that was judged.

    Attributes:
        config: with which it was trained and judged; what a search has chosen is applied, and nothing is searched any more.
        num_trials: of that search, 0 if there was none.
        shards: what it was trained and judged on.
        train: the network.
        evaluate: its scores.
    """

    config: ExperimentConfig
    num_trials: int
    shards: Artifact
    train: Artifact
    evaluate: Artifact


def find_evaluation(workdir: Path, run: str) -> Evaluation:
    """The evaluation that is meant.

    Args:
        workdir: its store is searched.
        run: the path of an artifact of the stage `evaluate`, in any store; or its fingerprint, or the beginning of it; or the
            id of its MLflow run.

    Raises:
        ConfigError: if there is none, or more than one.
        PipelineError: if it, or what it was made of, is no longer whole in the store, or is of another program.
    """
    folder = Path(run).absolute()
    if (folder / "artifact.json").is_file():
        if folder.parent.name != "evaluate":
            raise ConfigError(f"{run} is of the stage {folder.parent.name}; expected one of the stage evaluate")
        return _read(Store(folder.parents[1]), folder.name)
    store = Store(workdir.absolute() / "store")
    known = store.finished("evaluate")
    meant = [item for item in known if run and (item.fingerprint.startswith(run) or item.mlflow_run_id == run)]
    if len(meant) == 1:
        return _read(store, meant[0].fingerprint)
    if meant:
        raise ConfigError(f"{run!r} begins {len(meant)} fingerprints: {_list(meant)}; give more digits")
    raise ConfigError(
        f"{run!r} is no evaluation in {store.root}; expected a fingerprint, a path or an MLflow run id of the stage evaluate, "
        f"as `sagsm run NAME --json` prints them; the newest are: {_list(known)}"
    )


def make_page_folder(folder: Path) -> Path:
    """Make the folder of a page, with those above it.

    Raises:
        ConfigError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error}; choose another with --output") from error
    return folder


def _read(store: Store, fingerprint: str) -> Evaluation:
    evaluate = _require(store, "evaluate", fingerprint)
    train = _require(store, "train", evaluate.manifest["inputs"]["train"])
    shards = _require(store, "shards", evaluate.manifest["inputs"]["shards"])
    index = _require(store, "index", shards.manifest["inputs"]["index"])
    search = _require(store, "search", train.manifest["inputs"]["search"])
    sections = {name: section for item in (index, shards, train, evaluate) for name, section in item.manifest["config"].items()}
    try:
        config = ExperimentConfig.model_validate({**sections, "search": SearchSettings(num_trials=0)})
    except ValidationError as error:
        raise PipelineError(
            f"evaluate {fingerprint} in {store.root} was made by another version of this program, whose settings are not known "
            f"here ({explain_validation_error(error)}); run its experiment again"
        ) from error
    chosen = apply_overrides(config, search.summary["overrides"])
    return Evaluation(chosen, len(search.summary["trials"]), shards, train, evaluate)


def _require(store: Store, stage: str, fingerprint: str) -> Artifact:
    artifact, problem = store.find(stage, fingerprint)
    if artifact is None:
        reason = problem or "it is not there"
        raise PipelineError(f"{stage} {fingerprint} in {store.root} cannot be used: {reason}; run its experiment again")
    return artifact


def _list(found: list[Artifact]) -> str:
    """The first of them, each with what a person knows it by."""
    named = [
        f"{item.fingerprint} ({' '.join([item.manifest['experiment'], item.manifest.get('variant', '')]).strip()}, "
        f"{item.summary['text']})"
        for item in found[:_NAMED]
    ]
    return ", ".join(named) + (", ..." if len(found) > _NAMED else "") if named else "none yet"
