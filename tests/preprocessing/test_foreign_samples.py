"""Samples of foreign tars: kept with their frames' places and label, or rejected with a reason, never anything in between."""

import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preprocessing.foreign_samples import sample_rows


def jpeg(number: int = 0, height: int = 16, width: int = 24) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(pixels)


def write(path: Path, files: list[tuple[str, bytes]]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def judge(tmp_path: Path, files: list[tuple[str, bytes]], split: str = "train", **more: Any) -> list[dict[str, Any]]:
    write(tmp_path / "0.tar", files)
    return sample_rows(tmp_path / "0.tar", split, more.get("class_ids"))[0]


def clip(key: str, num_frames: int, first: int = 0, digits: int = 6) -> list[tuple[str, bytes]]:
    return [(f"{key}.{number:0{digits}d}.jpg", jpeg(number)) for number in range(first, first + num_frames)]


clip_shapes = st.tuples(st.integers(1, 12), st.integers(0, 1), st.integers(1, 6), st.integers(0, 99))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    clips=st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 1), st.integers(1, 6), st.integers(0, 99)), min_size=1, max_size=5
    ),
    rng=st.randoms(use_true_random=False),
)
def test_frames_come_back_in_order_whatever_their_order_in_the_tar(tmp_path: Path, clips: list[tuple], rng: Any) -> None:
    files = []
    for number, (num_frames, first, digits, label) in enumerate(clips):
        sample = [*clip(f"dir/c{number}", num_frames, first, digits), (f"dir/c{number}.cls", str(label).encode())]
        rng.shuffle(sample)
        files += sample
    data = write(tmp_path / "0.tar", files)
    rows, num_ignored = sample_rows(tmp_path / "0.tar", "train", None)
    assert num_ignored == 0
    assert len({row["key"] for row in rows}) == len(clips)
    position = 0
    for number, (row, (num_frames, first, _, label)) in enumerate(zip(rows, clips, strict=True)):
        frames = [jpeg(index) for index in range(first, first + num_frames)]
        assert (row["status"], row["video_id"], row["label"]) == ("kept", f"0.tar/dir/c{number}", label)
        places = list(zip(row["frame_offsets"], row["frame_sizes"], strict=True))
        assert [data[offset : offset + size] for offset, size in places] == frames
        assert row["frame_crc32"] == [zlib.crc32(frame) for frame in frames]
        assert (row["num_frames"], row["height"], row["width"], row["fps"]) == (num_frames, 16, 24, None)
        assert row["content_sha256"] == hashlib.sha256(b"".join(frames)).hexdigest()
        assert row["sample_offset"] == position
        position += row["sample_bytes"]
        assert row["sample_crc32"] == zlib.crc32(data[row["sample_offset"] : position])


def test_a_single_image_is_one_frame_and_folders_are_part_of_the_key(tmp_path: Path) -> None:
    files = [("a/1.jpg", jpeg()), ("a/1.json", b'{"label": 3, "fps": 25}'), ("b/1.JPEG", jpeg()), ("b/1.cls", b" 4\n")]
    rows = judge(tmp_path, files)
    assert [(row["status"], row["num_frames"], row["label"], row["fps"]) for row in rows] == [
        ("kept", 1, 3, 25),
        ("kept", 1, 4, None),
    ]


@pytest.mark.parametrize(
    ("files", "reason", "detail"),
    [
        ([("a.mp4", b"x"), ("a.json", b"{}")], "no_frames", "json, mp4"),
        ([("a.000000.png", b"x")], "no_frames", "000000.png"),
        ([*clip("a", 3)[:1], *clip("a", 3)[2:]], "gap", "frame 1 is missing"),
        (clip("a", 3, first=2), "gap", "frame 1 is missing; found 3 from 2 to 4"),
        ([("a.0.jpg", jpeg()), ("a.00.jpg", jpeg())], "odd_file", "are the same frame"),
        ([("a.jpg", jpeg()), ("a.0.jpg", jpeg())], "odd_file", "are the same frame"),
        ([("a.jpg", jpeg()), ("a.jpg", jpeg())], "odd_file", "twice"),
        ([("a.jpg", jpeg()), ("a.jpeg", jpeg())], "odd_file", "are the same frame"),
        ([("a.0.jpg", jpeg()), ("a.1.jpg", jpeg(height=24))], "size_changes", "(24, 24)"),
        ([("a.jpg", jpeg()[:-200])], "not_jpeg", "a.jpg"),
        ([("a.jpg", b"\x89PNG\r\n\x1a\n" + bytes(50))], "not_jpeg", "a.jpg"),
        ([("a.jpg", b"")], "not_jpeg", "a.jpg"),
        ([("../a.jpg", jpeg())], "odd_name", "leads out of the archive"),
        ([("/a.jpg", jpeg())], "odd_name", "leads out of the archive"),
        ([("../evil", b"")], "odd_name", "leads out of the archive"),
    ],
)
def test_unusable_samples_are_rejected_with_a_reason(tmp_path: Path, files: list, reason: str, detail: str) -> None:
    rows = judge(tmp_path, [*files, ("good.jpg", jpeg()), ("good.cls", b"1")], split="test")
    assert [row["status"] for row in rows] == ["rejected", "kept"]
    assert rows[0]["reason"] == reason
    assert detail in rows[0]["detail"]
    assert "frame_offsets" not in rows[0]


def test_links_and_devices_reject_their_sample(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("a.000001.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        first = tarfile.TarInfo("a.000000.jpg")
        first.size = len(jpeg())
        tar.addfile(first, io.BytesIO(jpeg()))
        tar.addfile(link)
    ((row,), _) = sample_rows(tmp_path / "0.tar", "test", None)
    assert (row["reason"], row["detail"]) == ("odd_file", "a.000001.jpg: it is a symbolic link, no regular file")


def test_scattered_samples_are_rejected_as_a_whole(tmp_path: Path) -> None:
    rows = judge(tmp_path, [("a.0.jpg", jpeg()), ("b.jpg", jpeg()), ("a.1.jpg", jpeg()), ("a.2.jpg", jpeg())], "test")
    assert [(row["video_id"], row["reason"]) for row in rows] == [("0.tar/a", "scattered"), ("0.tar/b", "")]


def test_files_of_no_sample_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [("README", b"x"), (".DS_Store", b"x"), ("d/._a.jpg", b"x"), ("a.jpg", jpeg())])
    rows, num_ignored = sample_rows(tmp_path / "0.tar", "test", None)
    assert (len(rows), num_ignored) == (1, 3)


@pytest.mark.parametrize(
    ("name", "data", "label"),
    [
        ("a.cls", b"2", 2),
        ("a.cls", b"007", 7),
        ("a.json", b'{"label": 1}', 1),
        ("a.json", b'{"label": "right"}', 1),
        ("a.json", b'{"label": null, "label_name": "left"}', 0),
        ("a.json", b'{"caption": "right", "fps": "fast"}', 1),
        ("a.json", b'{"label": 1, "fps": NaN}', 1),
        ("a.json", b'{"caption": "up"}', "bad_label"),
        ("a.json", b'{"label": -1}', "bad_label"),
        ("a.json", b'{"label": true}', "bad_label"),
        ("a.json", b'{"label": 1.0}', "bad_label"),
        ("a.json", b'{"label": 8}', "bad_label"),
        ("a.json", b'{"label": [1]}', "bad_label"),
        ("a.json", b'{"label": 1', "bad_label"),
        ("a.json", b"[1]", "bad_label"),
        ("a.json", b"[" * 100_000, "bad_label"),
        ("a.json", b'{"label": ' + b"9" * 10_000 + b"}", "bad_label"),
        ("a.json", b" " * (2 << 20), "too_large"),
        ("a.cls", b"left", "bad_label"),
        ("a.cls", b"", "bad_label"),
        ("a.cls", b"1" * 100, "bad_label"),
        ("a.cls", "٣".encode(), "bad_label"),
        ("a.txt", b"left", "no_label"),
        ("a.pyd", b"cos\nsystem\n(S'touch pwned'\ntR.", "no_label"),
    ],
)
def test_labels(tmp_path: Path, name: str, data: bytes, label: int | str) -> None:
    names = {text: number for number, text in enumerate(["left", "right", *"cdefgh"])}
    (row,) = judge(tmp_path, [("a.jpg", jpeg()), (name, data)], class_ids=names)
    assert (row["reason"] or row["label"]) == label
    if label == "no_label":
        (row,) = judge(tmp_path, [("a.jpg", jpeg()), (name, data)], "validation", class_ids=names)
        assert (row["status"], row["label"]) == ("kept", None)


def test_without_names_labels_are_small_numbers(tmp_path: Path) -> None:
    for data, reason in ((b"99999", ""), (b"100000", "bad_label"), (b"999999999", "bad_label")):
        (row,) = judge(tmp_path, [("a.jpg", jpeg()), ("a.cls", data)])
        assert row["reason"] == reason
    (row,) = judge(tmp_path, [("a.jpg", jpeg()), ("a.json", b'{"label": "left"}')])
    assert row["detail"] == "label left; expected a class id, or a list of label names (--labels)"


def test_the_frame_rate_must_be_a_number(tmp_path: Path) -> None:
    for fps, expected in ((29.97, 29.97), (0, None), (-1, None), (True, None), ("25", None), (1e9, None), (None, None)):
        content = json.dumps({"label": 0, "fps": fps}).encode()
        assert judge(tmp_path, [("a.jpg", jpeg()), ("a.json", content)])[0]["fps"] == expected


def test_names_cannot_reach_the_terminal_nor_collide(tmp_path: Path) -> None:
    rows = judge(tmp_path, [("a\x1b[2J.jpg", jpeg()), ("a\\u{1b}[2J.jpg", jpeg()), ("a\udcff.jpg", jpeg())], "test")
    assert len({row["video_id"] for row in rows}) == len({row["key"] for row in rows}) == 3
    assert all(row["video_id"].isprintable() and row["reason"] == "odd_name" for row in rows)
    assert all(row["detail"].isprintable() for row in rows)
