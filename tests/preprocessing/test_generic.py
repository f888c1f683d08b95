"""Users' own videos: a folder a class, csv and Parquet files; what is read, and what is said when they are wrong."""

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import DataError
from preprocessing.datasets import DatasetSettings, VideoIndex, index_videos, raw_listing, val_split
from preprocessing.generic import draw_splits
from preprocessing.planning import plan_shards

CSV = DatasetSettings(name="folder", annotations="videos.csv")


def read(root: Path, content: str | bytes, **changes: Any) -> VideoIndex:
    (root / "videos.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return index_videos(CSV.model_copy(update=changes), root)


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    assert str(caught.value).isprintable()
    return str(caught.value)


def make(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def test_a_csv_is_read_in_its_order(tmp_path: Path) -> None:
    index = read(
        tmp_path,
        "path,label,split,start,end\n"
        "b/1.mp4,turning left,train,,\n"
        './a/x y.MOV,"jumping, twice",val,0.5,2\n'
        "b/1.mp4,turning left,train,1,\n"
        "frames/é 日本,turning left,test,,\n"
        "c.mp4,,test,,3.25\n"
        'd.mp4,"jumping, twice",train,,\n',
    )
    assert index.label_names == ["jumping, twice", "turning left"]
    rows = index.videos.to_pylist()
    assert [row["video_id"] for row in rows] == [
        "b/1.mp4", "a/x y.MOV#0.5-2.0", "b/1.mp4#1.0-", "frames/é 日本", "c.mp4#-3.25", "d.mp4"
    ]  # fmt: skip
    assert [row["path"] for row in rows] == ["b/1.mp4", "a/x y.MOV", "b/1.mp4", "frames/é 日本", "c.mp4", "d.mp4"]
    assert [row["kind"] for row in rows] == ["video", "video", "video", "frames", "video", "video"]
    assert [row["split"] for row in rows] == ["train", "validation", "train", "test", "test", "train"]
    assert [row["label"] for row in rows] == [1, 0, 1, 1, None, 0]
    assert [row["start"] for row in rows] == [None, 0.5, 1.0, None, None, None]
    assert [row["end"] for row in rows] == [None, 2.0, None, None, 3.25, None]


def test_numbers_are_labels_in_the_order_of_their_values(tmp_path: Path) -> None:
    index = read(tmp_path, "path,label\na.mp4,10\nb.mp4,9\nc.mp4,007\n", val_fraction=0.0)
    assert index.label_names == ["7", "9", "10"]
    assert index.videos["label"].to_pylist() == [2, 1, 0]


@pytest.mark.parametrize(
    "change", [lambda data: b"\xef\xbb\xbf" + data, lambda data: data.replace(b"\n", b"\r\n"), bytes.rstrip,
               lambda data: data.replace(b"\n", b"\n\n")]
)  # fmt: skip
def test_byte_order_mark_crlf_empty_lines_and_missing_last_newline_change_nothing(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    content = b"path,label,split\na.mp4,x,train\nb.mp4,y,train\n"
    before, after = read(tmp_path, content), read(tmp_path, change(content))
    assert after.videos.equals(before.videos)
    assert after.label_names == before.label_names


def test_parquet_is_read_as_csv_is(tmp_path: Path) -> None:
    expected = read(tmp_path, "path,label,split,start,end\na.mp4,3,train,0.5,2\nb.mp4,1,train,,\nc.mp4,,test,1,\n")
    columns = {"path": ["a.mp4", "b.mp4", "c.mp4"], "label": [3, 1, None], "split": pa.array(["train", "train", "test"])}
    columns |= {"start": [0.5, None, 1.0], "end": [2.0, None, None]}
    columns["split"] = columns["split"].dictionary_encode()
    pq.write_table(pa.table(columns), tmp_path / "videos.parquet")
    found = index_videos(CSV.model_copy(update={"annotations": "videos.parquet"}), tmp_path)
    assert found.videos.equals(expected.videos)
    assert found.label_names == expected.label_names


HEAD = "path,label,split,start,end\n"
GOOD = "good.mp4,x,train,,\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("/etc/passwd,x,train,,", "row 4: path is '/etc/passwd'; expected a path inside the dataset's folder"),
        ("../x.mp4,x,train,,", "row 4: path is '../x.mp4'"),
        ("a/../../x.mp4,x,train,,", "row 4: path is"),
        ("a//x.mp4,x,train,,", "row 4: path is"),
        ("a/./x.mp4,x,train,,", "row 4: path is"),
        ("..,x,train,,", "row 4: path is"),
        ("a/,x,train,,", "row 4: path is"),
        (",x,train,,", "row 4: path is ''"),
        ("s3://bucket/x.mp4,x,train,,", "row 4: path is"),
        ("C:\\x.mp4,x,train,,", "row 4: path is"),
        ("a\\x.mp4,x,train,,", "row 4: path is"),
        ("a\0b.mp4,x,train,,", "row 4: path is 'a\\x00b.mp4'; expected printable text"),
        ("a\x1b[2Jb.mp4,x,train,,", "row 4: path is"),
        ("a\u202eb.mp4,x,train,,", "row 4: path is"),
        ('"a\nb.mp4",x,train,,', "row 4"),
        (f"{'a' * 1001},x,train,,", "row 4: path is"),
        ("a.mp4,x,train,2,1", "row 4: end is '1'; expected more seconds than the start"),
        ("a.mp4,x,train,1,1", "row 4: end is '1'"),
        ("a.mp4,x,train,,0", "row 4: end is '0'"),
        ("a.mp4,x,train,-1,1", "row 4: start is '-1'; expected seconds such as 12.5"),
        ("a.mp4,x,train,nan,1", "row 4: start is 'nan'"),
        ("a.mp4,x,train,1,inf", "row 4: end is 'inf'"),
        ("a.mp4,x,train,1e3,2e3", "row 4: start is '1e3'"),
        ("a.mp4,x,train,99999999999999999999,", "row 4: start is"),
        ("a.mp4,x,train,0x10,", "row 4: start is"),
        ("a.mp4,,train,,", "row 4: label is ''; expected a label, since only videos of the split test"),
        ("a.mp4,  ,val,,", "row 4: label is"),
        ("a.mp4,-1,train,,", "row 4: label is '-1'; expected text, or a whole number from 0"),
        ("a.mp4,NaN,train,,", "row 4: label is 'NaN'"),
        ("a.mp4,1.0,train,,", "row 4: label is '1.0'"),
        ("a.mp4,99999999999999999999999,train,,", "row 4: label is"),
        ("a.mp4,x\x07y,train,,", "row 4: label is"),
        ("a.mp4,xx,test,,", "row 4: label is 'xx'; expected a label that a training video has (did you mean x?)"),
        ("a.mp4,x,trian,,", "row 4: split is 'trian'; expected train, validation or test"),
        ("a.mp4,x,,,", "row 4: split is ''"),
        ("good.mp4,x,train,,", "rows 2 and 4 both list the video 'good.mp4'"),
        ("a.mp4,x,train", "row 4 has 3 cells; expected 5, as in the header"),
        ("a.mp4,x, y,train,,", "row 4 has 6 cells; expected 5"),
        ('"a.mp4,x,train,,', "row 4"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_one_error_that_names_it(tmp_path: Path, row: str, expected: str) -> None:
    message = message_of(lambda: read(tmp_path, f"{HEAD}{GOOD}\n{row}\nlast.mp4,x,train,,\n"))
    assert expected in message
    assert message.startswith("videos.csv row")


def test_rows_that_are_no_utf_8_are_named(tmp_path: Path) -> None:
    assert "videos.csv row 3 is not UTF-8" in message_of(lambda: read(tmp_path, f"{HEAD}{GOOD}".encode() + b"\xff,x,train,,\n"))
    assert "not UTF-8" in message_of(lambda: read(tmp_path, f"{HEAD}{GOOD}".encode("utf-16")))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is no readable csv file"),
        ("path,label\n", "lists no video"),
        ("path,labels\na.mp4,x\n", "has the column 'labels'; did you mean label?"),
        ("path,label,label\na.mp4,x,x\n", "has the column label twice"),
        ("path;label\na.mp4;x\n", "begins with 'path;label'; expected columns that commas separate"),
        ("label\nx\n", "has no column path; found 'label'"),
        ("a.mp4,x\nb.mp4,x\n", "has the column 'a.mp4'"),
        ("path,label,split\na.mp4,x,test\n", "lists no video of the split train"),
        ("path,label,split\na.mp4,,test\n", "labels no video"),
        ("path,label,video_id\na.mp4,x,1\nb.mp4,x,1\n", "rows 2 and 3 both list the video '1'"),
        ("path,label,video_id\na.mp4,x,\n", "row 2: video_id is ''"),
    ],
)
def test_a_wrong_file_is_one_error(tmp_path: Path, content: str, expected: str) -> None:
    assert expected in message_of(lambda: read(tmp_path, content))


def test_a_wrong_parquet_file_is_one_error(tmp_path: Path) -> None:
    parquet = CSV.model_copy(update={"annotations": "videos.parquet"})
    path = tmp_path / "videos.parquet"

    def says(columns: dict[str, Any], expected: str) -> None:
        pq.write_table(pa.table(columns), path)
        assert expected in message_of(lambda: index_videos(parquet, tmp_path))

    says({"path": ["a.mp4"], "label": [[1]]}, "column label is of type list")
    says({"path": [1], "label": ["x"]}, "column path is of type int64")
    says({"path": ["a.mp4", None], "label": ["x", "x"]}, "videos.parquet row 2: path is None")
    says({"path": ["a.mp4"], "label": ["x"], "start": [float("nan")]}, "row 1: start is nan")
    says({"path": ["a.mp4"], "label": ["x"], "start": [-1.0]}, "row 1: start is -1.0")
    says({"path": ["a.mp4"], "label": [-1]}, "row 1: label is -1")
    path.write_bytes(b"PAR1 no")
    assert "is no readable Parquet file" in message_of(lambda: index_videos(parquet, tmp_path))
    path.unlink()
    assert "videos.parquet cannot be read" in message_of(lambda: index_videos(parquet, tmp_path))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=80), st.text(max_size=80).map(lambda text: f"path,label\n{text}".encode("utf-8", "replace"))
    )
)
def test_arbitrary_bytes_are_read_or_one_data_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    root = tmp_path_factory.getbasetemp()
    with contextlib.suppress(DataError):
        for path in read(root, data, val_fraction=0.0).videos["path"].to_pylist():
            assert not os.path.isabs(path)  # noqa: PTH117
            assert ".." not in path.split("/")
            assert "\0" not in path


@given(
    names=st.lists(
        st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=20),
        min_size=1,
        max_size=9,
        unique=True,
    )
)
@settings(max_examples=60)
def test_printable_ids_of_any_script_get_their_own_key(names: list[str]) -> None:
    columns = {"video_id": names, "path": names, "kind": ["video"] * len(names), "split": ["train"] * len(names)}
    columns |= {"label": [0] * len(names), "start": [None] * len(names), "end": [None] * len(names)}
    plans = plan_shards(pa.table(columns), videos_per_shard=100, seed=0)
    assert len({video.key for video in plans[0].videos}) == len(names)


@settings(max_examples=60)
@given(paths=st.lists(st.text("abc/", min_size=1, max_size=6), min_size=2, max_size=30, unique=True), seed=st.integers(0, 99))
def test_a_drawn_split_depends_on_the_seed_and_the_path_alone(paths: list[str], seed: int) -> None:
    with contextlib.suppress(DataError):
        splits = dict(zip(paths, draw_splits(paths, 0.5, seed), strict=True))
        some = paths[: len(paths) // 2 + 1]
        with contextlib.suppress(DataError):
            assert draw_splits(some[::-1], 0.5, seed) == [splits[path] for path in some[::-1]]


def test_drawn_splits_have_the_share_that_was_asked_for_and_keep_windows_together(tmp_path: Path) -> None:
    paths = [f"{number}.mp4" for number in range(20_000)]
    assert 0.09 < draw_splits(paths, 0.1, 0).count("validation") / len(paths) < 0.11
    assert draw_splits(paths, 0.1, 0) != draw_splits(paths, 0.1, 1)
    assert set(draw_splits(paths[:3], 0.0, 0)) == {"train"}
    assert "none was drawn for validation" in message_of(lambda: draw_splits(paths[:2], 0.001, 0))
    rows = "".join(f"{number}.mp4,x,{start},{start + 1}\n" for number in range(50) for start in range(4))
    index = read(tmp_path, f"path,label,start,end\n{rows}")
    pairs = set(zip(index.videos["path"].to_pylist(), index.videos["split"].to_pylist(), strict=True))
    assert len(pairs) == 50


def test_a_folder_a_class_is_read(tmp_path: Path) -> None:
    make(tmp_path, *(f"{label}/{number}.mp4" for label in ("run", "a jump") for number in range(30)), "run/frames/00001.jpg")
    make(tmp_path, "run/.DS_Store", "README.txt", ".git/x")
    index = index_videos(DatasetSettings(name="folder"), tmp_path)
    assert index.label_names == ["a jump", "run"]
    assert index.videos.num_rows == 61
    rows = {row["video_id"]: row for row in index.videos.to_pylist()}
    assert rows["run/frames"]["kind"] == "frames"
    assert rows["a jump/7.mp4"] | {"split": ""} == {
        "video_id": "a jump/7.mp4", "path": "a jump/7.mp4", "kind": "video", "split": "", "label": 0, "start": None, "end": None
    }  # fmt: skip
    assert set(index.videos["split"].to_pylist()) == {"train", "validation"}


def test_folders_of_splits_are_read(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.mp4", "train/b/1.mp4", "val/a/1.mp4", "test/b/2.mp4")
    index = index_videos(DatasetSettings(name="folder"), tmp_path)
    pairs = zip(index.videos["video_id"].to_pylist(), index.videos["split"].to_pylist(), strict=True)
    assert dict(pairs) == {
        "train/a/1.mp4": "train", "train/b/1.mp4": "train", "val/a/1.mp4": "validation", "test/b/2.mp4": "test"
    }  # fmt: skip
    make(tmp_path, "val/aa/1.mp4")
    message = message_of(lambda: index_videos(DatasetSettings(name="folder"), tmp_path))
    assert "no training video has the label 'aa'; did you mean a?" in message
    make(tmp_path, "other/x.mp4")
    assert "expected either <class>/<video> or" in message_of(lambda: index_videos(DatasetSettings(name="folder"), tmp_path))


def test_wrong_folders_are_one_error(tmp_path: Path) -> None:
    def says() -> str:
        return message_of(lambda: index_videos(DatasetSettings(name="folder"), tmp_path / "root"))

    assert "is no readable folder" in says()
    (tmp_path / "root").mkdir()
    assert "hold no video" in says()
    (tmp_path / "root" / "run").mkdir()
    assert "hold no video" in says()
    (tmp_path / "root" / "run" / "a\nb.mp4").write_bytes(b"")
    assert "expected printable text" in says()
    (tmp_path / "root" / "run" / "a\nb.mp4").unlink()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/root/run/\xff.mp4")).write_bytes(b"")
    assert "expected printable text" in says()


def test_the_listing_changes_with_videos_and_rows(tmp_path: Path) -> None:
    make(tmp_path, *(f"{label}/{number}.mp4" for label in "ab" for number in range(30)))
    folders, listed = (DatasetSettings(name="folder", root=str(tmp_path), annotations=name) for name in (None, "videos.csv"))
    read(tmp_path, "path,label,split\na/1.mp4,x,train\nnowhere/2.mp4,x,train\n")
    before = raw_listing(folders), raw_listing(listed)
    assert (raw_listing(folders), raw_listing(listed)) == before
    make(tmp_path, "b/more.mp4")
    assert raw_listing(folders) != before[0]
    assert raw_listing(listed) == before[1]
    (tmp_path / "a" / "1.mp4").write_bytes(b"longer")
    assert raw_listing(listed) != before[1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"annotations": "../videos.csv"}, "expected a file in dataset.root"),
        ({"annotations": "/videos.csv"}, "expected a file in dataset.root"),
        ({"archive": "a/b.tar", "annotations": "x.csv"}, "expected a file in dataset.root"),
        ({"archive": "b.tar"}, "archive without annotations"),
        ({"version": "V1"}, "version is for diving48, not for folder"),
        ({"val_fraction": 1.0}, "less than 1"),
        ({"root": "ftp://x/y"}, "expected"),
        ({"synthetic": {}}, "synthetic makes something_v1 or diving48"),
        ({"name": "diving48", "annotations": "x.csv"}, "annotations is for the dataset folder, not for diving48"),
        ({"name": "something_v1", "split_seed": 3}, "split_seed is for the dataset folder"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        DatasetSettings.model_validate({"name": "folder"} | changes)


def test_the_split_that_training_is_validated_on() -> None:
    assert val_split("folder", ["train", "validation", "test"]) == "validation"
    assert val_split("folder", ["train", "test"]) == "test"
    assert {val_split(name, []) for name in ("diving48", "diving48_v1")} == {"test"}
    assert val_split("something_v1", []) == "validation"


_MILLION = r"""
    import re, sys, time
    from pathlib import Path
    from preprocessing.datasets import DatasetSettings, index_videos
    started = time.perf_counter()
    root, name, annotations = sys.argv[1:]
    index = index_videos(DatasetSettings(name=name, annotations=annotations or None), root)
    seconds = time.perf_counter() - started
    # Not getrusage: its peak is inherited from the process that forked this one, here a whole test session.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    print(index.videos.num_rows, len(index.label_names), f"{seconds:.2f}", peak)
"""


def measure(root: Path, name: str, annotations: str) -> tuple[int, int, float, int]:
    """Index a dataset in a process of its own: rows, classes, seconds, and the peak of memory in kB."""
    command = [sys.executable, "-c", textwrap.dedent(_MILLION), str(root), name, annotations]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    rows, classes, seconds, kilobytes = done.stdout.split()
    print(f"{name} {annotations}: {rows} rows in {seconds} s, peak {int(kilobytes) / 1e3:.0f} MB")
    return int(rows), int(classes), float(seconds), int(kilobytes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet", "something_v1"])
def test_a_million_rows_are_indexed_in_modest_memory(tmp_path: Path, kind: str) -> None:
    if kind == "something_v1":
        prefix = "something-something-v1-"
        (tmp_path / f"{prefix}labels.csv").write_text("".join(f"doing number {number}\n" for number in range(174)))
        with (tmp_path / f"{prefix}train.csv").open("w") as file:
            file.writelines(f"{number};doing number {number % 174}\n" for number in range(1_000_000))
        for split in ("validation", "test"):
            (tmp_path / f"{prefix}{split}.csv").write_text("")
        name, annotations = "something_v1", ""
    else:
        name, annotations = "folder", f"videos.{kind}"
        with (tmp_path / "videos.csv").open("w") as file:
            file.write("path,label,start,end\n")
            file.writelines(f"c{n % 500}/clip {n // 2}.mp4,class {n % 500},{n % 2},{n % 2 + 1}.5\n" for n in range(1_000_000))
        if kind == "parquet":
            import pyarrow.csv

            pq.write_table(pyarrow.csv.read_csv(tmp_path / "videos.csv"), tmp_path / "videos.parquet")
    rows, classes, seconds, kilobytes = measure(tmp_path, name, annotations)
    assert rows == 1_000_000
    assert classes in (174, 500)
    assert seconds < 120
    assert kilobytes < 1_500_000
