"""Samples of WebDataset tars made elsewhere: which members form one, whether its frames are whole, what its label is."""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from preprocessing.decode import VideoRejectedError
from preprocessing.foreign_tar import ForeignMember, foreign_members
from preprocessing.jpeg import OversizeError, require_whole_jpeg
from preprocessing.planning import sample_key

# As webdataset splits names: the folder and the base name up to its first dot, then the extension.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_FRAME = re.compile(r"(?:([0-9]{1,9})\.)?jpe?g", re.ASCII)
_CLASS = re.compile(rb"\s*([0-9]{1,9})\s*")
_MAX_JSON_BYTES = 1 << 20
_MAX_FRAME_BYTES = 64 << 20
_MAX_SAMPLE_BYTES = 1 << 30
_MAX_CLASSES_WITHOUT_NAMES = 100_000
_MAX_FPS = 1000
_MAX_CLASS_BYTES = 64
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class SampleFacts:
    """What the files beside the frames say: the class id (None if there is none) and the frame rate (None if unknown)."""

    label: int | None
    fps: float | None


def sample_rows(path: Path, split: str, class_ids: dict[str, int] | None) -> tuple[list[dict[str, Any]], int]:
    """Read a tar made elsewhere and judge each of its samples.

    Args:
        path: the tar.
        split: "train", "validation" or "test"; samples of the first must have a label.
        class_ids: of the label names; None if there are none, then labels must be numbers.

    Returns:
        Rows with the columns of the index and the ledger, in the order of the tar, and the number of files in it that belong
        to no sample (names without a dot or that begin with one).

    Raises:
        DataError: if the tar is damaged.
        OSError: if it cannot be read.
    """
    rows: dict[str, dict[str, Any]] = {}
    num_ignored = 0
    with path.open("rb") as file:
        for key, members in _runs(path):
            if key is None:
                num_ignored += len(members)
                continue
            if key in rows:
                rows[key] = _row(path.name, split, key) | _rejected("scattered", "its files are not next to each other")
                continue
            rows[key] = _judge(file, path.name, split, key, members, class_ids)
    return list(rows.values()), num_ignored


def _runs(path: Path) -> Iterator[tuple[str | None, list[ForeignMember]]]:
    """Successive members with the same key; None for those that belong to no sample."""
    for key, members in groupby(foreign_members(path), lambda member: _split_name(member)[0]):
        yield key, list(members)


def _split_name(member: ForeignMember) -> tuple[str | None, str]:
    found = _NAME.fullmatch(member.name)
    if found is not None:
        return found[1], found[2].lower()
    return (member.name, "") if member.problem else (None, "")


def _row(shard: str, split: str, key: str) -> dict[str, Any]:
    video_id = f"{shard}/{_printable(key)}"
    row: dict[str, Any] = {"video_id": video_id, "key": sample_key(video_id), "shard": shard, "split": split, "label": None}
    row |= {"status": "kept", "reason": "", "detail": "", "num_frames": 0, "num_bytes": 0, "source_bytes": 0}
    return row | {"content_sha256": "", "seconds": 0.0}


def _rejected(reason: str, detail: str) -> dict[str, Any]:
    return {"status": "rejected", "reason": reason, "detail": detail}


def _judge(
    file: IO[bytes], shard: str, split: str, key: str, members: Sequence[ForeignMember], class_ids: dict[str, int] | None
) -> dict[str, Any]:
    row = _row(shard, split, key)
    try:
        by_extension = _by_extension(members)
        frames = _frames(by_extension)
        facts = _read_facts(file, by_extension, class_ids)
        if facts.label is None and split == "train":
            raise VideoRejectedError("no_label", "no .cls file and no label in its .json; expected one in the train split")
        row |= {"label": facts.label, "fps": facts.fps}
        return row | _frame_columns(file, frames) | _span_columns(file, members)
    except VideoRejectedError as error:
        return row | _rejected(error.reason, error.detail)


def _by_extension(members: Sequence[ForeignMember]) -> dict[str, ForeignMember]:
    found: dict[str, ForeignMember] = {}
    for member in members:
        extension = _split_name(member)[1]
        if member.problem:
            raise VideoRejectedError("odd_name" if member.odd_name else "odd_file", f"{_short(member.name)}: {member.problem}")
        if extension in found:
            raise VideoRejectedError("odd_file", f"the tar holds {_short(member.name)} twice")
        found[extension] = member
    return found


def _frames(by_extension: dict[str, ForeignMember]) -> list[ForeignMember]:
    """The frames in order: numbered from 0 or 1 without a gap, or one image without a number."""
    numbered: dict[int, ForeignMember] = {}
    for extension, member in by_extension.items():
        found = _FRAME.fullmatch(extension)
        if found is None:
            continue
        number = int(found[1] or 0)
        if number in numbered:
            raise VideoRejectedError(
                "odd_file", f"{_short(numbered[number].name)} and {_short(member.name)} are the same frame"
            )
        numbered[number] = member
    if not numbered:
        found_types = _short(", ".join(sorted(by_extension)))
        raise VideoRejectedError("no_frames", f"no .jpg or .NNNNNN.jpg among its files: {found_types}")
    numbers = sorted(numbered)
    first = min(numbers[0], 1)
    if numbers != list(range(first, first + len(numbers))):
        missing = next(number for place, number in enumerate(range(first, numbers[-1] + 1)) if numbers[place] != number)
        raise VideoRejectedError("gap", f"frame {missing} is missing; found {len(numbers)} from {numbers[0]} to {numbers[-1]}")
    return [numbered[number] for number in numbers]


def _frame_columns(file: IO[bytes], frames: Sequence[ForeignMember]) -> dict[str, Any]:
    """Decode each frame; one of them at a time is in memory."""
    num_bytes = sum(frame.size for frame in frames)
    if num_bytes > _MAX_SAMPLE_BYTES or max(frame.size for frame in frames) > _MAX_FRAME_BYTES:
        limits = f"{_MAX_SAMPLE_BYTES}, and {_MAX_FRAME_BYTES} a frame"
        raise VideoRejectedError("too_large", f"{num_bytes} bytes of frames; expected at most {limits}")
    digest = hashlib.sha256()
    checksums, sizes = [], set()
    for frame in frames:
        data = _read(file, frame)
        try:
            size = require_whole_jpeg(data)
        except OversizeError as error:
            raise VideoRejectedError("too_large", f"{_short(frame.name)} {error}") from error
        except ValueError as error:
            raise VideoRejectedError("not_jpeg", f"{_short(frame.name)}: {error}") from error
        sizes.add(size)
        if len(sizes) > 1:
            raise VideoRejectedError("size_changes", f"frames have several sizes: {sorted(sizes)} (height, width)")
        digest.update(data)
        checksums.append(zlib.crc32(data))
    height, width = sizes.pop()
    return {
        "num_frames": len(frames),
        "num_bytes": num_bytes,
        "content_sha256": digest.hexdigest(),
        "height": height,
        "width": width,
        "frame_offsets": [frame.offset for frame in frames],
        "frame_sizes": [frame.size for frame in frames],
        "frame_crc32": checksums,
    }


def _span_columns(file: IO[bytes], members: Sequence[ForeignMember]) -> dict[str, Any]:
    """The sample's bytes in the tar, from its first header to its last padding."""
    begin, end = members[0].begin, members[-1].end
    if end - begin > 2 * _MAX_SAMPLE_BYTES:  # a sample is read whole when it is verified
        most = 2 * _MAX_SAMPLE_BYTES
        raise VideoRejectedError("too_large", f"{end - begin} bytes with all its files; expected at most {most}")
    checksum = 0
    file.seek(begin)
    for position in range(begin, end, _CHUNK_BYTES):
        checksum = zlib.crc32(file.read(min(_CHUNK_BYTES, end - position)), checksum)
    return {"sample_offset": begin, "sample_bytes": end - begin, "sample_crc32": checksum, "source_bytes": end - begin}


def _read_facts(file: IO[bytes], by_extension: dict[str, ForeignMember], class_ids: dict[str, int] | None) -> SampleFacts:
    """The label of the .cls file, else of the .json file's "label", "label_name" or "caption"; and the .json file's "fps"."""
    content = _read_json(file, by_extension["json"]) if "json" in by_extension else {}
    fps = content.get("fps")
    known = fps if isinstance(fps, (int, float)) and not isinstance(fps, bool) and 0 < fps <= _MAX_FPS else None
    if "cls" in by_extension:
        member = by_extension["cls"]
        found = _CLASS.fullmatch(_read(file, member)) if member.size <= _MAX_CLASS_BYTES else None
        if found is None:
            raise VideoRejectedError("bad_label", f"{_short(member.name)} holds no class id; expected digits")
        return SampleFacts(_class_id(int(found[1]), class_ids), known)
    label = next((content[name] for name in ("label", "label_name", "caption") if content.get(name) is not None), None)
    return SampleFacts(None if label is None else _class_id(label, class_ids), known)


def _read_json(file: IO[bytes], member: ForeignMember) -> dict[str, Any]:
    if member.size > _MAX_JSON_BYTES:
        raise VideoRejectedError(
            "too_large", f"{_short(member.name)} has {member.size} bytes; expected at most {_MAX_JSON_BYTES}"
        )
    try:
        content = json.loads(_read(file, member))
    except (ValueError, RecursionError) as error:
        raise VideoRejectedError("bad_label", f"{_short(member.name)} is not JSON: {_short(str(error))}") from error
    if not isinstance(content, dict):
        raise VideoRejectedError(
            "bad_label", f"{_short(member.name)} holds a JSON {type(content).__name__}; expected an object"
        )
    return content


def _class_id(label: object, class_ids: dict[str, int] | None) -> int:
    if isinstance(label, str) and class_ids is not None and label in class_ids:
        return class_ids[label]
    limit = _MAX_CLASSES_WITHOUT_NAMES if class_ids is None else len(class_ids)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < limit:
        return label
    if isinstance(label, str):
        expected = "a label name of the list" if class_ids is not None else "a class id, or a list of label names (--labels)"
    else:
        expected = f"0 to {limit - 1}"
    raise VideoRejectedError("bad_label", f"label {_short(str(label))}; expected {expected}")


def _read(file: IO[bytes], member: ForeignMember) -> bytes:
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) != member.size:
        raise OSError(
            f"{member.name!r} has {len(data)} bytes, its header says {member.size}: the tar changed while it was read"
        )
    return data


def _printable(text: str) -> str:
    """Everything that could do something to a terminal or a page's layout is spelled out; different texts stay different."""
    return "".join(char if char.isprintable() and char != "\\" else f"\\u{{{ord(char):x}}}" for char in text)


def _short(text: str) -> str:
    text = _printable(text)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
