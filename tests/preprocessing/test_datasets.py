"""Annotation files of both datasets: what is read, and what is said when they are wrong."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import ConfigError, DataError
from preprocessing.datasets import (
    DatasetSettings,
    VideoIndex,
    find_archive,
    index_videos,
    load_video_index,
    raw_listing,
    save_video_index,
)
from preprocessing.labels import label_passport, mirror_labels
from preprocessing.synthetic import SyntheticSettings

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_annotations = pytest.mark.skipif(
    not (SHARED / "annotations").is_dir(), reason="the genuine annotation files are not on this machine"
)

SOMETHING = DatasetSettings(name="something_v1")
DIVING = DatasetSettings(name="diving48")
CSV = "something-something-v1-{}.csv"
SOMETHING_DIR = "20bn-something-something-v1"


@pytest.fixture
def something(tmp_path: Path) -> Path:
    """A Something-V1 root with three labels out of order, one of them with a comma."""
    files = {
        "labels": b"Holding something\nDropping something, softly\nMoving something up\n",
        "train": b"7;Moving something up\n2;Dropping something, softly\n9;Holding something\n",
        "validation": b"4;Holding something\n",
        "test": b"5\n3\n",
    }
    for part, content in files.items():
        (tmp_path / CSV.format(part)).write_bytes(content)
    (tmp_path / "20bn-something-something-v1").mkdir()
    return tmp_path


@pytest.fixture
def diving(tmp_path: Path) -> Path:
    """A Diving48 root with two classes."""
    train = [
        {"vid_name": "-mmq0PT-u8k_00155", "label": 0, "start_frame": 0, "end_frame": 48},
        {"vid_name": "b_00001", "label": 1},
    ]
    (tmp_path / "Diving48_V2_train.json").write_text(json.dumps(train))
    (tmp_path / "Diving48_V2_test.json").write_text(json.dumps([{"vid_name": "c_00002", "label": 1}]))
    (tmp_path / "Diving48_vocab.json").write_text('[["Back", "15som", "PIKE"], ["Forward", "NoTwis"]]')
    (tmp_path / "rgb").mkdir()
    return tmp_path


def message_of(call: Callable[[], object]) -> str:
    """The text of the DataError that `call` must raise."""
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


def test_something_is_read_in_file_order_with_sorted_classes(something: Path) -> None:
    index = index_videos(SOMETHING, something)
    assert index.label_names == ["Dropping something, softly", "Holding something", "Moving something up"]
    strings = [(name, pa.string()) for name in ("video_id", "path", "kind", "split")]
    assert index.videos.schema == pa.schema([*strings, ("label", pa.int32()), ("start", pa.float64()), ("end", pa.float64())])
    columns = index.videos.to_pydict()
    assert columns["video_id"] == ["7", "2", "9", "4", "5", "3"]
    assert columns["label"] == [2, 0, 1, 1, None, None]
    assert columns["split"] == ["train"] * 3 + ["validation"] + ["test"] * 2
    assert columns["path"][0] == "20bn-something-something-v1/7"
    assert set(columns["kind"]) == {"frames"}


def test_diving_is_read_with_vocabulary_order(diving: Path) -> None:
    index = index_videos(DIVING, diving)
    assert index.label_names == ["Back 15som PIKE", "Forward NoTwis"]
    assert index.videos.to_pydict() == {
        "video_id": ["-mmq0PT-u8k_00155", "b_00001", "c_00002"],
        "path": ["rgb/-mmq0PT-u8k_00155.mp4", "rgb/b_00001.mp4", "rgb/c_00002.mp4"],
        "kind": ["video"] * 3,
        "start": [None] * 3,
        "end": [None] * 3,
        "split": ["train", "train", "test"],
        "label": [0, 1, 1],
    }


@pytest.mark.parametrize(
    "change", [lambda data: b"\xef\xbb\xbf" + data, lambda data: data.replace(b"\n", b"\r\n"), bytes.rstrip]
)
def test_byte_order_mark_crlf_and_missing_last_newline_change_nothing(
    something: Path, change: Callable[[bytes], bytes]
) -> None:
    before = index_videos(SOMETHING, something)
    for path in something.glob("*.csv"):
        path.write_bytes(change(path.read_bytes()))
    after = index_videos(SOMETHING, something)
    assert after.videos.equals(before.videos)
    assert after.label_names == before.label_names


def test_json_with_byte_order_mark_is_read(diving: Path) -> None:
    path = diving / "Diving48_vocab.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(index_videos(DIVING, diving).label_names) == 2


def test_a_missing_root_names_what_was_expected() -> None:
    message = message_of(lambda: index_videos(DIVING, Path("/nowhere")))  # short: the message shortens long paths
    assert "'/nowhere' is no readable folder (No such file or directory)" in message
    assert "expected one with Diving48_V2_train.json, Diving48_V2_test.json, Diving48_vocab.json and rgb/" in message
    assert "--set dataset.root=DIR" in message


@pytest.mark.parametrize("root", ["a\0b", "x" * 5000])
def test_an_impossible_root_is_one_error(root: str) -> None:
    assert "is no readable folder" in message_of(lambda: index_videos(DIVING, Path(root)))


def test_a_root_that_is_a_file_is_one_error(something: Path) -> None:
    assert "(Not a directory)" in message_of(lambda: index_videos(SOMETHING, something / CSV.format("test")))


def test_a_missing_csv_names_it_and_what_is_there(something: Path) -> None:
    (something / CSV.format("validation")).unlink()
    for call in (
        lambda: index_videos(SOMETHING, something),
        lambda: raw_listing(SOMETHING.model_copy(update={"root": something})),
    ):
        message = message_of(call)
        assert f"has no {CSV.format('validation')}; expected {CSV.format('labels')}" in message
        assert f"found 20bn-something-something-v1, {CSV.format('labels')}" in message


def test_a_missing_json_names_it(diving: Path) -> None:
    (diving / "Diving48_vocab.json").unlink()
    assert "has no Diving48_vocab.json" in message_of(lambda: index_videos(DIVING, diving))


def test_a_folder_in_place_of_a_csv_is_one_error(something: Path) -> None:
    path = something / CSV.format("test")
    path.unlink()
    path.mkdir()
    assert "cannot be read: Is a directory" in message_of(lambda: index_videos(SOMETHING, something))


@pytest.mark.parametrize(
    ("part", "content", "expected"),
    [
        ("train", b"1;Holding something\n2;Holdin something\n", "train.csv row 2: label 'Holdin something' of video '2' is n"),
        ("train", b"1;Holding something\n2;Holdin something\n", "did you mean Holding something"),
        ("train", b"\n1 Holding something\n", "train.csv row 2 is '1 Holding something'; expected 'id;label text'"),
        ("train", b"8;Holding something\n8;Holding something\n", "video 8 is listed twice: something-something-v1-train.csv r"),
        ("validation", b"7;Holding something\n", "train.csv row 1 and something-something-v1-validation.csv row 1"),
        ("test", b"7\n", "train.csv row 1 and something-something-v1-test.csv row 1"),
        ("train", b"", "train.csv lists no video"),
        ("labels", b"", "labels.csv holds no label"),
        ("labels", b"Holding something\nHolding something\n", "holds the label 'Holding something' twice"),
        ("labels", b"Holding \x1b[2Jsomething\n", r"the label 'Holding \x1b[2Jsomething'; expected printable text"),
        ("train", b"1;Holding something\n2;Holding \xff\n", "train.csv row 2 is not UTF-8"),
        ("test", b"5;Holding something\n", "test.csv row 1: '5;Holding something' is not a video id"),
    ],
)  # fmt: skip
def test_a_wrong_csv_is_one_error_that_names_the_row(something: Path, part: str, content: bytes, expected: str) -> None:
    (something / CSV.format(part)).write_bytes(content)
    assert expected in message_of(lambda: index_videos(SOMETHING, something))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "V2_train",
            '[{"vid_name": "a", "label": 2}]',
            "train.json entry 1: label 2 of video 'a' is out of range; expected 0 to 1",
        ),
        ("V2_train", '[{"vid_name": "a", "label": -1}]', "is out of range"),
        ("V2_train", '[{"vid_name": "a", "label": true}]', "expected an object with a text vid_name and a whole number label"),
        ("V2_train", '[{"vid_name": "a"}]', "expected an object"),
        ("V2_train", '[{"vid_name": 3, "label": 0}]', "expected an object"),
        ("V2_train", "[3]", "Diving48_V2_train.json entry 1 is 3; expected an object"),
        ("V2_train", '[{"vid_name": "a", "label": 0}', "Diving48_V2_train.json is not JSON: "),
        ("V2_train", "[" * 200_000, "is not JSON: "),
        ("V2_train", "[]", "lists no video"),
        ("V2_test", '{"a": 1}', "Diving48_V2_test.json holds a JSON dict; expected a list"),
        ("V2_test", '[{"vid_name": "b_00001", "label": 0}]', "video b_00001 is listed twice: Diving48_V2_train.json row 2"),
        ("vocab", '[["Back"], ["Back"]]', "holds the label 'Back' twice"),
        ("vocab", '["Back"]', "Diving48_vocab.json entry 1 is 'Back'; expected a list of words"),
        ("vocab", "[[]]", "expected a list of words"),
        ("vocab", "[]", "holds no label"),
    ],
)
def test_a_wrong_json_is_one_error_that_names_the_entry(diving: Path, name: str, content: str, expected: str) -> None:
    (diving / f"Diving48_{name}.json").write_text(content)
    assert expected in message_of(lambda: index_videos(DIVING, diving))


HOSTILE = [
    "../x",
    "/etc/passwd",
    "a/b",
    "a\0b",
    "",
    ".",
    "..",
    "a\nb",
    "a\x1b[2Jb",
    "a b",
    " a",
    "a.b",
    "x" * 201,
    "\u0661",
    "a\n",
]


@pytest.mark.parametrize("video_id", HOSTILE)
def test_hostile_ids_are_refused(diving: Path, video_id: str) -> None:
    (diving / "Diving48_V2_test.json").write_text(json.dumps([{"vid_name": video_id, "label": 0}]))
    message = message_of(lambda: index_videos(DIVING, diving))
    assert "Diving48_V2_test.json row 1: " in message
    assert "is not a video id; expected 1 to 200 letters, digits, '_' or '-'" in message
    assert message.isprintable()


@pytest.mark.parametrize("video_id", ["../x", "/x", "a\0b", "", "\x1c7", " 7", "x" * 201])
def test_hostile_ids_in_a_csv_are_refused(something: Path, video_id: str) -> None:
    (something / CSV.format("train")).write_text(f"{video_id};Holding something\n")
    assert "train.csv row 1: " in message_of(lambda: index_videos(SOMETHING, something))


@given(data=st.binary(max_size=60))
def test_arbitrary_bytes_are_read_or_one_data_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    for part in ("labels", "train", "validation", "test"):
        (root / CSV.format(part)).write_bytes(data)
    with contextlib.suppress(DataError):
        index_videos(SOMETHING, root)
    shutil.rmtree(root)


def test_both_sources_are_refused_and_none_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="root and synthetic are both set"):
        DatasetSettings(name="diving48", root=tmp_path, synthetic=SyntheticSettings())
    with pytest.raises(ConfigError, match=r"dataset\.root is not set; .* add --set dataset\.root=DIR"):
        raw_listing(DIVING)


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert DatasetSettings.model_validate({"name": "diving48", "root": "~/data"}).root == "/somewhere/data"
    assert DatasetSettings.model_validate({"name": "diving48", "root": Path("~/data")}).root == "/somewhere/data"


def test_the_versions_of_diving48_are_different_datasets(diving: Path) -> None:
    version_1 = DatasetSettings(name="diving48", version="V1")
    assert "has no Diving48_train.json" in message_of(lambda: index_videos(version_1, diving))
    (diving / "Diving48_train.json").write_text('[{"vid_name": "a_00001", "label": 1, "start_frame": 0, "end_frame": 9}]')
    (diving / "Diving48_test.json").write_text("[]")
    assert index_videos(version_1, diving).videos["video_id"].to_pylist() == ["a_00001"]
    assert (DIVING.dataset_name, version_1.dataset_name) == ("diving48", "diving48_v1")
    assert raw_listing(version_1.model_copy(update={"root": diving})) != raw_listing(DIVING.model_copy(update={"root": diving}))


@pytest.mark.parametrize("settings", [SOMETHING, DIVING])
def test_published_archives_are_found_where_the_folder_is_missing(
    something: Path, diving: Path, settings: DatasetSettings
) -> None:
    folder, parts, pattern = {
        "something_v1": (SOMETHING_DIR, [f"{SOMETHING_DIR}-aa", f"{SOMETHING_DIR}-ab"], f"{SOMETHING_DIR}-??"),
        "diving48": ("rgb", ["Diving48_rgb.tar.gz"], "Diving48_rgb.tar.gz"),
    }[settings.name]
    root = diving  # the same folder as that of the other fixture
    assert find_archive(settings, root) is None
    for part in parts:
        (root / part).write_bytes(b"x")
    assert find_archive(settings, root) is None
    (root / folder).rmdir()
    assert find_archive(settings, root) == pattern
    with_root = settings.model_copy(update={"root": str(root)})
    before = raw_listing(with_root)
    (root / parts[-1]).write_bytes(b"xy")
    assert raw_listing(with_root) != before
    named = settings.model_copy(update={"archive": "other.tar"})
    assert "has no file like 'other.tar'" in message_of(lambda: find_archive(named, root))


def test_an_index_survives_saving_and_a_changed_name_is_noticed(something: Path, tmp_path: Path) -> None:
    index = index_videos(SOMETHING, something)
    folder = tmp_path / "index"
    folder.mkdir()
    save_video_index(index, folder)
    loaded = load_video_index(folder)
    assert loaded.videos.equals(index.videos)
    assert loaded.label_names == index.label_names

    labels = json.loads((folder / "labels.json").read_text())
    assert labels["passport"] == label_passport(index.label_names)
    labels["names"].reverse()
    (folder / "labels.json").write_text(json.dumps(labels))
    assert f"says passport {labels['passport']}, but its names have" in message_of(lambda: load_video_index(folder))
    (folder / "labels.json").unlink()
    assert "cannot be read" in message_of(lambda: load_video_index(folder))


def test_the_listing_changes_with_videos_and_annotations(diving: Path) -> None:
    settings = DatasetSettings(name="diving48", root=diving)
    seen = [raw_listing(settings)]
    assert raw_listing(settings) == seen[0]
    (diving / "rgb" / "a.mp4").write_bytes(b"1")
    seen.append(raw_listing(settings))
    (diving / "rgb" / "a.mp4").write_bytes(b"12")
    seen.append(raw_listing(settings))
    (diving / "rgb" / "a.mp4").rename(diving / "rgb" / "b.mp4")
    seen.append(raw_listing(settings))
    (diving / "Diving48_V2_test.json").write_text("[]")
    seen.append(raw_listing(settings))
    assert len(set(seen)) == 5


def test_the_listing_sees_a_frame_that_is_added(something: Path) -> None:
    settings = DatasetSettings(name="something_v1", root=something)
    folder = something / "20bn-something-something-v1" / "7"
    folder.mkdir()
    before = raw_listing(settings)
    (folder / "00001.jpg").write_bytes(b"1")
    assert raw_listing(settings) != before


def test_the_listing_refuses_a_missing_videos_folder(diving: Path) -> None:
    (diving / "rgb").rmdir()
    index_videos(DIVING, diving)
    message = message_of(lambda: raw_listing(DatasetSettings(name="diving48", root=diving)))
    assert (
        f"the videos' folder {diving / 'rgb'} cannot be read (No such file or directory); found Diving48_V2_test.json"
        in message
    )


def test_the_listing_of_generated_videos_is_their_settings() -> None:
    def listing(name: str, seed: int) -> str:
        return raw_listing(DatasetSettings.model_validate({"name": name, "synthetic": {"seed": seed}}))

    assert listing("diving48", 1) == listing("diving48", 1)
    assert len({listing("diving48", 1), listing("diving48", 2), listing("something_v1", 1)}) == 3


@needs_annotations
def test_genuine_something_v1_counts_classes_and_flip_pairs() -> None:
    started = time.process_time()
    index = index_videos(SOMETHING, SHARED / "annotations" / "something_v1")
    assert time.process_time() - started < 10  # half a second in November 2026
    assert counts(index) == {"train": 86_017, "validation": 11_522, "test": 10_960}
    assert len(index.label_names) == 174
    assert sum("," in name for name in index.label_names) == 12
    swaps = {label: other for label, other in enumerate(mirror_labels(index.label_names)) if label != other}
    assert swaps == {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}
    labels = dict(zip(index.videos["video_id"].to_pylist(), index.videos["label"].to_pylist(), strict=True))
    listed = (SHARED / "annotations" / "something_v1" / "train_frame_counts.txt").read_text().splitlines()
    assert all(labels[video_id] == int(label) for video_id, _, label in map(str.split, listed))


@needs_annotations
def test_genuine_diving48_counts_and_empty_class() -> None:
    index = index_videos(DIVING, SHARED / "annotations" / "diving48")
    assert counts(index) == {"train": 15_027, "test": 1_970}
    assert len(index.label_names) == 48
    assert set(range(48)) - set(index.videos["label"].to_pylist()) == {30}
    assert sum(video_id.startswith("-") for video_id in index.videos["video_id"].to_pylist()) > 100
    assert mirror_labels(index.label_names) == list(range(48))


def counts(index: VideoIndex) -> dict[str, int]:
    """Videos a split."""
    return {item["values"]: item["counts"] for item in index.videos["split"].value_counts().to_pylist()}
