"""Some clips through a trained network once more, for what goes on inside it: attention, gates, and what raised an answer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from infra import cluster
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.evaluation.films import SHOWN_PIXELS, SlotFilm, slot_films
from pipelines.evaluation.grad_cam import grad_cam
from pipelines.insight.examples import Judgement, judge, most_wrong
from pipelines.insight.subject import Subject, spread_places, take_rows
from pipelines.training.job import evaluation_loader
from pipelines.training.scoring import NUM_THREADS, plan_workers
from preprocessing.clips import centre_clip
from preprocessing.decode import DecodedVideo
from preprocessing.loader import Loader
from preprocessing.reader import FrameReader

if TYPE_CHECKING:
    from pipelines.training.trained import TrainedNetwork

_MAX_MEASURED = 64
"""So many clips, evenly spread, are enough for means of gates and attention."""


@dataclass(frozen=True)
class ClipInside:
    """What goes on in a network while it looks at one clip.

    Attributes:
        key: of the video.
        label: the true class.
        answer: the most probable class of the centre view.
        probability: of it, in [0, 1].
        frames: what the network saw, larger. Shape: [T, side, side, 3].
        slots: the attention of each slot; none of a network without attention.
        raised_answer: Grad-CAM of the answer. Shape: [t, h, w].
        raised_label: Grad-CAM of the true class.
    """

    key: str
    label: int
    answer: int
    probability: float
    frames: npt.NDArray[np.uint8]
    slots: Sequence[SlotFilm]
    raised_answer: npt.NDArray[np.float32]
    raised_label: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Inside:
    """What goes on in a network.

    Attributes:
        pairs: clips that are shown beside each other, as `choose_pairs` chose them.
        num_measured: over how many clips the next two are means.
        gates: by slot, the mean of |tanh gate| at each segment; nothing of a network without gates. Shape: [T] each.
        attention: by name of the attention its gamma and the mean of `AttentionMap.spread`; nothing of a network without.
    """

    pairs: Sequence[Sequence[ClipInside]]
    num_measured: int
    gates: Mapping[str, npt.NDArray[np.float64]]
    attention: Mapping[str, tuple[float, float]]


def choose_pairs(judged: Sequence[Judgement], num_pairs: int) -> list[list[Judgement]]:
    """Pairs of a right and a wrong answer, the right one first; alone where there is no other.

    The wrong ones are those that the network was surest of, of as many classes as there are; beside each stands the surest
    right one of the same class or, if there is none, of any. No clip is shown twice.

    Args:
        judged: the clips to choose from.
        num_pairs: at most so many.
    """
    times: Counter[int] = Counter()
    turns = []
    for clip in most_wrong(judged):
        turns.append((times[clip.label], clip))
        times[clip.label] += 1
    wrong = [clip for _, clip in sorted(turns, key=lambda turn: turn[0])]
    right = sorted((clip for clip in judged if clip.answer == clip.label), key=lambda clip: (-clip.answer_score, clip.key))
    pairs = []
    for number in range(num_pairs):
        pair = wrong[number : number + 1]
        beside = [clip for clip in right if pair and clip.label == pair[0].label] or right
        right = [clip for clip in right if clip not in beside[:1]]
        pairs.append([*beside[:1], *pair])
    return [pair for pair in pairs if pair]


def look_inside_on_cluster(subject: Subject) -> Inside:
    """As `look_inside`, by a worker of the cluster to which this process is connected: pairs of clips, and means over 64.

    Raises:
        ClusterError: as `cluster.call`; and what `look_inside` raises.
    """
    worker = plan_workers(cluster.node_resources(), num_batches=1)
    pairs = choose_pairs(judge(subject.scores, subject.classes), subject.settings.num_pairs)
    arguments = {
        "model_dir": subject.model_dir,
        "shards_place": subject.shards_place,
        "settings": subject.one_view,
        "shown": [[subject.row_of[clip.key] for clip in pair] for pair in pairs],
        "measured": [subject.rows[place] for place in spread_places(len(subject.rows), _MAX_MEASURED)],
        "num_threads": NUM_THREADS,
    }
    return cluster.call(look_inside, num_cpus=worker.num_cpus, num_gpus=worker.num_gpus, arguments=arguments)


def look_inside(
    model_dir: Path,
    shards_place: str,
    settings: EvaluateSettings,
    shown: Sequence[Sequence[int]],
    measured: Sequence[int],
    num_threads: int | None = None,
) -> Inside:
    """Look into a network while it sees some clips, in this process.

    Args:
        model_dir: as `save_model` wrote it.
        shards_place: of the clips.
        settings: `split`, `protocol` (of one view a clip), and how many clips at a time.
        shown: rows of the split, of clips to be drawn beside each other.
        measured: rows of clips over which means are taken; at least one.
        num_threads: of torch; None leaves them alone.

    Raises:
        DataError: as `open_network`.
    """
    import torch

    from pipelines.training.trained import open_network

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    network = open_network(model_dir, shards_place, settings.split, purpose="explain it")

    def loader(rows: Sequence[int]) -> Loader:
        return evaluation_loader(take_rows(network.shards, rows), network.train, settings)

    gates, attention = _measure(network, loader(measured))
    rows = [row for pair in shown for row in pair]
    clips = iter(_look_at(network, loader(rows)) if rows else ())
    return Inside([[next(clips) for _ in pair] for pair in shown], len(measured), gates, attention)


def _measure(
    network: "TrainedNetwork", loader: Loader
) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, tuple[float, float]]]:
    """`gates` and `attention` of `Inside`, over the clips of the loader."""
    import torch

    from models.insight import attention_maps, gate_activity
    from pipelines.training.precision import autocast

    opened: dict[str, list[npt.NDArray[np.float64]]] = {}
    spreads: dict[str, list[float]] = {}
    gammas: dict[str, float] = {}
    for batch in loader:
        clips = network.model.prepare(batch.clips.to(network.device))
        with torch.inference_mode(), autocast(network.precision, network.device):
            _, maps = attention_maps(network.model, clips)
            activity = gate_activity(network.model, clips)
        for slot, values_BT in activity.items():
            opened.setdefault(slot, []).extend(values_BT.double().cpu().numpy())
        for found in maps:
            gammas[found.name] = found.gamma
            spreads.setdefault(found.name, []).extend(found.spread.tolist())
    gates = {slot: np.mean(values, axis=0) for slot, values in opened.items()}
    return gates, {name: (gammas[name], float(np.mean(values))) for name, values in spreads.items()}


def _look_at(network: "TrainedNetwork", loader: Loader) -> list[ClipInside]:
    """Each clip of the loader, in its order."""
    import torch

    from models.insight import attention_maps
    from pipelines.training.precision import autocast

    reader = FrameReader(loader.shards)
    found: list[ClipInside] = []
    for batch in loader:
        prepared = network.model.prepare(batch.clips.to(network.device))
        for place, (key, label) in enumerate(zip(batch.keys, batch.labels.tolist(), strict=True)):
            clip = prepared[place : place + 1]
            with torch.inference_mode(), autocast(network.precision, network.device):
                logits, maps = attention_maps(network.model, clip)
            scores = logits[0].float().softmax(dim=0)
            answer = int(scores.argmax())
            stored = loader.shards.video(len(found))
            video = DecodedVideo(reader.read_sample(stored), None, stored.height, stored.width, 0, "")
            frames = centre_clip(video, loader.sampling, loader.pixels, SHOWN_PIXELS)
            cams = (grad_cam(network.model, clip, wanted) for wanted in (answer, label))
            found.append(ClipInside(key, label, answer, float(scores[answer]), frames, slot_films(maps), *cams))
    return found
