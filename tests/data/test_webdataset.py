"""WebDataset tars: samples, labels, places of the images inside, and errors that name the shard."""

from __future__ import annotations

import builtins
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from methods.parts.errors import ConfigError
from pipeline.config import DataConfig
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.sources import webdataset
from pipeline.data.sources.base import open_source
from pipeline.storage import files
from tests.data.pictures import png, write_tar

LONG = "x/" + "l" * 150 + ".webp"


def open_path(path: Path | str, **settings: object) -> ImageDataset:
    return open_source(DataConfig(path=str(path), **settings))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of 3 and 2 samples, one in a format of each kind, with a long name."""
    root = tmp_path / "shards"
    root.mkdir()
    first = {"x/b.jpg": png(0), "x/b.cls": b"2\n", "x/b.json": b"{}", "x/a.cls": b"1", "x/a.PNG": png(1), LONG: png(2)}
    second = {"c.txt": b"3", "c.seg.png": png(3), "d.txt": b"a caption", "d.jpg": png(4), "lost.json": b"{}", "._d.jpg": b"finder"}
    write_tar(root / "00001.tar", second, tarfile.GNU_FORMAT)
    write_tar(root / "00000.tar", first)
    (root / "notes.txt").write_text("ignored")
    return root


def test_samples_labels_and_order(shards: Path) -> None:
    dataset = open_path(shards)
    assert len(dataset) == 5 and dataset.labels.tolist() == [2, 1, -1, 3, -1] and dataset.class_names == ["0", "1", "2", "3"]
    assert dataset.spans.tolist() == [[0, 3], [3, 2]]
    ids = [4, 0, 2, 3, 1, 0]
    rows = pickle.loads(pickle.dumps(dataset)).read(ids)
    assert [row.id for row in rows] == ids and [row.image for row in rows] == [png(i) for i in ids]
    assert rows[1].path == f"{shards}/00000.tar#x/b.jpg" and rows[0].path == f"{shards}/00001.tar#d.jpg"
    assert dataset.skipped == [(f"{shards}/00001.tar#lost.json", "no image in this sample")]


def test_one_file_and_a_pattern(shards: Path) -> None:
    one = open_path(shards / "00001.tar")
    assert [row.image for row in one.read([0, 1])] == [png(3), png(4)]
    chosen = open_path(f"{shards}/*1.tar")
    assert chosen.fingerprint == one.fingerprint != open_path(shards).fingerprint
    with pytest.raises(ConfigError, match=r"no \.parquet or \.tar file has such a name"):
        open_path(f"{shards}/test-*.tar")


def test_a_sample_has_one_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"k.left.jpg": png(1), "k.right.jpg": png(2), "m.jpg": png(3)})
    dataset = open_path(tmp_path)
    assert [row.image for row in dataset.read([0, 1])] == [png(1), png(3)]
    assert dataset.skipped == [(f"{tmp_path}/a.tar#k.right.jpg", "a second image of its sample")]


def test_a_task_reads_only_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [np.random.default_rng(i).bytes(100_000) for i in range(40)]
    write_tar(tmp_path / "a.tar", {f"{i:02}.jpg": image for i, image in enumerate(images)})
    dataset = open_path(tmp_path)
    assert dataset.spans.tolist() == [[0, 16], [16, 16], [32, 8]]
    asked: list[files.Part] = []
    original = files._read_local
    monkeypatch.setattr(files, "_read_local", lambda part: asked.append(part) or original(part))
    rows = dataset.read([7, 30, 6, 8, 20])
    assert [row.image for row in rows] == [images[i] for i in (7, 30, 6, 8, 20)]
    assert len(asked) == 3  # 6 to 8 are neighbours
    assert sum(part.size or 0 for part in asked) < 5 * 100_000 + 3 * 2048


def test_spans_stay_inside_a_shard(tmp_path: Path) -> None:
    for shard, count in enumerate([17, 0, 3, 32]):
        write_tar(tmp_path / f"{shard}.tar", {f"{i:02}.png": png(100 * shard + i) for i in range(count)})
    dataset = open_path(tmp_path)
    assert dataset.spans.tolist() == [[0, 16], [16, 1], [17, 3], [20, 16], [36, 16]]
    assert [row.image for row in dataset.read([16, 17, 20])] == [png(16), png(200), png(300)]


def test_deleted_and_shortened_shards_give_bad_images(shards: Path) -> None:
    dataset = open_path(shards)
    (shards / "00001.tar").unlink()
    (shards / "00000.tar").write_bytes((shards / "00000.tar").read_bytes()[:550])
    assert [row.image for row in dataset.read([3, 4])] == [b"", b""]
    assert dataset.read([0])[0].image != png(0)


def damaged_header(data: bytes) -> bytes:
    """The second header overwritten: tarfile itself would take this for the end."""
    place = data.index(b"b.cls")
    return data[:place] + b"\xff" * 400 + data[place + 400 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"PK\3\4 no tar at all" * 100, id="no tar"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:550], id="cut inside an image"),
        pytest.param(lambda data: data[:1300], id="cut inside a header"),
        pytest.param(damaged_header, id="damaged header"),
    ],
)
def test_a_shard_without_a_readable_index_is_named(tmp_path: Path, damage: object) -> None:
    write_tar(tmp_path / "good.tar", {"a.png": png(1)})
    write_tar(tmp_path / "bad.tar", {"a.png": png(1), "b.cls": b"1", "b.png": png(2)})
    (tmp_path / "bad.tar").write_bytes(damage((tmp_path / "bad.tar").read_bytes()))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"bad\.tar: not a readable tar file \(.+\); replace it") as caught:
        open_path(tmp_path)
    assert "\n" not in str(caught.value) and "good.tar" not in str(caught.value)


def test_tars_without_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.json": b"{}"})
    with pytest.raises(ConfigError, match=r"no images among a\.json"):
        open_path(tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    with pytest.raises(ConfigError, match=r"no images among a\.tar\.gz; unpack"):
        open_path(tmp_path)


def test_labels_are_not_read_from_large_members(tmp_path: Path) -> None:
    labels = {"a.txt": b"1" * 100, "b.cls": b"-1", "c.txt": b"5", "c.cls": b"4"}
    write_tar(tmp_path / "a.tar", labels | {f"{key}.png": png(1) for key in "abc"})
    assert open_path(tmp_path).labels.tolist() == [-1, -1, 4]


def test_a_symbolic_link_inside_is_no_image(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    write_tar(tmp_path / "b.tar", {"a.png": png(1)})
    assert len(open_path(tmp_path)) == 1


def test_indexing_keeps_no_handle(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_path(shards)
    opened: list[str] = []
    original = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: opened.append(str(file)) or original(file, *a, **k))
    dataset.read([0, 3])
    assert len(pickle.dumps(dataset)) < 2500
    assert [re.sub(r".*/", "", name) for name in opened] == ["00000.tar", "00001.tar"]
    assert webdataset.SPAN > 1
