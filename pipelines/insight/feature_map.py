"""What a network takes for alike: how often the nearest clips in its feature space share a class, and a map of that space.

The map is t-SNE's (van der Maaten, Hinton: Visualizing Data using t-SNE, JMLR 2008), by scikit-learn, with a fixed seed. It
keeps neighbours and gives up distances, so that the number is computed from the features and never from the map.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from pipelines.insight.features import ClipFeatures
from pipelines.insight.map_figure import draw_map
from pipelines.insight.section import Column, Picture, Section, Table
from pipelines.insight.subject import Subject
from pipelines.reports.page import percent

Vectors = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]

_PERPLEXITY = 30.0
_SEED = 0
_LEAST_ON_MAP = 5  # with fewer clips there is nothing to arrange


@dataclass(frozen=True)
class Purity:
    """How often the nearest clips share a clip's class.

    Attributes:
        shares: of the `num_neighbours` nearest other clips that with the same class, for each clip. Shape: [N].
        num_neighbours: that were asked for; all other clips where there are fewer.
        chance: the mean share if neighbours were drawn by lot.
        most: the mean share if every neighbour that can be of the same class were: below 1 where a class has few clips.
    """

    shares: npt.NDArray[np.float64]
    num_neighbours: int
    chance: float
    most: float

    @property
    def mean(self) -> float:
        """Over all clips."""
        return float(self.shares.mean())


def measure_purity(vectors: Vectors, labels: Labels, num_neighbours: int) -> Purity | None:
    """Ask the nearest clips, by Euclidean distance, for their class.

    Args:
        vectors: finite. Shape: [N, D].
        labels: class ids. Shape: [N].
        num_neighbours: at least 1.

    Returns:
        None if there is nothing to tell apart: one clip, or one class.
    """
    counts = np.bincount(labels)
    if len(labels) < 2 or np.count_nonzero(counts) < 2:
        return None
    num_neighbours = min(num_neighbours, len(labels) - 1)
    search = NearestNeighbors(n_neighbors=num_neighbours, algorithm="brute").fit(vectors.astype(np.float64))
    nearest = search.kneighbors(return_distance=False)  # of the fitted ones, each without itself
    others = counts[labels] - 1
    return Purity(
        shares=(labels[nearest] == labels[:, None]).mean(axis=1),
        num_neighbours=num_neighbours,
        chance=float((others / (len(labels) - 1)).mean()),
        most=float(np.minimum(others / num_neighbours, 1).mean()),
    )


def map_features(vectors: Vectors) -> npt.NDArray[np.float32] | None:
    """Places of clips in the plane, near each other where their features are; the same for the same features.

    Args:
        vectors: finite. Shape: [N, D].

    Returns:
        Shape: [N, 2]; None if there are fewer than 5 clips, or all are the same.
    """
    if len(vectors) < _LEAST_ON_MAP or not np.ptp(vectors, axis=0).any():
        return None
    perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=_SEED)
    with threadpool_limits(1):  # sums of several threads depend on how many they are
        places: npt.NDArray[np.float32] = tsne.fit_transform(vectors.astype(np.float32))
    return places


def map_section(subject: Subject, features: ClipFeatures) -> Section:
    """How pure neighbourhoods are, in all and by class, and the map."""
    names, labels = subject.split.label_names, features.labels
    purity = measure_purity(features.vectors, labels, subject.settings.num_neighbours)
    places = map_features(features.vectors)
    pictures = []
    if places is not None:
        path = draw_map(subject.figures / "map.png", places, labels, names)
        pictures.append(Picture(path, "features/map", _alt(labels, names, purity), _CAPTION))
    return Section(
        title="What looks alike to the network",
        sentence=_sentence(purity, len(labels), len(np.unique(labels))),
        text=(
            f"Each of {len(labels):,} {subject.judged.split} clips as the {features.vectors.shape[1]:,} numbers that the "
            "classifier is given of its centre view. Nearest is meant by the distance between these numbers, not on the map."
        ),
        pictures=pictures,
        tables=[_class_table(purity, labels, names), _clip_table(features, purity, places, names)],
        metrics={} if purity is None else {"insight/purity": purity.mean, "insight/purity_chance": purity.chance},
        doubts=_doubts(purity, labels, len(subject.candidates), has_map=places is not None),
        numbers=[] if purity is None else _numbers(purity),
    )


_CAPTION = (
    "A dot a clip, in the colour and form of its class. t-SNE keeps neighbours together and gives up distances: how far apart "
    "groups lie, and how large they are, means nothing."
)


def _sentence(purity: Purity | None, num_clips: int, num_classes: int) -> str:
    if purity is None:
        what = "1 clip" if num_clips == 1 else f"{num_clips:,} clips of one class"
        return f"{what}: no neighbours of other classes, so nothing to tell apart."
    return (
        f"Of the {_count(purity)}clips nearest in feature space {percent(purity.mean)} are of the same class; by chance it "
        f"would be {percent(purity.chance)} ({num_clips:,} clips, {num_classes:,} classes)."
    )


def _count(purity: Purity) -> str:
    return "" if purity.num_neighbours == 1 else f"{purity.num_neighbours} "


def _numbers(purity: Purity) -> list[tuple[str, str]]:
    same = (percent(purity.mean), f"of the {_count(purity)}nearest clips are of the same class")
    return [same, (percent(purity.chance), "would be by chance")]


def _alt(labels: Labels, names: list[str], purity: Purity | None) -> str:
    if purity is None:
        return f"Map of {len(labels):,} clips of one class."
    shares = sorted(((float(purity.shares[labels == label].mean()), names[label]) for label in np.unique(labels)), reverse=True)
    best, worst = shares[0], shares[-1]
    return (
        f"Map of {len(labels):,} clips of {len(shares):,} classes. Most among themselves: {best[1]} ({percent(best[0])} of the "
        f"nearest clips); least: {worst[1]} ({percent(worst[0])})."
    )


def _class_table(purity: Purity | None, labels: Labels, names: list[str]) -> Table:
    rows = []
    for label in np.unique(labels):
        own = labels == label
        share = None if purity is None else float(purity.shares[own].mean())
        chance = None if purity is None else float((own.sum() - 1) / (len(labels) - 1))
        rows.append(
            {"number": int(label), "class": names[label], "num_clips": int(own.sum()), "purity": share, "chance": chance}
        )
    rows.sort(key=lambda row: (row["purity"] or 0.0, row["class"]))
    columns = (
        Column("number", "on the map", "count"),
        Column("class", "class"),
        Column("num_clips", "clips", "count"),
        Column("purity", "alike", "percent"),
        Column("chance", "by chance", "percent"),
    )
    return Table("purity", f"{len(rows):,} classes, the least pure first", columns, rows)


def _clip_table(
    features: ClipFeatures, purity: Purity | None, places: npt.NDArray[np.float32] | None, names: list[str]
) -> Table:
    rows = [
        {
            "key": key,
            "class": names[features.labels[row]],
            "purity": None if purity is None else float(purity.shares[row]),
            "x": None if places is None else round(float(places[row, 0]), 3),
            "y": None if places is None else round(float(places[row, 1]), 3),
        }
        for row, key in enumerate(features.keys)
    ]
    columns = (
        Column("key", "clip"),
        Column("class", "class"),
        Column("purity", "neighbours of the class", "percent"),
        Column("x", "x on the map", "number"),
        Column("y", "y", "number"),
    )
    return Table("map", f"All {len(rows):,} clips with their places", columns, rows, num_shown=0)


def _doubts(purity: Purity | None, labels: Labels, num_all: int, *, has_map: bool) -> list[str]:
    found = []
    if not has_map:
        found.append(f"No map: {len(labels):,} clips are too few, or the network gives all of them the same features.")
    if len(labels) < num_all:
        found.append(f"{len(labels):,} of {num_all:,} clips were looked at, evenly spread over the split (insight.max_clips).")
    if purity is not None and purity.most < 1:
        found.append(
            f"Some classes have no more than {purity.num_neighbours} clips here, so that at most {percent(purity.most)} of the "
            "neighbours can have the same class."
        )
    return found
