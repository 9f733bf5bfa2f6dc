"""Reading and writing of files on local disks and in object stores, with the same functions.

A path is a string: an absolute local path or a URI (`s3://`, `gs://`, `hf://`). File systems, handles and threads belong to the
process and are made when they are first needed, so image datasets can be pickled.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

from pipeline.storage.stores import at, missing, short
from pipeline.storage.stores import explained as explained
from pipeline.storage.stores import is_remote as is_remote
from pipeline.storage.stores import resolve as resolve

if TYPE_CHECKING:
    import pyarrow as pa

THREADS = 16  # concurrent requests of each process: their latency hardly depends on their size
OPEN_ATTEMPTS, READ_ATTEMPTS, WRITE_ATTEMPTS = (
    3,
    10,
    10,
)  # few for opening, so that a wrong address fails within seconds; many for a busy store
OPEN_HANDLES = 64  # objects that each process keeps open, which saves requests for their size
MERGE_GAP, MERGE_MOST = 64 * 2**10, 16 * 2**20  # bytes: parts of one file within this gap are read together, up to this length

In = TypeVar("In")
Out = TypeVar("Out")


class File(NamedTuple):
    """A file of a listing: its path below the root, with slashes, its size in bytes, and its time in an object store."""

    name: str
    size: int
    written: float = 0.0  # Unix time, s


class Part(NamedTuple):
    """A part of a file: `size` bytes from `offset`, or the whole file."""

    path: str
    offset: int = 0
    size: int | None = None


def join(root: str, name: str) -> str:
    """Return the path of a file of a listing."""
    return f"{root.rstrip('/')}/{name}"


def cache_folder() -> Path:
    """Return the folder of downloads and indices: MANYVIEWS_CACHE, else `~/.cache/manyviews`. On a cluster it must be shared."""
    return Path(os.environ.get("MANYVIEWS_CACHE") or "~/.cache/manyviews").expanduser().resolve()


# ---------------------------------------------------------------------------- listing


def is_file(path: str) -> bool:
    """Return whether there is a file of this name."""
    if not is_remote(path):
        return os.path.isfile(path)
    from pyarrow.fs import FileType

    system, key = at(path, OPEN_ATTEMPTS)
    return bool(system.get_file_info(key).type == FileType.File)


def facts(path: str) -> File:
    """Return a single file as an entry of its folder's listing."""
    name = path.rpartition("/")[2]
    if not is_remote(path):
        return File(name, os.path.getsize(path))
    system, key = at(path, OPEN_ATTEMPTS)
    return _file(name, system.get_file_info(key))


def children(folder: str) -> list[File]:
    """Return the files directly in a local folder."""
    with os.scandir(folder) as entries:
        return [File(entry.name, entry.stat().st_size) for entry in entries if entry.is_file()]


def tree(folder: str, missing_ok: bool = False) -> list[File]:
    """Return every file below a folder that is not hidden, sorted by name, in an object store by one recursive listing.

    Local links are followed, loops are not.

    Args:
        missing_ok: return an empty list for a folder that does not exist in a store.
    """
    if not is_remote(folder):
        return sorted(_walk(folder))
    from pyarrow.fs import FileSelector, FileType

    system, key = at(folder, OPEN_ATTEMPTS)
    found = system.get_file_info(FileSelector(key, allow_not_found=missing_ok, recursive=True))
    listed = (_file(info.path[len(key) + 1 :], info) for info in found if info.type == FileType.File)
    return sorted(file for file in listed if not any(part.startswith(".") for part in file.name.split("/")))


def _file(name: str, info: Any) -> File:
    return File(name, int(info.size or 0), info.mtime.timestamp() if info.mtime else 0.0)


def _walk(root: str) -> Iterator[File]:
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        for name in names:
            if not name.startswith("."):
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, root).replace(os.sep, "/")
                yield File(relative, os.stat(path).st_size if os.path.exists(path) else 0)


# ---------------------------------------------------------------------------- reading


def read_all(parts: Sequence[Part]) -> list[bytes]:
    """Return the bytes of every part, in order; empty for a file that no longer exists, and for a local one that may not be read.

    Raises:
        OSError: an object store does not answer after several attempts, or credentials have expired. The images are not bad then.
    """
    if not parts:
        return []
    if not is_remote(parts[0].path):
        return [_read_local(part) for part in parts]
    return each(_read_remote, parts)


def read_merged(parts: Sequence[Part]) -> list[bytes]:
    """Return the same as `read_all` for parts with sizes; neighbours in a file are read together."""
    runs: list[list[int]] = []
    for i in sorted(range(len(parts)), key=lambda i: parts[i][:2]):
        if runs and _near(parts[runs[-1][0]], parts[runs[-1][-1]], parts[i]):
            runs[-1].append(i)
        else:
            runs.append([i])
    whole = []
    for run in runs:
        path, start, _ = parts[run[0]]
        whole.append(Part(path, start, max(_end(parts[i]) for i in run) - start))
    cells = [b""] * len(parts)
    for run, part, data in zip(runs, whole, read_all(whole), strict=True):
        for i in run:
            cells[i] = data[parts[i].offset - part.offset : _end(parts[i]) - part.offset]
    return cells


def _near(first: Part, last: Part, part: Part) -> bool:
    """Return whether a part is read in the same request as those from `first` to `last`."""
    return part.path == last.path and part.offset - _end(last) <= MERGE_GAP and _end(part) - first.offset <= MERGE_MOST


def _end(part: Part) -> int:
    return part.offset + (part.size or 0)


def each(function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """Map a function over items in several threads."""
    return list(_threads().map(function, items))


def open_file(path: str, attempts: int | None = None) -> pa.NativeFile:
    """Open a file for random access; local files are memory-mapped."""
    import pyarrow as pa

    if not is_remote(path):
        return pa.memory_map(path)
    system, key = at(path, attempts or READ_ATTEMPTS)
    return system.open_input_file(key)


def open_stream(path: str) -> IO[bytes] | pa.NativeFile:
    """Open a file to read it once, from its beginning."""
    if not is_remote(path):
        return open(path, "rb")
    system, key = at(path, READ_ATTEMPTS)
    return system.open_input_stream(key)


# ---------------------------------------------------------------------------- writing


def open_output(path: str) -> pa.NativeFile:
    """Open a new object for writing; it exists after the stream is closed."""
    system, key = at(path, WRITE_ATTEMPTS)
    return system.open_output_stream(key)


def write(path: str, data: bytes) -> None:
    """Write a whole object atomically."""
    with open_output(path) as out:
        out.write(data)


def copy(source: str, destination: str) -> None:
    """Copy a file, or a folder with its content, between disk and store."""
    from pyarrow import fs

    (system, path), (other, target) = (
        at(place, WRITE_ATTEMPTS) if is_remote(place) else (fs.LocalFileSystem(), place) for place in (source, destination)
    )
    fs.copy_files(path, target, source_filesystem=system, destination_filesystem=other)


def folders(folder: str) -> list[str]:
    """Return the names of the folders directly in a folder, sorted; an empty list if it does not exist."""
    if not is_remote(folder):
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if os.path.isdir(folder) else []
    from pyarrow.fs import FileSelector, FileType

    system, key = at(folder, WRITE_ATTEMPTS)
    found = system.get_file_info(FileSelector(key, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == FileType.Directory)


def remove_tree(path: str) -> None:
    """Remove every object below a path, if there are any."""
    system, key = at(path, WRITE_ATTEMPTS)
    with contextlib.suppress(FileNotFoundError):
        system.delete_dir(key)


def _read_local(part: Part) -> bytes:
    try:
        if part.size is None:
            return Path(part.path).read_bytes()
        with open(part.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), part.size, part.offset)
    except OSError:
        return b""


def _read_remote(part: Part) -> bytes:
    try:
        if part.size is None:
            with open_file(part.path) as file:
                return bytes(file.read())
        return bytes(_handle(part.path).read_at(part.size, part.offset))
    except Exception as error:  # fsspec file systems raise exceptions of their clients
        if missing(error):
            return b""
        raise OSError(f"{part.path}: cannot be read ({short(error)})") from None


@lru_cache(maxsize=OPEN_HANDLES)
def _handle(path: str) -> pa.NativeFile:
    return open_file(path)


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="manyviews-read")
