"""Finished evaluations, with all that they were made of.

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
from pipelines.lookup import find_evaluated
from tuning.settings import SearchSettings


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
        run: as `find_evaluated` takes it.

    Raises:
        ConfigError: if there is none, or more than one.
        PipelineError: if it, or what it was made of, is no longer whole in the store, or is of another program.
    """
    evaluate = find_evaluated(workdir, run)
    store = Store(evaluate.path.parents[1])
    train = store.require("train", evaluate.manifest["inputs"]["train"])
    shards = store.require("shards", evaluate.manifest["inputs"]["shards"])
    index = store.require("index", shards.manifest["inputs"]["index"])
    search = store.require("search", train.manifest["inputs"]["search"])
    sections = {name: section for item in (index, shards, train, evaluate) for name, section in item.manifest["config"].items()}
    try:
        config = ExperimentConfig.model_validate({**sections, "search": SearchSettings(num_trials=0)})
    except ValidationError as error:
        raise PipelineError(
            f"evaluate {evaluate.fingerprint} in {store.root} was made by another version of this program, whose settings are "
            f"not known here ({explain_validation_error(error)}); run its experiment again"
        ) from error
    chosen = apply_overrides(config, search.summary["overrides"])
    return Evaluation(chosen, len(search.summary["trials"]), shards, train, evaluate)


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
