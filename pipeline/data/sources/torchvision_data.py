"""Source: datasets by their torchvision name, downloaded once and stored as Parquet files of PNG bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.parts.errors import ConfigError
from pipeline.data.image_dataset import ImageDataset, fingerprint
from pipeline.storage.files import File, cache_folder

if TYPE_CHECKING:
    from pipeline.config import DataConfig

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
SPLITS = ("train", "test")
ROW_GROUP = 1000  # images, about 2 MB of 32 pixels
TIMEOUT_S = 30.0  # for one answer of the server


def open_torchvision(data: DataConfig) -> ImageDataset:
    """Open `cifar10` (its training images) or `cifar10:split=test`.

    Raises:
        ConfigError: an unknown option, or neither a cached copy nor internet.
    """
    from pipeline.data.sources.parquet import open_parquet

    name, split = _parse(data.path)
    folder = cache_folder() / name
    file = folder / f"{split}.parquet"
    if not file.exists():
        try:
            with _locked(folder):
                if not file.exists():
                    _prepare(name, folder)
        except OSError as error:
            raise ConfigError(f"data.path={data.path}: {folder} cannot be written ({error.strerror}); set MANYVIEWS_CACHE") from None
    columns = dataclasses.replace(data, image_column="image", label_column="label")
    dataset = open_parquet(str(folder), [File(file.name, file.stat().st_size)], columns)
    # not from the file, whose size depends on the compressor
    dataset.fingerprint = fingerprint([f"{name}:split={split}:{len(dataset)}"], dataset.class_names)
    dataset.test_path = f"{name}:split=test" if split == "train" else None
    return dataset


def _parse(path: str) -> tuple[str, str]:
    name, _, options = path.partition(":")
    split = "train"
    for item in filter(None, options.split(",")):
        key, _, split = (part.strip() for part in item.partition("="))
        if key != "split" or split not in SPLITS:
            raise ConfigError(f"data.path={path}: unknown option {item}; use {name} or {name}:split=test")
    return name, split


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder, because two runs may start the same download."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepare(name: str, folder: Path) -> None:
    """Download the archive and write one Parquet file for each split."""
    import torchvision

    dataset = getattr(torchvision.datasets, TORCHVISION[name])
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        splits = {split: dataset(root=str(folder), train=split == "train", download=True) for split in SPLITS}
    except (OSError, RuntimeError) as error:  # urllib's errors are OSError; a damaged archive is a RuntimeError
        reason = str(getattr(error, "reason", error)).splitlines()[0]
        raise ConfigError(
            f"data.path={name}: cannot be downloaded ({reason}); put {dataset.filename} from {dataset.url} into {folder}, "
            "or set MANYVIEWS_CACHE to a folder that has it"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    for split, images in splits.items():
        _write(images, folder / f"{split}.parquet", f"{name}, {split}")


def _write(images: Any, file: Path, description: str) -> None:
    """Write images `(N, H, W, 3)` uint8 and their labels to a Parquet file of PNG bytes, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from rich.console import Console
    from rich.progress import track

    cells = []
    for pixels in track(images.data, description, console=Console(stderr=True), transient=True):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        cells.append(out.getvalue())
    table = pa.table({"image": pa.array(cells, pa.binary()), "label": pa.array(images.targets, pa.int64())})
    table = table.replace_schema_metadata({"class_names": ",".join(images.classes)})
    part = file.with_suffix(".part")
    pq.write_table(table, part, row_group_size=ROW_GROUP, compression="none")  # PNG does not shrink further
    os.replace(part, file)
