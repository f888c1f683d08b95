"""The network that is explained, what it was judged on, and which clips of that are looked at."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.errors import ConfigError, DataError
from infra.settings import nearest
from pipelines.evaluation.evaluate import EvaluateSettings
from pipelines.evaluation.scores import ClipScores
from pipelines.insight.settings import InsightSettings
from preprocessing.reader import FrameReader, ShardSplit, open_shards


@dataclass(frozen=True)
class Subject:
    """What all sections are about.

    Attributes:
        model_dir: as `save_model` wrote it.
        shards_place: of the clips.
        judged: how `evaluate` judged it.
        scores: what it said of each clip then.
        settings: of the stage.
        output_dir: of the stage.
    """

    model_dir: Path
    shards_place: str
    judged: EvaluateSettings
    scores: ClipScores
    settings: InsightSettings
    output_dir: Path

    @property
    def figures(self) -> Path:
        """The folder of pictures; made if it is not there."""
        folder = self.output_dir / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def one_view(self) -> EvaluateSettings:
        """As it was judged, but by the centre view alone: a vector or a map belongs to one view."""
        return self.judged.model_copy(update={"protocol": "centre"})

    @cached_property
    def split(self) -> ShardSplit:
        """The split that it was judged on."""
        return open_shards(self.shards_place, self.judged.split)

    @cached_property
    def reader(self) -> FrameReader:
        """Of the frames of that split."""
        return FrameReader(self.split)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of the split in which each clip lies, by its key."""
        return {key: row for row, key in enumerate(self.split.keys)}

    @cached_property
    def num_segments(self) -> int:
        """How many frames the network sees of a video."""
        facts = json.loads((self.model_dir / "model.json").read_bytes())
        return int(facts["train"]["num_segments"])

    @cached_property
    def classes(self) -> list[int]:
        """Ids of the classes that are looked at, in rising order.

        Raises:
            ConfigError: if the settings name one that the shards have not.
        """
        names = self.split.label_names
        unknown = [name for name in self.settings.classes if name not in names]
        if unknown:
            raise ConfigError(
                f"insight.classes names {unknown[0]!r}, which is none of the {len(names)} classes; {nearest(unknown[0], names)}"
            )
        wanted = set(self.settings.classes or names)
        return [label for label, name in enumerate(names) if name in wanted]

    @cached_property
    def candidates(self) -> npt.NDArray[np.int64]:
        """Rows of the split: all clips of `classes`.

        Raises:
            DataError: if there is none.
        """
        wanted = np.flatnonzero(np.isin(np.array(self.split.labels), self.classes))
        if not len(wanted):
            raise DataError(
                f"split {self.split.split} of {self.shards_place} has no clip of the classes that insight.classes names; "
                "choose others, or none for all"
            )
        return wanted

    @property
    def rows(self) -> list[int]:
        """Those of the `candidates` that are looked at: `max_clips` of them, evenly spread, or all."""
        return [int(row) for row in self.candidates[spread_places(len(self.candidates), self.settings.max_clips)]]


def take_rows(split: ShardSplit, rows: Sequence[int]) -> ShardSplit:
    """The split with some of its videos, in the order given."""
    return replace(split, table=split.table.take(pa.array(rows, pa.int64())).combine_chunks())


def spread_places(total: int, most: int) -> npt.NDArray[np.int64]:
    """At most so many of `total` places, as far apart as can be."""
    count = min(total, most)
    return (2 * np.arange(count) + 1) * total // (2 * count)
