"""Raw datasets: annotation files -> one table of videos and a list of label names.

Something-Something V1 (Goyal et al., "The 'something something' video database", ICCV 2017) comes as folders of JPEG frames
with csv files, Diving48 V2 (Li et al., "RESOUND", ECCV 2018; labels cleaned in 2020) as mp4 files with json files. A dataset is
one row of `DATASETS`: which annotation files it needs, where its videos are, and a function that reads the annotations.

Reading annotations never touches a video: a listed video that is missing or broken is the decoder's finding and lands in the
ledger. Everything that is wrong with the annotations themselves is one DataError that names the file and the row.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import field_validator, model_validator

from infra.errors import ConfigError, DataError
from infra.settings import Settings, nearest
from infra.storage import atomic_path, sha256_json, write_json
from preprocessing.labels import label_passport
from preprocessing.synthetic import GENERATOR_VERSION, SyntheticSettings

VIDEO_SCHEMA = pa.schema(
    {
        "video_id": pa.string(),
        "path": pa.string(),
        "kind": pa.string(),
        "split": pa.string(),
        "label": pa.int32(),
        "start": pa.float64(),
        "end": pa.float64(),
    }
)
# A video id becomes a path and an argument of programs, so it holds nothing but these; 158 genuine ids begin with "-".
_VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{1,200}", re.ASCII)
_FILES_SHOWN = 8
_LABEL_COMPARED = 200

# A video as read: id, row in its annotation file (from 1), class id or None.
Row = tuple[str, int, int | None]


class DatasetSettings(Settings):
    """Which dataset, and where its raw videos are: in a folder (`root`) or generated (`synthetic`), not both."""

    name: Literal["something_v1", "diving48"]
    root: Path | None = None
    synthetic: SyntheticSettings | None = None

    @field_validator("root")
    @classmethod
    def _expand_home(cls, root: Path | None) -> Path | None:
        return None if root is None else root.expanduser()

    @model_validator(mode="after")
    def _check_one_source(self) -> Self:
        if self.root is not None and self.synthetic is not None:
            raise ValueError("root and synthetic are both set; expected one of them: to use real videos set synthetic to null")
        return self


@dataclass(frozen=True)
class VideoIndex:
    """All annotated videos of a dataset.

    Attributes:
        videos: a row a video (`VIDEO_SCHEMA`), split after split, each in its file's order: video_id, path relative to root,
            kind ("frames" or "video"), split ("train", "validation" or "test"), label (class id, null if unlabelled).
        label_names: the label text of each class id.
    """

    videos: pa.Table
    label_names: list[str]


@dataclass(frozen=True)
class DatasetLayout:
    """How one dataset lies on disk.

    Attributes:
        annotation_files: names relative to the root.
        videos_dir: the folder of the videos, relative to the root.
        how_to_get: the end of the error message when a file or the folder is missing.
        read: root -> (label names, {(split, file name): rows}).
        kind: "frames" or "video".
        suffix: what follows the video id in the video's path.
        val_split: the split that training and search are validated on. Diving48 has no validation split, and all published
            work takes its test split.
    """

    annotation_files: tuple[str, ...]
    videos_dir: str
    how_to_get: str
    read: Callable[[Path], tuple[list[str], dict[tuple[str, str], list[Row]]]]
    kind: Literal["frames", "video"]
    suffix: str
    val_split: str


def index_videos(settings: DatasetSettings, root: Path) -> VideoIndex:
    """Read the annotation files of a dataset; looks at no video (0.5 s for the 108,499 rows of Something-V1).

    Args:
        settings: `settings.name` chooses the layout.
        root: the folder that holds the annotation files and the videos.

    Raises:
        DataError: if the root or a file is missing, or a row is wrong (see the module's text).
    """
    layout = DATASETS[settings.name]
    _require_files(root, layout)
    label_names, rows_by_file = layout.read(root)
    _check_ids(rows_by_file)
    ids: list[str] = []
    splits: list[str] = []
    labels: list[int | None] = []
    for (split, _), rows in rows_by_file.items():
        ids += [video_id for video_id, _, _ in rows]
        splits += [split] * len(rows)
        labels += [label for _, _, label in rows]
    paths = [f"{layout.videos_dir}/{video_id}{layout.suffix}" for video_id in ids]
    whole = [None] * len(ids)
    columns = {"video_id": ids, "path": paths, "kind": [layout.kind] * len(ids), "split": splits, "label": labels}
    columns |= {"start": whole, "end": whole}
    return VideoIndex(videos=pa.table(columns, schema=VIDEO_SCHEMA), label_names=label_names)


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

    Covers the content of the annotation files and, for each entry of the videos' folder, its name and modification time, for a
    file also its size. A frame that is rewritten in place inside a folder is not seen. Generated videos are their settings.

    Raises:
        ConfigError: if neither root nor synthetic is set.
        DataError: if the root, an annotation file or the videos' folder is missing.
    """
    if settings.synthetic is not None:
        synthetic = settings.synthetic.model_dump(mode="json")
        return sha256_json({"synthetic": synthetic, "layout": settings.name, "generator": GENERATOR_VERSION})
    if settings.root is None:
        raise ConfigError(f"dataset.root is not set; expected the folder of {settings.name}; add --set dataset.root=DIR")
    layout = DATASETS[settings.name]
    found = _require_files(settings.root, layout)
    digest = hashlib.sha256()
    for name in layout.annotation_files:
        digest.update(f"{name}\0{hashlib.sha256(_read_bytes(settings.root / name)).hexdigest()}\n".encode())
    for line in sorted(_list_videos(settings.root, layout, found)):
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _something_v1(root: Path) -> tuple[list[str], dict[tuple[str, str], list[Row]]]:
    """Class ids are the labels sorted by name, as in TRN, TSM and GSM (mmaction2 takes the file's order)."""
    labels_file, train_file, validation_file, test_file = _SOMETHING_FILES
    label_names = sorted(text.strip() for _, text in _lines(root / labels_file))
    _check_names(label_names, labels_file)
    class_ids = {name: class_id for class_id, name in enumerate(label_names)}
    test_rows: list[Row] = [(text, number, None) for number, text in _lines(root / test_file)]
    return label_names, {
        ("train", train_file): _labelled_rows(root / train_file, class_ids),
        ("validation", validation_file): _labelled_rows(root / validation_file, class_ids),
        ("test", test_file): test_rows,
    }


def _labelled_rows(path: Path, class_ids: dict[str, int]) -> list[Row]:
    """Rows `id;label text` without quotes; 12 of the genuine labels hold commas."""
    rows: list[Row] = []
    for number, text in _lines(path):
        video_id, semicolon, name = text.partition(";")
        if not semicolon:
            raise DataError(f"{path.name} row {number} is {_short(text)}; expected 'id;label text'; correct the row")
        label = class_ids.get(name.strip())
        if label is None:
            raise DataError(
                f"{path.name} row {number}: label {_short(name)} of video {_short(video_id)} is none of the "
                f"{len(class_ids)} in {_SOMETHING_FILES[0]}; {nearest(name.strip()[:_LABEL_COMPARED], class_ids)}; "
                "correct the row or the list"
            )
        rows.append((video_id, number, label))
    return rows


def _diving48(root: Path) -> tuple[list[str], dict[tuple[str, str], list[Row]]]:
    """Class ids are positions in the vocabulary, whose entries are lists of words; class 30 of the genuine 48 has no video."""
    train_file, test_file, vocabulary_file = _DIVING_FILES
    vocabulary = _json_list(root / vocabulary_file)
    for number, words in enumerate(vocabulary, start=1):
        if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
            raise DataError(f"{vocabulary_file} entry {number} is {_short(words)}; expected a list of words; correct the file")
    label_names = [" ".join(words) for words in vocabulary]
    _check_names(label_names, vocabulary_file)
    return label_names, {
        ("train", train_file): _json_rows(root / train_file, len(label_names)),
        ("test", test_file): _json_rows(root / test_file, len(label_names)),
    }


def _json_rows(path: Path, num_classes: int) -> list[Row]:
    rows: list[Row] = []
    for number, item in enumerate(_json_list(path), start=1):
        if not (isinstance(item, dict) and isinstance(item.get("vid_name"), str) and type(item.get("label")) is int):
            raise DataError(
                f"{path.name} entry {number} is {_short(item)}; expected an object with a text vid_name and a whole number "
                "label; correct the file"
            )
        if not 0 <= item["label"] < num_classes:
            raise DataError(
                f"{path.name} entry {number}: label {_short(item['label'])} of video {_short(item['vid_name'])} is out of "
                f"range; expected 0 to {num_classes - 1}, an entry of {_DIVING_FILES[2]}; check that both files are of V2"
            )
        rows.append((item["vid_name"], number, item["label"]))
    return rows


def _json_list(path: Path) -> list[Any]:
    try:
        value = json.loads(_decode(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; fetch the file again") from error
    if not isinstance(value, list):
        raise DataError(f"{path} holds a JSON {type(value).__name__}; expected a list; fetch the file again")
    return value


def _lines(path: Path) -> list[tuple[int, str]]:
    """The non-empty rows of a text file with their numbers from 1; LF or CRLF, with or without a byte order mark."""
    numbered = enumerate(_decode(path).split("\n"), start=1)
    return [(number, text.removesuffix("\r")) for number, text in numbered if text.strip()]


def _decode(path: Path) -> str:
    data = _read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} row {row} is not UTF-8: {error.reason}; save the file as UTF-8 or fetch it again") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected a readable file; check its permissions") from error


def _require_files(root: Path, layout: DatasetLayout) -> str:
    """Check that the root holds the annotation files. Returns what it holds, for further messages."""
    expected = f"{', '.join(layout.annotation_files)} and {layout.videos_dir}/"
    advice = f"{layout.how_to_get}, or give the right folder with --set dataset.root=DIR"
    try:
        names = sorted(path.name for path in root.iterdir())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"dataset.root {_short(str(root))} is no readable folder ({reason}); expected one with {expected}; {advice}"
        ) from error
    more = f" and {len(names) - _FILES_SHOWN} more" if len(names) > _FILES_SHOWN else ""
    found = (", ".join(names[:_FILES_SHOWN]) + more) or "nothing"
    missing = [name for name in layout.annotation_files if name not in names]
    if missing:
        raise DataError(f"{root} has no {' and no '.join(missing)}; expected {expected}; found {found}; {advice}")
    return found


def _list_videos(root: Path, layout: DatasetLayout, found: str) -> list[str]:
    """A line an entry of the videos' folder: name, modification time in ns, and for files the size in bytes."""
    lines = []
    try:
        with os.scandir(root / layout.videos_dir) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                size = status.st_size if layout.kind == "video" else 0
                lines.append(f"{entry.name}\0{size}\0{status.st_mtime_ns}\n")
    except OSError as error:
        raise DataError(
            f"the videos' folder {root / layout.videos_dir} cannot be read ({error.strerror}); found {found} in {root}; "
            f"{layout.how_to_get}"
        ) from error
    return lines


def _check_names(label_names: list[str], file_name: str) -> None:
    if not label_names:
        raise DataError(f"{file_name} holds no label; expected one a row; fetch the file again")
    seen: set[str] = set()
    for name in label_names:
        if name in seen:
            raise DataError(f"{file_name} holds the label {_short(name)} twice; expected each once; remove one")
        if not name.strip() or not name.isprintable():
            raise DataError(f"{file_name} holds the label {_short(name)}; expected printable text; correct the file")
        seen.add(name)


def _check_ids(rows_by_file: dict[tuple[str, str], list[Row]]) -> None:
    seen: dict[str, tuple[str, int]] = {}
    for (split, file_name), rows in rows_by_file.items():
        if split == "train" and not rows:
            raise DataError(f"{file_name} lists no video; expected at least one; fetch the file again")
        for video_id, number, _ in rows:
            if _VIDEO_ID.fullmatch(video_id) is None:
                raise DataError(
                    f"{file_name} row {number}: {_short(video_id)} is not a video id; expected 1 to 200 letters, "
                    "digits, '_' or '-'; correct the row"
                )
            if video_id in seen:
                other_file, other_number = seen[video_id]
                raise DataError(
                    f"video {video_id} is listed twice: {other_file} row {other_number} and {file_name} row {number}; "
                    "expected each video once over all splits; remove one"
                )
            seen[video_id] = (file_name, number)


def _short(value: object) -> str:
    """`repr`, so that nothing unprintable reaches a terminal, cut to fit a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


_SOMETHING_FILES = tuple(f"something-something-v1-{part}.csv" for part in ("labels", "train", "validation", "test"))
_DIVING_FILES = ("Diving48_V2_train.json", "Diving48_V2_test.json", "Diving48_vocab.json")

DATASETS: dict[str, DatasetLayout] = {
    "something_v1": DatasetLayout(
        annotation_files=_SOMETHING_FILES,
        videos_dir="20bn-something-something-v1",
        how_to_get="unpack the parts with cat 20bn-something-something-v1-?? | tar zx and put the csv files beside the folder",
        read=_something_v1,
        kind="frames",
        suffix="",
        val_split="validation",
    ),
    "diving48": DatasetLayout(
        annotation_files=_DIVING_FILES,
        videos_dir="rgb",
        how_to_get="unpack Diving48_rgb.tar.gz and put the V2 json files beside rgb",
        read=_diving48,
        kind="video",
        suffix=".mp4",
        val_split="test",
    ),
}
