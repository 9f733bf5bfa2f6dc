"""Whole training steps on a GPU: they never wait for it, they agree with the CPU, they resume, they say what to do without memory."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import build, configured, make_images, random_batch
from methods.parts.contract import Progress, find, registered
from methods.parts.views import Views
from pipeline.build import prepare
from pipeline.config import RunConfig, override
from pipeline.data.augment import finish_views
from pipeline.data.loader import Batch
from pipeline.recipes import entries, load_recipe
from pipeline.run_folder import create_run
from pipeline.train.health import TrainingAborted
from pipeline.train.loop import Trainer
from pipeline.train.progress import NullReporter
from pipeline.train.work import train

BATCH = 16
DATA = {
    "data.path": "patches:per_photo=6",
    "data.held_out": 0.0,
    "data.num_shards": 2,
    "train.global_batch_size": BATCH,
}  # 7 steps an epoch
small = sorted((entry.name for entry in entries() if entry.name.endswith("-small")), key=len, reverse=True)
RECIPES = {find(load_recipe(recipe).method).name: recipe for recipe in small}  # the shortest name of each method stays


def config_of(recipe: str, precision: str) -> RunConfig:
    return override(load_recipe(recipe), DATA | {"train.precision": precision, "train.steps": 40})


def batch(trainer: Trainer) -> Batch:
    """A batch for the step that is due, on the device; its ids go round the images, as those of a real epoch do."""
    return random_batch(trainer.config.views, BATCH, trainer.device, step=trainer.position.step, of=trainer.images)


def now(trainer: Trainer) -> Progress:
    facts = trainer.resolved.facts
    generator = torch.Generator().manual_seed(7)
    step = trainer.position.step
    return Progress(step=step, total_steps=facts.total_steps, steps_per_epoch=facts.steps_per_epoch, generator=generator)


def begun(recipe: str, precision: str, folder: Path, device: torch.device) -> Trainer:
    """A trainer with two steps behind it that had a gradient: some methods spend their first epoch without one."""
    trainer, _ = build(config_of(recipe, precision), folder, device)
    learned = 0
    while learned < 2:
        learned += trainer.method.has_loss(now(trainer))
        trainer.step(batch(trainer))
    return trainer


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_every_registered_method_is_here() -> None:
    assert set(RECIPES) == set(registered())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_bf16_step_never_waits_for_the_device(recipe: str, device: torch.device, tmp_path: Path) -> None:
    """Colour, forward, loss, backward, optimizer and what follows: none asks the device for a value."""
    trainer = begun(recipe, "bf16", tmp_path, device)
    due = batch(trainer)
    with waiting_is_an_error(device):
        output = trainer.step(due)
    assert output.loss is not None and torch.isfinite(output.loss).all()


def moved(views: Views, device: torch.device) -> Views:
    stacks = {name: stack.to(device) for name, stack in views.stacks.items()}
    ids, labels = views.image_ids.to(device), views.labels.to(device)
    return Views(stacks=stacks, counts=views.counts, image_ids=ids, labels=labels, host_ids=views.host_ids)


def gradients(trainer: Trainer, views: Views, masks: list[Tensor] | None) -> tuple[float, Tensor]:
    """Loss, and all gradients as one vector on the CPU."""
    method = trainer.method
    method.zero_grad(set_to_none=True)
    method.before_step(now(trainer))
    loss = method(views, now(trainer), masks).loss
    assert loss is not None
    loss.backward()
    return float(loss), torch.cat([p.grad.flatten().cpu() for p in method.parameters() if p.grad is not None])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_loss_and_gradients_in_float32_are_those_of_the_cpu(recipe: str, device: torch.device, tmp_path: Path) -> None:
    here = begun(recipe, "float32", tmp_path / "cpu", torch.device("cpu"))
    there = copy.copy(here)
    there.method = copy.deepcopy(here.method).to(device)
    data, due = here.config.data, batch(here)
    views = finish_views(due, here.config.views, data.mean, data.std, "cpu")
    masks = here.method.draw_masks(views, now(here))
    expected, expected_gradient = gradients(here, views, masks)
    loss, gradient = gradients(there, moved(views, device), masks and [mask.to(device) for mask in masks])
    assert loss == pytest.approx(expected, rel=1e-3)
    assert float((gradient - expected_gradient).norm()) <= 1e-3 * float(expected_gradient.norm())


@pytest.mark.parametrize("method", ["swav", "moco", "dino", "coke"])
def test_a_resumed_run_has_the_same_loss_curve(method: str, device: torch.device, tmp_path: Path) -> None:
    """To the rounding of kernels that add in any order; on a CPU bit for bit."""
    config = config_of(RECIPES[method], "float32")
    whole, _ = build(config, tmp_path / "whole", device)
    file = io.BytesIO()
    for _ in range(9):
        whole.step(batch(whole))
    torch.save(whole.state(), file)
    expected = [float(whole.step(batch(whole)).loss) for _ in range(5)]  # type: ignore[arg-type]
    file.seek(0)
    again, _ = build(config, tmp_path / "again", device)
    again.restore(torch.load(file, map_location="cpu", weights_only=True))
    assert [float(again.step(batch(again)).loss) for _ in range(5)] == pytest.approx(expected, rel=1e-3)  # type: ignore[arg-type]


def test_a_full_device_ends_training_with_a_sentence(ray_local: None, cuda: torch.device, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 128, (64, 48))
    ready = prepare(override(configured("swav", 64, tmp_path / "images", num_shards=1), {"train.epochs": 2}))
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)  # weights fit, the step does not
    quiet = {"screen": NullReporter(64), "report": lambda step, metrics: None, "stop": lambda: False}
    try:
        with pytest.raises(TrainingAborted, match=r"out of memory.*train\.global_batch_size=64"):
            train(ready, create_run(tmp_path, None, "full"), None, **quiet)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
