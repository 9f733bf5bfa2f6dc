"""Source: WebDataset tars. Members that share a name up to their extensions are one sample.

The headers of every tar are read once. Then an image is read by its offset.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.data.image_dataset import IMAGE_EXTENSIONS, ImageDataset, fingerprint, numbered
from pipeline.storage import files
from pipeline.storage.files import File, Part

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.config import DataConfig

SPAN = 16  # neighbouring samples that are read together, with one request to an object store
BUFFER = 2 * 2**20  # bytes; headers lie between images, so a remote tar is fetched whole instead of one request for each header
LABEL_BYTES = 32  # a label member is a short number


@dataclass(kw_only=True)
class TarDataset(ImageDataset):
    """Images inside tar files, by file and offset."""

    files: list[str]
    first_ids: np.ndarray  # (files + 1,) int64, first id of every file
    offsets: np.ndarray  # (N,) int64, bytes from the start of the tar
    sizes: np.ndarray  # (N,) int64
    names: pa.Array  # of the image members

    def _file(self, id: int) -> str:
        return self.files[int(np.searchsorted(self.first_ids, id, side="right")) - 1]

    def path(self, id: int) -> str:
        name: str = self.names[id].as_py()
        return f"{self._file(id)}#{os.fsdecode(name)}"

    def _read(self, ids: Sequence[int] | np.ndarray) -> list[tuple[bytes, str | None]]:
        parts = [Part(self._file(int(i)), int(self.offsets[i]), int(self.sizes[i])) for i in ids]
        return [(data, None) for data in files.read_merged(parts)]


class _Location(NamedTuple):
    name: str  # of the image member
    offset: int
    size: int
    label: int


class _Index(NamedTuple):
    samples: list[_Location]
    skipped: list[tuple[str, str]]


def open_webdataset(root: str, parts: list[File], data: DataConfig) -> ImageDataset:
    """Open tar files below `root`: ids follow the order of the files, and of the images inside.

    Raises:
        ConfigError: a tar that cannot be read to its end, or no image in any of them.
    """
    import pyarrow as pa

    paths = [files.join(root, part.name) for part in parts]
    if files.is_remote(root):
        indices = files.each(lambda pair: _remembered(*pair), list(zip(paths, parts, strict=True)))
    else:
        indices = [_index(path) for path in paths]
    samples = [sample for index in indices for sample in index.samples]
    skipped = [entry for index in indices for entry in index.skipped]
    if not samples:
        few = ", ".join(path.rpartition("#")[2] for path, _ in skipped[:3])
        among = f" among {few}" if few else " in the .tar files"
        raise ConfigError(f"data.path={data.path}: no images{among}; give tars with jpg, png, webp, ... members")
    labels = np.array([sample.label for sample in samples], np.int64)
    class_names = numbered(labels)
    counts = [len(index.samples) for index in indices]
    spans = [
        (first, min(SPAN, end - first)) for end, n in zip(np.cumsum(counts), counts, strict=True) for first in range(end - n, end, SPAN)
    ]
    return TarDataset(
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint((f"{p.name}:{p.size}:{n}" for p, n in zip(parts, counts, strict=True)), class_names),
        spans=np.array(spans, np.int64),
        skipped=skipped,
        files=paths,
        first_ids=np.cumsum([0, *counts], dtype=np.int64),
        offsets=np.array([sample.offset for sample in samples], np.int64),
        sizes=np.array([sample.size for sample in samples], np.int64),
        names=pa.array([os.fsencode(sample.name) for sample in samples], pa.large_binary()),
    )


def _remembered(path: str, part: File) -> _Index:
    """Return the index of a remote tar from the cache folder; if it is not there, read the tar."""
    from pipeline.storage.place import write_atomic

    key = hashlib.blake2b(f"{path}:{part.size}:{part.written}".encode(), digest_size=16).hexdigest()
    index_file = files.cache_folder() / "tars" / f"{key}.json"
    try:
        samples, skipped = json.loads(index_file.read_text())
        return _Index([_Location(*sample) for sample in samples], [(where, reason) for where, reason in skipped])
    except (OSError, ValueError, TypeError):  # missing or incomplete
        index = _index(path)
    with contextlib.suppress(OSError):  # without a cache, e.g. on a full disk, the next run reads the tar again
        index_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(index_file, json.dumps(index).encode())
    return index


def _index(path: str) -> _Index:
    try:
        with files.explained(path), files.open_file(path, files.OPEN_ATTEMPTS) as file:
            buffered = io.BufferedReader(file, BUFFER) if files.is_remote(path) else file
            return _samples(path, buffered)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ConfigError(f"data.path={path}: not a readable tar file ({error}); replace it, or move it away") from None


def _samples(path: str, file: io.BufferedIOBase) -> _Index:
    """Read the headers of a tar in one pass."""
    images: dict[str, tarfile.TarInfo] = {}  # by key
    labels: dict[str, int] = {}
    skipped: dict[str, tuple[str, str]] = {}  # a member and a reason by key; only samples without an image are reported
    extra = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            key, extensions = _split(member.name)
            if not member.isreg() or member.issparse() or os.path.basename(key).startswith(".") or not key:
                continue
            extension = "." + extensions.rpartition(".")[2].lower()
            if extension in IMAGE_EXTENSIONS:
                if key in images:
                    extra.append((f"{path}#{member.name}", "a second image of its sample"))
                else:
                    images[key] = member
            elif extensions.lower() in ("cls", "txt") and member.size <= LABEL_BYTES:
                file.seek(member.offset_data)
                text = file.read(member.size).strip()
                if text.isdigit() and (extensions == "cls" or key not in labels):
                    labels[key] = int(text)
            skipped.setdefault(key, (f"{path}#{member.name}", "no image in this sample"))
        _check_end(tar, file)
    samples = [_Location(m.name, m.offset_data, m.size, labels.get(key, -1)) for key, m in images.items()]
    return _Index(samples, extra + [entry for key, entry in skipped.items() if key not in images])


def _split(name: str) -> tuple[str, str]:
    """Return key and extensions: the parts before and after the first dot of the file name."""
    folder, slash, last = name.rpartition("/")
    stem, _, extensions = last.partition(".")
    if not stem:  # a hidden file
        return folder + slash + last, ""
    return folder + slash + stem, extensions


def _check_end(tar: tarfile.TarFile, file: io.BufferedIOBase) -> None:
    """Raise ReadError unless the archive ends here or goes on with zeros: tarfile ends without an error at a damaged header."""
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
