"""Foreign tars as a shard set: `open_shards` reads what stock webdataset reads, and nothing half done is left behind."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import webdataset

from infra.errors import ConfigError, DataError, PipelineError
from preprocessing.foreign import index_foreign_tars, read_label_names
from preprocessing.index import read_dataset_info, read_index, read_ledger
from preprocessing.reader import FrameReader, open_shards
from preprocessing.verify import verify_shards

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # stock webdataset leaves its files to the collector


def jpeg(number: int) -> bytes:
    pixels = np.full((16, 24, 3), (number * 40 % 256, number * 10 % 256, 90), np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=98, colorsubsampling="444")


def write_tars(folder: Path, names: list[str], per_tar: int = 3, **more: Any) -> dict[str, list[bytes]]:
    """Stock `webdataset.TarWriter`; returns the frames of each video id. Keys repeat from tar to tar."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = {}
    for tar_number, name in enumerate(names):
        with webdataset.TarWriter(str(folder / name)) as sink:
            for number in range(per_tar):
                images = [jpeg(10 * tar_number + number + index) for index in range(2 + number)]
                sample = {f"{index:03d}.jpg": image for index, image in enumerate(images)}
                sink.write({"__key__": f"some/{number:05d}", "cls": number, **sample, **more})
                frames[f"{name}/some/{number:05d}"] = images
    return frames


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("num_threads", [1, 4])
def test_every_sample_is_readable_by_its_offsets(tmp_path: Path, num_threads: int) -> None:
    frames = write_tars(tmp_path, ["train-0.tar", "train-1.tar", "val-0.tar", "test.tar"])
    tars = listing(tmp_path)
    calls: list[tuple[int, int, str]] = []
    names = ["a", "b", "c", "never"]
    counts = index_foreign_tars(
        tmp_path, label_names=names, num_threads=num_threads, on_progress=lambda *call: calls.append(call)
    )
    assert {name: data for name, data in listing(tmp_path).items() if name in tars} == tars
    assert sorted(set(listing(tmp_path)) - set(tars)) == ["dataset.json", "index.parquet", "ledger.parquet"]
    assert (counts["videos"], counts["kept"], counts["rejected"], counts["shards"]) == (12, 12, 0, 4)
    assert [call[:2] for call in calls] == [(done, 4) for done in range(1, 5)]
    ids = {row["key"]: row["video_id"] for row in read_ledger(tmp_path).to_pylist()}
    reader = FrameReader(tmp_path)
    for split, number in (("train", 6), ("validation", 3), ("test", 3)):
        shards = open_shards(tmp_path, split)
        assert (len(shards), shards.label_names) == (number, names)
        for row in range(number):
            video = shards.video(row)
            expected = frames[ids[video.key]]
            assert video.label == int(ids[video.key][-5:])
            assert len(video.frame_sizes) == len(expected)
            for index, image in enumerate(expected):
                assert np.array_equal(reader.read(video, index), simplejpeg.decode_jpeg(image))
    info = read_dataset_info(tmp_path)
    assert (info.settings, info.dataset, info.ffmpeg_version) == ({"foreign": True}, tmp_path.name, "")
    assert {name: (shard.bytes, shard.samples) for name, shard in info.shards.items()} == {
        name: (len(data), 3) for name, data in tars.items()
    }


def test_verify_finds_any_flipped_byte_of_a_foreign_set(tmp_path: Path) -> None:
    write_tars(tmp_path, ["0.tar", "1.tar"])
    index_foreign_tars(tmp_path)
    assert verify_shards(tmp_path) == []
    data = bytearray((tmp_path / "1.tar").read_bytes())
    for place in (0, 600, 1000, len(data) // 2, len(data) - 1):
        damaged = data.copy()
        damaged[place] ^= 1
        (tmp_path / "1.tar").write_bytes(damaged)
        assert any("1.tar" in str(problem) for problem in verify_shards(tmp_path))


def test_the_result_does_not_depend_on_the_threads(tmp_path: Path) -> None:
    write_tars(tmp_path / "one" / "set", [f"{number}.tar" for number in range(7)])
    shutil.copytree(tmp_path / "one", tmp_path / "many")
    for folder, num_threads in (("one", 1), ("many", 5)):
        index_foreign_tars(tmp_path / folder / "set", num_threads=num_threads)
    one, many = listing(tmp_path / "one" / "set"), listing(tmp_path / "many" / "set")
    assert one == many


def test_another_folder_gets_links(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", ["0.tar"])
    index_foreign_tars(tmp_path / "tars", tmp_path / "set")
    assert sorted(listing(tmp_path / "tars")) == ["0.tar"]
    assert (tmp_path / "set" / "0.tar").samefile(tmp_path / "tars" / "0.tar")
    assert open_shards(tmp_path / "set", "train").label_names == ["0", "1", "2"]


def test_another_disk_is_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    write_tars(tmp_path / "tars", ["0.tar"])
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(PipelineError, match=r"cannot be linked into .*Invalid cross-device link; .*leave out --output"):
        index_foreign_tars(tmp_path / "tars", tmp_path / "set")


def test_splits_by_pattern(tmp_path: Path) -> None:
    write_tars(tmp_path, ["a-0.tar", "a-1.tar", "b-0.tar"])
    with pytest.raises(ConfigError, match=r"tar b-0\.tar fits no pattern of a split; expected exactly one"):
        index_foreign_tars(tmp_path, split_patterns={"train": ["a-*"]})
    with pytest.raises(ConfigError, match=r"tar a-1\.tar fits the patterns of train and test"):
        index_foreign_tars(tmp_path, split_patterns={"train": ["a-*"], "test": ["*-1.tar", "b*"]})
    with pytest.raises(ConfigError, match="'dev' is no split; expected train, validation, test"):
        index_foreign_tars(tmp_path, split_patterns={"dev": ["*"]})
    assert len(listing(tmp_path)) == 3
    index_foreign_tars(tmp_path, split_patterns={"train": ["a-*"], "test": ["b*"]})
    assert {name: shard.split for name, shard in read_dataset_info(tmp_path).shards.items()} == {
        "a-0.tar": "train",
        "a-1.tar": "train",
        "b-0.tar": "test",
    }


def test_a_shard_set_is_not_overwritten(tmp_path: Path, tiny_shard_dir: Path) -> None:
    before = listing(tiny_shard_dir)
    with pytest.raises(PipelineError, match="is a shard set already"):
        index_foreign_tars(tiny_shard_dir)
    assert listing(tiny_shard_dir) == before
    write_tars(tmp_path, ["0.tar"])
    index_foreign_tars(tmp_path)
    with pytest.raises(PipelineError, match="is a shard set already"):
        index_foreign_tars(tmp_path)


def test_our_own_tars_can_be_indexed_too(tmp_path: Path, tiny_shard_dir: Path) -> None:
    for path in tiny_shard_dir.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index_foreign_tars(tmp_path, label_names=read_dataset_info(tiny_shard_dir).label_names)
    columns = ["shard", "split", "label", "num_frames", "height", "width"]
    columns += ["sample_offset", "sample_bytes", "sample_crc32", "frame_offsets", "frame_sizes", "frame_crc32"]
    ours = read_index(tiny_shard_dir).select(columns).sort_by([("shard", "ascending"), ("sample_offset", "ascending")])
    assert read_index(tmp_path).select(columns).to_pylist() == ours.to_pylist()


def test_too_many_bad_samples_are_refused_with_their_reasons(tmp_path: Path) -> None:
    write_tars(tmp_path, ["0.tar"], **{"001.jpg": b"no picture"})
    with pytest.raises(DataError, match=r"^3 of 3 samples \(100\.0%\) cannot be used: 3 not_jpeg; .*First: 0\.tar/some/00000"):
        index_foreign_tars(tmp_path, max_bad_fraction=1.0)
    assert sorted(listing(tmp_path)) == ["0.tar", "ledger.parquet"]
    write_tars(tmp_path, ["1.tar", "2.tar"])
    with pytest.raises(DataError, match=r"3 of 9 samples .*accept them with --max-bad-fraction 0\.334"):
        index_foreign_tars(tmp_path)
    counts = index_foreign_tars(tmp_path, max_bad_fraction=0.334)
    assert (counts["kept"], counts["by_reason"], counts["by_split"]) == (
        6,
        {"not_jpeg": 3},
        {"train": {"kept": 6, "rejected": 3}},
    )
    assert len(open_shards(tmp_path, "train")) == 6
    assert set(read_ledger(tmp_path)["status"].to_pylist()) == {"kept", "rejected"}


def test_a_damaged_tar_leaves_nothing_behind(tmp_path: Path) -> None:
    write_tars(tmp_path, ["0.tar", "1.tar", "2.tar"])
    with (tmp_path / "1.tar").open("r+b") as file:
        file.truncate(5000)
    before = listing(tmp_path)
    with pytest.raises(DataError, match=r"1\.tar"):
        index_foreign_tars(tmp_path)
    assert listing(tmp_path) == before


def test_folders_without_tars(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder; expected one that holds WebDataset tars"):
        index_foreign_tars(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no file named \*\.tar"):
        index_foreign_tars(tmp_path)
    with webdataset.TarWriter(str(tmp_path / "0.tar")):
        pass
    with pytest.raises(DataError, match="hold no sample; expected files named KEY"):
        index_foreign_tars(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "pwned"
    payload = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    sample = {"__key__": "a", "jpg": jpeg(0), "cls": b"0", "pyd": payload, "pkl": payload, "pickle": payload, "pth": payload}
    (tmp_path / "set").mkdir()
    with webdataset.TarWriter(str(tmp_path / "set" / "0.tar"), encoder=False) as sink:
        sink.write(sample)
    assert index_foreign_tars(tmp_path / "set")["kept"] == 1
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", '["b", "a c"]'), ("a.json", '{"names": ["b", "a c"], "passport": "x"}'), ("a.txt", "b\na c\n")],
)
def test_label_names_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_label_names(tmp_path / name) == ["b", "a c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("3", "holds no list of label names"),
        ("[]", "holds no list of label names"),
        ('["a", 1]', "holds no list of label names"),
        ('["a", " "]', "holds no list of label names"),
        ('["a", "b", "a"]', "holds the label 'a' twice"),
        ("[" * 200_000, "cannot be read"),
    ],
)
def test_label_names_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_label_names(tmp_path / "a.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_label_names(tmp_path / "b.json")
