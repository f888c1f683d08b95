"""Folders of files on a local disk or in an object store, behind one small interface.

A path is a folder of this machine (or one that all nodes mount); `s3://bucket/prefix` and `gs://bucket/prefix` are folders of
an object store, reached through pyarrow. Credentials and endpoints come from the environment, as the vendors' own tools read
them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `AWS_REGION`, `GOOGLE_APPLICATION_CREDENTIALS`, ...). A file appears whole or not
at all: on a disk by a rename, in an object store because an object becomes visible when its upload is complete.

A store that does not answer is given up after about 20 seconds, with an OSError that names the file: where that is not the end
of the run, the caller tries again.
"""

import functools
import io
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from infra.errors import ConfigError, PipelineError
from infra.secrets import redact
from infra.storage import atomic_path

_SCHEMES = ("s3", "gs")
_MAX_NAME_BYTES = 255
# Letters, digits, dots, "-" and "_" are all that S3 and Google allow; so no name, password or port gets into a bucket.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
# A request that gets no byte for so long is tried again, and so often in all.
_REQUEST_SECONDS = 5
_ATTEMPTS = 4
_CONNECT_SECONDS = 3
_GOOGLE_SECONDS = 20
# An object store answers each read by a request of its own.
_REMOTE_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True)
class Entry:
    """A name inside a folder: `size` in bytes, 0 for a folder; `modified_ns` since 1970, 0 if unknown, as of remote folders."""

    name: str
    is_folder: bool
    size: int
    modified_ns: int


_Entries = list[Entry]  # inside the class, `list` is a method


def file_name(path: str) -> str:
    """The last part of a path in an archive or object store, as the name of a local copy; one that is too long gives way."""
    name = Path(path).name
    return name if len(name.encode()) <= _MAX_NAME_BYTES else f"video{Path(path).suffix[:16]}"


class Folder:
    """A folder, local or remote; small and picklable, so that it travels to Ray workers.

    The names that its methods take are relative paths inside it; "." and doubled slashes in them mean nothing. Every method
    raises PipelineError for a name that is empty, absolute or leads out by "..", and OSError where the disk or the network
    fails; FileNotFoundError and PermissionError are told apart.

    Args:
        place: a path, or a URL `s3://bucket/prefix` or `gs://bucket/prefix`.

    Raises:
        PipelineError: if the URL has another scheme, no valid bucket name or ".." in its path.
    """

    def __init__(self, place: "Folder | Path | str") -> None:
        text = str(place)
        scheme, separator, rest = text.partition("://")
        self._scheme = scheme if separator else ""
        if self._scheme and self._scheme not in _SCHEMES:
            raise PipelineError(f"{text!r} has the scheme {scheme}://; expected a local path, s3:// or gs://")
        bucket, _, prefix = rest.partition("/")
        if self._scheme and not _BUCKET.fullmatch(bucket):
            # What stands there may be a password, so it is not shown.
            raise PipelineError(
                f"a {scheme}:// URL has no valid bucket name; expected {scheme}://bucket/folder, made of letters, digits, "
                '".", "-" and "_" (credentials and endpoints are read from the environment)'
            )
        if self._scheme:
            inside = _checked_name(prefix, text) if prefix.strip("/") else ""
            self.url = f"{scheme}://{bucket}/{inside}".rstrip("/")
        else:
            self.url = str(Path(text).absolute())

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> "Folder":
        """A folder inside this one."""
        return Folder(f"{self.url}/{_checked_name(name, self.url)}")

    @property
    def local(self) -> Path | None:
        """The path on this machine; None for a remote folder."""
        return None if self._scheme else Path(self.url)

    def make(self) -> None:
        """Make the folder, and those above it; an object store needs none."""
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)

    def list(self) -> dict[str, int]:
        """Names and sizes in bytes of the files directly inside; empty if there is no such folder."""
        if self.local is not None:
            return _list_local(self.local)
        from pyarrow.fs import FileSelector, FileType

        with _named(self.url):
            filesystem, base = self._remote()
            infos = filesystem.get_file_info(FileSelector(base, allow_not_found=True))
        return {info.base_name: int(info.size) for info in infos if info.type == FileType.File}

    def entries(self) -> tuple[Entry, ...]:
        """Files and folders directly inside, sorted by name.

        Raises:
            OSError: if there is no such folder (FileNotFoundError), or it cannot be read.
        """
        found = []
        if self.local is not None:
            with os.scandir(self.local) as entries:
                for entry in entries:
                    try:
                        status, is_folder = entry.stat(), entry.is_dir()
                    except OSError:  # a link that leads nowhere, or to itself
                        status, is_folder = entry.stat(follow_symlinks=False), False
                    found.append(Entry(entry.name, is_folder, 0 if is_folder else status.st_size, status.st_mtime_ns))
        else:
            from pyarrow.fs import FileSelector, FileType

            with _named(self.url):
                filesystem, base = self._remote()
                infos = filesystem.get_file_info(FileSelector(base))
            for info in infos:
                is_folder = info.type == FileType.Directory
                found.append(Entry(info.base_name, is_folder, 0 if is_folder else int(info.size), info.mtime_ns or 0))
        return tuple(sorted(found, key=lambda entry: entry.name))

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if there is no such file."""
        name = _checked_name(name, self.url)
        if self.local is not None:
            path = self.local / name
            return path.stat().st_size if path.is_file() else None
        from pyarrow.fs import FileType

        with _named(f"{self.url}/{name}"):
            filesystem, base = self._remote()
            info = filesystem.get_file_info(f"{base}/{name}")
        return int(info.size) if info.type == FileType.File else None

    def read_bytes(self, name: str) -> bytes:
        """The whole content of a file.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        with self.open(name) as file:
            return file.read()

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for reading; it can be sought. Remote files are read ahead in pieces of 4 MiB.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        name = _checked_name(name, self.url)
        if self.local is not None:
            with (self.local / name).open("rb") as file:
                yield file
            return
        with _named(f"{self.url}/{name}"):
            filesystem, base = self._remote()
            remote = filesystem.open_input_file(f"{base}/{name}")
        with io.BufferedReader(remote, _REMOTE_BUFFER_BYTES) as buffered:
            yield buffered

    def open_ranges(self, name: str) -> "FileRanges":
        """Open a file for reading pieces of it, by many threads at once; it is closed when nobody holds the object.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        name = _checked_name(name, self.url)
        if self.local is not None:
            return _open_local_ranges(self.local / name)
        with _named(f"{self.url}/{name}"):
            filesystem, base = self._remote()
            remote = filesystem.open_input_file(f"{base}/{name}")
            return FileRanges(remote.size(), remote.read_at)

    @contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        """A local path to a file, for programs that need one: the file itself, or a copy that lives as long as the block.

        Raises:
            FileNotFoundError: if there is no such remote file; a local one is not looked at.
        """
        name = _checked_name(name, self.url)
        if self.local is not None:
            yield self.local / name
            return
        with tempfile.TemporaryDirectory(prefix="sagsm-") as folder:
            copy = Path(folder) / file_name(name)
            self._copy(name, copy, upload=False)
            yield copy

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Yield a local path to write to; when the block ends well the file appears in the folder, whole.

        Nothing appears if the block raises. A file of that name is replaced; it may be lost if its replacement fails.

        Raises:
            OSError: if the file cannot be written, or the store then says another size than was sent.
        """
        name = _checked_name(name, self.url)
        if self.local is not None:
            with atomic_path(self.local / name) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory(prefix="sagsm-") as folder:
            copy = Path(folder) / file_name(name)
            yield copy
            try:
                self._copy(name, copy, upload=True)
                sent, stored = copy.stat().st_size, self.size(name)
                if stored != sent:
                    raise OSError(f"{self.url}/{name} has {stored} bytes after an upload of {sent}; try again")
            except BaseException:
                # pyarrow completes an upload that failed in the middle (its streams close when they are dropped).
                with suppress(OSError):
                    self.delete(name)
                raise

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole."""
        with self.create(name) as path:
            path.write_bytes(data)

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        name = _checked_name(name, self.url)
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
            return
        with _named(f"{self.url}/{name}"), suppress(FileNotFoundError):
            filesystem, base = self._remote()
            filesystem.delete_file(f"{base}/{name}")

    def _copy(self, name: str, path: Path, *, upload: bool) -> None:
        from pyarrow import fs

        with _named(f"{self.url}/{name}"):
            filesystem, base = self._remote()
            here, there = (str(path), fs.LocalFileSystem()), (f"{base}/{name}", filesystem)
            (source, source_system), (target, target_system) = (here, there) if upload else (there, here)
            fs.copy_files(source, target, source_filesystem=source_system, destination_filesystem=target_system)

    def _remote(self) -> tuple[Any, str]:
        """The pyarrow filesystem of a remote folder, and the folder's path in it: "bucket/prefix"."""
        base = self.url.partition("://")[2]
        if self._scheme == "gs":
            return _google(), base
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
        if not region:
            # A store of another vendor does not care; asking one for its region would be one more request to wait for.
            region = "us-east-1" if endpoint else _region(base.partition("/")[0])
        return _s3(endpoint, region), base


class FileRanges:
    """An open file of a folder, read in pieces; safe to share between threads. `Folder.open_ranges` makes it.

    Args:
        size: the file's size in bytes.
        read_at: reads at most (number of bytes, offset).
    """

    def __init__(self, size: int, read_at: Callable[[int, int], bytes]) -> None:
        self.size = size
        self._read_at = read_at

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from byte `offset` on.

        Raises:
            ValueError: if the file does not reach so far.
            OSError: if it cannot be read.
        """
        # Before memory is asked for: the numbers may come from a damaged index.
        if not 0 <= offset <= offset + size <= self.size:
            raise ValueError(f"found a file of {self.size} bytes, expected {size} bytes at byte {offset}")
        data = self._read_at(size, offset)
        if len(data) != size:
            raise ValueError(f"found {len(data)} bytes at byte {offset}, expected {size}")
        return data


def _open_local_ranges(path: Path) -> FileRanges:
    descriptor = os.open(path, os.O_RDONLY)
    ranges = FileRanges(os.fstat(descriptor).st_size, functools.partial(os.pread, descriptor))
    # Not closed by hand: a cache may drop the object while a thread still reads.
    weakref.finalize(ranges, os.close, descriptor)
    return ranges


def _checked_name(name: str, where: str) -> str:
    """The name without "." and doubled slashes."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise PipelineError(f'{name!r} is no name of a file in {where}; expected a relative path without ".."')
    return str(path)


def _list_local(folder: Path) -> dict[str, int]:
    sizes = {}
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process may rename its temporary file right now
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
    return sizes


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Let an error of the network say which file or folder was wanted; errors of the system say so themselves."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise type(error)(f"{place} cannot be reached: {error}") from error
    except ValueError as error:  # pyarrow's, for paths that the store cannot have
        raise OSError(f"{place} cannot be reached: {error}") from error


@functools.cache
def _s3(endpoint: str, region: str) -> Any:
    from pyarrow import fs

    options: dict[str, Any] = {}
    if endpoint:
        parts = urlsplit(endpoint)
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
            raise ConfigError(
                f"AWS_ENDPOINT_URL is {redact(endpoint)!r}; expected http://host:port or https://host:port, with credentials "
                "in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    return fs.S3FileSystem(
        region=region,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        **options,
    )


@functools.cache
def _region(bucket: str) -> str:
    from pyarrow import fs

    return str(fs.resolve_s3_region(bucket))


@functools.cache
def _google() -> Any:
    from pyarrow import fs

    return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=_GOOGLE_SECONDS))
