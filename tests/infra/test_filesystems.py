"""Folders: the same behaviour on a disk and on a server that speaks S3."""

import pickle
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from infra.errors import ConfigError, PipelineError
from infra.filesystems import Folder, file_name


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A new folder, made."""
    place = tmp_path / "folder" if request.param == "local" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    folder = Folder(place)
    folder.make()
    return folder


def test_files_come_back_as_they_were_written(folder: Folder) -> None:
    assert folder.list() == {}
    folder.write_bytes("a.bin", b"12345")
    folder.write_bytes("empty", b"")
    folder.write_bytes("ü b%20?#.bin", b"odd name")
    (folder / "sub").make()
    (folder / "sub").write_bytes("deep", b"x")
    assert folder.list() == {"a.bin": 5, "empty": 0, "ü b%20?#.bin": 8}
    assert (folder / "sub").list() == {"deep": 1}
    assert (folder.size("a.bin"), folder.size("none"), folder.size("sub/deep"), folder.size("sub")) == (5, None, 1, None)
    assert folder.read_bytes("ü b%20?#.bin") == b"odd name"
    assert folder.read_bytes("./sub//deep") == b"x"
    with folder.fetch("a.bin") as path:
        assert path.read_bytes() == b"12345"
    folder.write_bytes("a.bin", b"new")
    assert folder.read_bytes("a.bin") == b"new"
    folder.delete("a.bin")
    folder.delete("a.bin")
    assert "a.bin" not in folder.list()


def test_entries_are_files_and_folders_by_name(folder: Folder) -> None:
    folder.write_bytes("b", b"12")
    (folder / "a").make()
    (folder / "a").write_bytes("deep", b"x")
    assert [(entry.name, entry.is_folder, entry.size) for entry in folder.entries()] == [("a", True, 0), ("b", False, 2)]
    assert folder.entries()[1].modified_ns > 0
    with pytest.raises(FileNotFoundError):
        (folder / "nowhere").entries()


def test_open_files_can_be_sought_and_read_in_pieces(folder: Folder) -> None:
    data = bytes(range(256)) * 40_000
    folder.write_bytes("big", data)
    with folder.open("big") as file:
        assert file.read(10) == data[:10]
        file.seek(9_000_001)
        assert file.read(1000) == data[9_000_001:9_001_001]
        assert file.read() == data[9_001_001:]
    ranges = folder.open_ranges("big")
    assert ranges.size == len(data)
    starts = range(0, len(data) - 999, 300_007)
    with ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda start: ranges.read(start, 999), starts))
    assert pieces == [data[start : start + 999] for start in starts]
    for offset, size in ((len(data) - 1, 2), (-1, 1), (0, -1), (0, 2**40)):
        with pytest.raises(ValueError, match=f"found a file of {len(data)} bytes, expected {size} bytes at byte {offset}"):
            ranges.read(offset, size)


def test_a_missing_file_is_file_not_found(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        folder.read_bytes("none")
    with pytest.raises(FileNotFoundError, match="none"):
        folder.open_ranges("none")
    if folder.local is None:
        with pytest.raises(FileNotFoundError, match="none"), folder.fetch("none"):
            pass
    assert (folder / "nowhere").list() == {}


def test_a_file_whose_writing_fails_never_appears(folder: Folder) -> None:
    folder.write_bytes("old", b"old")

    def write_half(name: str) -> None:
        with folder.create(name) as path:
            path.write_bytes(b"hal")
            raise RuntimeError("half")

    for name in ("old", "new"):
        with pytest.raises(RuntimeError, match="half"):
            write_half(name)
    assert folder.list() == {"old": 3}
    assert folder.read_bytes("old") == b"old"


@pytest.mark.parametrize("is_told", [True, False])
def test_a_broken_upload_is_an_error_and_leaves_nothing(s3_url: str, monkeypatch: pytest.MonkeyPatch, is_told: bool) -> None:
    def copy_half(source: str, target: str, *, destination_filesystem: Any, **_: Any) -> None:
        with destination_filesystem.open_output_stream(target) as stream:
            stream.write(Path(source).read_bytes()[:500])
        if is_told:
            raise OSError("the line broke")

    folder = Folder(f"{s3_url}/broken-{is_told}")
    monkeypatch.setattr(fs, "copy_files", copy_half)
    reason = "the line broke" if is_told else "has 500 bytes after an upload of 1000; try again"
    with pytest.raises(OSError, match=rf"s3://bucket/broken-{is_told}/x .*{reason}"):
        folder.write_bytes("x", bytes(1000))
    assert folder.list() == {}


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "//x", "a\0b"])
def test_names_that_lead_out_are_refused(folder: Folder, name: str) -> None:
    calls = [folder.size, folder.read_bytes, folder.delete, folder.open_ranges, folder.__truediv__]
    calls.append(lambda name: folder.write_bytes(name, b""))
    calls.append(lambda name: folder.fetch(name).__enter__())
    for call in calls:
        with pytest.raises(PipelineError, match=r'is no name of a file in .*; expected a relative path without "\.\."'):
            call(name)


def test_a_folder_travels(folder: Folder) -> None:
    folder.write_bytes("x", b"1")
    copy = pickle.loads(pickle.dumps(folder))
    assert copy == folder
    assert hash(copy) == hash(folder)
    assert copy.read_bytes("x") == b"1"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ftp://host/x", r"has the scheme ftp://; expected a local path, s3:// or gs://"),
        ("s3://", "a s3:// URL has no valid bucket name; expected s3://bucket/folder"),
        ("s3:///x", "a s3:// URL has no valid bucket name"),
        ("gs://-x/y", "a gs:// URL has no valid bucket name"),
        ("s3://key:secret@bucket/x", r"a s3:// URL has no valid bucket name; .* read from the environment\)$"),
        ("s3://bucket?region=x", "a s3:// URL has no valid bucket name"),
        ("s3://bucket/../other", "is no name of a file in s3://bucket/../other"),
        ("s3://bucket//x", "is no name of a file in"),
    ],
)
def test_odd_urls_are_refused(place: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        Folder(place)
    assert "secret" not in str(caught.value)


def test_urls_are_kept_in_one_form() -> None:
    assert str(Folder("gs://bucket/")) == "gs://bucket"
    assert str(Folder("s3://bucket/a//b/./c/")) == "s3://bucket/a/b/c"
    assert str(Folder("s3://bucket") / "a") == "s3://bucket/a"
    assert Folder("x").local == Path.cwd() / "x"
    assert Folder("s3://bucket").local is None


@pytest.mark.parametrize("kind", ["refused", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_dead_store_is_an_error_that_names_the_place(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        if kind == "refused":
            listener.close()
        started = time.monotonic()
        with pytest.raises(OSError, match=r"^s3://bucket/x/file cannot be reached: .*NETWORK_CONNECTION"):
            Folder("s3://bucket/x").size("file")
        assert time.monotonic() - started < 30


def test_a_bucket_that_is_not_there(s3_url: str) -> None:
    with pytest.raises(OSError, match="nobodys-bucket"):
        Folder("s3://nobodys-bucket/x").write_bytes("file", b"1")
    with pytest.raises(FileNotFoundError):
        Folder("s3://nobodys-bucket/x").read_bytes("file")


def test_an_endpoint_that_is_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "localhost:9000")
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL is 'localhost:9000'; expected http://host:port"):
        Folder("s3://bucket/x").list()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://KEY:hush@localhost:9000")
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL is 'http://\*\*\*@localhost:9000'; .* in AWS_ACCESS_KEY_ID"):
        Folder("s3://bucket/x").list()


def test_a_linked_file_has_the_size_of_what_it_leads_to(tmp_path):
    (tmp_path / "big").write_bytes(bytes(1000))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to("../big")
    (tmp_path / "set" / "loop").symlink_to("loop")
    assert {entry.name: (entry.size, entry.is_folder) for entry in Folder(tmp_path / "set").entries()}["link"] == (1000, False)


def test_names_that_are_too_long_for_a_disk_give_way():
    assert file_name(f"clips/{'a' * 300}.mp4") == "video.mp4"
    assert file_name("clips/a.mp4") == "a.mp4"
