"""Files under a URL: on an object store, or a network file system."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from search.errors import MeiosisError, UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
_WHOLE_ON_CLOSE = ("s3", "gcs", "abfs")
"""Stores in which an object appears when it is whole; elsewhere a file is written under another name first."""


def is_url(text: str) -> bool:
    """Whether a place is named by a URL and not by a path."""
    return _URL.match(text) is not None


@dataclass(frozen=True)
class Store:
    """Files below a URL."""

    url: str
    system: FileSystem
    root: str

    @classmethod
    def open(cls, url: str) -> Store:
        """The place at a URL: what pyarrow knows (`s3://`, `gs://`, `hdfs://`, `file://`), or fsspec.

        Raises:
            UserError: no such kind of URL, or it cannot be reached.
        """
        import pyarrow as pa
        from pyarrow import fs

        try:
            system, root = fs.FileSystem.from_uri(url)
        except (pa.ArrowException, ValueError, OSError) as error:
            try:
                import fsspec  # type: ignore[import-untyped]  # has no stubs

                other, root = fsspec.core.url_to_fs(url)
                system = fs.PyFileSystem(fs.FSSpecHandler(other))
            except Exception as second:  # noqa: BLE001 - every kind of store has errors of its own
                why = f"{first_line(error)}; {first_line(second)}"
                raise UserError(f"{url}: {why}; give a folder, or an s3://, gs:// or file:// URL") from error
        return cls(url.rstrip("/"), system, root.rstrip("/"))

    def read(self, name: str) -> bytes | None:
        """The content of a file, None where there is none. Raises OSError."""
        try:
            with _as_os_error(), self.system.open_input_stream(f"{self.root}/{name}") as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a file, which appears whole. Raises OSError."""
        path = f"{self.root}/{name}"
        direct = self.system.type_name in _WHOLE_ON_CLOSE
        target = path if direct else f"{path}.{uuid4().hex[:8]}.tmp"
        with _as_os_error():
            if not direct:
                self.system.create_dir(path.rpartition("/")[0], recursive=True)
            with self.system.open_output_stream(target) as stream:
                for chunk in chunks:
                    stream.write(chunk)
            if not direct:
                self.system.move(target, path)

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is fine. Raises OSError."""
        with suppress(FileNotFoundError), _as_os_error():
            self.system.delete_file(f"{self.root}/{name}")

    def names(self) -> dict[str, int]:
        """Every file below the URL -> its bytes. Raises OSError."""
        from pyarrow import fs

        with _as_os_error():
            found = self.system.get_file_info(fs.FileSelector(self.root, allow_not_found=True, recursive=True))
        files = (info for info in found if info.type == fs.FileType.File and not info.path.endswith(".tmp"))
        return {info.path[len(self.root) + 1 :]: info.size for info in files}

    def download(self, name: str, path: Path) -> None:
        """Copy a file here. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        source = f"{self.root}/{name}"
        with _as_os_error(), self.system.open_input_stream(source) as stream, path.open("wb") as file:
            while chunk := stream.read(1 << 22):
                file.write(chunk)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Errors of a store as OSError: many that fsspec knows have classes of their own, some say nothing of a network."""
    try:
        yield
    except (OSError, MeiosisError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, for people, in one short line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
