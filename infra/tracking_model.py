"""A trained network in MLflow's registry: packed as a pyfunc from code (no pickle), sent by the spool's thread, fetched again.

What MLflow keeps:

    MLmodel                   signature, flavour, ids
    card.md                   the model card, also the description of the registered version
    artifacts/model/          the files as training wrote them
    served.py                 the script that MLflow runs to load the model
    code/                     our packages as they were
    input_example.json, serving_input_example.json, requirements.txt, conda.yaml, python_env.yaml

A request has a column `video` of texts; the answer has a row for each, with the columns of `ANSWER_COLUMNS`.
"""

import importlib.metadata
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from infra.errors import ConfigError
from infra.tracking_spool import Entry

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.tracking import MlflowClient

# Set where the user has not: by default MLflow retries a dead server for four minutes, sends telemetry, tells the terminal
# of each database made, file copied and run ended, and packs a uv.lock of the current folder into every model.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",
}

ANSWER_COLUMNS = ("status", "reason", "detail", "classes", "probabilities")
_LISTS = {"classes": "string", "probabilities": "double"}
_PACKAGES = ("infra", "models", "pipelines", "preprocessing", "tuning")
_KEY = "asked_as"  # tag: the key of the entry that asked for the model
_DESCRIPTION_CHARACTERS = 5000
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")

Answer = Callable[[Sequence[str]], list[dict[str, Any]]]
"""Given texts, for each the values of `ANSWER_COLUMNS`."""


def python_model(load: Callable[[Path], Answer]) -> Any:
    """MLflow's view of a network; for the script that MLflow runs to load it.

    Args:
        load: given the folder of the files as training wrote them, the function that answers.
    """
    import pandas as pd

    class VideoModel(_pyfunc().PythonModel):  # type: ignore[misc]  # of a module that is imported this late
        def load_context(self, context: Any) -> None:
            self._answer = load(Path(context.artifacts["model"]))

        def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
            return pd.DataFrame(self._answer(model_input["video"].tolist()), columns=list(ANSWER_COLUMNS))

    return VideoModel()


def send_model(client: "MlflowClient", experiment_id: str, run_id: str, entry: Entry) -> None:
    """Log and register the model of an entry that `TrackedRun.log_model` has made; what an earlier try has done stays.

    Raises:
        RuntimeError: if it cannot be packed, so that no other try will help.
        MlflowException, OSError: if MLflow cannot be used.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    model = _logged_model(client, experiment_id, run_id, entry)
    if model.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory(prefix="sagsm-model-") as folder:
            try:
                _pack(Path(folder) / "model", model, run_id, entry)
            except Exception as error:
                raise RuntimeError(f"the model {entry['files']} could not be packed: {error!r}") from error
            client.log_model_artifacts(model.model_id, f"{folder}/model")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    version = _version(client, model, run_id, entry)
    link = json.dumps([{"name": entry["name"], "version": version}])  # by which the pages of the run and the model lead there
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
    client.set_registered_model_alias(entry["name"], entry["alias"], version)


def fetch_model(client: "MlflowClient", uri: str, model: str, folder: Path) -> Path:
    """Fetch a registered network's files, as training wrote them, into `folder`; returns where they are.

    Args:
        client: of the server or database.
        uri: its own.
        model: models:/NAME@ALIAS or models:/NAME/VERSION.
        folder: an existing one.

    Raises:
        ConfigError: if `model` is written otherwise, or nothing is registered so.
        MlflowException, OSError: if MLflow cannot be used.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    found = _MODEL_URI.fullmatch(model)
    if found is None:
        raise ConfigError(f"--model {model}: expected models:/NAME@ALIAS or models:/NAME/VERSION, or the path of a folder")
    try:
        version = found["version"] or client.get_model_version_by_alias(found["name"], found["alias"]).version
        place = client.get_model_version_download_uri(found["name"], version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        known = [f"models:/{each.name}@{alias}" for each in client.search_registered_models() for alias in each.aliases]
        raise ConfigError(
            f"--model {model} is not registered with {uri}; registered are: {', '.join(known) or 'none'}; an experiment "
            "registers its network at its end"
        ) from error
    return Path(download_artifacts(artifact_uri=f"{place}/artifacts/model", dst_path=str(folder), tracking_uri=uri))


def _logged_model(client: "MlflowClient", experiment_id: str, run_id: str, entry: Entry) -> "LoggedModel":
    found = client.search_logged_models([experiment_id], f"tags.{_KEY} = '{entry['key']}'", max_results=1)
    if found:
        model: LoggedModel = found[0]
        return model
    tags = {**entry["tags"], _KEY: entry["key"]}
    return client.create_logged_model(
        experiment_id, entry["name"], source_run_id=run_id, tags=tags, model_type="video classifier"
    )


def _pack(folder: Path, model: "LoggedModel", run_id: str, entry: Entry) -> None:
    """Write all that MLflow keeps into a new folder; needs no server."""
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, Schema

    files = Path(entry["files"])
    if not (files / "model.json").is_file():
        raise FileNotFoundError(f"{files} holds no model any more")
    outputs: list[Any] = [ColSpec(Array(_LISTS[name]) if name in _LISTS else "string", name) for name in ANSWER_COLUMNS]
    with tempfile.TemporaryDirectory() as scripts:
        script = Path(scripts) / "served.py"
        script.write_text(entry["code"])
        _pyfunc().save_model(
            folder,
            python_model=script,
            artifacts={"model": files.as_uri()},
            code_paths=[str(_root() / package) for package in _PACKAGES],
            signature=ModelSignature(Schema([ColSpec("string", "video")]), Schema(outputs)),
            input_example=pd.DataFrame({"video": [entry["example"]]}),
            pip_requirements=_requirements(),
            mlflow_model=Model(run_id=run_id, model_id=model.model_id),
        )
    (folder / "card.md").write_text(entry["card"])


def _pyfunc() -> Any:
    """`mlflow.pyfunc`, which warns of one of its own type hints when it is imported."""
    warnings.filterwarnings("ignore", r".*Any type hint is inferred as AnyType", UserWarning)
    from mlflow import pyfunc

    return pyfunc


def _version(client: "MlflowClient", model: "LoggedModel", run_id: str, entry: Entry) -> str:
    """The version that this model is registered as, which is made if it is not there."""
    from mlflow.exceptions import MlflowException

    name = entry["name"]
    for found in client.search_model_versions(f"name = '{name}'", order_by=["version_number DESC"]):
        if found.tags.get(_KEY) == entry["key"]:
            return str(found.version)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags: Mapping[str, str] = {**entry["tags"], _KEY: entry["key"]}
    card = entry["card"][:_DESCRIPTION_CHARACTERS]
    made = client.create_model_version(
        name, model.artifact_location, run_id, tags=dict(tags), description=card, model_id=model.model_id
    )
    return str(made.version)


def _requirements() -> list[str]:
    """What our packages need, in the versions that are installed."""
    declared = [Requirement(text) for text in importlib.metadata.requires("sagsm") or []]
    needed = [item for item in declared if item.marker is None or item.marker.evaluate({"extra": ""})]
    extras = {item.name: f"[{','.join(sorted(item.extras))}]" if item.extras else "" for item in needed}
    # Without what torch adds to say how it was built ("+cpu"), which no index but its own knows.
    return [f"{name}{extra}=={importlib.metadata.version(name).partition('+')[0]}" for name, extra in extras.items()]


def _root() -> Path:
    return Path(__file__).resolve().parents[1]
