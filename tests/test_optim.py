"""Optimizers against literal transcriptions and the original's values; freezing, clipping, constant rates."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from methods.parts.contract import ParamGroup, RunFacts
from methods.parts.errors import ConfigError
from pipeline.config import OptimConfig
from pipeline.recipes import load_recipe
from pipeline.resolve import Resolved, resolve
from pipeline.train.optim import LARC, build_optimizer, prepare_step, scheduled_lr


def resolved(**changes: float) -> Resolved:
    settings = dict(lr=0.5, start_lr=0.1, final_lr=0.0, warmup_steps=3, chunk=1, window=1, checkpoint_every=1, knn_every=1)
    return Resolved(facts=RunFacts(global_batch_size=8, steps_per_epoch=5, total_steps=10), **{**settings, **changes})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_larc_equals_the_original(golden, dtype: torch.dtype) -> None:
    """apex LARC without clipping over SGD(momentum 0.9, wd 1e-2); parameter 0 is frozen for two steps, parameter 3 is all zeros."""
    values = golden("clustering_schedules_optim")
    params = [nn.Parameter(torch.from_numpy(values[f"opt_p{j}_init"]).to(dtype)) for j in range(4)]
    optimizer = LARC(params, lr=1.0, momentum=0.9, weight_decay=1e-2, trust=1e-3)
    for step, lr in enumerate(values["opt_lrs"]):
        for j, p in enumerate(params):
            p.grad = None if j == 0 and step < 2 else torch.from_numpy(values[f"opt_g{j}"][step]).to(dtype)
        optimizer.param_groups[0]["lr"] = float(lr)
        optimizer.step()
        for j, p in enumerate(params):
            tolerance = 1e-9 if dtype == torch.float64 else 2e-5
            np.testing.assert_allclose(p.detach().numpy(), values[f"opt_larc_p{j}_step{step}"], atol=tolerance)


@pytest.mark.parametrize(("name", "form"), [("lars", "popular"), ("lars-classic", "classic")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lars_equals_the_original(golden, name: str, form: str, dtype: torch.dtype) -> None:
    """One group: biases and scales are left out by their shape; the rate begins at 0; zero weights and zero gradients occur."""
    values = golden("contrastive_lars")
    names = ["w", "b", "gamma", "w_zero"]
    params = [nn.Parameter(torch.from_numpy(values[f"init/{n}"]).to(dtype)) for n in names]
    settings = {"weight_decay": float(values["weight_decay"]), "momentum": float(values["momentum"])}
    config = OptimConfig(name=name, trust_coefficient=float(values["trust_coefficient"]), **settings)
    optimizer = build_optimizer(config, [ParamGroup(params=params)])
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    others = ["classic" if form == "popular" else "popular", "lightly_variant"]
    for step, lr in enumerate(values["lr"]):
        for n, p in zip(names, params, strict=True):
            p.grad = torch.from_numpy(values[f"grad/{n}"][step]).to(dtype)
        optimizer.param_groups[0]["lr"] = float(lr)
        optimizer.step()
        for n, p in zip(names, params, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), values[f"{form}/{n}"][step], **tolerance)
    for other in others:
        assert max(np.abs(p.detach().numpy() - values[f"{other}/{n}"][-1]).max() for n, p in zip(names, params, strict=True)) > 1e-4


def test_lars_worked_value_and_a_group_that_does_not_adapt() -> None:
    config = OptimConfig(name="lars", base_lr=2.0, weight_decay=0.1)
    w, held = (nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64)) for _ in range(2))
    optimizer = build_optimizer(config, [ParamGroup(params=[w]), ParamGroup(params=[held], adapt=False)])
    w.grad, held.grad = (torch.tensor([[1.0, 0.0]], dtype=torch.float64) for _ in range(2))
    optimizer.step()
    np.testing.assert_allclose(w.detach().numpy(), [[2.99044221, 3.99705914]], atol=5e-9)
    np.testing.assert_allclose(held.detach().numpy(), [[3 - 2 * 1.3, 4 - 2 * 0.4]], atol=1e-12)


def test_norms_of_half_precision_weights_do_not_overflow() -> None:
    """400 x 400 weights of 1 and gradients of 200: the squares of the gradients sum to 6.4e9, beyond float16."""
    w = nn.Parameter(torch.ones(400, 400, dtype=torch.float16))
    optimizer = build_optimizer(OptimConfig(name="lars", base_lr=1.0, weight_decay=0, trust_coefficient=0.5), [ParamGroup(params=[w])])
    w.grad = torch.full_like(w, 200)
    optimizer.step()
    assert w.detach().float().mean().item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("name", ["larc", "lars"])
def test_layerwise_rates_equal_their_equations(name: str) -> None:
    rng = np.random.default_rng(0)
    p, wd, trust, lr, momentum = rng.normal(size=(4, 3)), 0.02, 0.001, 0.3, 0.9
    plain = rng.normal(size=3)
    groups = [
        ParamGroup(params=[nn.Parameter(torch.from_numpy(p.copy()))]),
        ParamGroup(params=[nn.Parameter(torch.from_numpy(plain.copy()))], adapt=False, decay=False),
    ]
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=wd, momentum=momentum, trust_coefficient=trust), groups)
    m, m_plain = np.zeros_like(p), np.zeros_like(plain)
    for _ in range(4):
        g, g_plain = rng.normal(size=p.shape), rng.normal(size=3)
        groups[0].params[0].grad, groups[1].params[0].grad = torch.from_numpy(g.copy()), torch.from_numpy(g_plain.copy())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        p_norm, g_norm = np.sqrt((p**2).sum()), np.sqrt((g**2).sum())
        decayed = g + wd * p
        rate = trust * p_norm / (g_norm + wd * p_norm + 1e-8) if name == "larc" else trust * p_norm / np.sqrt((decayed**2).sum())
        m = momentum * m + rate * decayed
        p = p - lr * m
        m_plain = momentum * m_plain + g_plain
        plain = plain - lr * m_plain
        np.testing.assert_allclose(groups[0].params[0].detach().numpy(), p, atol=1e-12)
        np.testing.assert_allclose(groups[1].params[0].detach().numpy(), plain, atol=1e-12)


def literal_direction(name: str, g: np.ndarray, p: np.ndarray, wd: float, trust: float, adapt: bool) -> np.ndarray:
    """The rescaled gradient of one tensor, as the docstrings of LARC and LARS state it."""
    p_norm, g_norm = np.sqrt((p**2).sum()), np.sqrt((g**2).sum())
    if name == "larc":
        if not adapt:
            return g + wd * p
        positive = p_norm > 0 and g_norm > 0
        return trust * p_norm / (g_norm + wd * p_norm + 1e-8) * (g + wd * p) if positive else g
    if p.ndim <= 1:
        return g
    decayed = g + wd * p
    norm = np.sqrt((decayed**2).sum())
    return trust * p_norm / norm * decayed if adapt and p_norm > 0 and norm > 0 else decayed


@pytest.mark.parametrize("wd", [0.0, 0.02])
@pytest.mark.parametrize("name", ["larc", "lars", "lars-classic"])
def test_every_tensor_has_its_own_rate(name: str, wd: float) -> None:
    """Matrices, filters in channels-last memory, vectors and scalars; zero weights, zero gradients, absent gradients, frozen steps."""
    rng = np.random.default_rng(1)
    shapes = [(4, 3), (5,), (3, 2, 3, 3), (2, 2), (6,), (), (3, 3), (4,)]
    values = [rng.normal(size=shape) for shape in shapes]
    values[3], values[4] = np.zeros((2, 2)), np.zeros(6)
    trust, lr, momentum = 0.01, 0.3, 0.9

    def group(adapt: bool, frozen: int) -> ParamGroup:
        params = [nn.Parameter(torch.from_numpy(v.copy())) for v in values]
        params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)
        return ParamGroup(params=params, adapt=adapt, frozen_steps=frozen)

    groups = [group(True, 0), group(False, 0), group(True, 2)]
    config = OptimConfig(name=name, weight_decay=wd, momentum=momentum, trust_coefficient=trust)
    optimizer = build_optimizer(config, groups)
    want = [[v.copy() for v in values] for _ in groups]
    moved = [[np.zeros_like(v) for v in values] for _ in groups]
    plan = resolved(lr=lr, start_lr=lr, warmup_steps=0, milestones=(0.5,))
    for step in range(4):
        for g, (settings, ws, ms) in enumerate(zip(groups, want, moved, strict=True)):
            for i, p in enumerate(settings.params):
                gradient = np.zeros(shapes[i]) if i in (6, 7) and step != 1 else rng.normal(size=shapes[i])
                p.grad = None if i == 0 and step == 2 else torch.from_numpy(np.array(gradient))
                if p.grad is None or (g == 2 and step < 2):
                    continue
                d = literal_direction(name.removesuffix("-classic"), gradient, ws[i], wd, trust, settings.adapt)
                ms[i] = momentum * ms[i] + (lr * d if name == "lars-classic" else d)
                ws[i] = ws[i] - (ms[i] if name == "lars-classic" else lr * ms[i])
        prepare_step(optimizer, plan, step, None)
        optimizer.step()
    for settings, ws in zip(groups, want, strict=True):
        for p, w in zip(settings.params, ws, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["larc", "lars", "lars-classic"])
def test_no_optimizer_asks_the_device(name: str) -> None:
    """On meta any read of a value raises."""
    params = [nn.Parameter(torch.ones(shape, device="meta")) for shape in ((3, 2), (3,))]
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=0.1), [ParamGroup(params=params)])
    for step in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        assert prepare_step(optimizer, resolved(), step, 1.0, "tensor").is_meta
        optimizer.step()


def test_learning_rate_falls_in_steps_after_the_warmup() -> None:
    """MoCo v1: a tenth at 120 of 200 epochs, a hundredth at 160."""
    plan = resolved(lr=0.03, start_lr=0.0, warmup_steps=0, milestones=(0.6, 0.8))
    np.testing.assert_allclose([scheduled_lr(plan, s) for s in range(10)], [0.03] * 6 + [0.003] * 2 + [0.0003] * 2, rtol=1e-12)
    warm = resolved(lr=0.03, start_lr=0.01, warmup_steps=3, milestones=(0.2, 0.8))
    np.testing.assert_allclose([scheduled_lr(warm, s) for s in range(4)], [0.01, 0.02, 0.03, 0.003], rtol=1e-12)
    with pytest.raises(ConfigError, match=r"optim\.milestones=\(0\.8, 0\.6\): use rising fractions"):
        OptimConfig(schedule="steps", milestones=(0.8, 0.6))


def test_groups_are_frozen_scaled_held_and_clipped() -> None:
    frozen, held, free = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [
        ParamGroup(params=[frozen], frozen_steps=2),
        ParamGroup(params=[held], lr_constant=True, lr_scale=2, clip=False),
        ParamGroup(params=[free]),
    ]
    optimizer = build_optimizer(OptimConfig(name="sgd", weight_decay=0), groups)
    plan = resolved()
    for step in (1, 2):
        for p in (frozen, held, free):
            p.grad = torch.full((2,), 3.0)
        norm = prepare_step(optimizer, plan, step, clip_norm=1.0)
        assert (frozen.grad is None) == (step < 2)
        assert float(norm) == pytest.approx(3 * (2 if step < 2 else 4) ** 0.5)
        assert float(free.grad.norm()) == pytest.approx(1 if step < 2 else 0.5**0.5, abs=1e-5)
        torch.testing.assert_close(held.grad, torch.full((2,), 3.0))
        assert [g["lr"] for g in optimizer.param_groups] == [scheduled_lr(plan, step), 2 * plan.lr, scheduled_lr(plan, step)]


def test_each_tensor_is_clipped_by_itself() -> None:
    """Norms 5, 0.5 and 0 with a limit of 1; frozen and exempt groups stay out of it."""
    large, small, zero, exempt, frozen = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(5))
    groups = [
        ParamGroup(params=[large, small, zero]),
        ParamGroup(params=[exempt], clip=False),
        ParamGroup(params=[frozen], frozen_steps=9),
    ]
    optimizer = build_optimizer(OptimConfig(name="sgd", weight_decay=0), groups)
    for p, values in zip((large, small, zero, exempt, frozen), ([3, 4], [0.3, 0.4], [0, 0], [30, 40], [1, 1]), strict=True):
        p.grad = torch.tensor(values, dtype=torch.float64)
    norm = prepare_step(optimizer, resolved(), 1, 1.0, "tensor")
    assert float(norm) == pytest.approx(25.25**0.5) and frozen.grad is None
    factor = 1 / (5 + 1e-6)
    for p, want in ((large, [3 * factor, 4 * factor]), (small, [0.3, 0.4]), (zero, [0, 0]), (exempt, [30, 40])):
        np.testing.assert_allclose(p.grad.numpy(), want, atol=1e-15)
    optimizer.zero_grad()
    assert float(prepare_step(optimizer, resolved(), 1, 1.0, "tensor")) == 0  # no gradient at all


def test_weight_decay_follows_its_schedule_in_groups_that_decay() -> None:
    groups = [ParamGroup(params=[nn.Parameter(torch.ones(2))], decay=decay) for decay in (True, False)]
    optimizer = build_optimizer(OptimConfig(name="adamw", weight_decay=0.04, final_weight_decay=0.4), groups)
    plan = resolved(weight_decays=(0.04, 0.4))
    for step in range(10):
        prepare_step(optimizer, plan, step, None)
        want = 0.4 + (0.04 - 0.4) / 2 * (1 + np.cos(np.pi * step / 10))
        assert [g["weight_decay"] for g in optimizer.param_groups] == [pytest.approx(want), 0.0]
    prepare_step(optimizer, resolved(), 3, None)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(want)  # without a schedule it stays


@pytest.mark.parametrize("name", ["larc", "lars", "lars-classic", "sgd", "adamw"])
def test_state_of_every_optimizer_goes_on_bit_exactly(name: str) -> None:
    def fresh() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        p = nn.Parameter(torch.arange(6.0).view(2, 3) / 7)
        return p, build_optimizer(OptimConfig(name=name, weight_decay=0.1), [ParamGroup(params=[p])])

    def advance(p: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            p.grad = torch.sin(torch.arange(6.0) + step).view(2, 3)
            prepare_step(optimizer, resolved(), step, None)
            optimizer.step()

    whole, optimizer = fresh()
    advance(whole, optimizer, range(6))
    half, first = fresh()
    advance(half, first, range(3))
    again, second = fresh()
    with torch.no_grad():
        again.copy_(half)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    advance(again, second, range(3, 6))
    assert torch.equal(again, whole)


@pytest.mark.parametrize("recipe", ["simclr", "simclr-v2", "byol", "byol-epochs300", "nnclr"])
def test_warmup_of_the_contrastive_papers_is_the_share_of_its_steps(recipe: str) -> None:
    """lr = base step / warmup, and base in the step after it; departs: the first step has the rate of the second."""
    resolved = resolve(load_recipe(recipe), 1_281_167)
    last = resolved.warmup_steps
    for step in (1, 2, last // 3, last - 1, last):
        assert scheduled_lr(resolved, step) == pytest.approx(resolved.lr * step / last)
    assert scheduled_lr(resolved, 0) == scheduled_lr(resolved, 1) and scheduled_lr(resolved, last + 50) < resolved.lr
