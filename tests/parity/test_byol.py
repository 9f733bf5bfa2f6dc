"""BYOL against reference values and against a literal float64 transcription of its equations."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.byol import BYOL, BYOLConfig, distance
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import Progress, RunFacts
from methods.parts.errors import ConfigError
from methods.parts.views import Views
from pipeline.config import OptimConfig, override
from pipeline.recipes import load_recipe
from pipeline.train.optim import build_optimizer
from tests.parity.test_swav import Same

EXACT = 1e-11


class Encoder(nn.Module):
    """Linear without bias, then ReLU."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, features, bias=False)
        self.num_features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def byol(backbone: nn.Module, **settings: object) -> BYOL:
    facts = RunFacts(global_batch_size=8, steps_per_epoch=5, total_steps=100)
    return BYOL(BYOLConfig(**settings), backbone, facts).double()


def views(v1: Tensor, v2: Tensor) -> Views:
    ids = torch.arange(len(v1))
    return Views(stacks={"first": v1, "second": v2}, counts={"first": 1, "second": 1}, image_ids=ids, labels=ids)


def progress(step: int = 0, total: int = 100) -> Progress:
    return Progress(step=step, total_steps=total, steps_per_epoch=5)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def advance(method: BYOL, batch: Views, optimizer: torch.optim.Optimizer, at: Progress) -> Tensor:
    """One step as the loop makes it."""
    method.before_step(at)
    out = method(batch, at)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    method.after_step([out.outputs], at)
    return out.loss.detach()


# ---------------------------------------------------------------------------- loss


def test_distance_of_a_worked_pair() -> None:
    p, y = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[4.0, 3.0]]).double()
    assert distance(p, y).item() == pytest.approx(2 - 2 * 24 / 25, abs=1e-15)


class Fixed(nn.Module):
    """A target that gives the projections of view 1, then those of view 2."""

    def __init__(self, *projections: Tensor) -> None:
        super().__init__()
        self.projections = list(projections)

    def forward(self, x: Tensor) -> Tensor:
        return self.projections.pop(0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 2e-5)])
def test_loss_and_gradients_equal_the_original(golden, dtype: torch.dtype, tolerance: float) -> None:
    values = {name: torch.from_numpy(array) for name, array in golden("contrastive_byol").items()}
    p1, p2 = (values[name].to(dtype).requires_grad_() for name in ("p1", "p2"))
    z1, z2 = (values[name].to(dtype).requires_grad_() for name in ("z1", "z2"))
    method = byol(Same(16), predictor=False, projection_dim=16)
    method.projector, method.target = nn.Identity(), Fixed(z1, z2)
    loss = method(views(p1, p2), progress()).loss
    loss.backward()
    np.testing.assert_allclose(loss.item(), values["loss"], atol=tolerance)
    for p, name in ((p1, "grad_p1"), (p2, "grad_p2")):
        np.testing.assert_allclose(p.grad.numpy(), values[name], atol=tolerance)
    assert z1.grad is None and z2.grad is None
    for p, z, name in ((p1, z2, "per_sample_p1_z2"), (p2, z1, "per_sample_p2_z1")):
        np.testing.assert_allclose(distance(p, z).detach().numpy(), values[name], atol=tolerance)


def test_loss_follows_neither_the_order_nor_the_length_of_rows() -> None:
    p1, p2, z1, z2 = (draw(i, 6, 4) for i in range(4))
    want = (distance(p1, z2) + distance(p2, z1)).mean()
    order = torch.randperm(6)
    torch.testing.assert_close((distance(p1[order], z2[order]) + distance(p2[order], z1[order])).mean(), want, atol=1e-14, rtol=0)
    torch.testing.assert_close((distance(7 * p1, 0.1 * z2) + distance(p2, z1)).mean(), want, atol=1e-14, rtol=0)
    assert distance(p1, -p1).tolist() == pytest.approx([4] * 6) and distance(p1, 3 * p1).tolist() == pytest.approx([0] * 6)


def test_another_number_of_crops_is_refused() -> None:
    x = draw(0, 12, 4)
    three = Views(stacks={"global": x}, counts={"global": 3}, image_ids=torch.arange(4), labels=torch.arange(4))
    with pytest.raises(ConfigError, match=r"views\.global\.count=3: 3 crops, but this method compares two"):
        byol(Same(4))(three, progress())


# ---------------------------------------------------------------------------- momentum


def test_momentum_of_worked_steps() -> None:
    method = byol(Same(4))
    taus = [method.momentum(progress(step)) for step in (0, 25, 50, 75, 100)]
    assert taus == pytest.approx([0.996, 0.99658579, 0.998, 0.99941421, 1], abs=5e-9)
    assert byol(Same(4), momentum=0.99, final_momentum=0.99).momentum(progress(37)) == 0.99


@pytest.mark.parametrize("base", ["0.97", "0.99", "0.996"])
def test_momentum_equals_the_original(golden, base: str) -> None:
    values = golden("contrastive_byol")
    method, total = byol(Same(4), momentum=float(base)), int(values["tau_max_steps"])
    taus = [method.momentum(progress(int(step), total)) for step in values["tau_steps"]]
    np.testing.assert_allclose(taus, values[f"tau_{base}"], atol=1e-12)


# ---------------------------------------------------------------------------- several steps

NAMES = {
    "backbone.linear.weight": "enc.weight",
    "projector.0.weight": "proj.l1.weight",
    "projector.0.bias": "proj.l1.bias",
    "projector.1.weight": "proj.bn.weight",
    "projector.1.bias": "proj.bn.bias",
    "projector.3.weight": "proj.l2.weight",
    "predictor.0.weight": "pred.l1.weight",
    "predictor.0.bias": "pred.l1.bias",
    "predictor.1.weight": "pred.bn.weight",
    "predictor.1.bias": "pred.bn.bias",
    "predictor.3.weight": "pred.l2.weight",
}


def test_five_steps_equal_the_original(golden) -> None:
    """Losses, momenta, first gradient, and the parameters of both networks at the end."""
    values = golden("contrastive_byol")
    base, total = float(values["trace_base_tau"]), int(values["trace_max_steps"])
    method = byol(Encoder(12, 10), momentum=base, projector_hidden=16, projection_dim=8, predictor_hidden=16)
    online = {name: p for name, p in method.named_parameters() if not name.startswith("target")}
    target = dict(method.target.named_parameters())
    assert online.keys() == NAMES.keys()
    with torch.no_grad():
        for name, p in online.items():
            p.copy_(torch.from_numpy(values[f"trace_init_online/{NAMES[name]}"]))
        for name, p in target.items():
            p.copy_(torch.from_numpy(values[f"trace_init_target/{NAMES[name]}"]))
    optimizer = build_optimizer(OptimConfig(name="sgd", base_lr=float(values["trace_lr"]), weight_decay=0), method.param_groups())
    for step in range(total):
        batch = views(*(torch.from_numpy(values[f"trace_x{v}"][step]) for v in (1, 2)))
        assert method.momentum(progress(step, total)) == pytest.approx(values["trace_tau"][step], abs=1e-14)
        loss = advance(method, batch, optimizer, progress(step, total))
        np.testing.assert_allclose(loss, values["trace_loss"][step], atol=EXACT)
        if step == 0:
            for name, p in online.items():
                np.testing.assert_allclose(p.grad.numpy(), values[f"trace_grad0/{NAMES[name]}"], atol=EXACT)
    for name, p in online.items():
        np.testing.assert_allclose(p.detach().numpy(), values[f"trace_final_online/{NAMES[name]}"], atol=EXACT)
    for name, p in target.items():
        np.testing.assert_allclose(p.numpy(), values[f"trace_final_target/{NAMES[name]}"], atol=EXACT)


def normalised(x: Tensor, scale: Tensor, shift: Tensor, running: list[Tensor]) -> Tensor:
    mean, variance = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    running[0] = 0.9 * running[0] + 0.1 * mean.detach()
    running[1] = 0.9 * running[1] + 0.1 * variance.detach() * len(x) / (len(x) - 1)
    return (x - mean) / torch.sqrt(variance + 1e-5) * scale + shift


def literal(w: dict[str, Tensor], head: str, x: Tensor, running: list[Tensor]) -> Tensor:
    hidden = normalised(x @ w[f"{head}.0.weight"].T + w[f"{head}.0.bias"], w[f"{head}.1.weight"], w[f"{head}.1.bias"], running)
    return torch.relu(hidden) @ w[f"{head}.3.weight"].T


def test_steps_equal_the_equations() -> None:
    """Six steps with another target at the start: losses, both networks, and the batch-norm statistics of each."""
    torch.manual_seed(3)
    settings = {"projector_hidden": 17, "projection_dim": 5, "predictor_hidden": 16, "independent_target_init": True}
    method = byol(Encoder(6, 4), momentum=0.8, **settings)
    theta = {name: p.detach().clone() for name, p in method.named_parameters() if not name.startswith("target")}
    xi = {name: p.clone() for name, p in method.target.named_parameters()}
    stats = {name: [torch.zeros(n).double(), torch.ones(n).double()] for name, n in (("g", 17), ("q", 16), ("g'", 17))}
    optimizer = build_optimizer(OptimConfig(name="sgd", base_lr=0.2, weight_decay=0, momentum=0.0), method.param_groups())
    for k in range(6):
        v = [draw(10 * k, 5, 6), draw(10 * k + 1, 5, 6)]
        loss = advance(method, views(*v), optimizer, progress(k, 6))

        w = {name: p.clone().requires_grad_() for name, p in theta.items()}
        z = [literal(w, "projector", torch.relu(x @ w["backbone.linear.weight"].T), stats["g"]) for x in v]
        p = [literal(w, "predictor", z_v, stats["q"]) for z_v in z]
        y = [literal(xi, "projector", torch.relu(x @ xi["backbone.linear.weight"].T), stats["g'"]) for x in v]
        want = torch.zeros(()).double()
        for i in range(5):
            for a, b in ((p[0][i], y[1][i]), (p[1][i], y[0][i])):
                want = want + ((a / a.norm() - b / b.norm()) ** 2).sum() / 5
        gradients = torch.autograd.grad(want, list(w.values()))
        theta = {name: theta[name] - 0.2 * g for name, g in zip(w, gradients, strict=True)}
        tau = 1 - (1 - 0.8) * (math.cos(math.pi * k / 6) + 1) / 2
        xi = {name: tau * xi[name] + (1 - tau) * theta[name] for name in xi}

        assert loss.item() == pytest.approx(want.item(), abs=EXACT)
        for name, value in theta.items():
            torch.testing.assert_close(method.get_parameter(name).detach(), value, atol=EXACT, rtol=0)
        for name, value in xi.items():
            torch.testing.assert_close(method.target.get_parameter(name), value, atol=EXACT, rtol=0)
    for norm, name in ((method.projector[1], "g"), (method.predictor[1], "q"), (method.target.projector[1], "g'")):
        torch.testing.assert_close(norm.running_mean, stats[name][0], atol=EXACT, rtol=0)
        torch.testing.assert_close(norm.running_var, stats[name][1], atol=EXACT, rtol=0)
        assert int(norm.num_batches_tracked) == 12  # two passes a step, never averaged


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    """Without batch norm: the mean gradient of two halves is that of the whole."""
    torch.manual_seed(0)
    method = byol(Encoder(6, 4), projection_dim=3)
    method.projector, method.predictor = nn.Linear(4, 3).double(), nn.Linear(3, 3).double()
    method.target = copy.deepcopy(method.online()).requires_grad_(False)
    v1, v2 = draw(0, 8, 6), draw(1, 8, 6)
    method(views(v1, v2), progress()).loss.backward()
    whole = [p.grad.clone() for p in method.parameters() if p.grad is not None]
    method.zero_grad()
    for rows in (slice(0, 8, 2), slice(1, 8, 2)):
        (method(views(v1[rows], v2[rows]), progress()).loss / 2).backward()
    for p, want in zip([p for p in method.parameters() if p.grad is not None], whole, strict=True):
        torch.testing.assert_close(p.grad, want, atol=1e-14, rtol=0)


# ---------------------------------------------------------------------------- the networks


def test_target_is_a_copy_without_gradient_outside_the_optimizer() -> None:
    method = byol(Encoder(6, 4))
    for name, p in method.online().named_parameters():
        assert torch.equal(method.target.get_parameter(name), p)
    groups = method.param_groups()
    held = {id(p) for group in groups for p in group.params}
    assert not any(p.requires_grad or id(p) in held for p in method.target.parameters())
    method(views(draw(0, 8, 6), draw(1, 8, 6)), progress()).loss.backward()
    assert all(p.grad is None for p in method.target.parameters())
    assert all(p.grad is not None for group in groups for p in group.params)
    assert not any(name.startswith("target.predictor") for name in method.state_dict())
    assert method.evaluation_backbone() is method.backbone


def test_biases_and_norms_neither_decay_nor_adapt() -> None:
    method = byol(Encoder(6, 4))
    names = {id(p): name for name, p in method.named_parameters()}
    matrices, vectors = method.param_groups()
    assert {names[id(p)] for p in vectors.params} == {f"{head}.{layer}" for head in ("projector", "predictor") for layer in HEAD_VECTORS}
    assert (matrices.decay, matrices.adapt, vectors.decay, vectors.adapt) == (True, True, False, False)


HEAD_VECTORS = ("0.bias", "1.weight", "1.bias")

# ---------------------------------------------------------------------------- why it works, by configuration alone


def arm(**settings: object) -> BYOL:
    config = override(load_recipe("byol-small"), {f"method.{name}": value for name, value in settings.items()})
    small = override(config, {"method.projector_hidden": 8, "method.projection_dim": 4, "method.predictor_hidden": 8})
    torch.manual_seed(0)
    return BYOL(small.method, Encoder(6, 4), RunFacts(global_batch_size=8, steps_per_epoch=5, total_steps=100)).double()


def trained(method: BYOL, steps: int = 3) -> BYOL:
    optimizer = build_optimizer(OptimConfig(name="sgd", base_lr=0.1), method.param_groups())
    for step in range(steps):
        advance(method, views(draw(2 * step, 8, 6), draw(2 * step + 1, 8, 6)), optimizer, progress(step))
    return method


def test_a_fixed_random_target_stays_and_differs() -> None:
    method = arm(momentum=1.0, independent_target_init=True)
    start = [p.clone() for p in method.target.parameters()]
    for name, p in method.online().named_parameters():
        other = method.target.get_parameter(name)
        assert p.ndim == 1 or float((p - other).detach().abs().mean()) > 0.1 * float(p.detach().std())
        assert float(other.std(correction=0)) == pytest.approx(float(p.detach().std(correction=0)), rel=1, abs=1e-12)
    for p, old in zip(trained(method).target.parameters(), start, strict=True):
        assert torch.equal(p, old)


def test_without_an_average_the_target_is_the_online_network() -> None:
    method = trained(arm(momentum=0.0, final_momentum=0.0))
    for name, p in method.online().named_parameters():
        assert torch.equal(method.target.get_parameter(name), p)


def test_an_average_lies_between() -> None:
    method = arm(momentum=0.9, final_momentum=0.9)
    start = method.target.backbone.linear.weight.clone()
    target, online = trained(method).target.backbone.linear.weight, method.backbone.linear.weight.detach()
    assert 0 < float((target - start).norm()) < float((online - start).norm())


def test_the_target_drops_no_paths() -> None:
    vit = BackboneConfig(name="vit_tiny_patch16_224", width=0.25, image_size=16, patch_size=4, depth=(3,), drop_path=0.5)
    method = byol(build_backbone(vit)).train()
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(method.target(x), method.target(x))
        assert not torch.equal(method.online()(x), method.online()(x))


def test_a_random_network_learns_nothing_but_its_statistics() -> None:
    method = arm(train_online=False)
    start = {name: p.clone() for name, p in method.named_parameters()}
    assert not method.has_loss(progress()) and byol(Encoder(6, 4)).has_loss(progress())
    with torch.no_grad():
        out = method(views(draw(0, 8, 6), draw(1, 8, 6)), progress())
    method.after_step([out.outputs], progress())
    assert out.loss is None and method.config.hints(RunFacts(global_batch_size=8, steps_per_epoch=1, total_steps=1)).chance_loss is None
    for name, p in method.named_parameters():
        torch.testing.assert_close(p, start[name], atol=1e-15, rtol=0)
    assert float(method.projector[1].running_mean.abs().sum()) > 0


def test_the_predictor_can_be_left_out() -> None:
    method = arm(predictor=False)
    assert not any(name.startswith("predictor") for name, _ in method.named_parameters())
    z = method.online()(draw(0, 8, 6))
    assert torch.equal(method.predictor(z), z)


def test_meters_tell_collapse_from_health() -> None:
    method = byol(Same(16), predictor=False, projection_dim=16)
    method.projector = nn.Identity()
    method.target = nn.Identity()
    spread = draw(0, 512, 16)
    healthy, collapsed = (method(views(x, x), progress()).metrics for x in (spread, torch.ones(512, 16).double()))
    assert float(healthy["embedding_std"]) == pytest.approx(1, abs=0.05) and float(collapsed["embedding_std"]) < 1e-6
    assert float(healthy["positive_cosine"]) == pytest.approx(1) and abs(float(healthy["negative_cosine"])) < 0.02
    assert float(collapsed["negative_cosine"]) == pytest.approx(1)
    assert healthy["momentum"] == pytest.approx(0.996)
