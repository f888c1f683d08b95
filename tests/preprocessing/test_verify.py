"""Every damage to a shard set is found, by `verify_shards` and by the reader, and named."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import webdataset

from infra.errors import DataError
from infra.storage import sha256_file
from preprocessing import verify
from preprocessing.datasets import VIDEO_SCHEMA, VideoIndex
from preprocessing.finish import finish_shard_set
from preprocessing.index import INDEX_SCHEMA, LEDGER_SCHEMA, FileInfo, dataset_json, read_dataset_info, read_index, read_ledger
from preprocessing.planning import plan_shards, sidecar_name
from preprocessing.reader import FrameReader, open_shards
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.verify import Problem, verify_shards

SETTINGS = ShardSettings(videos_per_shard=3, max_bad_fraction=0.5)

# webdataset does, the files that it reads
FORGETS_TO_CLOSE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of three training videos of two frames each, and one without any sample. Who changes it, restores it."""
    root, output_dir = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("shards")
    rows = []
    for number in range(7):
        video_id, split = f"v{number}", "train" if number < 6 else "test"
        rows.append({"video_id": video_id, "path": video_id, "kind": "frames", "split": split, "label": number % 2})
        for frame in range(2 if split == "train" else 0):
            (root / video_id).mkdir(exist_ok=True)
            pixels = np.random.default_rng(number * 2 + frame).integers(0, 256, (8, 12, 3), dtype=np.uint8)
            (root / video_id / f"{frame + 1:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=60))
    index = VideoIndex(videos=pa.Table.from_pylist(rows, schema=VIDEO_SCHEMA), label_names=["left", "right"])
    plans = plan_shards(index.videos, videos_per_shard=SETTINGS.videos_per_shard, seed=SETTINGS.seed)
    for plan in plans:
        write_shard(plan, FolderSource(root), output_dir, SETTINGS)
    finish_shard_set(output_dir, index, plans, SETTINGS, "something_v1")
    return output_dir


@pytest.fixture
def copy(shard_set: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage for good."""
    return Path(shutil.copytree(shard_set, tmp_path / "shards"))


def restamp(folder: Path) -> None:
    """Make dataset.json and the sidecars vouch for whatever lies in the folder now."""
    info = read_dataset_info(folder)
    files = {name: FileInfo(sha256=sha256_file(folder / name), bytes=(folder / name).stat().st_size) for name in info.files}
    shards = {
        name: shard.model_copy(update={"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size})
        for name, shard in info.shards.items()
    }
    (folder / "dataset.json").write_bytes(dataset_json(info.model_copy(update={"files": files, "shards": shards})))
    for name, shard in shards.items():
        rows = pq.read_table(folder / sidecar_name(name))
        commit = json.loads(rows.schema.metadata[b"sagsm.shard"]) | {"tar_sha256": shard.sha256, "tar_bytes": shard.bytes}
        pq.write_table(rows.replace_schema_metadata({"sagsm.shard": json.dumps(commit)}), folder / sidecar_name(name))


def change_index(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    rows = read_index(folder).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), folder / "index.parquet")
    restamp(folder)


def change_ledger(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    rows = read_ledger(folder).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA), folder / "ledger.parquet")
    restamp(folder)


def texts(folder: Path) -> list[str]:
    return [str(problem) for problem in verify_shards(folder)]


def reader_errors(folder: Path) -> list[str]:
    """What a reader says of all samples of the training split."""
    try:
        split = open_shards(folder, "train")
    except DataError as error:
        return [str(error)]
    errors, reader = [], FrameReader(split)
    for row in range(len(split)):
        try:
            reader.read_sample(split.video(row))
        except DataError as error:
            errors.append(str(error))
    return errors


def damages(data: bytes, spans: list[tuple[int, int]], rng: np.random.Generator, number: int) -> list[bytes]:
    """Flipped bits (in headers, frames, labels, padding and the end), cuts, and tails that became zeros."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [member.offset for member in tar.getmembers()]
    regions = [lambda: int(rng.integers(len(data))), lambda: int(rng.choice(members) + rng.integers(512))]
    regions += [lambda: int(rng.integers(spans[-1][1], len(data)))]
    damaged: list[bytes] = []
    while len(damaged) < number:
        kind = len(damaged) % 10
        place = regions[kind % 3]()
        if kind < 6:
            changed = bytearray(data)
            changed[place] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(changed))
        elif kind < 8:
            damaged.append(data[:place])
        elif zeroed := data[:place].ljust(len(data), b"\0"):
            damaged += [zeroed] if zeroed != data else [data[: place // 512 * 512]]
    return damaged


def test_a_thousand_damages_of_tars_are_found_and_named(shard_set: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train-000000.tar", "train-000001.tar"):
        path = shard_set / name
        data = path.read_bytes()
        rows = [row for row in read_index(shard_set, "train").to_pylist() if row["shard"] == name]
        spans = {row["key"]: (row["sample_offset"], row["sample_offset"] + row["sample_bytes"]) for row in rows}
        try:
            for damaged in damages(data, list(spans.values()), rng, 500):
                path.write_bytes(damaged)
                hurt = {key for key, (start, end) in spans.items() if data[start:end] != damaged[start:end]}
                problems = verify_shards(shard_set)
                assert problems
                assert {problem.shard for problem in problems} == {name}
                assert {problem.key for problem in problems} - {""} == hurt
                errors = reader_errors(shard_set)
                assert errors
                assert all(name in error for error in errors)
                if len(damaged) == len(data):  # else the shard is not even opened
                    assert {key for key in spans for error in errors if key in error} == hurt
        finally:
            path.write_bytes(data)
    assert verify_shards(shard_set) == reader_errors(shard_set) == []


def test_a_sidecar_that_is_damaged_missing_or_of_another_shard_is_found(copy: Path) -> None:
    """Reading needs none, but a shard without it cannot be healed."""
    sidecar, other = copy / "train-000001.parquet", (copy / "train-000000.parquet").read_bytes()
    data = sidecar.read_bytes()
    for damage in (lambda: sidecar.write_bytes(data[:-100]), lambda: sidecar.write_bytes(other), sidecar.unlink):
        damage()
        assert [problem.shard for problem in verify_shards(copy)] == ["train-000001.tar"]


@pytest.mark.parametrize("name", ["index.parquet", "ledger.parquet", "dataset.json"])
def test_flipped_bits_and_cuts_of_the_books_are_found(shard_set: Path, name: str) -> None:
    rng = np.random.default_rng(1)
    path = shard_set / name
    data = path.read_bytes()
    read = read_ledger if name == "ledger.parquet" else lambda folder: open_shards(folder, "train")
    bits = rng.choice(8 * len(data), 300, replace=False).tolist()
    try:
        for bit in bits:
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            if bit % 10 == 0:
                damaged = damaged[: bit // 8]
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=name):
                read(shard_set)
            if name == "dataset.json":
                with pytest.raises(DataError, match=name):
                    verify_shards(shard_set)
            else:
                assert [name in text for text in texts(shard_set)] == [True]
    finally:
        path.write_bytes(data)
    assert verify_shards(shard_set) == []


def test_no_part_of_dataset_json_is_left_unchecked(shard_set: Path) -> None:
    path = shard_set / "dataset.json"
    data = path.read_bytes()
    try:
        for byte in range(0, len(data), 5):
            damaged = bytearray(data)
            damaged[byte] ^= 1 << byte % 8
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"dataset\.json"):
                read_dataset_info(shard_set)
    finally:
        path.write_bytes(data)


@FORGETS_TO_CLOSE
def test_stock_readers_read_every_shard(shard_set: Path) -> None:
    for path in sorted(shard_set.glob("*.tar")):
        rows = [row for row in read_index(shard_set).to_pylist() if row["shard"] == path.name]
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode("pil"))
        assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
        for sample, row in zip(samples, rows, strict=True):
            assert [sample[f"{frame:06d}.jpg"].size for frame in range(row["num_frames"])] == [(12, 8)] * 2
            assert sample["json"]["label"] == row["label"]
        listed = subprocess.run(["tar", "-tf", str(path)], capture_output=True, check=True, text=True)
        assert (len(listed.stdout.splitlines()), listed.stderr) == (3 * len(rows), "")


@FORGETS_TO_CLOSE
def test_stock_readers_lose_samples_in_silence(copy: Path) -> None:
    path = copy / "train-000000.tar"
    second = read_index(copy, "train").to_pylist()[1]
    data = bytearray(path.read_bytes())
    data[second["sample_offset"] + 148] ^= 1  # a digit of the header's checksum
    path.write_bytes(data)
    stock = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert len(stock) < 3
    assert texts(copy) == [
        "train-000000.tar has another SHA-256 than dataset.json says",
        f"train-000000.tar: sample {second['key']} (bytes {second['sample_offset']} to "
        f"{second['sample_offset'] + second['sample_bytes']}) has another checksum than the index says",
        f"train-000000.tar: the header of frame 0 of {second['key']} is damaged",
    ]


def test_missing_and_unlisted_shards_are_named(copy: Path) -> None:
    shutil.copy(copy / "train-000000.tar", copy / "train-000099.tar")
    (copy / "train-000001.tar").unlink()
    assert verify_shards(copy) == [
        Problem("train-000099.tar is not listed in dataset.json", "train-000099.tar"),
        Problem("train-000001.tar is missing", "train-000001.tar"),
    ]


def test_bytes_after_the_end_are_found(copy: Path) -> None:
    path = copy / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert texts(copy)[1].startswith("train-000000.tar does not end cleanly after its last sample, at byte ")
    path.write_bytes(path.read_bytes()[:-1] + bytes(513))
    restamp(copy)
    assert len(texts(copy)) == 0, "more zeros are no damage, if dataset.json knows of them"
    split = open_shards(copy, "train")
    FrameReader(split).read_sample(split.video(0))
    path.write_bytes(path.read_bytes() + bytes(20_480))
    restamp(copy)
    with pytest.raises(
        DataError, match=r"the end in .*train-000000\.tar cannot be read: found \d+ bytes after its last sample"
    ):
        FrameReader(open_shards(copy, "train")).read_sample(split.video(0))


def test_shards_are_checked_without_an_index(copy: Path) -> None:
    (copy / "index.parquet").unlink()
    path = copy / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    problems = verify_shards(copy)
    assert "index.parquet is missing" in str(problems[0])
    assert [problem.shard for problem in problems] == ["", "train-000001.tar", "train-000001.tar"]
    assert "no valid member header at byte 0" in str(problems[2])


def swap(row: dict[str, Any], **values: Any) -> None:
    row.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["frame_offsets"].reverse(), "frame 0 of {key} is not where the index says"),
        (lambda row: row["frame_sizes"].__setitem__(1, 10**6), "frame 1 of {key} is not where the index says"),
        (lambda row: row["frame_crc32"].__setitem__(1, 7), "frame 1 of {key} has another checksum than the index says"),
        (lambda row: swap(row, sample_offset=0, sample_bytes=10**9), "sample {key} is not where the index says, it overlaps"),
        (lambda row: swap(row, sample_crc32=7), "sample {key} (bytes "),
        (lambda row: swap(row, height=9), "frame 0 of {key} has 12 x 8 pixels, the index says 12 x 9"),
        (lambda row: swap(row, label=None), "the label file of {key} is damaged, or says something else than the index"),
        (lambda row: swap(row, split="test"), "the index row of {key} contradicts itself or dataset.json"),
        (lambda row: swap(row, num_frames=3), "the index row of {key} contradicts itself or dataset.json"),
        (lambda row: row["frame_sizes"].pop(), "the index row of {key} contradicts itself or dataset.json"),
        (lambda row: swap(row, width=None), "the index row of {key} contradicts itself or dataset.json"),
    ],
)
def test_an_index_that_lies_is_found(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    row = read_index(copy).to_pylist()[-2]
    change_index(copy, lambda rows: change(rows[-2]))
    problems = verify_shards(copy)
    assert any(message.format(key=row["key"]) in str(problem) for problem in problems)
    assert row["key"] in {problem.key for problem in problems}


def test_lost_doubled_and_moved_rows_are_found(copy: Path) -> None:
    lost = read_index(copy).to_pylist()[-1]
    change_index(copy, lambda rows: rows.pop())
    assert texts(copy)[0] == f"the ledger keeps 6 videos, the index holds 5, and their keys differ, for example {lost['key']}"
    assert "train-000001.tar holds 3 samples by dataset.json, the index has 2" in texts(copy)
    change_index(copy, lambda rows: rows.insert(0, rows.pop()))
    assert "the rows of train-000001.tar are not next to each other in the index" in texts(copy)
    change_index(copy, lambda rows: rows[0].update(shard="foreign.tar"))
    assert "the index names foreign.tar, dataset.json does not" in texts(copy)


def test_a_ledger_that_does_not_balance_is_found(copy: Path) -> None:
    change_ledger(copy, lambda rows: rows.append(rows[0]))
    video_id = read_ledger(copy)["video_id"][0].as_py()
    assert texts(copy)[:2] == [
        "the ledger has 8 rows, dataset.json counts 7 videos",
        f"the ledger lists a video twice, for example {video_id}",
    ]


def test_a_frame_that_does_not_decode_is_found_though_all_checksums_hold(copy: Path) -> None:
    path = copy / "train-000000.tar"
    data = bytearray(path.read_bytes())
    row = read_index(copy, "train").to_pylist()[0]
    start = row["frame_offsets"][1] + row["frame_sizes"][1] - 30
    data[start : start + 30] = bytes(30)
    path.write_bytes(data)

    def vouch(rows: list[dict[str, Any]]) -> None:
        begin, end = row["sample_offset"], row["sample_offset"] + row["sample_bytes"]
        rows[0]["sample_crc32"] = zlib.crc32(data[begin:end])
        rows[0]["frame_crc32"][1] = zlib.crc32(data[row["frame_offsets"][1] :][: row["frame_sizes"][1]])

    change_index(copy, vouch)
    (problem,) = verify_shards(copy)
    assert (problem.shard, problem.key) == ("train-000000.tar", row["key"])
    assert f"frame 1 of {row['key']} does not decode: " in str(problem)


def test_progress_is_told_shard_by_shard(shard_set: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    verify_shards(str(shard_set), lambda *call: calls.append(call))
    assert calls == [(number, 3, "shards verified") for number in (1, 2, 3)]


def test_a_failing_disk_is_a_problem_of_the_shard(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, file: object, rows: object) -> list[Problem]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verify._ShardCheck, "run", fail)
    assert texts(shard_set)[0] == "train-000000.tar cannot be read: [Errno 5] Input/output error"


def test_tars_made_elsewhere_are_judged_by_checksums_alone(copy: Path) -> None:
    content = json.loads((copy / "dataset.json").read_text())
    info = read_dataset_info(copy)
    assert content["checksum"]
    # Other headers, and members between the samples that the index does not know.
    path = copy / "train-000000.tar"
    old = path.read_bytes()
    buffer = io.BytesIO()
    rows = read_index(copy).to_pylist()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for row in rows[:3]:
            for name, start, size in (
                ("README", 0, 700),
                *(
                    (f"{row['key']}.{number}.jpg", *place)
                    for number, place in enumerate(zip(row["frame_offsets"], row["frame_sizes"], strict=True))
                ),
            ):
                member = tarfile.TarInfo(name)
                member.size, member.mtime = size, 123
                tar.addfile(member, io.BytesIO(old[start : start + size]))
    data = buffer.getvalue()
    path.write_bytes(data)

    def point(rows: list[dict[str, Any]]) -> None:
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar.getmembers()}
        for row in rows[:3]:
            first, last = (members[f"{row['key']}.{number}.jpg"] for number in (0, 1))
            row["frame_offsets"] = [first.offset_data, last.offset_data]
            row["sample_offset"] = first.offset
            row["sample_bytes"] = last.offset_data + last.size + -last.size % 512 - first.offset
            row["sample_crc32"] = zlib.crc32(data[first.offset :][: row["sample_bytes"]])

    (copy / "dataset.json").write_bytes(dataset_json(info.model_copy(update={"settings": {"foreign": True}})))
    change_index(copy, point)
    assert verify_shards(copy) == reader_errors(copy) == []
    damaged = bytearray(data)
    damaged[read_index(copy, "train")["sample_offset"][0].as_py() + 3] ^= 1
    path.write_bytes(damaged)
    assert {problem.key for problem in verify_shards(copy)} == {"", rows[0]["key"]}
    assert len(reader_errors(copy)) == 1
    assert hashlib.sha256(damaged).hexdigest() != hashlib.sha256(data).hexdigest()
