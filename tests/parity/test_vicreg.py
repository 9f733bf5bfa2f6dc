"""VICReg against a literal float64 transcription of its equations, in one process and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from methods.parts.contract import Progress, RunFacts
from methods.parts.views import Views
from methods.vicreg import VICReg, VICRegConfig
from tests.parity.test_byol import Encoder, draw
from tests.parity.test_swav import Same
from tests.test_workers import in_processes

EXACT = 1e-10


def vicreg(backbone: nn.Module, dim: int, **settings: float) -> VICReg:
    config = VICRegConfig(projection_dim=dim, projector_hidden=8, **settings)
    method = VICReg(config, backbone, RunFacts(global_batch_size=8, steps_per_epoch=5, total_steps=20))
    method.projector = nn.Identity()
    return method.double()


def views(v1: Tensor, v2: Tensor) -> Views:
    ids = torch.arange(len(v1))
    return Views(stacks={"global": torch.cat([v1, v2])}, counts={"global": 2}, image_ids=ids, labels=ids)


def progress() -> Progress:
    return Progress(step=0, total_steps=20, steps_per_epoch=5)


def literal(z1: Tensor, z2: Tensor, weights: tuple[float, float, float] = (25, 25, 1)) -> Tensor:
    """The three terms, entry by entry."""
    n, d = z1.shape
    s = sum(((z1[k] - z2[k]) ** 2).sum() for k in range(n)) / n / d
    v, c = [], []
    for z in (z1, z2):
        mean = sum(z[k] for k in range(n)) / n
        cov = sum(torch.outer(z[k] - mean, z[k] - mean) for k in range(n)) / (n - 1)
        v.append(sum(torch.clamp(1 - torch.sqrt(cov[i, i] + 1e-4), min=0) for i in range(d)) / d)
        c.append(sum(cov[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d)
    return weights[0] * s + weights[1] * (v[0] + v[1]) / 2 + weights[2] * (c[0] + c[1])


@pytest.mark.parametrize(("n", "d", "size"), [(6, 4, 0.5), (3, 7, 1.5), (16, 5, 1.0)])
def test_loss_and_gradient_equal_the_equations(n: int, d: int, size: float) -> None:
    x1 = (draw(0, n, d) * size + 5).requires_grad_()
    x2 = (x1.detach() + draw(1, n, d) * 0.3).requires_grad_()
    loss = vicreg(Same(d), d)(views(x1, x2), progress()).loss
    want = literal(x1, x2)
    assert loss.item() == pytest.approx(want.item(), abs=EXACT)
    for got, wanted in zip(torch.autograd.grad(loss, [x1, x2]), torch.autograd.grad(want, [x1, x2]), strict=True):
        torch.testing.assert_close(got, wanted, atol=EXACT, rtol=0)


def test_each_term_has_its_weight() -> None:
    x1, x2 = draw(0, 9, 4) * 0.5, draw(1, 9, 4) * 0.5
    names = ("invariance_weight", "variance_weight", "covariance_weight")
    for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 5)):
        method = vicreg(Same(4), 4, **dict(zip(names, weights, strict=True)))
        assert method(views(x1, x2), progress()).loss.item() == pytest.approx(literal(x1, x2, weights).item(), abs=EXACT)


def test_worked_values() -> None:
    z1 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    z2 = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double()
    out = vicreg(Same(2), 2)(views(z1, z2), progress())
    # s = (0 + 1 + 0 + 1) / 4; v(z1) = (0 + 0.99) / 2, v(z2) = 0; c(z1) = 0, c(z2) = (2^2 + 2^2) / 2
    assert out.loss.item() == pytest.approx(25 * 0.5 + 25 * 0.495 / 2 + 4, abs=1e-12)
    assert [float(out.metrics[name]) for name in ("invariance", "variance", "covariance")] == pytest.approx([0.5, 0.2475, 4])


def test_collapse_costs_the_variance_term_and_shows_in_the_meter() -> None:
    ones = torch.ones(64, 16).double()
    collapsed = vicreg(Same(16), 16)(views(ones, ones), progress())
    assert collapsed.loss.item() == pytest.approx(25 * 0.99, abs=1e-12)
    assert float(collapsed.metrics["embedding_std"]) < 1e-6
    spread = draw(0, 512, 16)
    healthy = vicreg(Same(16), 16)(views(spread, spread), progress())
    assert float(healthy.metrics["embedding_std"]) == pytest.approx(1, abs=0.05) and healthy.loss < 2


def test_gradient_is_finite_where_a_dimension_is_constant() -> None:
    x = draw(0, 8, 3)
    x[:, 1] = 2.0
    x = x.requires_grad_()
    vicreg(Same(3), 3)(views(x, x), progress()).loss.backward()
    assert bool(x.grad.isfinite().all())


# ---------------------------------------------------------------------------- several workers

DIM = 7  # no number of workers divides it


def _joined() -> tuple[Tensor, Tensor]:
    x = draw(5, 12, 6)
    return x, x + 0.5 * draw(6, 12, 6)


def _step(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    method = vicreg(Encoder(6, DIM), DIM)
    forward = DistributedDataParallel(method) if world > 1 else method
    rows = torch.arange(12).chunk(world)[rank]
    out = forward(views(*(x[rows] for x in _joined())), progress())
    out.loss.backward()
    metrics = {name: float(value) for name, value in out.metrics.items()}
    return {"loss": out.loss.item(), "gradient": method.backbone.linear.weight.grad, "metrics": metrics}


def test_workers_together_make_the_loss_and_gradient_of_the_joined_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder(6, DIM).double()
    want = literal(*(encoder(x) for x in _joined()))
    want.backward()
    parts = in_processes(2, tmp_path, _step)
    np.testing.assert_allclose(np.mean([part["loss"] for part in parts]), want.item(), atol=EXACT)
    one = _step(0, 1)
    for part in parts:
        torch.testing.assert_close(part["gradient"], encoder.linear.weight.grad, atol=EXACT, rtol=0)
    for name in ("invariance", "variance", "covariance"):
        assert np.mean([part["metrics"][name] for part in parts]) == pytest.approx(one["metrics"][name], abs=EXACT)
