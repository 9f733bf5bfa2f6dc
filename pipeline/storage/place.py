"""Folders and files for writing, on a disk or in an object store, with the same methods."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.storage import files


@dataclass(frozen=True)
class Place:
    """A folder or a file, by its absolute local path or its URI (`s3://`, `gs://`).

    Every method raises OSError if the disk or the store refuses, and FileNotFoundError for a missing file.
    """

    uri: str

    @classmethod
    def of(cls, path: str | Path) -> Place:
        """Return the place of a path, made absolute, or of a URI."""
        return cls(files.resolve(str(path), "runs_dir"))

    def __truediv__(self, name: str) -> Place:
        return Place(files.join(self.uri, name))

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def is_remote(self) -> bool:
        return files.is_remote(self.uri)

    def read(self) -> bytes:
        """Return the whole content of a file."""
        with files.open_stream(self.uri) as file:
            return bytes(file.read())

    def write(self, data: bytes) -> None:
        """Replace a file atomically."""
        if self.is_remote:
            files.write(self.uri, data)
        else:
            Path(self.uri).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(self.uri), data)

    @contextlib.contextmanager
    def writing(self) -> Iterator[IO[bytes] | Any]:
        """Open a file for writing; it exists, flushed to the disk, after the block ends without an error."""
        if self.is_remote:
            with files.open_output(self.uri) as file:
                yield file
            return
        Path(self.uri).parent.mkdir(parents=True, exist_ok=True)
        with _atomic(Path(self.uri)) as file:
            yield file

    def is_file(self) -> bool:
        return files.is_file(self.uri)

    def folders(self) -> list[str]:
        """Return the names of the folders directly in this one, sorted; an empty list if it does not exist."""
        return files.folders(self.uri)

    def remove(self) -> None:
        """Remove a folder with its content, if it exists."""
        if self.is_remote:
            files.remove_tree(self.uri)
        else:
            shutil.rmtree(self.uri, ignore_errors=True)


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[IO[bytes]]:
    """Write a temporary file beside the target, flush it to the disk, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a local file atomically; its folder must exist."""
    with _atomic(path) as file:
        file.write(data)
