"""DINO over several optimizer steps, in one process and in two: networks, centre, groups of parameters, the teacher."""

from __future__ import annotations

import copy
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.dino import DINO, DINOConfig
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.norms import convert_sync_batchnorm
from methods.parts.views import Views
from tests.parity.common import in_processes
from tests.parity.dino_cases import EPOCH, FACTS, SMALL, Encoder, advance, dino, fresh_optimizer, images, progress, rows_of

LENGTHS, DIRECTIONS = "head.prototypes.lengths", "head.prototypes.directions"


def literal_scores(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Scores of one image `(3, H, W) -> (K,)`."""

    def gelu(a: Tensor) -> Tensor:
        return a * (1 + torch.erf(a / math.sqrt(2))) / 2

    h = gelu(w["backbone.linear.weight"] @ (x.mean((1, 2)) + w["backbone.token"][0, 0]) + w["backbone.linear.bias"])
    for layer in (0, 2):
        h = gelu(w[f"head.mlp.{layer}.weight"] @ h + w[f"head.mlp.{layer}.bias"])
    z = w["head.mlp.4.weight"] @ h + w["head.mlp.4.bias"]
    v = w[DIRECTIONS]
    return w[LENGTHS][:, 0] * (v @ (z / z.norm())) / (v**2).sum(1).sqrt()


@pytest.mark.parametrize("unit", [True, False])
def test_steps_equal_the_equations(unit: bool) -> None:
    """Seven steps: losses, both networks and the centre, with AdamW, clipping and all schedules written out.

    The prototypes are frozen in the first epoch, the decay is 0.04 to 0.4, the momentum 0.9 to 1, tau_t 0.04 to 0.07.
    """
    settings = {"teacher_temperature": 0.07, "warmup_teacher_temperature_epochs": 3, "momentum": 0.9, "unit_prototypes": unit}
    method = dino(**settings)
    optimizer = fresh_optimizer(method)
    theta = {name: p.detach().clone() for name, p in method.student().named_parameters()}
    xi = {name: p.clone() for name, p in method.teacher.named_parameters()}
    trained = [name for name, p in method.student().named_parameters() if p.requires_grad]
    assert (LENGTHS in trained) == (not unit)
    center = torch.zeros(7, dtype=torch.float64)
    moments = {name: [torch.zeros_like(theta[name]), torch.zeros_like(theta[name]), 0] for name in trained}
    for k in range(7):
        batch = images(k)
        loss = advance(method, optimizer, [batch], k)

        tau = [0.04, 0.055, 0.07, 0.07][k // 3]
        w = {name: value.clone().requires_grad_(name in trained) for name, value in theta.items()}
        crops = batch.crops
        t = [[literal_scores(xi, x) for x in crops[g]] for g in range(2)]
        want = torch.zeros((), dtype=torch.float64)
        for g in range(2):
            for v in range(5):
                if v == g:
                    continue
                for b in range(4):
                    e = ((t[g][b] - center) / tau).exp()
                    s = literal_scores(w, crops[v][b]) / 0.1
                    want = want - ((e / e.sum()) * (s - s.exp().sum().log())).sum() / 4 / 8
        gradients = dict(zip(trained, torch.autograd.grad(want, [w[name] for name in trained]), strict=True))
        lr = 0.02 * k / 2 if k < 3 else 1e-3 + (0.02 - 1e-3) / 2 * (1 + math.cos(math.pi * (k - 3) / 9))
        wd = 0.4 + (0.04 - 0.4) / 2 * (1 + math.cos(math.pi * k / 12))
        for name, gradient in gradients.items():
            if name.startswith("head.prototypes") and k < 3:
                continue
            g = gradient * min(1.0, 0.3 / (float((gradient**2).sum().sqrt()) + 1e-6))
            state = moments[name]
            state[0], state[1], state[2] = 0.9 * state[0] + 0.1 * g, 0.999 * state[1] + 0.001 * g**2, state[2] + 1
            mean, square = state[0] / (1 - 0.9 ** state[2]), state[1] / (1 - 0.999 ** state[2])
            kept = 1 - lr * wd if theta[name].ndim > 1 else 1.0
            theta[name] = theta[name] * kept - lr * mean / (square.sqrt() + 1e-8)
        m = 1 - (1 - 0.9) / 2 * (1 + math.cos(math.pi * k / 12))
        xi = {name: m * xi[name] + (1 - m) * theta[name] for name in xi}
        center = 0.9 * center + 0.1 * sum(row for crop in t for row in crop) / 8

        assert loss == pytest.approx(want.item(), abs=1e-11), k
        for name, value in theta.items():
            torch.testing.assert_close(method.student().get_parameter(name).detach(), value, rtol=0, atol=1e-10)
        for name, value in xi.items():
            torch.testing.assert_close(method.teacher.get_parameter(name), value, rtol=0, atol=1e-10)
        torch.testing.assert_close(method.center.value, center, rtol=0, atol=1e-12)


def test_frozen_prototypes_are_the_same_bits_for_an_epoch() -> None:
    method = dino(unit_prototypes=False)
    optimizer = fresh_optimizer(method)
    start = [p.detach().clone() for p in (method.head.prototypes.directions, method.head.prototypes.lengths)]
    for step in range(EPOCH):
        advance(method, optimizer, [images(step)], step)
        assert torch.equal(method.head.prototypes.directions, start[0]) and torch.equal(method.head.prototypes.lengths, start[1])
        assert not optimizer.state[method.head.prototypes.directions]  # no moments either
    advance(method, optimizer, [images(9)], EPOCH)
    assert not torch.equal(method.head.prototypes.directions, start[0]) and not torch.equal(method.head.prototypes.lengths, start[1])


def test_groups_of_parameters() -> None:
    """Biases and vectors do not decay, the token does; the prototypes are a group of their own."""
    method = dino(unit_prototypes=False, freeze_prototypes_epochs=2.0)
    names = {id(p): name for name, p in method.named_parameters()}
    matrices, vectors, prototypes = method.param_groups()
    assert (matrices.decay, vectors.decay, prototypes.decay) == (True, False, True)
    assert (matrices.frozen_steps, vectors.frozen_steps, prototypes.frozen_steps) == (0, 0, 2 * EPOCH)
    assert "backbone.token" in {names[id(p)] for p in matrices.params}
    assert all(names[id(p)].endswith(".bias") for p in vectors.params) and len(vectors.params) == 4
    assert {names[id(p)] for p in prototypes.params} == {LENGTHS, DIRECTIONS}
    unit = dino()  # whose lengths are not trained
    assert [id(p) for p in unit.param_groups()[2].params] == [id(unit.head.prototypes.directions)]


def test_micro_batches_equal_the_whole_batch() -> None:
    """Four steps in halves as the loop cuts them: the networks, and the centre, which moves once a step."""
    whole, halves = dino(momentum=0.9), dino(momentum=0.9)
    a, b = fresh_optimizer(whole), fresh_optimizer(halves)
    for step in range(5):
        batch = images(step)
        loss = advance(whole, a, [batch], step)
        again = advance(halves, b, [rows_of(batch, slice(i, None, 2)) for i in range(2)], step)
        assert again == pytest.approx(loss, abs=1e-12)
        torch.testing.assert_close(halves.center.value, whole.center.value, rtol=0, atol=1e-13)
    for name, p in whole.named_parameters():
        torch.testing.assert_close(halves.get_parameter(name), p, rtol=0, atol=1e-10)


def trained(rank: int, world: int, settings: dict[str, Any]) -> dict[str, Any]:
    method = dino(momentum=0.9, **settings)
    if world > 1:
        convert_sync_batchnorm(method)
    optimizer = fresh_optimizer(method)
    losses = [advance(method, optimizer, [rows_of(images(step, 8), slice(rank, None, world))], step) for step in range(4)]
    return {"losses": losses, "state": method.state_dict()}


@pytest.mark.parametrize("settings", [{"projector_batch_norm": True}, {"teacher_targets": "sinkhorn"}])
def test_two_processes_equal_one(settings: dict[str, Any], tmp_path: Path) -> None:
    """Losses, both networks, the centre, and the batch-norm statistics of the heads."""
    alone = trained(0, 1, settings)
    results = in_processes(2, tmp_path, partial(trained, settings=settings))
    np.testing.assert_allclose(np.mean([r["losses"] for r in results], axis=0), alone["losses"], rtol=1e-9)
    assert results[0]["losses"] != results[1]["losses"]
    for name, value in alone["state"].items():
        # a bias in front of batch norm has no gradient but rounding, to which AdamW gives the size of any other
        noise = settings.get("projector_batch_norm") and re.search(r"mlp\.\d+\.bias$", name)
        for r in results:
            np.testing.assert_allclose(r["state"][name].numpy(), value.numpy(), rtol=1e-7, atol=1e-6 if noise else 1e-9, err_msg=name)


# ---------------------------------------------------------------------------- the teacher


def test_teacher_moves_by_the_average_alone() -> None:
    method = dino(momentum=1.0)
    optimizer = fresh_optimizer(method)
    start = {name: p.clone() for name, p in method.teacher.state_dict().items()}
    for step in range(3):
        advance(method, optimizer, [images(step)], step)
    assert all(torch.equal(p, start[name]) for name, p in method.teacher.state_dict().items())
    held = {id(p) for group in method.param_groups() for p in group.params}
    assert not any(p.requires_grad or p.grad is not None or id(p) in held for p in method.teacher.parameters())
    assert method.evaluation_backbone() is method.teacher.get_submodule("backbone")


def test_teacher_begins_as_the_student_and_state_has_the_centre() -> None:
    method = DINO(DINOConfig(**SMALL), Encoder(), FACTS)
    for name, p in method.student().named_parameters():
        assert torch.equal(method.teacher.get_parameter(name), p)
    assert method.state_dict()["center.value"].shape == (7,)


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    method = dino(momentum=0.9)
    optimizer = fresh_optimizer(method)
    for step in range(4):
        advance(method, optimizer, [images(step)], step)
    again = dino(momentum=0.9)
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    other = fresh_optimizer(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(4, 7):
        assert advance(again, other, [images(step)], step) == advance(method, optimizer, [images(step)], step)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in method.state_dict().items())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_a_step_of_a_vit_and_of_a_resnet_is_that_of_each_crop_by_itself(name: str) -> None:
    """Scores of all crops at once against one crop at a time, in evaluation mode; the teacher takes the global ones only."""
    vit = {"image_size": 16, "patch_size": 4, "depth": (2,), "drop_path": 0.5}
    config = BackboneConfig(name=name, width=0.25, **(vit if name.startswith("vit") else {"stem": "strided"}))
    method = dino(build_backbone(config)).eval()
    sides = {"global": (2, 16), "local": (3, 8)}
    stacks = {n: torch.randn(4 * count, 3, side, side, dtype=torch.float64) for n, (count, side) in sides.items()}
    ids = torch.arange(4)
    views = Views(stacks=stacks, counts={"global": 2, "local": 3}, roles={"local": "local"}, image_ids=ids, labels=ids)
    q = [torch.softmax(method.teacher(x) / 0.04, dim=1) for x in views.crops[:2]]
    p = [torch.log_softmax(method.student()(x) / 0.1, dim=1) for x in views.crops]
    want = sum(-(q[g] * p[v]).sum(1).mean() for g in range(2) for v in range(5) if v != g) / 8
    torch.testing.assert_close(method(views, progress()).loss, want, rtol=0, atol=1e-10)


def test_the_teacher_drops_no_paths() -> None:
    vit = BackboneConfig(name="vit_tiny_patch16_224", width=0.25, image_size=16, patch_size=4, depth=(3,), drop_path=0.5)
    method = dino(build_backbone(vit)).train()
    images_ = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    assert torch.equal(method.teacher(images_), method.teacher(images_))
    assert not torch.equal(method.student()(images_), method.student()(images_))
    matrices, vectors, _ = method.param_groups()
    names = {id(p): name for name, p in method.named_parameters()}
    decays = {names[id(p)] for p in matrices.params}
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.weight"} <= decays
    assert {"backbone.norm.weight", "backbone.blocks.0.norm1.weight"} <= {names[id(p)] for p in vectors.params}
