"""Users' own videos: a folder a class, or a csv or Parquet file with the columns path, label, split, start, end, video_id.

Rows are checked column by column with Arrow, so that a million of them take seconds; what is wrong is one DataError that names
the file and the row. A path that could lead out of the dataset's folder is never opened.
"""

import hashlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import DataError
from infra.filesystems import Entry, Folder
from infra.settings import nearest
from preprocessing.annotations import check_label_names, short
from preprocessing.tables import AnnotationTable, read_table

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
SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}

_MAX_NAME_CHARS = 1000
# Empty parts, "." and "..", so also a leading, a double and a closing slash; then what other systems take for a path.
_BAD_PATH = r"(^|/)\.{0,2}(/|$)|\\|://|^[A-Za-z]:"
_VIDEO_FILE = r"\.[A-Za-z0-9]{1,8}$"
_NUMBER = r"(?i)^([+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity))$"
_CLASS_NUMBER = r"^[0-9]{1,9}$"


def read_annotation_table(root: Folder, name: str, *, val_fraction: float, split_seed: int) -> tuple[pa.Table, list[str]]:
    """Read a csv file (with a header, UTF-8) or a Parquet file that lists videos.

    `path` is relative to the root; a path whose last part ends like a file name (".mp4") is a video file, another one a folder
    of frames. `label` is text or a whole number; empty means unlabelled, which only test videos may be. `split` is train,
    validation (or val) or test; without that column it is drawn by `draw_splits`. `start` and `end` are seconds, empty for the
    beginning or end of the file. `video_id` is any printable text; without that column it is the path, with "#start-end" where
    one of them is given. So the same path with another start or end is another video.

    Args:
        root: the dataset's folder.
        name: of the file, relative to the root; ".parquet" at its end means Parquet, all else csv.
        val_fraction: see `draw_splits`.
        split_seed: see `draw_splits`.

    Returns:
        Rows of `VIDEO_SCHEMA` in the file's order, and the label names: sorted, numbers by value.

    Raises:
        DataError: if the file cannot be read, a column is missing or unknown, or a row is wrong.
    """
    table = read_table(root, name)
    paths = _checked_paths(table)
    starts, ends = _checked_times(table)
    ids = _checked_ids(table, paths, starts, ends)
    label_texts, label_names = _checked_labels(table)
    drawn = "split" not in table.names
    splits = pa.array(draw_splits(paths.to_pylist(), val_fraction, split_seed)) if drawn else _checked_splits(table)
    _require_labels(table, label_texts, splits)
    if not drawn:
        _require_known_labels(table, label_texts, splits, label_names)
    kinds = pc.if_else(pc.match_substring_regex(paths, _VIDEO_FILE), "video", "frames")
    labels = pc.index_in(label_texts, value_set=pa.array(label_names, pa.string()))
    columns = {"video_id": ids, "path": paths, "kind": kinds, "split": splits, "label": labels, "start": starts, "end": ends}
    return pa.table(columns, schema=VIDEO_SCHEMA), label_names


def read_class_folders(root: Folder, *, val_fraction: float, split_seed: int) -> tuple[pa.Table, list[str]]:
    """List `<class>/<video>`, or `<split>/<class>/<video>` if the root holds nothing but folders named after splits.

    Everything in a class folder that is not hidden is a video: a file, or a folder of frames. Its id is its path.

    Args:
        root: the dataset's folder.
        val_fraction: see `draw_splits`; used if there are no folders of splits.
        split_seed: see `draw_splits`.

    Returns:
        Rows of `VIDEO_SCHEMA`, sorted by path, and the label names: the folders' names, sorted.

    Raises:
        DataError: if a folder cannot be read, there is no video, or a name is not printable.
    """
    by_split = class_folders(root)
    paths: list[str] = []
    kinds: list[str] = []
    labels: list[str] = []
    splits: list[str] = []
    for (split, label), place in by_split.items():
        for entry in visible_entries(root / place):
            paths.append(f"{place}/{entry.name}")
            kinds.append("frames" if entry.is_folder else "video")
            labels.append(label)
            splits.append(split)
    if not paths:
        raise DataError(f"the folders of {root} hold no video; expected {_EXPECTED_FOLDERS}; {_FOLDER_ADVICE}")
    if not all(splits):
        splits = draw_splits(paths, val_fraction, split_seed)
    label_names = sorted({label for _, label in by_split})
    check_label_names(label_names, str(root))
    train = {label for label, split in zip(labels, splits, strict=True) if split == "train"}
    for (split, label), place in by_split.items():
        if split and train and label not in train:
            raise DataError(f"{root}/{place}: no training video has the label {short(label)}; {nearest(label, train)}")
    _require_training(splits, str(root))
    class_ids = {name: class_id for class_id, name in enumerate(label_names)}
    whole = pa.nulls(len(paths), pa.float64())
    columns = {"video_id": paths, "path": paths, "kind": kinds, "split": splits, "start": whole, "end": whole}
    columns["label"] = [class_ids[label] for label in labels]
    return pa.table({name: columns[name] for name in VIDEO_SCHEMA.names}, schema=VIDEO_SCHEMA), label_names


def draw_splits(paths: Sequence[str], val_fraction: float, split_seed: int) -> list[str]:
    """Draw "train" or "validation" for each path: a function of the seed and that path alone, whatever else is listed.

    All videos that are cut from one file are in one split.

    Args:
        paths: relative to the dataset's folder.
        val_fraction: the share that is drawn for validation, from 0 to 1; 0 draws none.
        split_seed: another seed draws others.

    Raises:
        DataError: if either split came out empty, as it may with few videos.
    """
    limit = val_fraction * 2.0**64
    splits = []
    for path in paths:
        drawn = int.from_bytes(hashlib.sha256(f"{split_seed}/{path}".encode()).digest()[:8], "big")
        splits.append("validation" if drawn < limit else "train")
    for split, wanted in (("train", True), ("validation", val_fraction > 0)):
        if wanted and split not in splits:
            raise DataError(
                f"of {len(splits)} videos none was drawn for {split} with dataset.val_fraction={val_fraction}; expected at "
                "least one; choose another dataset.val_fraction or dataset.split_seed, or say the split of each video yourself"
            )
    return splits


def class_folders(root: Folder) -> dict[tuple[str, str], str]:
    """The folder of each (split, class), relative to the root; the split is "" where it must be drawn.

    Raises:
        DataError: if a folder cannot be read or has a name that is not printable, or only some are named after splits.
    """
    names = [entry.name for entry in visible_entries(root) if entry.is_folder]
    of_splits = [name for name in names if name in SPLITS]
    if not of_splits:
        return {("", name): name for name in names}
    others = [name for name in names if name not in SPLITS]
    if others or len({SPLITS[name] for name in of_splits}) < len(of_splits):
        raise DataError(
            f"{root} holds the folders {', '.join(map(short, names[:8]))}; expected either {_EXPECTED_FOLDERS}, each split "
            "once; rename or move the others"
        )
    classes = {split: [entry.name for entry in visible_entries(root / split) if entry.is_folder] for split in of_splits}
    return {(SPLITS[split], name): f"{split}/{name}" for split, inside in classes.items() for name in inside}


def visible_entries(folder: Folder) -> list[Entry]:
    """What a folder holds, but for hidden names.

    Raises:
        DataError: if it cannot be read, or a name is not printable.
    """
    try:
        entries = [entry for entry in folder.entries() if not entry.name.startswith(".")]
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{short(str(folder))} is no readable folder ({reason}); {_FOLDER_ADVICE}") from error
    for entry in entries:
        if not entry.name.isprintable() or "\\" in entry.name:
            place = short(str(folder))
            raise DataError(f"{place} holds the name {short(entry.name)}; expected printable text without '\\'; rename it")
    return entries


_EXPECTED_FOLDERS = "<class>/<video> or <train|validation|test>/<class>/<video>"
_FOLDER_ADVICE = "give the right folder with --set dataset.root=DIR, or list the videos in a file named by dataset.annotations"


def _checked_paths(table: AnnotationTable) -> pa.ChunkedArray:
    paths = pc.replace_substring_regex(table.texts("path"), r"^(\./+)+", "")
    expected = "a path inside the dataset's folder, such as clips/a.mp4, with '/' and without '..'"
    table.refuse_where(pc.match_substring_regex(paths, _BAD_PATH), "path", expected)
    table.refuse_where(pc.greater(pc.utf8_length(paths), _MAX_NAME_CHARS), "path", f"at most {_MAX_NAME_CHARS} characters")
    return paths


def _checked_times(table: AnnotationTable) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    starts, ends = table.seconds("start"), table.seconds("end")
    wrong = pc.fill_null(pc.less_equal(ends, pc.fill_null(starts, 0.0)), False)
    table.refuse_where(wrong, "end", "more seconds than the start")
    return starts, ends


def _checked_ids(table: AnnotationTable, paths: pa.Array, starts: pa.Array, ends: pa.Array) -> pa.ChunkedArray:
    if "video_id" in table.names:
        ids = table.texts("video_id")
        table.refuse_where(pc.equal(pc.utf8_trim_whitespace(ids), ""), "video_id", "printable text")
    else:
        columns = zip(*(column.to_pylist() for column in (paths, starts, ends)), strict=True)
        named = [path if start is None and end is None else _window_id(path, start, end) for path, start, end in columns]
        ids = pa.chunked_array([pa.array(named, pa.string())])
    table.refuse_where(pc.greater(pc.utf8_length(ids), 2 * _MAX_NAME_CHARS), "video_id", "a shorter text")
    if pc.count_distinct(ids).as_py() < len(ids):
        seen: dict[str, int] = {}
        for row, video_id in enumerate(ids.to_pylist()):
            if video_id in seen:
                rows = f"rows {table.row_number(seen[video_id])} and {table.row_number(row)}"
                raise DataError(
                    f"{table.name} {rows} both list the video {short(video_id)}; expected each once; remove one, or give "
                    "another start or end"
                )
            seen[video_id] = row
    return ids


def _window_id(path: str, start: float | None, end: float | None) -> str:
    return f"{path}#{'' if start is None else start}-{'' if end is None else end}"


def _checked_labels(table: AnnotationTable) -> tuple[pa.ChunkedArray, list[str]]:
    """The label text of each row ("" if unlabelled), numbers without leading zeros; and the names in order."""
    texts = pc.utf8_trim_whitespace(table.texts("label"))
    numbers = pc.match_substring_regex(texts, _CLASS_NUMBER)
    odd = pc.and_not(pc.match_substring_regex(texts, _NUMBER), numbers)
    expected = "text, or a whole number from 0 to 999999999, or an empty cell for a test video without label"
    table.refuse_where(odd, "label", expected)
    if pc.all(pc.or_(numbers, pc.equal(texts, ""))).as_py():
        values = pc.if_else(pc.equal(texts, ""), None, texts).cast(pa.int64())
        names = [str(value) for value in sorted(pc.unique(values.drop_null()).to_pylist())]
        texts = pc.fill_null(values.cast(pa.string()), "")
    else:
        names = sorted(set(pc.unique(texts).to_pylist()) - {""})
    if not names:
        raise DataError(f"{table.name} labels no video; expected a label for each of training; fill the column label")
    table.refuse_where(pc.greater(pc.utf8_length(texts), _MAX_NAME_CHARS), "label", f"at most {_MAX_NAME_CHARS} characters")
    unprintable = pa.array([name for name in names if not name.isprintable()], pa.string())
    table.refuse_where(pc.is_in(texts, value_set=unprintable), "label", "printable text")
    return texts, names


def _checked_splits(table: AnnotationTable) -> pa.ChunkedArray:
    texts = table.texts("split")
    known = pc.index_in(texts, value_set=pa.array(list(SPLITS)))
    table.refuse_where(pc.is_null(known), "split", "train, validation or test")
    splits = pc.take(pa.array(list(SPLITS.values())), known)
    _require_training(pc.unique(splits).to_pylist(), table.name)
    return splits


def _require_training(splits: Sequence[str], where: str) -> None:
    if "train" not in splits:
        raise DataError(f"{where} lists no video of the split train; expected at least one; add some")


def _require_labels(table: AnnotationTable, texts: pa.ChunkedArray, splits: pa.ChunkedArray) -> None:
    unlabelled = pc.and_(pc.equal(texts, ""), pc.not_equal(splits, "test"))
    table.refuse_where(unlabelled, "label", "a label, since only videos of the split test may be without")


def _require_known_labels(
    table: AnnotationTable, texts: pa.ChunkedArray, splits: pa.ChunkedArray, label_names: list[str]
) -> None:
    """A label that no training video has cannot be learnt; most often it is a slip of the pen."""
    train = pc.unique(texts.filter(pc.equal(splits, "train")))
    unknown = sorted(set(label_names) - set(train.to_pylist()))
    if unknown:
        advice = nearest(unknown[0][:200], [name[:200] for name in train.to_pylist()[:1000]])
        table.refuse_where(pc.equal(texts, unknown[0]), "label", f"a label that a training video has ({advice})")
