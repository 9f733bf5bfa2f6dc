"""Image datasets: dense stable ids, labels, reading, held-out images, and errors that say what to do."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from methods.parts.errors import ConfigError
from pipeline.config import DataConfig
from pipeline.data.decode import decode
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.sources import parquet
from pipeline.data.sources.base import open_source
from pipeline.data.sources.patches import CLASS_NAMES, load_photo, tiles


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, value // 256, 0)).save(out, "PNG")
    return out.getvalue()


def open_path(path: Path | str, **settings: object) -> ImageDataset:
    return open_source(DataConfig(path=str(path), **settings))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name, value in {"cat/b.png": 1, "cat/a.JPG": 2, "cat/deep/c.webp": 3, "ant/z.png": 4, "loose.png": 5}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    (root / "cat/notes.txt").write_text("no")
    (root / "README").write_text("no")
    (root / ".hidden.png").write_bytes(png(9))
    (root / "empty").mkdir()
    return root


def test_folder(tree: Path) -> None:
    dataset = open_path(tree)
    assert len(dataset) == 5 and dataset.class_names == ["ant", "cat"]
    names = [os.path.relpath(dataset.path(i), tree) for i in range(5)]
    assert names == ["ant/z.png", "cat/a.JPG", "cat/b.png", "cat/deep/c.webp", "loose.png"]
    assert dataset.labels.tolist() == [0, 1, 1, 1, -1]
    assert [os.path.basename(path) for path, _ in dataset.skipped] == ["README", "notes.txt"]
    assert all("no image" in reason for _, reason in dataset.skipped)
    assert dataset.spans.tolist() == [[i, 1] for i in range(5)]
    rows = dataset.read([3, 0])
    assert [(row.id, row.label, row.path) for row in rows] == [(3, 1, dataset.path(3)), (0, 0, dataset.path(0))]
    assert rows[0].image == png(3)


def test_folder_without_classes_and_unreadable_files(tree: Path) -> None:
    flat = open_path(tree / "cat" / "deep")
    assert flat.labels.tolist() == [-1] and flat.class_names == []
    dataset = open_path(tree)
    (tree / "cat/b.png").unlink()
    (tree / "cat/a.JPG").write_bytes(b"")
    assert [row.image for row in dataset.read([1, 2])] == [b"", b""]


def test_loops_of_links_end(tree: Path) -> None:
    (tree / "cat" / "loop").symlink_to(tree)
    assert len(open_path(tree)) == 5


def test_fingerprint_follows_content_not_place(tree: Path, tmp_path: Path) -> None:
    before = open_path(tree).fingerprint
    moved = tree.rename(tmp_path / "elsewhere")
    assert open_path(moved).fingerprint == before
    (moved / "cat").rename(moved / "dog")
    renamed = open_path(moved).fingerprint
    (moved / "ant/z.png").write_bytes(png(4) + b"x")
    assert len({before, renamed, open_path(moved).fingerprint}) == 3


def write(path: Path, count: int, first: int = 0, group: int = 4, **columns: object) -> None:
    table = {"image": [png(first + i) for i in range(count)]} | columns
    pq.write_table(pa.table(table), path, row_group_size=group)


def test_parquet_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "b.parquet", 5, 10, label=[3, None, 1, 1, 0])
    write(tmp_path / "a.parquet", 10, label=[float("nan"), *[2.0] * 9])
    (tmp_path / "notes.txt").write_text("ignored")
    dataset = open_path(tmp_path)
    assert len(dataset) == 15 and dataset.spans.tolist() == [[0, 4], [4, 4], [8, 2], [10, 4], [14, 1]]
    assert dataset.labels.tolist() == [-1] + [2] * 9 + [3, -1, 1, 1, 0] and dataset.class_names == ["0", "1", "2", "3"]
    ids = [14, 0, 9, 3, 10, 0]
    opened = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, group, **k: opened.append(group) or original(self, group, **k))
    rows = pickle.loads(pickle.dumps(dataset)).read(ids)
    assert [row.id for row in rows] == ids and [row.image for row in rows] == [png(i) for i in ids]
    assert rows[0].path.endswith("b.parquet#4") and rows[1].path.endswith("a.parquet#0")
    assert sorted(opened) == [0, 0, 1, 2]  # every row group that is needed, once
    dataset.read([1, 2])
    assert len(opened) == 4  # from the cache


def test_cache_of_row_groups_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", 40)
    monkeypatch.setattr(parquet, "ROW_GROUP_CACHE", 3 * 4 * len(png(0)))
    dataset = open_path(tmp_path)
    assert [row.image for row in dataset.read(range(40))] == [png(i) for i in range(40)]
    assert len(parquet._row_groups) <= 3


def test_hugging_face_columns(tmp_path: Path) -> None:
    cells = [{"bytes": png(i), "path": f"p{i}.png"} for i in range(3)] + [{"bytes": None, "path": None}]
    features = {"info": {"features": {"label": {"names": ["x", "y", "z"]}}}}
    table = pa.table({"image": cells, "label": [0, 1, 0, -1]}).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = open_path(tmp_path / "a.parquet")
    assert dataset.class_names == ["x", "y", "z"] and dataset.labels.tolist() == [0, 1, 0, -1]
    rows = dataset.read([1, 3])
    assert rows[0].image == png(1) and rows[0].path == "p1.png"
    assert rows[1].image == b"" and rows[1].path.endswith("a.parquet#3")


def test_string_and_absent_labels(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 4, kind=["dog", "ant", None, "dog"])
    dataset = open_path(tmp_path, label_column="kind")
    assert dataset.class_names == ["ant", "dog"] and dataset.labels.tolist() == [1, 0, -1, 1]
    unlabelled = open_path(tmp_path)
    assert unlabelled.class_names == [] and unlabelled.labels.tolist() == [-1] * 4


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 2, number=[1, 2])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "none").mkdir()
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.csv", "c.txt", "d.txt"):
        (tmp_path / "texts" / name).write_text("x")
    (tmp_path / "outer" / "train").mkdir(parents=True)
    write(tmp_path / "outer" / "train" / "a.parquet", 1)
    cases: list[tuple[object, dict, str]] = [
        (tmp_path / "nowhere", {}, "does not exist"),
        (tmp_path / "none", {}, "empty"),
        (tmp_path / "texts", {}, "a.txt, b.csv, c.txt and 1 more"),
        (tmp_path / "texts" / "a.txt", {}, "must be .parquet"),
        (tmp_path / "outer", {}, "holds the .parquet files"),
        (tmp_path / "broken", {}, "x.parquet: not a readable Parquet file"),
        (tmp_path, {"image_column": "img"}, "data.image_column=img: no such column.*it has image, number"),
        (tmp_path, {"image_column": "number"}, "holds int64, not encoded bytes"),
        (tmp_path, {"label_column": "class"}, "data.label_column=class: no such column.*it has image, number"),
        ("ftp://host/images", {}, "ftp:// is not known; use s3://"),
        ("patches:size=3", {}, "unknown option size; known options are pixels"),
        ("patches:pixels=big", {}, "whole number"),
        ("patches:pixels=4000", {}, "use 8 to 128"),
        ("patches:split=valid", {}, "use train or test"),
    ]
    for path, settings, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            open_path(path, **settings)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction, count", [(0, 0), (0.001, 1), (0.1, 2), (0.999, 22)])
def test_held_out(tmp_path: Path, fraction: float, count: int) -> None:
    write(tmp_path / "a.parquet", 23, label=list(range(23)))
    dataset = open_path(tmp_path)
    held_out, training = dataset.held_out_ids(fraction), dataset.training_ids(fraction)
    assert len(held_out) == count and sorted([*held_out, *training]) == list(range(23))
    assert (held_out == open_path(tmp_path).held_out_ids(fraction)).all() and (np.diff(held_out) > 0).all()


def test_nothing_is_held_out_without_labels(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 23)
    assert open_path(tmp_path).training_ids(0.5).tolist() == list(range(23))


def test_one_image_is_never_held_out(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 1, label=[0])
    assert open_path(tmp_path).training_ids(0.5).tolist() == [0]


# ---------------------------------------------------------------------------- the built-in set


def test_patches() -> None:
    dataset = open_path("patches:pixels=24,per_photo=10")
    assert len(dataset) == 19 * 12 and len(dataset.class_names) == 19
    held_out = dataset.held_out_ids(0.1)
    assert np.bincount(dataset.labels[held_out]).tolist() == [2] * 19
    assert np.bincount(dataset.labels[dataset.training_ids(0.1)]).tolist() == [10] * 19
    assert len(dataset.held_out_ids(0)) == 0
    rows = dataset.read([5, 200, 5])
    assert rows[0] == rows[2] and rows[0].label == 0 and rows[1].label == 200 // 12
    assert decode(rows[0].image).shape == (24, 24, 3)
    again = open_path("patches:per_photo=10,pixels=24,seed=0")
    assert again.fingerprint == dataset.fingerprint and again.read([7]) == dataset.read([7])
    other = open_path("patches:pixels=24,per_photo=10,seed=1")
    assert other.fingerprint != dataset.fingerprint and other.read([7])[0].image != dataset.read([7])[0].image
    images = {row.image for row in dataset.read(range(24))}
    assert len(images) == 24


def test_test_split_of_patches() -> None:
    dataset = open_path("patches:pixels=24,per_photo=10")
    assert dataset.test_path
    test = open_path(dataset.test_path)
    assert len(test) == 19 * 2 and test.class_names == dataset.class_names and test.test_path is None
    assert test.fingerprint != dataset.fingerprint
    assert not {row.image for row in test.read(range(38))} & {row.image for row in dataset.read(range(len(dataset)))}


@pytest.mark.parametrize("pixels", [8, 32, 128])
def test_tiles_of_the_splits_are_disjoint(pixels: int) -> None:
    for photo in range(len(CLASS_NAMES)):
        width, height = load_photo(photo).size
        tile, dealt = tiles(photo, pixels, 0)
        corners = [corner for part in dealt for corner in part]
        assert all(dealt) and len(set(corners)) == len(corners) and len(dealt[0]) >= len(dealt[1]) == len(dealt[2])
        assert all(top % tile == left % tile == 0 and top + tile <= height and left + tile <= width for top, left in corners)
