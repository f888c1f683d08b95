"""Folders of files on a local disk or in an object store, behind one small interface.

A path is a folder of this machine (or one that all nodes mount); `s3://bucket/prefix` and `gs://bucket/prefix` are folders of
an object store, reached through pyarrow. Credentials and endpoints come from the environment, as the vendors' own tools read
them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, ...). A file appears whole or not at all: on a
disk by a rename, in an object store because an object becomes visible when its upload is complete.
"""

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from infra.errors import PipelineError
from infra.storage import atomic_path

_SCHEMES = ("s3", "gs")


class Folder:
    """A folder, local or remote; small and picklable, so that it travels to Ray workers.

    Args:
        place: a path, or a URL that begins with `s3://` or `gs://`.

    Raises:
        PipelineError: if the URL has another scheme. Every method raises OSError where the disk or the network fails.
    """

    def __init__(self, place: "Folder | Path | str") -> None:
        text = str(place)
        scheme, separator, _ = text.partition("://")
        self._remote = bool(separator)
        if self._remote and scheme not in _SCHEMES:
            raise PipelineError(f"{text!r} has the scheme {scheme}://; expected a local path, s3:// or gs://")
        self.url = text.rstrip("/") if self._remote else str(Path(text).absolute())

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def __truediv__(self, name: str) -> "Folder":
        """A folder inside this one."""
        return Folder(f"{self.url}/{name}")

    @property
    def local(self) -> Path | None:
        """The path on this machine; None for a remote folder."""
        return None if self._remote else Path(self.url)

    def make(self) -> None:
        """Make the folder, and those above it; an object store needs none."""
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)

    def list(self) -> dict[str, int]:
        """Names and sizes in bytes of the files directly inside; empty if there is no such folder."""
        if self.local is not None:
            if not self.local.is_dir():
                return {}
            return {path.name: path.stat().st_size for path in self.local.iterdir() if path.is_file()}
        from pyarrow.fs import FileSelector, FileType

        filesystem, base = _filesystem(self.url)
        infos = filesystem.get_file_info(FileSelector(base, allow_not_found=True))
        return {info.base_name: info.size for info in infos if info.type == FileType.File}

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if there is no such file."""
        if self.local is not None:
            path = self.local / name
            return path.stat().st_size if path.is_file() else None
        from pyarrow.fs import FileType

        filesystem, base = _filesystem(self.url)
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
        """Open a file for reading; it can be sought.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        if self.local is not None:
            with (self.local / name).open("rb") as file:
                yield file
            return
        filesystem, base = _filesystem(self.url)
        with filesystem.open_input_file(f"{base}/{name}") as remote:
            yield remote

    @contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        """A local path to a file, for programs that need one: the file itself, or a copy that lives as long as the block.

        Raises:
            FileNotFoundError: if there is no such remote file; a local one is not looked at.
        """
        if self.local is not None:
            yield self.local / name
            return
        from pyarrow import fs

        filesystem, base = _filesystem(self.url)
        local = fs.LocalFileSystem()
        with tempfile.TemporaryDirectory(prefix="sagsm-") as folder:
            copy = Path(folder) / Path(name).name
            fs.copy_files(f"{base}/{name}", str(copy), source_filesystem=filesystem, destination_filesystem=local)
            yield copy

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """Yield a local path to write to; when the block ends well the file appears in the folder, whole.

        Nothing appears if the block raises. A file of that name is replaced.
        """
        if self.local is not None:
            with atomic_path(self.local / name) as temporary:
                yield temporary
            return
        from pyarrow import fs

        filesystem, base = _filesystem(self.url)
        local = fs.LocalFileSystem()
        with tempfile.TemporaryDirectory(prefix="sagsm-") as folder:
            copy = Path(folder) / Path(name).name
            yield copy
            fs.copy_files(str(copy), f"{base}/{name}", source_filesystem=local, destination_filesystem=filesystem)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole."""
        with self.create(name) as path:
            path.write_bytes(data)

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
            return
        filesystem, base = _filesystem(self.url)
        with suppress(FileNotFoundError):
            filesystem.delete_file(f"{base}/{name}")


@functools.lru_cache(maxsize=32)
def _filesystem(url: str) -> tuple[Any, str]:
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(url)
    return filesystem, path.rstrip("/")
