"""What reaches a GPU: colour as on the CPU, batches that are there in time, features of images."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.gpu import configured, make_images, random_batch
from methods.parts.backbones import BackboneConfig, build_backbone
from pipeline.build import prepare
from pipeline.config import DataConfig
from pipeline.data.augment import augment_views
from pipeline.data.loader import TrainLoader
from pipeline.export.embed import embed
from pipeline.export.write import export
from pipeline.machine import set_precision
from pipeline.recipes import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = tmp_path_factory.mktemp("data") / "images"
    make_images(images, 512, (64, 48))
    return images


@pytest.mark.parametrize("recipe", ["swav-imagenet", "byol", "moco-v1", "dino-vits16"])
def test_colour_on_the_device_is_that_of_the_cpu(recipe: str, device: torch.device) -> None:
    """A pixel within rounding of the solarisation's threshold may fall on either side, so one value in 100,000 may differ."""
    set_precision(device)
    config = load_recipe(recipe)
    batch, there = (random_batch(config.views, 8, where) for where in (torch.device("cpu"), device))
    data = config.data
    expected = augment_views(batch, config.views, data.mean, data.std, "cpu").stacks
    found = augment_views(there, config.views, data.mean, data.std, device).stacks
    for name, stack in expected.items():
        assert found[name].device.type == device.type and found[name].shape == stack.shape
        differences = (found[name].cpu() - stack).abs().flatten() * min(data.std)  # of values in [0, 1]
        assert float((differences > 1e-4).float().mean()) < 1e-5


def loader_of(folder: Path) -> TrainLoader:
    return prepare(configured("simclr-small", 32, folder, num_shards=2)).loader


def test_batches_arrive_on_the_device_with_the_pixels_of_the_cpu(ray_local: None, folder: Path, device: torch.device) -> None:
    loader = loader_of(folder)
    with contextlib.closing(loader.batches(device=device)) as there, contextlib.closing(loader.batches()) as here:
        for _ in range(20):
            found, expected = next(there), next(here)
            assert found.step == expected.step and found.ids.device.type == device.type
            assert torch.equal(found.ids.cpu(), expected.ids)
            for name, crops in expected.crops.items():
                assert found.crops[name].device.type == device.type
                assert torch.equal(found.crops[name].cpu(), crops)


def test_the_next_batch_is_ready_when_a_step_ends(ray_local: None, folder: Path, device: torch.device) -> None:
    waits = []
    with contextlib.closing(loader_of(folder).batches(device=device)) as found:
        for step in range(12):
            asked = time.perf_counter()
            next(found)
            if step >= 4:
                waits.append(time.perf_counter() - asked)
            time.sleep(0.5)  # a step
    assert np.median(waits) < 0.05


def test_features_and_the_served_model_use_the_device_and_agree_with_the_cpu(
    ray_local: None, folder: Path, device: torch.device, tmp_path: Path
) -> None:
    from types import SimpleNamespace

    from pipeline.export.pyfunc import Embedder

    torch.manual_seed(0)
    config = BackboneConfig(name="resnet18", width=0.25)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = export(build_backbone(config), config, tmp_path / "model", size=64, mean=mean, std=std, facts={})
    embed(model, DataConfig(path=str(folder)), tmp_path / "cpu", gpus=0)
    embed(model, DataConfig(path=str(folder)), tmp_path / "there")  # takes a GPU by itself
    expected, found = (np.array(pq.read_table(tmp_path / to)["embedding"].to_pylist(), np.float32) for to in ("cpu", "there"))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-3 * scale)
    served = Embedder()
    served.load_context(SimpleNamespace(artifacts={"export": str(model)}))
    assert next(served.backbone.parameters()).device.type == device.type
    files = sorted(folder.iterdir())[:8]
    answered = served.predict(None, pd.DataFrame({"image": [file.read_bytes() for file in files]}))
    np.testing.assert_allclose(answered, expected[:8], atol=2e-2 * scale)  # its convolutions may be TF32: flags of a server are its own
