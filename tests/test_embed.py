"""Embedding a data set: every image once, in order, with the registered model's numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.errors import ConfigError
from pipeline.config import DataConfig
from pipeline.export.embed import BAD, FACTS, EmbedReport, embed
from pipeline.export.registry import export

CONFIG = BackboneConfig(name="resnet18", width=0.25, depth=(1, 1, 1, 1), stem="full")
IMAGES = 23


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    return export(build_backbone(CONFIG), CONFIG, tmp_path_factory.mktemp("model"), size=32, mean=mean, std=std, facts={})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images of two classes and several sizes; two cannot be decoded."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (30 + i, 45, 3), np.uint8)
        file = folder / ("cats" if i < 12 else "dogs") / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
    (folder / "cats" / "05.png").write_bytes(b"")
    whole = (folder / "dogs" / "20.png").read_bytes()
    (folder / "dogs" / "20.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture(scope="module")
def result(ray_local: None, model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EmbedReport]:
    to = tmp_path_factory.mktemp("out") / "features"
    return to, embed(model, DataConfig(path=str(images), max_bad_fraction=0.2), to, batch_size=4, images_per_task=5)


def test_every_good_image_has_a_row_in_order(result: tuple[Path, EmbedReport]) -> None:
    to, report = result
    assert (report.rows, report.bad) == (21, 2) and report.images_per_s == pytest.approx(23 / report.seconds)
    assert [f.name for f in sorted(to.glob("*.parquet"))] == [f"part-{i:05d}.parquet" for i in range(5)]
    table = pq.read_table(to)
    wanted = pa.schema([("id", pa.int64()), ("path", pa.string()), ("label", pa.int64()), ("embedding", pa.list_(pa.float32(), 128))])
    assert table.schema.equals(wanted)
    assert table["id"].to_pylist() == [i for i in range(IMAGES) if i not in (5, 20)]
    assert table["label"].to_pylist() == [int(i >= 12) for i in table["id"].to_pylist()]
    assert all(path.endswith(f"{i:02d}.png") for i, path in zip(table["id"].to_pylist(), table["path"].to_pylist(), strict=True))


def test_bad_images_are_listed_with_the_reason(result: tuple[Path, EmbedReport]) -> None:
    to, _ = result
    bad = [json.loads(line) for line in (to / BAD).read_text().splitlines()]
    assert [entry["id"] for entry in bad] == [5, 20]
    assert all(entry["reason"] and entry["path"].endswith(".png") for entry in bad)
    assert json.loads((to / FACTS).read_text())["complete"] is True


def test_the_numbers_are_those_of_the_served_model(result: tuple[Path, EmbedReport], model: Path, images: Path) -> None:
    from types import SimpleNamespace

    import pandas as pd

    from pipeline.export.pyfunc import Embedder

    served = Embedder()
    served.load_context(SimpleNamespace(artifacts={"export": str(model)}))
    files = sorted(p for p in images.rglob("*.png") if p.name not in ("05.png", "20.png"))
    expected = served.predict(None, pd.DataFrame({"image": [p.read_bytes() for p in files]}))
    given = np.array(pq.read_table(result[0])["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(given, expected, atol=1e-5)
    assert np.abs(given[0] - given[1]).max() > 1e-2


def test_windows_and_batches_do_not_change_the_rows(
    result: tuple[Path, EmbedReport], ray_local: None, model: Path, images: Path, tmp_path: Path
) -> None:
    data = DataConfig(path=str(images), max_bad_fraction=0.2)
    embed(model, data, tmp_path / "a", batch_size=256, images_per_task=512)
    one, several = pq.read_table(tmp_path / "a"), pq.read_table(result[0])
    assert one.drop(["embedding"]).equals(several.drop(["embedding"]))
    np.testing.assert_allclose(one["embedding"].to_pylist(), several["embedding"].to_pylist(), atol=1e-5)
    # the folder of an earlier embed is replaced: no part of the former layout stays
    embed(model, data, tmp_path / "a", images_per_task=12, bf16=True)
    assert [f.name for f in sorted((tmp_path / "a").glob("*.parquet"))] == ["part-00000.parquet", "part-00001.parquet"]
    rounded = np.array(pq.read_table(tmp_path / "a")["embedding"].to_pylist())
    exact = np.array(several["embedding"].to_pylist())
    assert 1e-6 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


def test_too_many_bad_images_stop_it(ray_local: None, model: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_bad_fraction=0\.01.*of 23 images cannot be decoded.*05\.png"):
        embed(model, DataConfig(path=str(images)), tmp_path / "a")
    assert json.loads((tmp_path / "a" / FACTS).read_text())["complete"] is False


def test_a_part_without_a_good_image_is_an_empty_file(ray_local: None, model: Path, tmp_path: Path) -> None:
    pixels = io.BytesIO()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(pixels, "PNG")
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"" if i < 2 else pixels.getvalue())
    report = embed(model, DataConfig(path=str(tmp_path / "in"), max_bad_fraction=0.5), tmp_path / "out", images_per_task=2)
    assert (report.rows, report.bad) == (2, 2)
    table = pq.read_table(tmp_path / "out")
    assert table["id"].to_pylist() == [2, 3] and table["label"].to_pylist() == [-1, -1]


def test_foreign_files_are_never_touched(model: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds other files"):
        embed(model, DataConfig(path=str(images)), tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        embed(model, DataConfig(path=str(images)), tmp_path / "thesis.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_wrong_model_or_data_leave_no_folder(images: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        embed(tmp_path, DataConfig(path=str(images)), tmp_path / "a")
    with pytest.raises(ConfigError):
        embed(model, DataConfig(path=str(tmp_path / "nowhere")), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_gpu_that_is_not_there_is_refused(ray_local: None, model: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^gpus=0\.5: there is no GPU here"):
        embed(model, DataConfig(path=str(images)), tmp_path / "a", gpus=0.5)
    assert not (tmp_path / "a").exists()


@pytest.fixture
def ray_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray that believes to have one."""
    import ray

    ray.shutdown()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # `make test` hides GPUs, and Ray takes its word
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_actors_that_hold_gpus_write_what_tasks_write(
    result: tuple[Path, EmbedReport], model: Path, images: Path, ray_with_a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the tasks; the device of the actors is the CPU here."""
    monkeypatch.setattr("pipeline.export.embed.GPU", "cpu")
    report = embed(model, DataConfig(path=str(images), max_bad_fraction=0.2), tmp_path / "a", batch_size=4, images_per_task=5)
    assert (report.rows, report.bad) == (21, 2)
    ours, expected = pq.read_table(tmp_path / "a"), pq.read_table(result[0])
    assert ours.drop(["embedding"]).equals(expected.drop(["embedding"]))
    np.testing.assert_allclose(ours["embedding"].to_pylist(), expected["embedding"].to_pylist(), atol=1e-5)
