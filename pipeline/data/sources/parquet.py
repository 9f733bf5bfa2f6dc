"""Source: Parquet files with a column of encoded bytes, on a disk or in a bucket."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.data.image_dataset import ImageDataset, fingerprint, numbered
from pipeline.storage import files
from pipeline.storage.files import File

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.config import DataConfig

ROW_GROUP_CACHE = 128 * 2**20  # bytes of row groups that each process caches
ROW_GROUPS_AT_ONCE = 4  # read at the same time from an object store
FOOTERS = 256  # footers that each process caches

_Key = tuple[str, int, str]  # file, row group, column
_Group = tuple[Any, Any]  # images and paths (or None) of a row group


@dataclass(kw_only=True)
class ParquetDataset(ImageDataset):
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
        wanted = np.unique(spans)  # each row group is read once
        step = ROW_GROUPS_AT_ONCE if files.is_remote(self.files[0]) else 1
        for first in range(0, len(wanted), step):
            some = wanted[first : first + step]
            for span, group in zip(some, _row_groups_of([self._key(int(span)) for span in some]), strict=True):
                if group is None:
                    continue
                images, paths = group
                for place in np.flatnonzero(spans == span):
                    row = int(ids[place] - self.spans[span, 0])
                    cells[place] = (images[row].as_py() or b"", paths[row].as_py() if paths is not None else None)
        return cells

    def _key(self, span: int) -> _Key:
        file, group = (int(x) for x in self.groups[span])
        return self.files[file], group, self.column


_row_groups: OrderedDict[_Key, _Group] = OrderedDict()


def _row_groups_of(keys: list[_Key]) -> list[_Group | None]:
    """Return row groups from the cache of this process; missing ones are read at the same time.

    None for an object that no longer exists in its store.
    """
    missing = [key for key in keys if key not in _row_groups]
    read = [_row_group(key) for key in missing] if len(missing) < 2 else files.each(_row_group, missing)
    fresh = dict(zip(missing, read, strict=True))
    found = [_row_groups[key] if key in _row_groups else fresh[key] for key in keys]
    for key, group in zip(keys, found, strict=True):
        if group is not None:
            _row_groups[key] = group
            _row_groups.move_to_end(key)
    while len(_row_groups) > 1 and sum(images.nbytes for images, _ in _row_groups.values()) > ROW_GROUP_CACHE:
        _row_groups.popitem(last=False)
    return found


def _row_group(key: _Key) -> _Group | None:
    """Return images and paths (or None) of one row group; None if the object no longer exists."""
    import pyarrow as pa

    file, group, column = key
    try:
        with _parquet_file(file) as parquet:
            table = parquet.read_row_group(group, columns=[column], use_threads=False)
    except FileNotFoundError:
        if not files.is_remote(file):
            raise  # a whole file is gone from this disk, which is no bad image
        return None
    cells = table.column(column).combine_chunks()
    cells = cells.chunk(0) if isinstance(cells, pa.ChunkedArray) else cells
    if not pa.types.is_struct(cells.type):
        return cells, None
    return cells.field("bytes"), cells.field("path") if cells.type.get_field_index("path") >= 0 else None


def _parquet_file(file: str) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    if not files.is_remote(file):
        return pq.ParquetFile(file, memory_map=True)
    return pq.ParquetFile(files.open_file(file), metadata=_footer(file), pre_buffer=True)


@lru_cache(maxsize=FOOTERS)
def _footer(file: str) -> pq.FileMetaData:
    import pyarrow.parquet as pq

    with files.open_file(file) as opened:
        return pq.read_metadata(opened)


class _Facts(NamedTuple):
    """The content of the footer and of the label column of a file."""

    schema: pa.Schema
    rows: list[int]  # of every row group
    labels: pa.ChunkedArray


def open_parquet(root: str, parts: list[File], data: DataConfig) -> ImageDataset:
    """Open Parquet files below `root`, in the order given.

    Raises:
        ConfigError: a file that cannot be read, no such column, or no rows.
    """
    paths = [files.join(root, part.name) for part in parts]
    look = partial(_look, data=data)
    facts = files.each(look, paths) if files.is_remote(root) else [look(path) for path in paths]
    groups = [(index, group, rows) for index, fact in enumerate(facts) for group, rows in enumerate(fact.rows) if rows]
    if not groups:
        raise ConfigError(f"data.path={data.path}: no rows; give a Parquet file with images")
    names = next(filter(None, (_declared_names(fact.schema, data.label_column) for fact in facts)), None)
    labels, class_names = _labels([fact.labels for fact in facts], names)
    rows = np.array([rows for _, _, rows in groups], np.int64)
    return ParquetDataset(
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint((f"{p.name}:{p.size}:{fact.rows}" for p, fact in zip(parts, facts, strict=True)), class_names),
        spans=np.stack([np.cumsum(rows) - rows, rows], axis=1),
        files=paths,
        first_ids=np.cumsum([0, *(sum(fact.rows) for fact in facts)], dtype=np.int64),
        groups=np.array([group[:2] for group in groups], np.int64),
        column=data.image_column,
    )


def _look(path: str, data: DataConfig) -> _Facts:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with files.explained(path), files.open_file(path, files.OPEN_ATTEMPTS) as file, pq.ParquetFile(file, pre_buffer=True) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
            _check_columns(schema, path.rpartition("/")[2], data)
            rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            if data.label_column in schema.names:
                labels = parquet.read(columns=[data.label_column]).column(0)
            else:
                labels = pa.chunked_array([pa.nulls(sum(rows))])
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"data.path={path}: not a readable Parquet file ({str(error).splitlines()[0]}); replace it") from None
    return _Facts(schema, rows, labels)


def _check_columns(schema: pa.Schema, name: str, data: DataConfig) -> None:
    import pyarrow as pa

    from pipeline.config import DataConfig

    columns = ", ".join(schema.names)
    if data.image_column not in schema.names:
        raise ConfigError(f"data.image_column={data.image_column}: no such column in {name}; it has {columns}")
    if data.label_column not in schema.names and data.label_column != DataConfig.label_column:
        raise ConfigError(f"data.label_column={data.label_column}: no such column in {name}; it has {columns}")
    kind = schema.field(data.image_column).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ConfigError(f"data.image_column={data.image_column}: holds {kind}, not encoded bytes, in {name}; it has {columns}")


def _declared_names(schema: pa.Schema, label_column: str) -> list[str] | None:
    """Return class names from the metadata of the file: Hugging Face's features, or a comma-separated `class_names`."""
    metadata = schema.metadata or {}
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]
        return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError):
        return metadata[b"class_names"].decode().split(",") if b"class_names" in metadata else None


def _labels(parts: list[Any], names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Return labels `(N,)` int64, -1 if unknown, and the class names."""
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
    return labels, names if names is not None and top <= len(names) else numbered(labels)
