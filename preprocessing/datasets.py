"""Raw datasets: annotation files -> one table of videos and a list of label names.

Something-Something V1 (Goyal et al., "The 'something something' video database", ICCV 2017) comes as JPEG frames and csv files,
Diving48 (Li et al., "RESOUND", ECCV 2018; V2 has the labels cleaned in 2020) as mp4 files with json files. Each is one row of
`DATASETS`: which annotation files it needs, where its videos are, and a function that reads the annotations. Users' own videos
are the dataset "folder" (`generic.py`).

Reading annotations never touches a video: a listed video that is missing or broken is the decoder's finding and lands in the
ledger. Everything that is wrong with the annotations themselves is one DataError that names the file and the row.
"""

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from infra.errors import ConfigError, DataError, PipelineError
from infra.filesystems import Entry, Folder
from infra.settings import Settings
from infra.storage import atomic_path, sha256_json, write_json
from preprocessing.annotations import (
    DIVING_FILES,
    DIVING_V1_FILES,
    SOMETHING_FILES,
    Annotations,
    read_annotation_file,
    read_diving48_v1,
    read_diving48_v2,
    read_something_v1,
    short,
)
from preprocessing.generic import VIDEO_SCHEMA as VIDEO_SCHEMA
from preprocessing.generic import class_folders, read_annotation_table, read_class_folders, visible_entries
from preprocessing.labels import label_passport
from preprocessing.synthetic import GENERATOR_VERSION, SyntheticSettings

_FILES_SHOWN = 8
_ONLY_FOR_FOLDER = ("annotations", "val_fraction", "split_seed")


class DatasetSettings(Settings):
    """Which dataset, and where its raw videos are: in a folder (`root`) or generated (`synthetic`), not both.

    `root` is a path, `s3://bucket/prefix` or `gs://bucket/prefix`. `archive` is a pattern, such as "Diving48_rgb.tar.gz" or
    "20bn-something-something-v1-??", for files in the root: the parts of one tar, plain or gzip, sorted by name, whose members
    are read as if they lay in the root. Where it is null and the folder of the videos is missing, parts of the published names
    are taken. `version` is that of Diving48.

    The rest is for "folder", users' own videos: `annotations` names a csv or Parquet file in the root; null means a folder a
    class. Where these do not tell the split, the share `val_fraction` (0 to 1) of the videos is drawn for validation by
    `split_seed`.
    """

    name: Literal["something_v1", "diving48", "folder"]
    root: str | None = None
    synthetic: SyntheticSettings | None = None
    archive: str | None = None
    version: Literal["V1", "V2"] = "V2"
    annotations: str | None = None
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    split_seed: int = 0

    @property
    def dataset_name(self) -> str:
        """The name that shards and runs carry; the versions of Diving48 are different datasets."""
        return "diving48_v1" if (self.name, self.version) == ("diving48", "V1") else self.name

    @field_validator("root", mode="before")
    @classmethod
    def _expand_home(cls, root: object) -> object:
        if not isinstance(root, str | Path) or "://" in str(root):
            return root
        return str(Path(root).expanduser())

    @field_validator("root")
    @classmethod
    def _check_scheme(cls, root: str | None) -> str | None:
        if root is not None:
            try:
                Folder(root)
            except PipelineError as error:
                raise ValueError(str(error)) from error
        return root

    @field_validator("archive", "annotations")
    @classmethod
    def _check_inside_root(cls, name: str | None, info: Any) -> str | None:
        parts = (name or "x").split("/")
        if "" in parts or ".." in parts or (info.field_name == "archive" and len(parts) > 1):
            raise ValueError("expected a file in dataset.root, without '..'")
        return name

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.root is not None and self.synthetic is not None:
            raise ValueError("root and synthetic are both set; expected one of them: to use real videos set synthetic to null")
        if self.synthetic is not None and (self.dataset_name not in ("something_v1", "diving48") or self.archive):
            raise ValueError("synthetic makes something_v1 or diving48 V2 without archive; expected one of these")
        if self.name != "diving48" and self.version != "V2":
            raise ValueError(f"version is for diving48, not for {self.name}; expected it to be left out")
        unused = [name for name in _ONLY_FOR_FOLDER if getattr(self, name) != type(self).model_fields[name].default]
        if self.name != "folder" and unused:
            raise ValueError(f"{unused[0]} is for the dataset folder, not for {self.name}; expected it to be left out")
        if self.name == "folder" and self.archive is not None and self.annotations is None:
            raise ValueError("archive without annotations; expected a csv or Parquet file that lists the archive's videos")
        return self


@dataclass(frozen=True)
class VideoIndex:
    """All annotated videos of a dataset.

    Attributes:
        videos: a row a video (`VIDEO_SCHEMA`), split after split, each in its file's order: video_id, path relative to root,
            kind ("frames" or "video"), split ("train", "validation" or "test"), label (class id, null if unlabelled), start and
            end (seconds, null for the whole).
        label_names: the label text of each class id.
    """

    videos: pa.Table
    label_names: list[str]


@dataclass(frozen=True)
class DatasetLayout:
    """How one published dataset lies on disk.

    Attributes:
        annotation_files: names relative to the root.
        videos_dir: the folder of the videos, relative to the root.
        archive: the pattern of the names under which the videos are published.
        how_to_get: the end of the error message when a file or the folder is missing.
        read: root -> (label names, {(split, file name): rows}).
        kind: "frames" or "video".
        suffix: what follows the video id in the video's path.
    """

    annotation_files: tuple[str, ...]
    videos_dir: str
    archive: str
    how_to_get: str
    read: Callable[[Folder], Annotations]
    kind: Literal["frames", "video"]
    suffix: str


def index_videos(settings: DatasetSettings, root: Folder | Path | str) -> VideoIndex:
    """Read the annotation files of a dataset; looks at no video.

    Args:
        settings: `settings.name` and `settings.version` choose the layout.
        root: the folder that holds the annotation files and the videos.

    Raises:
        DataError: if the root or a file is missing, or a row is wrong (see the module's text).
    """
    root = Folder(root)
    if settings.name == "folder":
        fraction, seed = settings.val_fraction, settings.split_seed
        if settings.annotations is None:
            return VideoIndex(*read_class_folders(root, val_fraction=fraction, split_seed=seed))
        return VideoIndex(*read_annotation_table(root, settings.annotations, val_fraction=fraction, split_seed=seed))
    layout = DATASETS[settings.dataset_name]
    _require_files(root, layout)
    label_names, rows_by_file = layout.read(root)
    tables = []
    for (split, _), rows in rows_by_file.items():
        columns = {
            "video_id": [video_id for video_id, _, _ in rows],
            "path": [f"{layout.videos_dir}/{video_id}{layout.suffix}" for video_id, _, _ in rows],
            "kind": [layout.kind] * len(rows),
            "split": [split] * len(rows),
            "label": [label for _, _, label in rows],
        }
        whole = [None] * len(rows)
        tables.append(pa.table(columns | {"start": whole, "end": whole}, schema=VIDEO_SCHEMA))
    return VideoIndex(videos=pa.concat_tables(tables).combine_chunks(), label_names=label_names)


def find_archive(settings: DatasetSettings, root: Folder | Path | str) -> str | None:
    """The pattern of the archive parts in the root that hold the videos; None if the videos lie there as files.

    Raises:
        DataError: if `settings.archive` is set and no file has such a name.
    """
    root = Folder(root)
    if settings.archive is not None:
        archive_parts(root, settings.archive)
        return settings.archive
    if settings.name == "folder" or settings.synthetic is not None:
        return None
    layout = DATASETS[settings.dataset_name]
    names = {entry.name: entry.is_folder for entry in _entries(root, layout)}
    if layout.videos_dir in names or not fnmatch.filter(names, layout.archive):
        return None
    return layout.archive


def archive_parts(root: Folder, pattern: str) -> list[Entry]:
    """The parts of an archive, sorted by name.

    Args:
        root: the dataset's folder.
        pattern: as for `fnmatch`, for example "20bn-something-something-v1-??".

    Raises:
        DataError: if no file has such a name.
    """
    parts = [entry for entry in visible_entries(root) if not entry.is_folder and fnmatch.fnmatchcase(entry.name, pattern)]
    if not parts:
        raise DataError(
            f"{root} has no file like {short(pattern)}; expected the archive's parts; correct dataset.archive or dataset.root"
        )
    return parts


def val_split(dataset: str, splits: Iterable[str]) -> str:
    """The split that training and search are validated on, for a dataset's name and the splits that it has.

    Diving48 has no validation split, and all published work takes its test split; so do users' own videos without one.
    """
    if dataset.startswith("diving48") or (dataset == "folder" and "validation" not in splits):
        return "test"
    return "validation"


def save_video_index(index: VideoIndex, folder: Path) -> None:
    """Write `videos.parquet` and `labels.json` (names and their passport) into an existing folder."""
    with atomic_path(folder / "videos.parquet") as temporary:
        pq.write_table(index.videos, temporary)
    write_json(folder / "labels.json", {"names": index.label_names, "passport": label_passport(index.label_names)})


def load_video_index(folder: Path) -> VideoIndex:
    """Read what `save_video_index` wrote.

    Raises:
        DataError: if a file is missing or unreadable, or the label names do not fit their passport.
    """
    again = "run the index stage again"
    try:
        labels = json.loads((folder / "labels.json").read_bytes())
        names, passport = list(labels["names"]), labels["passport"]
        videos = pq.read_table(folder / "videos.parquet", schema=VIDEO_SCHEMA)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"the video index in {folder} cannot be read: {error}; {again}") from error
    if label_passport(names) != passport:
        raise DataError(
            f"{folder / 'labels.json'} says passport {passport}, but its names have {label_passport(names)}; {again}"
        )
    return VideoIndex(videos=videos, label_names=names)


def raw_listing(settings: DatasetSettings) -> str:
    """Hex SHA-256 that changes when the raw data changes, without reading a video: for the stage's fingerprint.

    Covers the content of the annotation files and, for each entry of the videos' folders, its name and modification time, for a
    file also its size; for an archive these of its parts. A frame that is rewritten in place inside a folder is not seen; in an
    object store nothing inside a folder of frames is. Generated videos are their settings.

    Raises:
        ConfigError: if neither root nor synthetic is set.
        DataError: if the root, an annotation file or the videos' folder is missing.
    """
    if settings.synthetic is not None:
        synthetic = settings.synthetic.model_dump(mode="json")
        return sha256_json({"synthetic": synthetic, "layout": settings.name, "generator": GENERATOR_VERSION})
    if settings.root is None:
        whose = "your videos" if settings.name == "folder" else settings.name
        raise ConfigError(f"dataset.root is not set; expected the folder of {whose}; add --set dataset.root=DIR")
    root = Folder(settings.root)
    digest = hashlib.sha256()
    if settings.name == "folder":
        files: tuple[str, ...] = () if settings.annotations is None else (settings.annotations,)
    else:
        files = DATASETS[settings.dataset_name].annotation_files
        _require_files(root, DATASETS[settings.dataset_name])
    for name in files:
        digest.update(f"{name}\0{hashlib.sha256(read_annotation_file(root, name)).hexdigest()}\n".encode())
    for line in sorted(_list_videos(root, settings)):
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _list_videos(root: Folder, settings: DatasetSettings) -> list[str]:
    """A line an entry of the videos' folders, or a part of their archive."""
    pattern = find_archive(settings, root)
    if pattern is not None:
        return _listing_lines("", archive_parts(root, pattern))
    if settings.name != "folder":
        layout = DATASETS[settings.dataset_name]
        try:
            return _listing_lines("", (root / layout.videos_dir).entries())
        except OSError as error:
            found = ", ".join(entry.name for entry in _entries(root, layout)[:_FILES_SHOWN])
            raise DataError(
                f"the videos' folder {root}/{layout.videos_dir} cannot be read ({error.strerror or error}); found {found} in "
                f"{root}; {layout.how_to_get}"
            ) from error
    if settings.annotations is None:
        places = class_folders(root).values()
        return [line for place in places for line in _listing_lines(place, visible_entries(root / place))]
    paths = index_videos(settings, root).videos["path"].to_pylist()
    lines = []
    for place in sorted({path.rpartition("/")[0] for path in paths}):
        try:
            lines += _listing_lines(place, (root / place if place else root).entries())
        except OSError:
            lines.append(f"{place}\0absent\n")
    return lines


def _listing_lines(place: str, entries: Iterable[Entry]) -> list[str]:
    return [f"{place}/{entry.name}\0{entry.size}\0{entry.modified_ns}\n" for entry in entries]


def _entries(root: Folder, layout: DatasetLayout) -> tuple[Entry, ...]:
    try:
        return root.entries()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        expected = f"{', '.join(layout.annotation_files)} and {layout.videos_dir}/"
        raise DataError(
            f"dataset.root {short(str(root))} is no readable folder ({reason}); expected one with {expected}; "
            f"{layout.how_to_get}, or give the right folder with --set dataset.root=DIR"
        ) from error


def _require_files(root: Folder, layout: DatasetLayout) -> None:
    names = [entry.name for entry in _entries(root, layout)]
    more = f" and {len(names) - _FILES_SHOWN} more" if len(names) > _FILES_SHOWN else ""
    found = (", ".join(names[:_FILES_SHOWN]) + more) or "nothing"
    missing = [name for name in layout.annotation_files if name not in names]
    if missing:
        expected = f"{', '.join(layout.annotation_files)} and {layout.videos_dir}/"
        raise DataError(
            f"{root} has no {' and no '.join(missing)}; expected {expected}; "
            f"found {found}; {layout.how_to_get}, or give the right folder with --set dataset.root=DIR"
        )


_DIVING_HOW = "put Diving48_rgb.tar.gz, or the folder rgb that is in it, beside the {} json files"

DATASETS: dict[str, DatasetLayout] = {
    "something_v1": DatasetLayout(
        annotation_files=SOMETHING_FILES,
        videos_dir="20bn-something-something-v1",
        archive="20bn-something-something-v1-??",
        how_to_get="put the parts 20bn-something-something-v1-??, or the folder that is in them, beside the csv files",
        read=read_something_v1,
        kind="frames",
        suffix="",
    ),
    "diving48": DatasetLayout(
        annotation_files=DIVING_FILES,
        videos_dir="rgb",
        archive="Diving48_rgb.tar.gz",
        how_to_get=_DIVING_HOW.format("V2"),
        read=read_diving48_v2,
        kind="video",
        suffix=".mp4",
    ),
    "diving48_v1": DatasetLayout(
        annotation_files=DIVING_V1_FILES,
        videos_dir="rgb",
        archive="Diving48_rgb.tar.gz",
        how_to_get=_DIVING_HOW.format("V1"),
        read=read_diving48_v1,
        kind="video",
        suffix=".mp4",
    ),
}
