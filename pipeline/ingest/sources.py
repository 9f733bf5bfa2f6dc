"""Where images come from: one manifest with dense ids 0 .. N-1 for a folder tree, Parquet, or the built-in patches."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.ingest.philox import HELD_OUT, uniforms

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.config import DataConfig  # importing it costs seconds (timm), and every task imports this file

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
MOST_HELD_OUT = 5000  # enough for an accuracy to half a point; a large source should train on the rest
ROW_GROUP_CACHE = 128 * 2**20  # bytes of row groups each process keeps


class Row(NamedTuple):
    """One image of a source, still encoded. A label of -1 is unknown."""

    id: int
    image: bytes
    label: int
    path: str


@dataclass(kw_only=True)
class Manifest:
    """What is in a source, without the pixels: small, picklable, the same wherever the files lie.

    Attributes:
        labels: `(N,)` int64 by id; -1 is unknown.
        class_names: name of every label, empty if there are none.
        fingerprint: hash of the list of images and the class names.
        spans: `(G, 2)` int64, first id and number of rows of every natural unit of reading.
        skipped: path and reason of every file that is no image.
        test_path: the source's own test split, to be opened like `data.path`.
    """

    labels: np.ndarray
    class_names: list[str]
    fingerprint: str
    spans: np.ndarray
    skipped: list[tuple[str, str]] = field(default_factory=list)
    test_path: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, id: int) -> str:
        """Where an image lies, for messages."""
        raise NotImplementedError

    def read(self, ids: Sequence[int] | np.ndarray) -> list[Row]:
        """The encoded images in the order asked. A file that cannot be read gives empty bytes, so that ids stay stable."""
        cells = zip(ids, self._read(ids), strict=True)
        return [Row(int(i), image, int(self.labels[i]), path or self.path(int(i))) for i, (image, path) in cells]

    def _read(self, ids: Sequence[int] | np.ndarray) -> Iterable[tuple[bytes, str | None]]:
        """Encoded bytes and, where the source stores one, a path of its own."""
        raise NotImplementedError

    def held_out_ids(self, fraction: float) -> np.ndarray:
        """Sorted ids kept away from training, int64; chosen by a hash of the id, so every run holds out the same ones.

        None where there are no labels: held-out images serve kNN, which would have nothing to vote on.
        """
        count = len(self)
        if fraction <= 0 or count < 2 or not (self.labels >= 0).any():
            return np.empty(0, np.int64)
        wanted = min(max(1, round(fraction * count)), count - 1, MOST_HELD_OUT)
        numbers = uniforms(0, 0, np.arange(count), HELD_OUT, 1)[:, 0]
        return np.sort(np.argsort(numbers, kind="stable")[:wanted])

    def training_ids(self, fraction: float) -> np.ndarray:
        """Sorted ids that are not held out, int64."""
        keep = np.ones(len(self), bool)
        keep[self.held_out_ids(fraction)] = False
        return np.flatnonzero(keep)


def open_source(data: DataConfig) -> Manifest:
    """List the images of `data.path`. Reads names, sizes, Parquet footers and labels, but no image.

    Raises:
        ConfigError: nothing there, no images, no such column, or an unknown option of the built-in set.
    """
    if data.path == "patches" or data.path.startswith("patches:"):
        from pipeline.ingest.patches import open_patches

        return open_patches(data.path)
    if "://" in data.path:
        raise ConfigError(f"data.path={data.path}: object stores are not read yet; copy the images to a local folder")
    root = Path(data.path).expanduser().resolve()
    if not root.exists():
        raise ConfigError(f"data.path={data.path}: does not exist; give a folder of images, a Parquet file or folder, or patches")
    if root.is_file():
        if root.suffix.lower() != ".parquet":
            raise ConfigError(f"data.path={data.path}: a single file must be .parquet; give the folder that holds the images")
        return _open_parquet([root], data)
    parts = sorted(p for p in root.iterdir() if p.suffix.lower() == ".parquet" and not p.name.startswith((".", "_")) and p.is_file())
    return _open_parquet(parts, data) if parts else _open_folder(root, data)


def fingerprint(lines: Iterable[str], class_names: Sequence[str]) -> str:
    """Hash of a list of images and the class names, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for line in (*lines, "classes", *class_names):
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


# ---------------------------------------------------------------------------- folder tree


@dataclass(kw_only=True)
class FolderManifest(Manifest):
    """A tree of image files; the first level of folders gives the labels."""

    root: str
    names: pa.Array  # paths below root; Arrow, because tasks then share one copy in memory

    def path(self, id: int) -> str:
        name: str = self.names[id].as_py()
        return os.path.join(self.root, os.fsdecode(name))

    def _read(self, ids: Sequence[int] | np.ndarray) -> Iterator[tuple[bytes, str | None]]:
        for i in ids:
            try:
                yield Path(self.path(int(i))).read_bytes(), None
            except OSError:
                yield b"", None


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Relative path and size in bytes of every file that is not hidden; links are followed, loops are not."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        for name in files:
            if not name.startswith("."):
                path = os.path.join(folder, name)
                yield os.path.relpath(path, root).replace(os.sep, "/"), os.stat(path).st_size if os.path.exists(path) else 0


def _open_folder(root: Path, data: DataConfig) -> Manifest:
    import pyarrow as pa

    images, skipped = [], []
    for name, size in sorted(_walk(root)):
        extension = os.path.splitext(name)[1].lower()
        if extension in IMAGE_EXTENSIONS:
            images.append((name, size))
        else:
            skipped.append((str(root / name), f"no image: {extension} file" if extension else "no image: no extension"))
    if not images:
        if not skipped:
            raise ConfigError(f"data.path={data.path}: the folder is empty; give a folder with images, or patches")
        few = ", ".join(os.path.relpath(path, root) for path, _ in skipped[:3])
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        remedy = "give the folder that holds the .parquet files" if ".parquet" in few else "give a folder with jpg, png, webp, ... files"
        raise ConfigError(f"data.path={data.path}: no images among {few}{more}; {remedy}")
    folders = [name.partition("/")[0] if "/" in name else None for name, _ in images]
    class_names = sorted({folder for folder in folders if folder is not None})
    index = {folder: label for label, folder in enumerate(class_names)}
    count = len(images)
    return FolderManifest(
        labels=np.array([-1 if folder is None else index[folder] for folder in folders], np.int64),
        class_names=class_names,
        fingerprint=fingerprint((f"{name}:{size}" for name, size in images), class_names),
        spans=np.stack([np.arange(count), np.ones(count, np.int64)], axis=1),
        skipped=skipped,
        root=str(root),
        names=pa.array([os.fsencode(name) for name, _ in images], pa.large_binary()),
    )


# ---------------------------------------------------------------------------- Parquet


@dataclass(kw_only=True)
class ParquetManifest(Manifest):
    """Parquet files with a column of encoded bytes; a row group is the unit of reading."""

    files: list[str]
    first_ids: np.ndarray  # (files + 1,) int64, first id of every file
    groups: np.ndarray  # (G, 2) int64, file and row group of every span
    column: str

    def path(self, id: int) -> str:
        file = int(np.searchsorted(self.first_ids, id, side="right")) - 1
        return f"{self.files[file]}#{id - int(self.first_ids[file])}"

    def _read(self, ids: Sequence[int] | np.ndarray) -> list[tuple[bytes, str | None]]:
        ids = np.asarray(ids, dtype=np.int64)
        spans = np.searchsorted(self.spans[:, 0], ids, side="right") - 1
        cells: list[tuple[bytes, str | None]] = [(b"", None)] * len(ids)
        for span in np.unique(spans):  # each row group once, whatever the order asked
            images, paths = self._group(int(span))
            for place in np.flatnonzero(spans == span):
                row = int(ids[place] - self.spans[span, 0])
                cells[place] = (images[row].as_py() or b"", paths[row].as_py() if paths is not None else None)
        return cells

    def _group(self, span: int) -> tuple[Any, Any]:
        file, group = (int(x) for x in self.groups[span])
        return _row_group(self.files[file], group, self.column)


_row_groups: OrderedDict[tuple[str, int, str], tuple[Any, Any]] = OrderedDict()


def _row_group(file: str, group: int, column: str) -> tuple[Any, Any]:
    """Images and paths (or None) of one row group, from this process's cache of the last few."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = (file, group, column)
    if key not in _row_groups:
        with pq.ParquetFile(file, memory_map=True) as parquet:
            table = parquet.read_row_group(group, columns=[column], use_threads=False)
        cells = table.column(column).combine_chunks()
        cells = cells.chunk(0) if isinstance(cells, pa.ChunkedArray) else cells
        if pa.types.is_struct(cells.type):
            paths = cells.field("path") if cells.type.get_field_index("path") >= 0 else None
            _row_groups[key] = (cells.field("bytes"), paths)
        else:
            _row_groups[key] = (cells, None)
    _row_groups.move_to_end(key)
    while len(_row_groups) > 1 and sum(images.nbytes for images, _ in _row_groups.values()) > ROW_GROUP_CACHE:
        _row_groups.popitem(last=False)
    return _row_groups[key]


def _open_parquet(files: list[Path], data: DataConfig) -> Manifest:
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups, first_ids, lines, label_parts = [], [0], [], []
    names: list[str] | None = None
    for index, file in enumerate(files):
        try:
            parquet = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"data.path={file}: not a readable Parquet file ({str(error).splitlines()[0]}); replace it") from None
        with parquet:
            _check_columns(parquet.schema_arrow, file, data)
            metadata = parquet.metadata
            counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            groups += [(index, g, rows) for g, rows in enumerate(counts) if rows]
            first_ids.append(first_ids[-1] + sum(counts))
            lines.append(f"{file.name}:{file.stat().st_size}:{counts}")
            names = names or _declared_names(parquet.schema_arrow, data.label_column)
            if data.label_column in parquet.schema_arrow.names:
                label_parts.append(parquet.read(columns=[data.label_column]).column(0))
            else:
                label_parts.append(pa.chunked_array([pa.nulls(sum(counts))]))
    if not first_ids[-1]:
        raise ConfigError(f"data.path={data.path}: no rows; give a Parquet file with images")
    labels, class_names = _labels(label_parts, names)
    rows = np.array([rows for _, _, rows in groups], np.int64)
    return ParquetManifest(
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint(lines, class_names),
        spans=np.stack([np.cumsum(rows) - rows, rows], axis=1),
        files=[str(file) for file in files],
        first_ids=np.array(first_ids, np.int64),
        groups=np.array([group[:2] for group in groups], np.int64),
        column=data.image_column,
    )


def _check_columns(schema: pa.Schema, file: Path, data: DataConfig) -> None:
    import pyarrow as pa

    from pipeline.config import DataConfig

    there = ", ".join(schema.names)
    if data.image_column not in schema.names:
        raise ConfigError(f"data.image_column={data.image_column}: no such column in {file.name}; it has {there}")
    if data.label_column not in schema.names and data.label_column != DataConfig.label_column:
        raise ConfigError(f"data.label_column={data.label_column}: no such column in {file.name}; it has {there}")
    kind = schema.field(data.image_column).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ConfigError(f"data.image_column={data.image_column}: holds {kind}, not encoded bytes, in {file.name}; it has {there}")


def _declared_names(schema: pa.Schema, label_column: str) -> list[str] | None:
    """Class names from the file's metadata: Hugging Face's features, or a comma-separated `class_names`."""
    import json

    metadata = schema.metadata or {}
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]
        return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError):
        return metadata[b"class_names"].decode().split(",") if b"class_names" in metadata else None


def _labels(parts: list[Any], names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Labels `(N,)` int64, -1 where unknown, and the class names."""
    import pyarrow as pa

    values = np.concatenate([np.asarray(part.to_pandas(), dtype=object) for part in parts])
    known = np.array([v is not None and v == v for v in values], bool)  # NaN is not equal to itself
    labels = np.full(len(values), -1, np.int64)
    if any(pa.types.is_string(p.type) or pa.types.is_large_string(p.type) or pa.types.is_dictionary(p.type) for p in parts):
        class_names, labels[known] = np.unique(values[known].astype(str), return_inverse=True)
        return labels, [str(name) for name in class_names]
    labels[known] = values[known].astype(np.int64)
    labels[labels < 0] = -1
    top = int(labels.max(initial=-1)) + 1
    if names is not None and top <= len(names):
        return labels, names
    return labels, [str(i) for i in range(top)] if top <= 100_000 else []
