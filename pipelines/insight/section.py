"""What a part of the page `insight` consists of, whichever question it answers: a sentence, pictures, clips, tables, numbers.

`pipelines.reports.insight` writes sections as a page, `pipelines.explaining` records them in MLflow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Picture:
    """A PNG file.

    Attributes:
        path: of the file, in the stage's folder `figures`.
        key: names its tile in MLflow, whose charts are grouped by what stands before the slash: "features/map".
        alt: what is to be seen, for those who cannot see it.
        caption: how to read it.
        on_page: False for pictures that only MLflow gets, since the page shows the same as text and frames.
    """

    path: Path
    key: str
    alt: str
    caption: str = ""
    on_page: bool = True


@dataclass(frozen=True)
class Film:
    """The same film in two files.

    Attributes:
        gif: that the page and MLflow's description play, in the stage's folder `figures`.
        mp4: sharper and smaller, beside it.
        alt: what is to be seen, for those who cannot see it.
        caption: how to read it.
    """

    gif: Path
    mp4: Path
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class ShownClip:
    """A clip on the page.

    Attributes:
        title: what to say of it first.
        text: in smaller letters.
        frames: RGB pixels in the order of time. Shape: [H, W, 3] each.
    """

    title: str
    text: str
    frames: Sequence[npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its values in a row, its head on the page, and how its values are written there."""

    name: str
    head: str
    kind: Literal["text", "count", "number", "percent"] = "text"


@dataclass(frozen=True)
class Table:
    """A table, `tables/<name>.csv` as a whole.

    Attributes:
        name: of the file.
        summary: what the page calls it.
        columns: in order.
        rows: values by the names of columns, text or numbers; None is an empty cell.
        num_shown: of the rows on the page; with 0 it only says where the table is.
    """

    name: str
    summary: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    num_shown: int = 200


@dataclass(frozen=True)
class Section:
    """The answer to one question about a trained network.

    Attributes:
        title: of the section.
        sentence: the answer; that of the first section opens the page and MLflow's description.
        text: how to read what follows.
        pictures: in order.
        clips: below the pictures and films.
        tables: below the clips.
        metrics: for MLflow, by names such as "insight/knn_purity".
        doubts: what not to conclude from it.
        films: below the pictures.
        numbers: for the top of the page, each with what it counts.
    """

    title: str
    sentence: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    clips: Sequence[ShownClip] = ()
    tables: Sequence[Table] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    doubts: Sequence[str] = ()
    films: Sequence[Film] = ()
    numbers: Sequence[tuple[str, str]] = ()
