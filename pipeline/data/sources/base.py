"""Opening of `data.path` as an image dataset, by kind of source."""

from __future__ import annotations

import fnmatch
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from methods.parts.errors import ConfigError
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.sources.folder import open_folder
from pipeline.data.sources.huggingface import open_huggingface
from pipeline.data.sources.iterable import open_iterable, with_absolute_path
from pipeline.data.sources.parquet import open_parquet
from pipeline.data.sources.patches import open_patches
from pipeline.data.sources.torchvision_data import open_torchvision
from pipeline.data.sources.webdataset import open_webdataset
from pipeline.storage import files

if TYPE_CHECKING:
    from pipeline.config import DataConfig  # importing it costs seconds (timm)

NAMES = ("patches", "cifar10", "cifar100")  # `data.path` may be one of these, with options after a colon


def is_local_path(path: str) -> bool:
    """Return whether `data.path` is a path on this machine, not a URI or a built-in name."""
    return "://" not in path and path.partition(":")[0] not in (*NAMES, "stream")


def nothing_at(path: str, key: str = "data.path") -> str:
    """Return the error message about a path that does not exist."""
    return f"{key}={path}: does not exist; give a folder of images, Parquet or tar files, a URI, or patches"


def absolute_source(path: str) -> str:
    """Return `data.path` in its absolute form."""
    if path.startswith("stream:"):
        return with_absolute_path(path)
    return str(Path(path).expanduser().resolve()) if is_local_path(path) else path


def open_source(data: DataConfig) -> ImageDataset:
    """List the images of `data.path`. Read names, sizes, Parquet footers, tar headers and labels, but no image.

    Raises:
        ConfigError: no such path, no images, no such column, no right to read, or an unknown option of a built-in set.
    """
    name = data.path.partition(":")[0]
    if name == "patches":
        return open_patches(data.path)
    if name in NAMES:
        return open_torchvision(data)
    if name == "stream":
        return open_iterable(data.path)
    root = files.resolve(data.path)
    if root.startswith("hf://"):
        return open_huggingface(root, data)
    with files.explained(root):
        return _open_files(root, data)


def open_test(data: DataConfig, path: str) -> ImageDataset:
    """List the test images at `path` with the other settings of `data`, as `open_source` does.

    Raises:
        ConfigError: as `open_source`, about `evaluate.path`.
    """
    try:
        return open_source(replace(data, path=path))
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.path=", "evaluate.path=", 1)) from None


def _open_files(root: str, data: DataConfig) -> ImageDataset:
    """Open a file or folder of Parquet or tars, or a folder of images; `*` in the last part of the path chooses files."""
    kinds = {".parquet": open_parquet, ".tar": open_webdataset}
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
        raise ConfigError(nothing_at(data.path))
    tree = files.tree(root) if remote else None  # one listing of a bucket; a local folder is walked only for images
    top = files.children(root) if tree is None else [file for file in tree if "/" not in file.name]
    parts = sorted(f for f in top if not f.name.startswith((".", "_")) and (not chosen or fnmatch.fnmatch(f.name, last)))
    for extension, opened in kinds.items():
        if found := [file for file in parts if file.name.lower().endswith(extension)]:
            return opened(root, found, data)
    if chosen:
        raise ConfigError(f"data.path={data.path}: no .parquet or .tar file has such a name; check the pattern, or give the folder")
    return open_folder(root, files.tree(root) if tree is None else tree, data.path)
