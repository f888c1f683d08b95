"""Videos straight from archives: the same shards as from the unpacked folder, and nothing that a hostile archive asks for."""

import contextlib
import gzip
import io
import itertools
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import DataError
from infra.filesystems import Folder
from preprocessing.archives import PartitionReport, open_source, partition
from preprocessing.datasets import DatasetSettings, find_archive, index_videos, raw_listing
from preprocessing.decode import DecodeSettings, VideoRejectedError
from preprocessing.planning import PlannedVideo, ShardPlan, plan_shards, sample_key
from preprocessing.shards import ShardSettings, write_shard
from preprocessing.sources import FolderSource
from preprocessing.spool import SpoolSource
from preprocessing.synthetic import SyntheticSettings, generate

REAL_MINI = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "real_mini"
NAMES = {
    "something_v1": ("20bn-something-something-v1", "20bn-something-something-v1-a{}"),
    "diving48": ("rgb", "Diving48_rgb.tar.gz"),
}
TOP, LIMIT = "20bn-something-something-v1", 1 << 22


def jpeg(value: int) -> bytes:
    return simplejpeg.encode_jpeg(np.full((16, 24, 3), value, np.uint8), colorspace="RGB")


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def video(path: str, kind: str = "frames") -> PlannedVideo:
    return PlannedVideo(path, sample_key(path), path, kind, 0)


def plan(*videos: PlannedVideo) -> ShardPlan:
    return ShardPlan("train-000000.tar", "train", videos)


def spooled(folder: Path, data: bytes, *videos: PlannedVideo, limit: int = LIMIT) -> tuple[SpoolSource, PartitionReport]:
    """Partition one archive part for one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "part").write_bytes(data)
    (folder / "spool").mkdir(exist_ok=True)
    report = partition(Folder(folder), "part", [plan(*videos)], folder / "spool", max_video_bytes=limit)
    return SpoolSource(folder / "spool"), report


def reason_of(source: SpoolSource, path: str, kind: str = "frames") -> str:
    with pytest.raises(VideoRejectedError) as caught:
        source.read(video(path, kind), "train-000000.tar", DecodeSettings())
    return caught.value.reason


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    assert str(caught.value).isprintable()
    return str(caught.value)


SEVEN = [member(f"{TOP}/7/{number:05d}.jpg", jpeg(number)) for number in (1, 2)]
EIGHT = [member(f"{TOP}/8/{number:05d}.jpg", jpeg(100 + number)) for number in (1, 2)]
IDS = video(f"{TOP}/7"), video(f"{TOP}/8")


def archive_of(name: str, root: Path, target: Path, cuts: list[float]) -> None:
    """Move the videos of a dataset into the parts of a tgz beside its annotation files in `target`."""
    videos_dir, part_name = NAMES[name]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        archive.add(root / videos_dir, arcname=videos_dir)
    data = buffer.getvalue()
    target.mkdir(parents=True)
    for path in root.iterdir():
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    places = [0, *sorted(int(cut * len(data)) for cut in cuts), len(data)]
    for letter, begin, end in zip("abcdefgh", places, places[1:], strict=False):
        (target / part_name.format(letter)).write_bytes(data[begin:end])


def shard_bytes(name: str, root: Path, output: Path, spool: Path) -> dict[str, bytes]:
    """All tars of a dataset; from its folder or, where that is not there, from its archive."""
    dataset = DatasetSettings.model_validate({"name": name, "root": root})
    assert raw_listing(dataset) == raw_listing(dataset)
    shards = ShardSettings(videos_per_shard=8)
    plans = plan_shards(index_videos(dataset, root).videos, videos_per_shard=shards.videos_per_shard, seed=0)
    output.mkdir()
    archive = find_archive(dataset, root)
    source, report = open_source(Folder(root), archive, plans, spool, output, shards)
    assert isinstance(source, SpoolSource) == (archive is not None)
    assert report is None or (report.num_hostile, report.num_strays) == (0, 0)
    for one in plans:
        write_shard(one, source, output, shards)
    return {path.name: path.read_bytes() for path in output.glob("*.tar")}


@pytest.mark.parametrize("name", ["something_v1", "diving48"])
def test_generated_archives_give_the_shards_of_their_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "raw"
    made = SyntheticSettings(num_train=6, num_validation=3, num_test=2, num_broken=5)
    generate(made, root, name)  # type: ignore[arg-type]
    archive_of(name, root, tmp_path / "archived", [0.2, 0.6] if name == "something_v1" else [])
    expected = shard_bytes(name, root, tmp_path / "from_folder", tmp_path / "unused")
    assert shard_bytes(name, tmp_path / "archived", tmp_path / "from_archive", tmp_path / "spool") == expected
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
@pytest.mark.skipif(not REAL_MINI.is_dir(), reason="the small real datasets are not on this machine")
@pytest.mark.parametrize("name", ["something_v1", "diving48"])
def test_real_archives_give_the_shards_of_their_folder(tmp_path: Path, name: str) -> None:
    archive_of(name, REAL_MINI / name, tmp_path / "archived", [0.1, 0.5, 0.9] if name == "something_v1" else [])
    expected = shard_bytes(name, REAL_MINI / name, tmp_path / "from_folder", tmp_path / "unused")
    assert shard_bytes(name, tmp_path / "archived", tmp_path / "from_archive", tmp_path / "spool") == expected


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    return gzip.compress(tar(*SEVEN, *EIGHT), mtime=0), tmp_path_factory.mktemp("cuts")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 2000), max_size=6), members=st.booleans())
def test_parts_may_be_cut_at_any_byte(whole: tuple[bytes, Path], cuts: list[int], members: bool) -> None:
    data, folder = whole
    if members:  # several gzip streams, as `cat` and pigz make them
        inside = gzip.decompress(data)
        data = gzip.compress(inside[:700]) + gzip.compress(b"") + gzip.compress(inside[700:]) + bytes(7)
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    (root / "spool").mkdir(parents=True)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for number, (begin, end) in enumerate(itertools.pairwise(places)):
        (root / f"part-{number}").write_bytes(data[begin:end])
    report = partition(Folder(root), "part-?", [plan(*IDS)], root / "spool", max_video_bytes=LIMIT)
    assert (report.num_members, report.num_strays, report.num_hostile) == (4, 0, 0)
    source = SpoolSource(root / "spool")
    for one, members_of in zip(IDS, (SEVEN, EIGHT), strict=True):
        assert source.read(one, "train-000000.tar", DecodeSettings()).frames == [content for _, content in members_of]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_every_dialect_of_tar_is_read(tmp_path: Path, form: int, prefix: str) -> None:
    folder = f"{'d' * 90}/{'é' * 30}"
    data = tar(member(f"{prefix}{folder}/00001.jpg", jpeg(3), mtime=1.5), form=form)
    source, report = spooled(tmp_path, data, video(folder))
    assert report.num_members == 1
    assert source.read(video(folder), "train-000000.tar", DecodeSettings()).frames == [jpeg(3)]


HOSTILE = [
    member(f"/{TOP}/7/00003.jpg", b"x"),
    member(f"../{TOP}/7/00003.jpg", b"x"),
    member(f"{TOP}/7/../8/00003.jpg", b"x"),
    member(f"{TOP}/7/00003.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
    member(f"{TOP}/7/00003.jpg", kind=tarfile.LNKTYPE, linkname="/etc/passwd"),
    member(f"{TOP}/7", kind=tarfile.SYMTYPE, linkname="/"),
    member(f"{TOP}/7/00003.jpg", kind=tarfile.CHRTYPE, devmajor=1, devminor=5),
    member(f"{TOP}/7/00003.jpg", kind=tarfile.BLKTYPE),
    member(f"{TOP}/7/00003.jpg", kind=tarfile.FIFOTYPE),
    member(f"{TOP}/7/00003.jpg", kind=tarfile.GNUTYPE_SPARSE),
    member(f"{TOP}/7/00003.jpg", b"x", pax_headers={"GNU.sparse.major": "1"}),
    member(f"{TOP}/7/00003.jpg", b"x", kind=b"Z"),
    member(f"{TOP}/7/0000\n3.jpg", b"x"),
    member(f"{TOP}/7/0000\x1b[2J3.jpg", b"x"),
    member(f"{TOP}/7/0000\udcff3.jpg", b"x"),
    member(f"{TOP}/7/{'a' * 2000}.jpg", b"x"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_member_is_not_taken_and_rejects_the_video_that_it_is_aimed_at(tmp_path: Path, number: int) -> None:
    info, content = HOSTILE[number]
    data = tar(SEVEN[0], (info, content), SEVEN[1], *EIGHT, form=tarfile.PAX_FORMAT if info.pax_headers else tarfile.GNU_FORMAT)
    source, report = spooled(tmp_path / "in", data, *IDS)
    assert report.num_hostile == 1
    assert all(text.isprintable() for pair in report.hostile for text in pair)
    if not info.name.startswith(".."):
        assert reason_of(source, f"{TOP}/7") == "hostile_member"
    frames = source.read(IDS[1], "train-000000.tar", DecodeSettings()).frames
    assert frames == [content for _, content in EIGHT]
    assert sorted(path.name for path in (tmp_path / "in" / "spool").iterdir()) == ["train-000000.spool"]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_is_not_listed_is_counted_and_not_kept(tmp_path: Path) -> None:
    strays = [member(f"{TOP}/9/00001.jpg", b"x" * 5000), member("README", b"x"), member(f"{TOP}/7/sub/00001.jpg", b"x")]
    source, report = spooled(tmp_path, tar(*SEVEN, *strays), IDS[0])
    assert (report.num_members, report.num_strays) == (2, 3)
    assert report.strays == [f"{TOP}/9/00001.jpg", "README", f"{TOP}/7/sub/00001.jpg"]
    assert reason_of(source, f"{TOP}/8") == "missing"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([*SEVEN, SEVEN[0]], "hostile_member"),
        ([member(f"{TOP}/7/00001.jpg", bytes(LIMIT + 1))], "too_large"),
        ([member(f"{TOP}/7/{number:05d}.jpg", b"\1" * (LIMIT // 4)) for number in range(6)], "too_large"),
        ([member(f"{TOP}/7", kind=tarfile.DIRTYPE)], "no_frames"),
        ([member(f"{TOP}/7", b"x")], "missing"),
        ([SEVEN[1]], "gap"),
        ([member(f"{TOP}/7/00001.jpg", b"no JPEG")], "not_jpeg"),
        ([member(f"{TOP}/7/x.jpg", jpeg(1))], "odd_file"),
        ([], "missing"),
    ],
)  # fmt: skip
def test_an_unusable_video_has_a_reason(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], reason: str) -> None:
    source, _ = spooled(tmp_path, tar(*members, *EIGHT), *IDS)
    assert reason_of(source, f"{TOP}/7") == reason
    assert len(source.read(IDS[1], "train-000000.tar", DecodeSettings()).frames) == 2
    assert (tmp_path / "spool" / "train-000000.spool").stat().st_size < 2 * LIMIT


def test_windows_of_one_file_get_it_in_each_of_their_shards(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(tar(*SEVEN))
    (tmp_path / "spool").mkdir()
    plans = [ShardPlan(f"{split}-000000.tar", split, (IDS[0], IDS[0])) for split in ("train", "test")]
    assert partition(Folder(tmp_path), "part", plans, tmp_path / "spool", max_video_bytes=LIMIT).num_members == 2
    for one in plans:
        assert len(SpoolSource(tmp_path / "spool").read(IDS[0], one.name, DecodeSettings()).frames) == 2


def test_a_bomb_stops_the_run_early(tmp_path: Path) -> None:
    def bomb(begin: bytes) -> bytes:
        squeezer = zlib.compressobj(9, wbits=31)
        return squeezer.compress(begin) + b"".join(squeezer.compress(bytes(1 << 20)) for _ in range(64)) + squeezer.flush()

    info, _ = member("zeros")
    info.size = 1 << 40
    message = message_of(lambda: spooled(tmp_path, bomb(info.tobuf(tarfile.GNU_FORMAT)), *IDS))
    assert "inflate to more than" in message
    assert "inflate to more than" in message_of(lambda: spooled(tmp_path, bomb(tar(*SEVEN)), *IDS))


@pytest.mark.parametrize("packed", [False, True])
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_archive_is_never_taken_for_complete(whole: tuple[bytes, Path], packed: bool, share: float) -> None:
    data = whole[0] if packed else gzip.decompress(whole[0])
    end = len(data) if packed else len(tar(*SEVEN, *EIGHT).rstrip(b"\0"))
    cut = data[: int(share * end)]
    message = message_of(lambda: spooled(whole[1] / "cut", cut, *IDS))
    assert f"{whole[1] / 'cut' / 'part'}, before byte {len(cut)}" in message


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_gzip_stream_is_noticed(whole: tuple[bytes, Path], place: float, bit: int) -> None:
    data = bytearray(whole[0])
    position = int(place * len(data))
    data[position] ^= 1 << bit
    with contextlib.suppress(DataError):  # unless the bit means nothing, as in the header's time or a distance among zeros
        spooled(whole[1] / "flip", bytes(data), *IDS)
        found = (whole[1] / "flip" / "spool" / "train-000000.spool").read_bytes()
        spooled(whole[1] / "flip", whole[0], *IDS)
        assert (whole[1] / "flip" / "spool" / "train-000000.spool").read_bytes() == found


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    data = bytearray(tar(*SEVEN, *EIGHT))
    data[data.index(f"{TOP}/8/00002".encode())] ^= 1
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
        assert len(list(archive)) == 3  # what the standard library makes of it
    assert "no valid member header at byte" in message_of(lambda: spooled(tmp_path, bytes(data), *IDS))
    two = tar(*SEVEN) + tar(*EIGHT)
    assert "data follow the end of the tar" in message_of(lambda: spooled(tmp_path, two, *IDS))


def test_a_header_that_claims_more_than_any_header_needs_is_refused(tmp_path: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        info, _ = member("x", kind=kind)
        info.size = 1 << 40
        assert "expected at most 1048576" in message_of(
            lambda info=info: spooled(tmp_path, info.tobuf(tarfile.GNU_FORMAT), *IDS)
        )
    bad = member("x", b"9999 path=y\n", kind=tarfile.XHDTYPE)
    assert "pax header" in message_of(lambda: spooled(tmp_path, tar(bad, *SEVEN, form=tarfile.USTAR_FORMAT), *IDS))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=1500), st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=4)), max_size=4)))
def test_arbitrary_bytes_are_read_or_one_data_error(whole: tuple[bytes, Path], data: bytes | list[tuple[int, bytes]]) -> None:
    if isinstance(data, list):
        changed = bytearray(tar(*SEVEN, *EIGHT))
        for position, content in data:
            changed[position : position + len(content)] = content
        data = bytes(changed)
    with contextlib.suppress(DataError):
        source, _ = spooled(whole[1] / "fuzz", data, *IDS)
        for one in IDS:
            with contextlib.suppress(VideoRejectedError):
                source.read(one, "train-000000.tar", DecodeSettings())


def test_a_second_run_spools_only_what_is_waiting(tmp_path: Path) -> None:
    root, output, spool = tmp_path / "raw", tmp_path / "out", tmp_path / "spool"
    root.mkdir()
    output.mkdir()
    (root / "part").write_bytes(tar(*SEVEN, *EIGHT))
    shards = ShardSettings()
    plans = [ShardPlan(f"train-{number:06d}.tar", "train", (one,)) for number, one in enumerate(IDS)]

    def opened() -> tuple[object, PartitionReport | None]:
        return open_source(Folder(root), "part", plans, spool, output, shards)

    source, report = opened()
    assert isinstance(source, SpoolSource)
    assert report is not None
    assert report.num_members == 4
    commit = spool / "complete.json"
    before = commit.stat().st_mtime_ns
    assert opened() == (source, report)
    assert commit.stat().st_mtime_ns == before
    write_shard(plans[0], source, output, shards)
    shutil.rmtree(spool)
    _, report = opened()
    assert report is not None
    assert (report.num_members, report.num_strays) == (2, 2)
    assert set(json.loads(commit.read_text())["shards"]) == {"train-000001.tar"}
    commit.unlink()  # as after a kill in the middle
    assert opened()[1] == report
    write_shard(plans[1], source, output, shards)
    shutil.rmtree(spool)
    assert opened() == (SpoolSource(spool), None)
    assert not spool.exists()
    assert open_source(Folder(root), None, plans, spool, output, shards) == (FolderSource(Folder(root)), None)


def test_a_damaged_spool_is_an_error_and_no_rejection(tmp_path: Path) -> None:
    source, _ = spooled(tmp_path, tar(*SEVEN), *IDS)
    path = tmp_path / "spool" / "train-000000.spool"
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    for damaged in (bytes(data), bytes(data[:-1])):
        path.write_bytes(damaged)
        with pytest.raises(Exception, match="is damaged; expected what was sorted from the archive"):
            source.read(IDS[0], "train-000000.tar", DecodeSettings())


def test_a_pattern_without_files_is_explained(tmp_path: Path) -> None:
    assert "has no file like 'x-??'; expected the archive's parts" in message_of(
        lambda: partition(Folder(tmp_path), "x-??", [], tmp_path, max_video_bytes=LIMIT)
    )


def test_an_archive_in_an_object_store_gives_the_same_frames(tmp_path: Path, s3_url: str) -> None:
    remote = Folder(f"{s3_url}/raw")
    data = gzip.compress(tar(*SEVEN, *EIGHT))
    for name, part in (("part-a", data[:500]), ("part-b", data[500:])):
        remote.write_bytes(name, part)
    rows = "".join(f"{one.path},x,{split}\n" for one, split in zip(IDS, ("train", "val"), strict=True))
    remote.write_bytes("videos.csv", f"path,label,split\n{rows}".encode())
    remote.write_bytes("run/1.mp4", b"x")
    dataset = DatasetSettings(name="folder", root=remote.url, archive="part-?", annotations="videos.csv")
    before = raw_listing(dataset)
    assert raw_listing(DatasetSettings(name="folder", root=remote.url, val_fraction=0.0)) != before
    videos = index_videos(dataset, remote).videos
    plans = plan_shards(videos, videos_per_shard=4, seed=0)
    source, report = open_source(remote, find_archive(dataset, remote), plans, tmp_path / "spool", tmp_path, ShardSettings())
    assert report is not None
    assert report.num_members == 4
    frames = {one.path: source.read(one, each.name, DecodeSettings()).frames for each in plans for one in each.videos}
    assert frames == {IDS[0].path: [data for _, data in SEVEN], IDS[1].path: [data for _, data in EIGHT]}
    remote.write_bytes("part-b", data[500:-4])
    assert raw_listing(dataset) != before
    with pytest.raises(DataError, match="part-b, before byte"):
        open_source(remote, "part-?", plans, tmp_path / "spool", tmp_path, ShardSettings())
    assert index_videos(DatasetSettings(name="folder", val_fraction=0.0), remote).label_names == ["run"]
