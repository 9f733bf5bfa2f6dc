"""Where images come from: one manifest with dense ids 0 .. N-1, whatever the kind of source and wherever it lies."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.ingest.philox import HELD_OUT, uniforms

if TYPE_CHECKING:
    from pipeline.config import DataConfig  # importing it costs seconds (timm), and every task imports this file

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
MOST_HELD_OUT = 5000  # enough for an accuracy to half a point; a large source should train on the rest
NAMES = ("patches", "cifar10", "cifar100")  # `data.path` may be one of these, with options after a colon


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


def is_local_path(path: str) -> bool:
    """Is `data.path` a path on this machine, which workers need in its absolute form, and no URI or built-in name?"""
    return "://" not in path and path.partition(":")[0] not in NAMES


def open_source(data: DataConfig) -> Manifest:
    """List the images of `data.path`. Reads names, sizes, Parquet footers, tar headers and labels, but no image.

    Raises:
        ConfigError: nothing there, no images, no such column, no right to read, or an unknown option of a built-in set.
    """
    from pipeline.ingest import files

    name = data.path.partition(":")[0]
    if name == "patches":
        from pipeline.ingest.patches import open_patches

        return open_patches(data.path)
    if name in NAMES:
        from pipeline.ingest.named import open_named

        return open_named(data)
    root = files.resolve(data.path)
    if root.startswith("hf://"):
        from pipeline.ingest.hub import open_hub

        return open_hub(root, data)
    with files.explained(root):
        return _open_files(root, data)


def _open_files(root: str, data: DataConfig) -> Manifest:
    """A file or folder of Parquet or tars, or a folder of images; `*` in the last part of the path chooses files."""
    from pipeline.ingest import files
    from pipeline.ingest.folder import open_folder
    from pipeline.ingest.parquet import open_parquet
    from pipeline.ingest.tars import open_tars

    kinds = {".parquet": open_parquet, ".tar": open_tars}
    folder, _, last = root.rpartition("/")
    remote = files.is_remote(root)
    if files.is_file(root):
        extension = os.path.splitext(root)[1].lower()
        if extension not in kinds:
            raise ConfigError(f"data.path={data.path}: a single file must be .parquet or .tar; give the folder that holds the images")
        return kinds[extension](folder, [files.facts(root)], data)
    chosen = "*" in last and (remote or not os.path.exists(root))
    if chosen:
        root = folder
    if not remote and not os.path.exists(root):
        raise ConfigError(f"data.path={data.path}: does not exist; give a folder of images, Parquet or tar files, a URI, or patches")
    tree = files.tree(root) if remote else None  # one listing of a bucket; a local folder is walked only for images
    top = files.children(root) if tree is None else [file for file in tree if "/" not in file.name]
    parts = sorted(f for f in top if not f.name.startswith((".", "_")) and (not chosen or fnmatch.fnmatch(f.name, last)))
    for extension, opened in kinds.items():
        if found := [file for file in parts if file.name.lower().endswith(extension)]:
            return opened(root, found, data)
    if chosen:
        raise ConfigError(f"data.path={data.path}: no .parquet or .tar file has such a name; check the pattern, or give the folder")
    return open_folder(root, files.tree(root) if tree is None else tree, data.path)


def numbered(labels: np.ndarray) -> list[str]:
    """Class names of labels that have none: their numbers."""
    top = int(labels.max(initial=-1)) + 1
    return [str(i) for i in range(top)] if top <= 100_000 else []


def fingerprint(lines: Iterable[str], class_names: Sequence[str]) -> str:
    """Hash of a list of images and the class names, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for line in (*lines, "classes", *class_names):
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
