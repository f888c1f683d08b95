"""Listing foreign tars: all members or an error, whatever is cut, flipped or zeroed, and whatever a header claims."""

import io
import os
import random
import re
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import DataError
from preprocessing.foreign_tar import foreign_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000.25 if form == tarfile.PAX_FORMAT else 1_700_000_000
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def special(name: str, kind: bytes, **more: object) -> bytes:
    """A header of a member without data."""
    info = tarfile.TarInfo(name)
    info.type = kind
    for attribute, value in more.items():
        setattr(info, attribute, value)
    return info.tobuf(tarfile.GNU_FORMAT)


names = st.text(st.characters(categories=["L", "N"], include_characters=" -_/."), min_size=1, max_size=300).filter(
    lambda name: not name.startswith("/") and not name.endswith("/") and ".." not in name.split("/") and name.strip("/.") != ""
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(files=st.dictionaries(names, st.binary(max_size=2000), min_size=1, max_size=8), form=st.sampled_from(["gnu", "pax"]))
def test_every_file_is_listed_where_it_lies(tmp_path: Path, files: dict[str, bytes], form: str) -> None:
    path = tmp_path / "a.tar"
    data = write_tar(path, files, FORMATS[form])
    found = list(foreign_members(path))
    assert [(member.name, member.problem) for member in found] == [(name, "") for name in files]
    assert [data[member.offset : member.offset + member.size] for member in found] == list(files.values())
    assert [member.begin for member in found] == [0, *(member.end for member in found[:-1])]


def test_gnu_tar_is_read_and_folders_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "in" / ("long" * 40)).mkdir(parents=True)
    (tmp_path / "in" / ("long" * 40) / "a.jpg").write_bytes(b"abc")
    subprocess.run(["tar", "-C", tmp_path / "in", "-cf", tmp_path / "a.tar", "."], check=True)
    assert [member.name for member in foreign_members(tmp_path / "a.tar")] == [f"./{'long' * 40}/a.jpg"]


@pytest.mark.parametrize("form", FORMATS)
def test_no_cut_zeroed_tail_or_flipped_header_hides_a_member(tmp_path: Path, form: str) -> None:
    """What is not an error lists every member: flips in a time stamp's record or a filling byte change nothing."""
    path = tmp_path / "a.tar"
    data = write_tar(path, {f"k{number}.jpg": bytes([number + 1]) * (11_000 + number) for number in range(9)}, FORMATS[form])
    expected = list(foreign_members(path))
    last = expected[-1].end
    rng = random.Random(0)
    for size in {0, 1, 511, 512, last, last + 512, last + 1023, *rng.sample(range(last), 60)}:
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=re.escape(str(path))):
            list(foreign_members(path))
    damaged = [data[:start] + bytes(len(data) - start) for start in range(512, last, 512)]
    for _ in range(300):
        member = rng.choice(expected)
        flipped = bytearray(data)
        flipped[rng.randrange(member.begin, member.offset)] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    errors = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = list(foreign_members(path))
        except DataError:
            errors += 1
        else:
            assert [(one.begin, one.offset, one.size) for one in found] == [
                (one.begin, one.offset, one.size) for one in expected
            ]
    assert errors > len(damaged) // 2


def test_a_zeroed_tail_of_many_samples_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    data = write_tar(path, {f"k{number}.jpg": b"x" * 5120 for number in range(20)})
    members = list(foreign_members(path))
    for member in members[:-2]:
        path.write_bytes(data[: member.end] + bytes(len(data) - member.end))
        with pytest.raises(DataError, match=rf"more than a tar program writes: the tail was lost, at byte {member.end}"):
            list(foreign_members(path))


def test_two_archives_in_one_file_are_not_taken_for_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    data = write_tar(path, {"a.jpg": b"1"})
    path.write_bytes(data + data)
    with pytest.raises(DataError, match="no valid member header, although the file goes on, at byte 1024"):
        list(foreign_members(path))


@pytest.mark.parametrize(
    ("name", "kind", "more", "problem"),
    [
        ("a.jpg", tarfile.SYMTYPE, {"linkname": "/etc/passwd"}, "a symbolic link"),
        ("a.jpg", tarfile.LNKTYPE, {"linkname": "b.jpg"}, "a hard link"),
        ("a.jpg", tarfile.CHRTYPE, {"devmajor": 1, "devminor": 8}, "a device"),
        ("a.jpg", tarfile.FIFOTYPE, {}, "a pipe"),
        ("a.jpg", b"Z", {}, "of an unknown type"),
        ("/etc/a.jpg", tarfile.REGTYPE, {}, "leads out"),
        ("x/../../a.jpg", tarfile.REGTYPE, {}, "leads out"),
        ("a\x1b[31m.jpg", tarfile.REGTYPE, {}, "control characters"),
        ("a\\b.jpg", tarfile.REGTYPE, {}, "backslashes"),
        ("n" * 5000 + ".jpg", tarfile.REGTYPE, {}, "5004 characters"),
    ],
)
def test_odd_members_are_named_as_such(tmp_path: Path, name: str, kind: bytes, more: dict, problem: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(special(name, kind, **more) + write_tar(path, {"good.jpg": b"1"})[: 4 * 512])
    odd, good = foreign_members(path)
    assert problem in odd.problem
    assert odd.odd_name == (kind == tarfile.REGTYPE)
    assert good.problem == ""


def test_sparse_files_are_no_regular_files(tmp_path: Path) -> None:
    with (tmp_path / "s.jpg").open("wb") as file:
        os.truncate(file.fileno(), 10_000_000)
        file.seek(5_000_000)
        file.write(b"x" * 5000)
    for form in ("gnu", "posix"):
        path = tmp_path / f"{form}.tar"
        command = ["tar", f"--format={form}", "--sparse", "-C", tmp_path, "-cf", path, "s.jpg"]
        subprocess.run(command, check=True)
        (member,) = foreign_members(path)
        assert "sparse" in member.problem


def with_size_field(name: str, kind: bytes, field: bytes) -> bytes:
    header = bytearray(special(name, kind))
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize(
    "field",
    [b"\xff" * 10 + b"\xfe\x00", b"\x80" + b"\xff" * 11, b"\x80" + bytes(6) + b"\x40" + bytes(4), b"00040000000\0"],
    ids=["negative", "huge", "terabytes", "long"],
)
def test_sizes_that_lie_neither_hang_nor_fill_the_memory(tmp_path: Path, kind: bytes, field: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(with_size_field("a.jpg", kind, field) + bytes(512) + write_tar(path, {"good.jpg": b"1"}))
    with path.open("r+b") as file:
        file.truncate(64 << 20)  # so that a header of megabytes could be read
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.tar"):
        list(foreign_members(path))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_thousand_nested_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    long_name = with_size_field("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"%011o\0" % 4) + b"abc".ljust(512, b"\0")
    path.write_bytes(long_name * 3000 + write_tar(path, {"good.jpg": b"1"}))
    with pytest.raises(DataError, match="is no whole uncompressed tar"):
        list(foreign_members(path))


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08gzip", b"no tar at all" * 100, bytes(100_000), bytes(1 << 16)])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar"):
        list(foreign_members(path))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=3000), st.integers(0, 2000))
def test_garbage_in_a_tar_is_an_error_or_a_list(tmp_path: Path, garbage: bytes, place: int) -> None:
    path = tmp_path / "a.tar"
    data = bytearray(write_tar(path, {"a.jpg": b"1" * 600, "b.jpg": b"2"}, tarfile.PAX_FORMAT))
    data[place : place + len(garbage)] = garbage
    path.write_bytes(data)
    try:
        found = list(foreign_members(path))
    except DataError:
        return
    assert all(member.begin < member.offset <= member.end <= len(data) for member in found)
