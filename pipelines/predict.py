"""What a trained network says of raw videos.

A video takes the way of the clips that `evaluate` judges: decoded to JPEG frames as the shards were, the centre of each
segment, the centre crop, the network's own normalisation. So the logits are the same (1e-5; the tests compare them for files of
several formats).
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError
from pipelines.training.job import load_model
from preprocessing.clips import centre_clip
from preprocessing.decode import DecodedVideo, DecodeSettings, VideoRejectedError
from preprocessing.planning import PlannedVideo
from preprocessing.sources import FolderSource
from preprocessing.views import FrameSampling

if TYPE_CHECKING:
    import torch
    from torch import nn

    from models.classifier import VideoClassifier
    from pipelines.evaluation.films import FilmClip
    from pipelines.training.precision import Precision

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What a network says of one video, or why it says nothing.

    Attributes:
        path: of the video, as `readable` writes it.
        logits: float32, before softmax; None if the video was rejected. Shape: [K].
        reason: a code of preprocessing/FORMAT.md, "" unless the video was rejected.
        detail: what was found then.
    """

    path: str
    logits: npt.NDArray[np.float32] | None
    reason: str = ""
    detail: str = ""

    @staticmethod
    def readable(path: Path) -> str:
        """A path as text, whatever bytes its name has: what is no UTF-8 is escaped."""
        return os.fsencode(path).decode("utf-8", "backslashreplace")

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Probabilities, which sum to 1. Shape: [K]."""
        from scipy.special import softmax

        assert self.logits is not None
        scores: npt.NDArray[np.float32] = softmax(self.logits)
        return scores

    def top(self, count: int) -> list[tuple[int, float]]:
        """The most probable classes, best first: class id and probability. Of equal ones the lower id comes first."""
        scores = self.scores
        order = np.argsort(-scores, kind="stable")[:count]
        return [(int(label), float(scores[label])) for label in order]


@dataclass(frozen=True)
class Predictor:
    """A network with all that is needed to ask it about a video; `load_predictor` makes it.

    Attributes:
        model: as it was trained; films look into its slots.
        asked: its form for inference, whose logits count.
        device: where both are.
        precision: in which they compute.
        decoding: how the videos of its shards became frames.
        sampling: which frames it sees.
        pixels: the side of what it sees.
        label_names: by class id.
    """

    model: "VideoClassifier"
    asked: "nn.Module"
    device: "torch.device"
    precision: "Precision"
    decoding: DecodeSettings
    sampling: FrameSampling
    pixels: int
    label_names: list[str]

    def predict(self, path: Path) -> Prediction:
        """Ask about a video file or a folder of numbered JPEG frames; a broken one is a prediction with a reason.

        Raises:
            OSError: if the machine, not the video, is at fault.
        """
        return self._ask(path, lambda clips: (self.asked(clips), None))[0]

    def watch(self, path: Path) -> "tuple[Prediction, FilmClip | None]":
        """`predict`, and the clip with the attention over it for a film (`save_film`); None for a broken video.

        Raises:
            OSError: as `predict`.
            ConfigError: if the network has no attention.
        """
        from models.insight import attention_maps
        from models.switch import slot_attentions
        from pipelines.evaluation.films import SHOWN_PIXELS, FilmClip, slot_films

        if not slot_attentions(self.model):
            raise ConfigError(
                "the network has no attention in any slot, so there is nothing that a film could show; expected an SA-GSM "
                "network whose placement is not none; predict without --film, or take another --model"
            )
        prediction, seen = self._ask(path, lambda clips: (self.asked(clips), attention_maps(self.model, clips)[1]))
        if seen is None:
            return prediction, None
        video, maps = seen
        ((label, score),) = prediction.top(1)
        frames = centre_clip(video, self.sampling, self.pixels, SHOWN_PIXELS)
        name = Prediction.readable(Path(path.name))
        return prediction, FilmClip(name, frames, self.label_names[label], score, None, slot_films(maps))

    def _ask(
        self, path: Path, look: "Callable[[torch.Tensor], tuple[torch.Tensor, Any]]"
    ) -> tuple[Prediction, tuple[DecodedVideo, Any] | None]:
        """What is said of a video, and, unless it is broken, the video and what `look` saw beside the logits of its clip."""
        import torch

        from pipelines.training.precision import autocast

        try:
            video = read_video(path, self.decoding)
        except VideoRejectedError as error:
            return Prediction(Prediction.readable(path), None, error.reason, error.detail), None
        clip = torch.from_numpy(centre_clip(video, self.sampling, self.pixels))
        clips = clip.unsqueeze(0).permute(0, 1, 4, 2, 3).to(self.device)
        with torch.inference_mode(), autocast(self.precision, self.device):
            logits, seen = look(self.model.prepare(clips))
        return Prediction(Prediction.readable(path), logits[0].float().cpu().numpy()), (video, seen)

    def describe(self, prediction: Prediction, count: int) -> dict[str, Any]:
        """A prediction as plain data: path, status ("ok" or "rejected"), reason, detail, and the `count` best classes."""
        top = [] if prediction.logits is None else prediction.top(count)
        return {
            "path": prediction.path,
            "status": "rejected" if prediction.logits is None else "ok",
            "reason": prediction.reason,
            "detail": prediction.detail,
            "top": [{"label": label, "class": self.label_names[label], "probability": score} for label, score in top],
        }


def load_predictor(folder: Path) -> Predictor:
    """Load the network of a train artifact, on the GPU if there is one.

    Args:
        folder: of the artifact, or the folder `model` in it.

    Raises:
        DataError: if there is no model, or it is damaged.
    """
    import torch

    from pipelines.training.precision import for_inference, resolve_precision

    inside = folder / "model"
    model, train, facts = load_model(inside if (inside / "model.json").is_file() else folder)
    if facts.get("decoding") is None:
        _log.warning("%s does not say how its videos were decoded; taken are the default settings of the shards", folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(train.precision, device)
    model.to(device)
    return Predictor(
        model=model,
        asked=for_inference(model, precision),
        device=device,
        precision=precision,
        decoding=DecodeSettings.model_validate(facts.get("decoding") or {}),
        sampling=FrameSampling(train.num_segments, train.sampling, train.stride),
        pixels=train.pixels,
        label_names=facts["label_names"],
    )


def read_video(path: Path, decoding: DecodeSettings) -> DecodedVideo:
    """Decode a video file or a folder of numbered JPEG frames as the shards stage does.

    Raises:
        VideoRejectedError: if it cannot be used.
        OSError: if the machine, not the video, is at fault.
    """
    place = Path(os.path.normpath(path.absolute()))
    kind = "frames" if is_folder(place) else "video"
    video = PlannedVideo(video_id=place.name, key="", path=place.name, kind=kind, label=None)
    return FolderSource(place.parent).read(video, "", decoding)


def is_folder(path: Path) -> bool:
    """Whether a path is that of a folder; False for what no file can be named, which the decoder explains."""
    try:
        return path.is_dir()
    except OSError:
        return False
