"""A trained network as an MLflow model: what `mlflow models serve` runs.

A text of the column `video` is the path of a video on the serving machine (a file or a folder of JPEG frames) or, if nothing is
there, the base64 of a video file's bytes. A broken video is an answer with a reason, so that it does not cost its neighbours
theirs.
"""

import base64
import binascii
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ffmpeg

from pipelines.predict import Prediction, Predictor, load_predictor
from preprocessing.decode import ffmpeg_path

NEWEST = "newest"
"""The alias of the version that was registered last; MLflow keeps "latest" for itself."""

CODE = '''\
"""MLflow runs this to load the model; the packages beside it are those of the commit that trained it."""

from mlflow.models import set_model

from infra.tracking_model import python_model
from pipelines.serving import load_answerer

set_model(python_model(load_answerer))
'''
_TOP = 5
_MAX_PATH_CHARACTERS = 4096
_SHOWN_CHARACTERS = 40


def registered_name(experiment: str) -> str:
    """The name of an experiment's network in MLflow's registry.

    Example:
        >>> registered_name("demo")
        'sagsm-demo'
    """
    return f"sagsm-{experiment}"


def load_answerer(folder: Path) -> Callable[[Sequence[str]], list[dict[str, Any]]]:
    """The function that answers requests with the network in a folder.

    Args:
        folder: with model.json and model.safetensors.

    Returns:
        A function that gives for each text status ("ok" or "rejected"), reason, detail, and the five most probable classes with
        their probabilities, best first; no class for a rejected one.

    Raises:
        DataError: if there is no model.
    """
    predictor = load_predictor(folder)

    def answer(texts: Sequence[str]) -> list[dict[str, Any]]:
        return [_answer(predictor, text) for text in texts]

    return answer


def example_video() -> str:
    """A small video as base64: ffmpeg's test picture, one second of it."""
    source = ffmpeg.input("testsrc=size=64x64:rate=8:duration=1", f="lavfi")
    target = source.output(
        "pipe:1", format="matroska", vcodec="mjpeg", pix_fmt="yuvj420p", **{"q:v": 20, "fflags": "+bitexact"}
    )
    data, _ = target.run(cmd=ffmpeg_path(), capture_stdout=True, quiet=True)
    return base64.b64encode(data).decode()


def _answer(predictor: Predictor, text: str) -> dict[str, Any]:
    found = predictor.describe(_predict_text(predictor, text), _TOP)
    best = found.pop("top")
    del found["path"]
    return found | {"classes": [item["class"] for item in best], "probabilities": [item["probability"] for item in best]}


def _predict_text(predictor: Predictor, text: str) -> Prediction:
    if _is_path(text):
        return predictor.predict(Path(text))
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        detail = f"{text[:_SHOWN_CHARACTERS]!r} is neither a path on this machine nor base64"
        return Prediction(text[:_SHOWN_CHARACTERS], None, "missing", detail)
    with tempfile.TemporaryDirectory(prefix="sagsm-video-") as folder:
        path = Path(folder) / "video"
        path.write_bytes(data)
        return predictor.predict(path)


def _is_path(text: str) -> bool:
    if not text or len(text) > _MAX_PATH_CHARACTERS:
        return False
    try:
        return Path(text).exists()
    except OSError:  # a name that is too long for one
        return False
