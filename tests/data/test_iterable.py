"""A source without an end: order of arrival, any number of workers, resume, and what refuses it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from methods.parts.contract import find
from methods.parts.errors import ConfigError
from pipeline.config import DataConfig, RunConfig, TrainConfig
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import Batch, TrainLoader
from pipeline.data.sources.base import absolute_source, open_source
from pipeline.data.sources.iterable import IterableDataset, Reader
from pipeline.recipes import load_recipe
from pipeline.resolve import resolve
from tests.data.ranks import collect_ranks

SOURCE = """
import io
from PIL import Image

def endless():
    number = 0
    while True:
        file = io.BytesIO()
        Image.new("RGB", (40, 40), (number % 256, number // 256 % 256, 0)).save(file, "PNG")
        yield b"no image" if number == 21 else file.getvalue()
        number += 1

def three():
    for number, image in zip(range(3), endless()):
        yield image

def nothing():
    return []

def text():
    yield "a path"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "camera.py"
    path.write_text(SOURCE)
    return path


def opened(file: Path, function: str) -> ImageDataset:
    return open_source(DataConfig(path=f"stream:{file}:{function}"))


def stream(dataset: ImageDataset) -> TrainLoader:
    sampler = dataset.make_sampler(seed=0, held_out=0.1, global_batch=16, num_shards=4, images_per_task=8, steps_per_epoch=3)
    return TrainLoader(dataset, sampler, load_recipe("swav-small").views, 0, 7, execution_steps=4)


@pytest.fixture(scope="module")
def endless(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainLoader, list[Batch]]:
    """A loader of images without an end, and its seven batches for one worker."""
    path = tmp_path_factory.mktemp("endless") / "camera.py"
    path.write_text(SOURCE)
    source = stream(opened(path, "endless"))
    return source, list(source.batches(tasks=2))


def test_images_are_dealt_in_order_of_arrival(endless: tuple[TrainLoader, list[Batch]]) -> None:
    _, found = endless
    assert [batch.step for batch in found] == list(range(7))
    assert [batch.epoch for batch in found] == [0, 0, 0, 1, 1, 1, 2]
    everything = np.concatenate([batch.ids.numpy() for batch in found])
    bad = [slot for batch in found for slot in batch.bad]
    assert [slot.id for slot in bad] == [21] and bad[0].path.endswith("camera.py:endless, image 21")
    assert everything[everything != np.arange(7 * 16)].size == 1, "each image in its place, but for the one that is none"
    red = np.concatenate([batch.crops["global"][:, 0, 0, 0, 0].numpy() for batch in found])
    assert (red == everything % 256).all(), "the pixels are those of the id"


def test_two_workers_and_a_resumed_run_see_the_same(endless: tuple[TrainLoader, list[Batch]]) -> None:
    source, whole = endless
    rest = list(source.batches(4, tasks=2))
    halves, _ = collect_ranks(source, 2)
    for step, batch in enumerate(whole):
        num_shards = batch.crops["local"].reshape(4, 4, *batch.crops["local"].shape[1:])
        for rank in (0, 1):
            assert (halves[rank][step].crops["local"] == num_shards[rank::2].flatten(0, 1)).all()
    for batch, again in zip(whole[4:], rest, strict=True):
        assert (batch.ids == again.ids).all() and (batch.crops["global"] == again.crops["global"]).all()


def test_a_function_that_ends_is_called_again_and_lost_tasks_are_read_again(file: Path) -> None:
    source = opened(file, "three")
    assert isinstance(source, IterableDataset)
    reader = Reader(source.function, 4)
    first, second, third = source.read([0, 1, 2])
    late = reader.read([6, 7])
    assert late == [first.image, second.image]
    assert reader.read([4, 5]) == [second.image, third.image]
    assert reader.read([6, 7]) == late, "handed out once already"
    assert not reader.buffer


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("camera.py:nothing", "yields nothing"),
        ("camera.py:text", "yields str"),
        ("camera.py:absent", "no function absent"),
        ("other.py:endless", "cannot be imported"),
        ("no_such_module:endless", "cannot be imported"),
        ("camera.py", "stream:FILE.py:FUNCTION"),
    ],
)
def test_what_is_no_stream_is_refused(file: Path, where: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    with pytest.raises(ConfigError, match=words):
        open_source(DataConfig(path=f"stream:{where}"))


def test_a_module_is_found_in_the_folder_of_the_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    (file.parent / "manyviews_test_camera.py").write_text(SOURCE)
    assert len(open_source(DataConfig(path="stream:manyviews_test_camera:endless")).read([0, 5])) == 2
    assert absolute_source("stream:camera.py:endless") == f"stream:{file}:endless"


# ---------------------------------------------------------------------------- the length of an epoch


def with_steps(steps_per_epoch: int | None) -> RunConfig:
    config = load_recipe("swav-small")
    return dataclasses.replace(config, train=TrainConfig(global_batch_size=64, epochs=2, steps_per_epoch=steps_per_epoch))


def test_the_length_of_an_epoch() -> None:
    facts = resolve(with_steps(5), 640).facts
    assert (facts.steps_per_epoch, facts.total_steps, facts.num_images) == (5, 10, 640)
    assert resolve(with_steps(None), 640).facts.steps_per_epoch == 10
    assert resolve(with_steps(7), None).facts.num_images is None
    with pytest.raises(ConfigError, match=r"train\.steps_per_epoch=None: patches has no end"):
        resolve(with_steps(None), None)


def test_methods_that_know_every_image_refuse_what_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find(load_recipe("swav-small").method).method, "needs_full_epochs", True)
    with pytest.raises(ConfigError, match=r"data\.path=patches: has no end, but swav"):
        resolve(with_steps(5), None)
    with pytest.raises(ConfigError, match=r"train\.steps_per_epoch=5: swav works in whole passes over the images; use 10"):
        resolve(with_steps(5), 640)
    assert resolve(with_steps(10), 640).facts.steps_per_epoch == 10
