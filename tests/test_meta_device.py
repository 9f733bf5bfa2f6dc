"""A step of any method reads no value of a tensor, so it never waits for a GPU: on the meta device there are none to read.

There `.item()`, `bool(tensor)`, `nonzero`, boolean masks, `bincount`, `unique`, `.to("cpu")` and a CPU tensor among others raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.deepcluster import DeepCluster
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import Masks, Method, Progress, RunFacts, StepOutput, find, registered
from methods.parts.norms import convert_sync_batchnorm
from methods.parts.views import Views
from methods.parts.vit import enable_gradient_checkpointing
from pipeline.recipes import load_recipe
from tests.test_methods import BATCH, SMALL, TINY, TINY_VIT, tiny

STEPS = 4  # of an epoch
TOTAL = 400
CLUSTERS_BETWEEN_EPOCHS = (DeepCluster,)  # these may read values there

# settings that lead a step over other lines than the small recipes do
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "byol": [{"predictor": False}, {"train_online": False}],
    "coke": [
        {"num_clusters": (6, 9), "train_first_epoch": True},
        {"predictor_weight": 0.5, "labels_from": "current", "centers_from": "current"},
        {"averaging_start_epoch": 1, "constraint_ratio": 1.0},
        {"averaging_start_epoch": 2, "shard_tables": True},
    ],
    "dino": [
        {"teacher_targets": "centering"},
        {"teacher_targets": "sinkhorn", "unit_prototypes": False},
        {"teacher_targets": "sinkhorn", "teacher_temperature": 0.07},
    ],
    "dinov2": [
        {"shared_head": True, "projector_batch_norm": False, "teacher_targets": "centering", "unit_prototypes": False},
        {"mask_shape": "random", "mask_start_epoch": 1},
        {"gram_weight": 1.0, "gram_scale": 2, "sigreg_weight": 0.1},
    ],
    "ibot": [
        {"shared_head": True, "projector_batch_norm": False, "teacher_targets": "centering"},
        {"mask_shape": "random", "num_patch_prototypes": 5, "unit_prototypes": False},
    ],
    "mae": [{"normalize_patches": False}],
    "moco": [{"bn_groups": 1}, {"bn_groups": 4, "projector_layers": 1}],
    "moco-v3": [{"predictor_norm": False, "freeze_patches": False}],
    "msn": [
        {"sinkhorn": False, "label_smoothing": 0.1},
        {"shared_mask": True, "mask_ratio": 0.5, "mask_spread": 0.3, "final_target_temperature": 0.05},
        {"mask_ratio": 0.0},
    ],
    "nnclr": [{"column_term": True, "own_kind_negatives": True, "warmup_with_views": True, "support_set_size": 24}],
    "simclr": [{"memory_size": 24}, {"projector_layers": 3}],
    "swav": [
        {"queue_length": BATCH, "queue_start_epoch": 0},  # used from the second step on
        {"queue_length": 8 * BATCH, "queue_start_epoch": 0, "epsilon": 0.01, "hard_codes": True},  # never full
    ],
}
RESNET = replace(TINY, depth=(1, 1, 1, 1), drop_path=0.2)
VIT = replace(TINY_VIT, drop_path=0.2, registers=2, layer_scale=1e-5)


class Convolution(nn.Sequential):
    """A backbone with batch norm whose step is quick on the meta device."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass(frozen=True)
class Case:
    recipe: str
    settings: tuple[tuple[str, Any], ...] = ()
    backbone: BackboneConfig | None = None

    def __str__(self) -> str:
        return "-".join([self.recipe, *(f"{key}={value}" for key, value in self.settings), *(["vit"] if self.backbone else [])])


# one small recipe of every registered method, and the variants of each
FIRST = {find(load_recipe(recipe).method).name: recipe for recipe in reversed(SMALL)}
CASES = [Case(FIRST[name], tuple(settings.items())) for name in FIRST for settings in [{}, *VARIANTS.get(name, [])]]


def build(case: Case) -> tuple[Method, Views]:
    """A method, and a batch of the sizes of its recipe's crops, on the CPU."""
    config = load_recipe(case.recipe)
    torch.manual_seed(0)
    facts = RunFacts(global_batch_size=BATCH, steps_per_epoch=STEPS, total_steps=TOTAL, num_images=16 * BATCH)
    settings = replace(config.method, **dict(case.settings))
    chosen = case.backbone or (TINY_VIT if tiny(config) == TINY_VIT else None)
    backbone = build_backbone(chosen) if chosen else Convolution()
    method = find(settings).method(settings, backbone, facts)
    sides = {name: max(8, group.size * 32 // config.evaluation_size) for name, group in config.views.items()}
    stacks = {name: torch.randn(g.count * BATCH, 3, sides[name], sides[name]) for name, g in config.views.items()}
    counts = {name: group.count for name, group in config.views.items()}
    ids, roles = torch.arange(BATCH), {name: group.role for name, group in config.views.items()}
    return method, Views(stacks=stacks, counts=counts, roles=roles, image_ids=ids, labels=torch.full_like(ids, -1))


def parts(views: Views, count: int) -> list[Views]:
    """Micro-batches."""
    ids, labels, host_ids = (x.chunk(count) for x in (views.image_ids, views.labels, views.host_ids))
    stacks = [
        {name: torch.cat([crop.chunk(count)[i] for crop in stack.chunk(views.counts[name])]) for name, stack in views.stacks.items()}
        for i in range(count)
    ]
    of_parts = zip(stacks, ids, labels, host_ids, strict=True)
    return [replace(views, stacks=s, image_ids=i, labels=n, host_ids=h, joined={}) for s, i, n, h in of_parts]


def step(method: Method, views: Views, number: int, *, micro_steps: int = 1, reports: bool = True) -> list[StepOutput]:
    """One step as the loop makes it, without an optimizer."""
    at = Progress(step=number, total_steps=TOTAL, steps_per_epoch=STEPS, micro_steps=micro_steps, reports=reports)
    if number % STEPS == 0 and not (number and type(method) in CLUSTERS_BETWEEN_EPOCHS and views.image_ids.is_meta):
        method.start_epoch(replace(at, generator=torch.Generator().manual_seed(number)))
    method.before_step(at)
    outputs = []
    for i, part in enumerate(parts(views, micro_steps)):
        now = replace(at, micro_step=i, generator=torch.Generator().manual_seed(100 * number + i))
        with torch.set_grad_enabled(method.has_loss(now)):
            output = method(part, now, method.draw_masks(part, now))
        if output.loss is not None:
            (output.loss / micro_steps).backward()
        outputs.append(output)
    method.after_step([output.outputs for output in outputs], at)
    if (number + 1) % STEPS == 0:
        method.end_epoch(at)
    return outputs


def to_meta(method: Method, views: Views) -> tuple[Method, Views]:
    stacks = {name: stack.to("meta") for name, stack in views.stacks.items()}
    ids, labels = views.image_ids.to("meta"), views.labels.to("meta")
    return method.to("meta"), replace(views, stacks=stacks, image_ids=ids, labels=labels, joined={})


def run_on_meta(case: Case) -> None:
    method, views = to_meta(*build(case))
    if method.sync_batchnorm:
        convert_sync_batchnorm(method)
    for number in (0, STEPS - 1, 2 * STEPS):  # the first of the first epoch, a last one, the first of a later one
        step(method, views, number, micro_steps=2 if number and not method.whole_batch_remedy else 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_reads_no_value(case: Case) -> None:
    run_on_meta(case)


def test_every_registered_method_is_tried() -> None:
    assert {find(load_recipe(case.recipe).method).name for case in CASES} == set(registered())
    assert set(VARIANTS) <= set(registered())


@pytest.mark.parametrize("backbone", [RESNET, VIT])
def test_a_step_of_a_network_with_drop_path_reads_no_value(backbone: BackboneConfig) -> None:
    run_on_meta(Case("dino-small", backbone=backbone))


def test_a_step_with_gradient_checkpointing_reads_no_value() -> None:
    method, views = to_meta(*build(Case("dino-small", backbone=VIT)))
    enable_gradient_checkpointing(method)
    step(method, views, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_in_bf16_has_the_loss_of_float32(case: Case) -> None:
    """Autocast rounds networks; losses stay float32, and no part meets another of another type."""
    losses = []
    for mixed in (False, True):
        method, views = build(case)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            (output,) = step(method, views, 2 * STEPS + 1)  # inside an epoch in which every method has its loss
        losses.append(output.loss)
    if dict(case.settings).get("train_online") is False:  # BYOL's target alone
        assert losses == [None, None]
        return
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.05, abs=0.05)


# ---------------------------------------------------------------------------- the test can fail


class Toy(Method):
    """Its loss is the mean of the features; what else a step does is `habit`."""

    def __init__(self, habit: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.habit = nn.Linear(12, 4), habit

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        z = self.layer(views.crops[0].flatten(1))
        self.habit(z)
        return StepOutput(loss=z.mean())


HABITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda z: z.sum().item(),
    "bool": lambda z: 1 if z.sum() > 0 else 0,
    "nonzero": lambda z: z.nonzero(),
    "boolean mask": lambda z: z[z > 0],
    "bincount": lambda z: z.argmax(dim=1).bincount(minlength=4),
    "unique": lambda z: z.argmax(dim=1).unique(),
    "to the CPU": lambda z: z.detach().to("cpu"),
    "a CPU tensor": lambda z: z + torch.ones(4),
}


@pytest.mark.parametrize("habit", HABITS)
def test_a_method_that_reads_values_is_found(habit: str) -> None:
    stacks = {"global": torch.randn(6, 3, 2, 2)}
    views = Views(stacks, {"global": 2}, torch.arange(3), torch.arange(3))
    step(Toy(HABITS[habit]), views, 0)  # on the CPU nobody notices
    method, there = to_meta(Toy(lambda z: None), views)
    step(method, there, 0)
    method.habit = HABITS[habit]
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(method, there, 0)


# ---------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_a_report_there_are_no_metrics_and_nothing_else_changes(case: Case) -> None:
    results = []
    for reports in (True, False):
        method, views = build(case)
        optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
        losses = []
        for number in (0, 1, STEPS - 1, STEPS, STEPS + 1):
            torch.manual_seed(number)
            (output,) = step(method, views, number, reports=reports)
            assert bool(output.metrics) is reports
            losses.append(output.loss)
            optimizer.step()
            optimizer.zero_grad()
        tables = {name: table.rows for name, table in method.memory_banks().items()}
        results.append((losses, method.state_dict() | tables))
    (losses, state), (silent_losses, silent_state) = results
    for a, b in zip(losses, silent_losses, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for name, value in state.items():
        assert torch.equal(value, silent_state[name]), name
