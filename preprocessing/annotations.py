"""The annotation files of the published datasets: Something-Something V1 (csv) and Diving48 V1 and V2 (json).

Nothing here looks at a video. Everything that is wrong with a file is one DataError that names the file and the row.
"""

import json
import re
from functools import partial
from typing import Any

from infra.errors import DataError
from infra.filesystems import Folder
from infra.settings import nearest

# A video as read: id, row in its annotation file (from 1), class id or None.
Row = tuple[str, int, int | None]
# The label names, and the rows of each (split, file name).
Annotations = tuple[list[str], dict[tuple[str, str], list[Row]]]

SOMETHING_FILES = tuple(f"something-something-v1-{part}.csv" for part in ("labels", "train", "validation", "test"))
DIVING_FILES = ("Diving48_V2_train.json", "Diving48_V2_test.json", "Diving48_vocab.json")
DIVING_V1_FILES = ("Diving48_train.json", "Diving48_test.json", "Diving48_vocab.json")

# A video id becomes a path and an argument of programs, so it holds nothing but these; 158 genuine ids begin with "-".
_VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{1,200}", re.ASCII)
_LABEL_COMPARED = 200


def read_something_v1(root: Folder) -> Annotations:
    """Read the four csv files of Something-V1.

    Class ids are the labels sorted by name, as in TRN, TSM and GSM (mmaction2 takes the file's order).

    Raises:
        DataError: see the module's text.
    """
    labels_file, train_file, validation_file, test_file = SOMETHING_FILES
    label_names = sorted(text.strip() for _, text in _lines(root, labels_file))
    check_label_names(label_names, labels_file)
    class_ids = {name: class_id for class_id, name in enumerate(label_names)}
    test_rows: list[Row] = [(text, number, None) for number, text in _lines(root, test_file)]
    rows = {
        ("train", train_file): _labelled_rows(root, train_file, class_ids),
        ("validation", validation_file): _labelled_rows(root, validation_file, class_ids),
        ("test", test_file): test_rows,
    }
    _check_ids(rows)
    return label_names, rows


def read_diving48(root: Folder, files: tuple[str, str, str]) -> Annotations:
    """Read the json files (train, test, vocabulary) of one version of Diving48.

    Class ids are positions in the vocabulary, whose entries are lists of words; class 30 of the genuine 48 has no video.

    Raises:
        DataError: see the module's text.
    """
    train_file, test_file, vocabulary_file = files
    vocabulary = _json_list(root, vocabulary_file)
    for number, words in enumerate(vocabulary, start=1):
        if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
            raise DataError(f"{vocabulary_file} entry {number} is {short(words)}; expected a list of words; correct the file")
    label_names = [" ".join(words) for words in vocabulary]
    check_label_names(label_names, vocabulary_file)
    rows = {
        ("train", train_file): _json_rows(root, train_file, len(label_names)),
        ("test", test_file): _json_rows(root, test_file, len(label_names)),
    }
    _check_ids(rows)
    return label_names, rows


read_diving48_v1 = partial(read_diving48, files=DIVING_V1_FILES)
read_diving48_v2 = partial(read_diving48, files=DIVING_FILES)


def check_label_names(label_names: list[str], file_name: str) -> None:
    """Raise DataError if there is no name, one is there twice, or one is blank or not printable."""
    if not label_names:
        raise DataError(f"{file_name} holds no label; expected one a row; fetch the file again")
    seen: set[str] = set()
    for name in label_names:
        if name in seen:
            raise DataError(f"{file_name} holds the label {short(name)} twice; expected each once; remove one")
        if not name.strip() or not name.isprintable():
            raise DataError(f"{file_name} holds the label {short(name)}; expected printable text; correct the file")
        seen.add(name)


def read_annotation_file(root: Folder, name: str) -> bytes:
    """The content of a file.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return root.read_bytes(name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{root}/{name} cannot be read: {reason}; expected a readable file; check its permissions") from error


def short(value: object) -> str:
    """`repr`, so that nothing unprintable reaches a terminal, cut to fit a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _labelled_rows(root: Folder, file_name: str, class_ids: dict[str, int]) -> list[Row]:
    """Rows `id;label text` without quotes; 12 of the genuine labels hold commas."""
    rows: list[Row] = []
    for number, text in _lines(root, file_name):
        video_id, semicolon, name = text.partition(";")
        if not semicolon:
            raise DataError(f"{file_name} row {number} is {short(text)}; expected 'id;label text'; correct the row")
        label = class_ids.get(name.strip())
        if label is None:
            raise DataError(
                f"{file_name} row {number}: label {short(name)} of video {short(video_id)} is none of the "
                f"{len(class_ids)} in {SOMETHING_FILES[0]}; {nearest(name.strip()[:_LABEL_COMPARED], class_ids)}; "
                "correct the row or the list"
            )
        rows.append((video_id, number, label))
    return rows


def _json_rows(root: Folder, file_name: str, num_classes: int) -> list[Row]:
    rows: list[Row] = []
    for number, item in enumerate(_json_list(root, file_name), start=1):
        if not (isinstance(item, dict) and isinstance(item.get("vid_name"), str) and type(item.get("label")) is int):
            raise DataError(
                f"{file_name} entry {number} is {short(item)}; expected an object with a text vid_name and a whole number "
                "label; correct the file"
            )
        if not 0 <= item["label"] < num_classes:
            raise DataError(
                f"{file_name} entry {number}: label {short(item['label'])} of video {short(item['vid_name'])} is out of "
                f"range; expected 0 to {num_classes - 1}, an entry of {DIVING_FILES[2]}; check that all are of one version"
            )
        rows.append((item["vid_name"], number, item["label"]))
    return rows


def _json_list(root: Folder, file_name: str) -> list[Any]:
    try:
        value = json.loads(_text(root, file_name))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{root}/{file_name} is not JSON: {error}; fetch the file again") from error
    if not isinstance(value, list):
        raise DataError(f"{root}/{file_name} holds a JSON {type(value).__name__}; expected a list; fetch the file again")
    return value


def _lines(root: Folder, file_name: str) -> list[tuple[int, str]]:
    """The non-empty rows of a text file with their numbers from 1; LF or CRLF, with or without a byte order mark."""
    numbered = enumerate(_text(root, file_name).split("\n"), start=1)
    return [(number, text.removesuffix("\r")) for number, text in numbered if text.strip()]


def _text(root: Folder, file_name: str) -> str:
    data = read_annotation_file(root, file_name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        place = f"{root}/{file_name} row {row}"
        raise DataError(f"{place} is not UTF-8: {error.reason}; save the file as UTF-8 or fetch it again") from error


def _check_ids(rows_by_file: dict[tuple[str, str], list[Row]]) -> None:
    seen: dict[str, tuple[str, int]] = {}
    for (split, file_name), rows in rows_by_file.items():
        if split == "train" and not rows:
            raise DataError(f"{file_name} lists no video; expected at least one; fetch the file again")
        for video_id, number, _ in rows:
            if _VIDEO_ID.fullmatch(video_id) is None:
                raise DataError(
                    f"{file_name} row {number}: {short(video_id)} is not a video id; expected 1 to 200 letters, "
                    "digits, '_' or '-'; correct the row"
                )
            if video_id in seen:
                other_file, other_number = seen[video_id]
                raise DataError(
                    f"video {video_id} is listed twice: {other_file} row {other_number} and {file_name} row {number}; "
                    "expected each video once over all splits; remove one"
                )
            seen[video_id] = (file_name, number)
