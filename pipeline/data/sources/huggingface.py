"""Source: datasets of the Hugging Face hub, `hf://datasets/OWNER/NAME[/FOLDER]`, read from their Parquet files."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from typing import TYPE_CHECKING

from methods.parts.errors import ConfigError
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.sources.parquet import open_parquet
from pipeline.storage import files

if TYPE_CHECKING:
    from pipeline.config import DataConfig

SPLIT = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-\d{5}(-\w+)?\.parquet$")  # train-00000-of-00001.parquet


def open_huggingface(root: str, data: DataConfig) -> ImageDataset:
    """Open the Parquet files of a dataset on the hub without copying them: those of the split `train` if file names contain splits.

    `*` in the last part of the path chooses files, for example `.../validation-*`. The split `test` becomes the test split.

    Raises:
        ConfigError: no such dataset, no Parquet files, or several folders of them.
    """
    folder, _, pattern = root.rpartition("/") if "*" in root else (root, "", "*")
    if not re.match(r"hf://datasets/[^/]+/[^/]+", folder):
        raise ConfigError(f"data.path={data.path}: not the form of a data set; use hf://datasets/OWNER/NAME or .../NAME/FOLDER")
    with files.explained(folder):
        tree = [files.facts(folder)] if folder.endswith(".parquet") else files.tree(folder)
    if folder.endswith(".parquet"):
        return open_parquet(folder.rpartition("/")[0], tree, data)
    found = [f for f in tree if f.name.endswith(".parquet") and fnmatch.fnmatch(f.name.rpartition("/")[2], pattern)]
    if not found:
        raise ConfigError(
            f"data.path={data.path}: no Parquet files there; the hub makes them for most data sets, try "
            f"{'/'.join(folder.split('/')[:5])}@refs/convert/parquet"
        )
    places = sorted({f.name.rpartition("/")[0] for f in found})
    if len(places) > 1:
        raise ConfigError(f"data.path={data.path}: Parquet files in several folders; give one of {', '.join(places[:10])}")
    splits = {f.name: match["split"] for f in found if (match := SPLIT.search(f.name.rpartition("/")[2]))}
    if pattern != "*" or "train" not in splits.values():
        return open_parquet(folder, found, data)
    dataset = open_parquet(folder, [f for f in found if splits.get(f.name) == "train"], data)
    if "test" in splits.values():
        dataset = dataclasses.replace(dataset, test_path=files.join(folder, files.join(places[0], "test-*") if places[0] else "test-*"))
    return dataset
