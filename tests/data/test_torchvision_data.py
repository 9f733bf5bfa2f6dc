"""Data sets by name: fetched once, kept as Parquet, and clear words where there is no internet."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torchvision

from methods.parts.errors import ConfigError
from pipeline.config import DataConfig
from pipeline.data.decode import decode
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.sources.base import open_source

CLASSES = ["airplane", "automobile", "bird"]


def open_path(path: str, **settings: object) -> ImageDataset:
    return open_source(DataConfig(path=path, **settings))


def pixels(split: int, count: int) -> np.ndarray:
    return np.random.default_rng(split).integers(0, 256, (count, 3, 32, 32), np.uint8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and torchvision told the checksums of a tiny archive of the same form."""
    monkeypatch.setenv("MANYVIEWS_CACHE", str(tmp_path / "cache"))
    members = {"batches.meta": {"label_names": CLASSES}}
    for name, split, count in (("data_batch_1", 0, 7), ("test_batch", 1, 4)):
        members[name] = {"data": pixels(split, count).reshape(count, -1), "labels": [i % 3 for i in range(count)]}  # type: ignore[dict-item]
    archive = tmp_path / "cifar-10-python.tar.gz"
    sums = {}
    with tarfile.open(archive, "w:gz") as tar:
        for name, value in members.items():
            data = pickle.dumps(value)
            sums[name] = hashlib.md5(data).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums["batches.meta"]})
    for protocol in ("http", "https"):  # nobody listens there: no internet
        monkeypatch.setenv(f"{protocol}_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    return tmp_path / "cache/cifar10"


def place_archive(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "cifar-10-python.tar.gz").write_bytes((cache.parent.parent / "cifar-10-python.tar.gz").read_bytes())


def test_both_splits(cache: Path) -> None:
    place_archive(cache)
    train = open_path("cifar10", image_column="of another source")
    assert len(train) == 7 and train.class_names == CLASSES and train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    for row, expected in zip(train.read(range(7)), pixels(0, 7), strict=True):
        assert row.image.startswith(b"\x89PNG") and (decode(row.image) == expected.transpose(1, 2, 0)).all()
    assert train.test_path == "cifar10:split=test"
    test = open_path(train.test_path)
    assert len(test) == 4 and test.class_names == CLASSES and test.test_path is None and test.fingerprint != train.fingerprint
    assert (decode(test.read([3])[0].image) == pixels(1, 4)[3].transpose(1, 2, 0)).all()


def test_it_is_prepared_once(cache: Path) -> None:
    place_archive(cache)
    before = open_path("cifar10").fingerprint
    (cache / "cifar-10-python.tar.gz").unlink(missing_ok=True)  # without which nothing can be prepared
    assert open_path("cifar10").fingerprint == before
    assert sorted(file.name for file in cache.glob("*.p*")) == ["test.parquet", "train.parquet"]


def test_the_fingerprint_does_not_hang_on_the_compression(cache: Path) -> None:
    place_archive(cache)
    before = open_path("cifar10").fingerprint
    file = cache / "train.parquet"
    pq.write_table(pq.read_table(file), file, compression="zstd", row_group_size=3)
    assert open_path("cifar10").fingerprint == before


def test_no_internet(cache: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be downloaded") as caught:
        open_path("cifar10")
    words = str(caught.value)
    assert f"put cifar-10-python.tar.gz from {torchvision.datasets.CIFAR10.url} into {cache}, or set MANYVIEWS_CACHE" in words
    assert re.search(r"cannot be downloaded \(\[Errno -?\d+\] .+?\); put", words) and "\n" not in words
    assert not list(cache.glob("*.parquet"))


def test_a_damaged_archive_is_not_used(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    with pytest.raises(ConfigError, match=r"cannot be downloaded .*put cifar-10-python\.tar\.gz"):
        open_path("cifar10")


def test_an_interrupted_preparation_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_archive(cache)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\); set MANYVIEWS_CACHE"):
            open_path("cifar10")
    assert len(open_path("cifar10")) == 7


@pytest.mark.parametrize("path", ["cifar10:split=valid", "cifar10:pixels=3", "cifar10:test"])
def test_options(cache: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown option .*; use cifar10 or cifar10:split=test"):
        open_path(path)
