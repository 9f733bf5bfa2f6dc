"""Source: a tree of image files, on a disk or in a bucket."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.data.image_dataset import IMAGE_EXTENSIONS, ImageDataset, fingerprint
from pipeline.storage import files
from pipeline.storage.files import File, Part

if TYPE_CHECKING:
    import pyarrow as pa

REMEDIES = {  # by the files that were found instead of images
    ".parquet": "give the folder that holds the .parquet files",
    ".tar": "give the folder that holds the .tar files",
    ".gz": "unpack .tar.gz archives to .tar: single images are read out of them",
    ".tgz": "unpack .tgz archives to .tar: single images are read out of them",
    ".arrow": "save the data set with to_parquet, one file for each split",
}


@dataclass(kw_only=True)
class FolderDataset(ImageDataset):
    """A tree of image files; the first level of folders gives the labels."""

    root: str
    names: pa.Array  # paths below root; Arrow, because tasks share one copy of it in memory

    def path(self, id: int) -> str:
        name: str = self.names[id].as_py()
        return files.join(self.root, os.fsdecode(name))

    def _read(self, ids: Sequence[int] | np.ndarray) -> list[tuple[bytes, str | None]]:
        return [(data, None) for data in files.read_all([Part(self.path(int(i))) for i in ids])]


def open_folder(root: str, tree: list[File], shown: str) -> ImageDataset:
    """Return the images of a listing.

    Args:
        root: absolute path or URI.
        tree: every file below it, sorted.
        shown: `data.path` as the user gave it, for messages.

    Raises:
        ConfigError: there is no image.
    """
    import pyarrow as pa

    images, skipped = [], []
    for name, size, _ in tree:
        extension = os.path.splitext(name)[1].lower()
        if extension in IMAGE_EXTENSIONS:
            images.append((name, size))
        else:
            skipped.append((name, f"no image: {extension} file" if extension else "no image: no extension"))
    if not images:
        if not skipped:
            raise ConfigError(f"data.path={shown}: the folder is empty; give a folder with images, or patches")
        few = ", ".join(name for name, _ in skipped[:3])
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        extensions = {os.path.splitext(name)[1].lower() for name, _ in skipped}
        remedy = next((text for ending, text in REMEDIES.items() if ending in extensions), "give a folder with jpg, png, webp, ... files")
        raise ConfigError(f"data.path={shown}: no images among {few}{more}; {remedy}")
    folders = [name.partition("/")[0] if "/" in name else None for name, _ in images]
    class_names = sorted({folder for folder in folders if folder is not None})
    index = {folder: label for label, folder in enumerate(class_names)}
    count = len(images)
    return FolderDataset(
        labels=np.array([-1 if folder is None else index[folder] for folder in folders], np.int64),
        class_names=class_names,
        fingerprint=fingerprint((f"{name}:{size}" for name, size in images), class_names),
        spans=np.stack([np.arange(count), np.ones(count, np.int64)], axis=1),
        skipped=[(files.join(root, name), reason) for name, reason in skipped],
        root=root,
        names=pa.array([os.fsencode(name) for name, _ in images], pa.large_binary()),
    )
