"""SimSiam against a literal float64 transcription of its equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methods.parts.contract import Progress, RunFacts
from methods.parts.views import Views
from methods.simsiam import SimSiam, SimSiamConfig, distance
from pipeline.config import OptimConfig
from pipeline.recipes import load_recipe
from pipeline.resolve import Resolved
from pipeline.train.optim import build_optimizer, prepare_step, scheduled_lr
from tests.parity.test_byol import Encoder, draw, normalised
from tests.parity.test_swav import Same

EXACT = 1e-11
FACTS = RunFacts(global_batch_size=8, steps_per_epoch=5, total_steps=20)


def simsiam(backbone: nn.Module, **settings: object) -> SimSiam:
    return SimSiam(SimSiamConfig(**settings), backbone, FACTS).double()


def views(v1: Tensor, v2: Tensor) -> Views:
    ids = torch.arange(len(v1))
    return Views(stacks={"global": torch.cat([v1, v2])}, counts={"global": 2}, image_ids=ids, labels=ids)


def progress(step: int = 0) -> Progress:
    return Progress(step=step, total_steps=20, steps_per_epoch=5)


def plan() -> Resolved:
    return Resolved(facts=FACTS, lr=0.1, start_lr=0.0, final_lr=0.0, warmup_steps=2, chunk=1, window=1, checkpoint_every=1, knn_every=1)


def test_distance_of_a_worked_pair() -> None:
    p, z = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[4.0, 3.0]]).double()
    assert distance(p, z).item() == pytest.approx(-0.96, abs=1e-15)


def test_steps_equal_the_equations() -> None:
    """Six steps: losses, parameters under a falling and a constant learning rate, and batch-norm statistics."""
    torch.manual_seed(1)
    method = simsiam(Encoder(6, 4), projector_hidden=7, projection_dim=5, predictor_hidden=3)
    theta = {name: p.detach().clone() for name, p in method.named_parameters()}
    assert "projector.6.weight" in theta and not {"projector.0.bias", "projector.6.bias", "predictor.0.bias"} & theta.keys()
    stats = {name: [torch.zeros(n).double(), torch.ones(n).double()] for name, n in (("1", 7), ("4", 7), ("7", 5), ("h", 3))}
    optimizer = build_optimizer(OptimConfig(name="sgd", base_lr=0.1, weight_decay=0.01, momentum=0.0), method.param_groups())
    for step in range(6):
        v = [draw(10 * step, 5, 6), draw(10 * step + 1, 5, 6)]
        out = method(views(*v), progress(step))
        optimizer.zero_grad()
        out.loss.backward()
        prepare_step(optimizer, plan(), step, None)
        optimizer.step()

        w = {name: p.clone().requires_grad_() for name, p in theta.items()}
        z, p = [], []
        for x in v:
            h = torch.relu(x @ w["backbone.linear.weight"].T)
            for i in (0, 3):
                bn = f"projector.{i + 1}"
                h = torch.relu(normalised(h @ w[f"projector.{i}.weight"].T, w[f"{bn}.weight"], w[f"{bn}.bias"], stats[str(i + 1)]))
            z.append(normalised(h @ w["projector.6.weight"].T, torch.ones(5), torch.zeros(5), stats["7"]))
        for z_v in z:
            h = normalised(z_v @ w["predictor.0.weight"].T, w["predictor.1.weight"], w["predictor.1.bias"], stats["h"])
            p.append(torch.relu(h) @ w["predictor.3.weight"].T + w["predictor.3.bias"])
        want = torch.zeros(()).double()
        for i in range(5):
            for a, b in ((p[0][i], z[1][i].detach()), (p[1][i], z[0][i].detach())):
                want = want - 0.5 * (a / a.norm() * b / b.norm()).sum() / 5
        gradients = torch.autograd.grad(want, list(w.values()))
        for name, g in zip(w, gradients, strict=True):
            lr = 0.1 if name.startswith("predictor") else scheduled_lr(plan(), step)
            theta[name] = theta[name] - lr * (g + 0.01 * theta[name])

        assert out.loss.item() == pytest.approx(want.item(), abs=EXACT)
        for name, value in theta.items():
            torch.testing.assert_close(method.get_parameter(name).detach(), value, atol=EXACT, rtol=0)
    for norm, name in ((method.projector[4], "4"), (method.projector[7], "7"), (method.predictor[1], "h")):
        torch.testing.assert_close(norm.running_mean, stats[name][0], atol=EXACT, rtol=0)
        torch.testing.assert_close(norm.running_var, stats[name][1], atol=EXACT, rtol=0)


def test_projections_carry_no_gradient_where_they_are_targets() -> None:
    """With an identity projector and an identity predictor the gradient is that of p alone, half of the one without stop gradient."""
    x1, x2 = draw(0, 6, 4).requires_grad_(), draw(1, 6, 4).requires_grad_()
    method = simsiam(Same(4), projection_dim=4)
    method.projector = method.predictor = nn.Identity()
    loss = method(views(x1, x2), progress()).loss
    stopped = torch.autograd.grad(loss, [x1, x2])
    free = torch.autograd.grad(-torch.cosine_similarity(x1, x2).mean(), [x1, x2])
    for got, whole in zip(stopped, free, strict=True):
        torch.testing.assert_close(got, whole / 2, atol=1e-14, rtol=0)


def test_predictor_keeps_its_learning_rate_unless_told_otherwise() -> None:
    for constant in (True, False):
        method = simsiam(Encoder(6, 4), constant_predictor_lr=constant)
        network, predictor = method.param_groups()
        assert (network.lr_constant, predictor.lr_constant) == (False, constant)
        assert {id(p) for p in predictor.params} == {id(p) for p in method.predictor.parameters()}
        assert network.decay and predictor.decay


def test_loss_is_minus_one_and_the_meter_zero_at_collapse() -> None:
    method = simsiam(Same(16), projection_dim=16)
    method.projector = method.predictor = nn.Identity()
    spread = draw(0, 512, 16)
    healthy, collapsed = (method(views(x, x), progress()) for x in (spread, torch.ones(512, 16).double()))
    assert healthy.loss.item() == pytest.approx(-1) and collapsed.loss.item() == pytest.approx(-1)
    assert float(healthy.metrics["embedding_std"]) == pytest.approx(1, abs=0.05)
    assert float(collapsed.metrics["embedding_std"]) < 1e-6
    assert float(healthy.metrics["positive_cosine"]) == pytest.approx(1)


def test_recipe_of_the_paper() -> None:
    config = load_recipe("simsiam")
    assert (config.optim.name, config.optim.base_lr, config.optim.lr_rule, config.optim.weight_decay) == ("sgd", 0.05, "linear", 1e-4)
    method = config.method
    assert (method.projector_layers, method.projector_hidden, method.projection_dim, method.predictor_hidden) == (3, 2048, 2048, 512)
