"""Barlow Twins against a literal float64 transcription of its equations, in one process and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from methods.barlow_twins import BarlowTwins, BarlowTwinsConfig
from methods.parts.contract import Progress, RunFacts
from methods.parts.views import Views
from pipeline.build import build_method
from pipeline.config import override
from pipeline.recipes import load_recipe
from tests.parity.test_byol import Encoder, draw
from tests.parity.test_swav import Same
from tests.test_workers import in_processes

EXACT = 1e-10


def barlow(backbone: nn.Module, dim: int, **settings: float) -> BarlowTwins:
    config = BarlowTwinsConfig(projection_dim=dim, projector_hidden=8, **settings)
    method = BarlowTwins(config, backbone, RunFacts(global_batch_size=8, steps_per_epoch=5, total_steps=20))
    method.projector = nn.Identity()
    return method.double()


def views(v1: Tensor, v2: Tensor) -> Views:
    ids = torch.arange(len(v1))
    return Views(stacks={"first": v1, "second": v2}, counts={"first": 1, "second": 1}, image_ids=ids, labels=ids)


def progress() -> Progress:
    return Progress(step=0, total_steps=20, steps_per_epoch=5)


def literal(za: Tensor, zb: Tensor, weight: float) -> Tensor:
    """The loss, entry by entry of C."""
    n, d = za.shape
    a, b = ((z - z.mean(0)) / torch.sqrt(((z - z.mean(0)) ** 2).mean(0) + 1e-5) for z in (za, zb))
    loss = torch.zeros(()).double()
    for i in range(d):
        for j in range(d):
            c = sum(a[k, i] * b[k, j] for k in range(n)) / n
            loss = loss + ((1 - c) ** 2 if i == j else weight * c**2)
    return loss


@pytest.mark.parametrize(("n", "d", "weight"), [(6, 4, 0.005), (3, 7, 0.1), (16, 5, 0.0)])
def test_loss_and_gradient_equal_the_equations(n: int, d: int, weight: float) -> None:
    x1, x2 = (draw(seed, n, d) * 3 + 5 for seed in (0, 1))
    x1, x2 = x1.requires_grad_(), (x2 + x1.detach()).requires_grad_()
    loss = barlow(Same(d), d, redundancy_weight=weight)(views(x1, x2), progress()).loss
    want = literal(x1, x2, weight)
    assert loss.item() == pytest.approx(want.item(), abs=EXACT)
    for got, wanted in zip(torch.autograd.grad(loss, [x1, x2]), torch.autograd.grad(want, [x1, x2]), strict=True):
        torch.testing.assert_close(got, wanted, atol=EXACT, rtol=0)


def test_worked_values() -> None:
    """Two independent dimensions: the same in both views, swapped, and one of them mirrored."""
    a = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    method = barlow(Same(2), 2)
    want = {"same": 0.0, "swapped": 2 + 0.005 * 2, "mirrored": 4.0}
    for name, b in (("same", a), ("swapped", a.flip(1)), ("mirrored", a * torch.tensor([1.0, -1.0]))):
        assert method(views(a, b), progress()).loss.item() == pytest.approx(want[name], abs=1e-4), name
    metrics = method(views(a, a), progress()).metrics
    assert float(metrics["correlation"]) == pytest.approx(1, abs=1e-4) and float(metrics["redundancy"]) == pytest.approx(0, abs=1e-12)
    assert float(method(views(a, a.flip(1)), progress()).metrics["redundancy"]) == pytest.approx(1, abs=1e-4)


def test_order_scale_and_shift_of_a_batch_do_not_matter() -> None:
    x1, x2 = draw(0, 12, 5), draw(1, 12, 5)
    method, order = barlow(Same(5), 5), torch.randperm(12)
    want = method(views(x1, x2), progress()).loss
    torch.testing.assert_close(method(views(x1[order], x2[order]), progress()).loss, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(method(views(100 * x1 - 7, x2), progress()).loss, want, atol=1e-3, rtol=0)  # eps 1e-5


def test_views_that_share_nothing_cost_d() -> None:
    method = barlow(Same(64), 64, redundancy_weight=0.0)
    assert method(views(draw(0, 4096, 64), draw(1, 4096, 64)), progress()).loss.item() == pytest.approx(64, rel=0.02)
    facts = RunFacts(global_batch_size=4096, steps_per_epoch=1, total_steps=1)
    assert method.config.hints(facts).chance_loss == (64.0, "D")


# ---------------------------------------------------------------------------- several workers

DIM = 7  # no number of workers divides it


def _joined() -> tuple[Tensor, Tensor]:
    x = draw(5, 12, 6)
    return x, x + 0.5 * draw(6, 12, 6)


def _step(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    method = barlow(Encoder(6, DIM), DIM)
    forward = DistributedDataParallel(method) if world > 1 else method
    rows = torch.arange(12).chunk(world)[rank]
    out = forward(views(*(x[rows] for x in _joined())), progress())
    out.loss.backward()
    metrics = {name: float(value) for name, value in out.metrics.items()}
    return {"loss": out.loss.item(), "gradient": method.backbone.linear.weight.grad, "metrics": metrics}


@pytest.mark.parametrize("world", [2, 3])
def test_workers_together_make_the_loss_and_gradient_of_the_joined_batch(world: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder(6, DIM).double()
    want = literal(*(encoder(x) for x in _joined()), 0.005)
    want.backward()
    parts = in_processes(world, tmp_path, _step)
    np.testing.assert_allclose(np.mean([part["loss"] for part in parts]), want.item(), atol=EXACT)
    one = _step(0, 1)
    for part in parts:
        torch.testing.assert_close(part["gradient"], encoder.linear.weight.grad, atol=EXACT, rtol=0)
        assert part["metrics"]["correlation"] == pytest.approx(one["metrics"]["correlation"], abs=EXACT)
    redundancy = np.mean([part["metrics"]["redundancy"] for part in parts])
    assert redundancy == pytest.approx(one["metrics"]["redundancy"], abs=EXACT)


# ---------------------------------------------------------------------------- the run


def test_biases_and_norms_learn_slower_and_neither_decay_nor_adapt() -> None:
    config = load_recipe("barlow-twins")
    method = BarlowTwins(config.method, Same(4), RunFacts(global_batch_size=8, steps_per_epoch=5, total_steps=20))
    matrices, vectors = method.param_groups()
    assert {p.ndim for p in matrices.params} == {2} and {p.ndim for p in vectors.params} == {1}
    assert config.optim.base_lr * vectors.lr_scale == pytest.approx(0.0048) and matrices.lr_scale == 1
    assert not vectors.decay and not vectors.adapt


@pytest.mark.parametrize("recipe", ["barlow-twins-small", "vicreg-small"])
def test_micro_batches_are_refused_with_a_remedy(recipe: str) -> None:
    config = override(load_recipe(recipe), {"train.accumulation_steps": 2})
    facts = RunFacts(global_batch_size=128, steps_per_epoch=5, total_steps=20)
    with pytest.raises(ValueError, match=r"needs the whole batch at once; use 1 .*256"):
        build_method(config, facts)
