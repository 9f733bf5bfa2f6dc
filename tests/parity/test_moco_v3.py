"""MoCo v3 against the original's values, a literal float64 transcription over several steps, and two workers against one."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.moco_v3 import MoCoV3, MoCoV3Config
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import Progress, RunFacts
from methods.parts.distributed import all_gather_rows, average_gradients
from methods.parts.errors import ConfigError
from methods.parts.norms import average_statistics, convert_sync_batchnorm
from pipeline.build import build_method
from pipeline.config import OptimConfig, override
from pipeline.recipes import load_recipe
from pipeline.resolve import resolve
from pipeline.train.optim import build_optimizer, scheduled_lr
from tests.parity.common import EXACT, Same, in_processes, progress, two_views

FACTS = RunFacts(global_batch_size=8, steps_per_epoch=10, total_steps=100)


class Body(nn.Module):
    """A small backbone, `(B, 6) -> (B, 10)`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 10
        self.linear = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def method_of(backbone: nn.Module, **settings: Any) -> MoCoV3:
    config = MoCoV3Config(**{"projector_hidden": 12, "projection_dim": 4, **settings})
    return MoCoV3(config, backbone, FACTS).double()


def small_vit() -> nn.Module:
    settings = {"width": 0.125, "depth": (2,), "image_size": 16, "patch_size": 8, "positions": "sincos", "xavier": True}
    return build_backbone(BackboneConfig(name="vit_tiny_patch16_224", **settings))


# ---------------------------------------------------------------------------- loss


class Fixed(nn.Module):
    """A key network that gives the keys of view 1, then those of view 2."""

    def __init__(self, *keys: Tensor) -> None:
        super().__init__()
        self.keys = list(keys)

    def forward(self, x: Tensor) -> Tensor:
        self.keys.append(self.keys.pop(0))
        return self.keys[-1]


def loss_of(raw: list[Tensor], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients of q1 and q2, with projections q1, q2, k1, k2 in the place of the networks' outputs."""
    method = method_of(Same(16), temperature=temperature)
    method.query, method.predictor, method.key = Same(16), nn.Identity(), Fixed(*raw[2:])
    q1, q2 = (q.clone().requires_grad_() for q in raw[:2])
    out = method(two_views(q1, q2), progress())
    out.loss.backward()
    return out.loss.detach(), q1.grad, q2.grad


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_equals_the_original(golden, temperature: float) -> None:
    values = golden("mocov3_loss")
    raw = [torch.from_numpy(values[name]).double() for name in ("q1", "q2", "k1", "k2")]
    loss, g1, g2 = loss_of(raw, temperature)
    np.testing.assert_allclose(loss.item(), values[f"T{temperature}_loss"], rtol=1e-7)
    np.testing.assert_allclose(g1.numpy(), values[f"T{temperature}_grad_q1"], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(g2.numpy(), values[f"T{temperature}_grad_q2"], rtol=1e-5, atol=1e-8)
    scaled, _, _ = loss_of([3 * raw[0], 0.5 * raw[1], 7 * raw[2], raw[3]], temperature)
    np.testing.assert_allclose(scaled.item(), loss.item(), rtol=1e-12)
    wrong, _, _ = loss_of([raw[0], raw[1], raw[3], raw[2]], temperature)  # a key of the own view
    assert abs(wrong.item() - loss.item()) > 0.1


def _worker_loss(rank: int, world: int, raw: list[Tensor], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    return loss_of([part.chunk(world)[rank] for part in raw], temperature)


def test_loss_of_two_workers_equals_the_original(golden, tmp_path: Path) -> None:
    values = golden("mocov3_loss")
    raw = [torch.from_numpy(values[name]).double() for name in ("q1", "q2", "k1", "k2")]
    for rank, (loss, g1, g2) in enumerate(in_processes(2, tmp_path, partial(_worker_loss, raw=raw, temperature=0.2))):
        np.testing.assert_allclose(loss.item(), values["T0.2_rank_loss"][rank], rtol=1e-7)
        np.testing.assert_allclose(g1.numpy(), values["T0.2_rank_grad_q1"][rank], rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(g2.numpy(), values["T0.2_rank_grad_q2"][rank], rtol=1e-5, atol=1e-8)


def test_keys_that_tell_nothing_give_the_loss_of_chance() -> None:
    method = method_of(Same(4), temperature=0.5)
    method.query, method.predictor, method.key = Same(4), nn.Identity(), Same(4)
    out = method(two_views(*torch.ones(2, 8, 4, dtype=torch.float64)), progress())
    assert out.loss.item() == pytest.approx(method.config.hints(FACTS).chance_loss[0], abs=1e-12) == pytest.approx(2 * math.log(8))
    assert float(out.metrics["contrastive_top1"]) == 0


# ---------------------------------------------------------------------------- schedules


def test_schedules_equal_the_original(golden) -> None:
    """The momentum, and the rate from the second step on; the first has that of the second instead of 0."""
    values = golden("vit_schedules")
    config = override(load_recipe("moco-v3-vitb16"), {"train.steps_per_epoch": 1251})
    resolved = resolve(config, 1_281_167)
    method = method_of(Body())
    steps = np.round(values["mocov3_epoch_float"] * 1251).astype(int)
    for step, lr, momentum in zip(steps, values["mocov3_lr"], values["mocov3_momentum"], strict=True):
        at = Progress(step=int(step), total_steps=resolved.facts.total_steps, steps_per_epoch=1251)
        np.testing.assert_allclose(method.momentum(at), momentum, atol=1e-6)
        want = scheduled_lr(resolved, 1) if step == 0 else lr
        np.testing.assert_allclose(scheduled_lr(resolved, int(step)), want, rtol=1e-3, atol=1e-9)


# ---------------------------------------------------------------------------- steps


def literal_norm(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    y = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    return y if scale is None else y * scale + shift


def literal_head(w: list[Tensor], x: Tensor, final: bool) -> Tensor:
    """Linear, norm, ReLU for each triple; a last Linear, and a norm without scale and shift."""
    for i in range(0, len(w) - 1, 3):
        x = literal_norm(x @ w[i].T, w[i + 1], w[i + 2]).relu()
    x = x @ w[-1].T
    return literal_norm(x) if final else x


@pytest.mark.parametrize(("layers", "final", "temperature"), [(3, True, 0.2), (2, False, 1.0)])
def test_steps_equal_the_equations(layers: int, final: bool, temperature: float) -> None:
    """Five steps of SGD with the schedule of m; both forms of the heads (ViT, ResNet)."""
    torch.manual_seed(0)
    method = method_of(Body(), projector_layers=layers, predictor_norm=final, temperature=temperature, momentum=0.6)
    w = [p.detach().clone() for p in method.query.parameters()]
    h = [p.detach().clone() for p in method.predictor.parameters()]
    slow = [p.clone() for p in w]
    optimizer = torch.optim.SGD(method.param_groups()[0].params, lr=0.1)

    def network(w: list[Tensor], x: Tensor) -> Tensor:
        return literal_head(w[2:], (x @ w[0].T + w[1]).relu(), True)

    for step in range(5):
        at = Progress(step=step, total_steps=8, steps_per_epoch=4)
        x1, x2 = torch.randn(2, 8, 6, dtype=torch.float64)
        method.before_step(at)
        out = method(two_views(x1, x2), at)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        method.after_step([out.outputs], at)

        m = 1 - (1 - 0.6) * (1 + math.cos(math.pi * step / 8)) / 2
        slow = [m * s + (1 - m) * p for s, p in zip(slow, w, strict=True)]
        w, h = ([p.detach().requires_grad_() for p in part] for part in (w, h))
        loss = torch.zeros((), dtype=torch.float64)
        for a, b in ((x1, x2), (x2, x1)):
            q, k = literal_head(h, network(w, a), final), network(slow, b)
            q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
            for i in range(8):
                terms = [torch.exp(q[i] @ k[j] / temperature) for j in range(8)]
                loss = loss - 2 * temperature * torch.log(terms[i] / sum(terms)) / 8
        gradients = torch.autograd.grad(loss, w + h)
        moved = [(p - 0.1 * g).detach() for p, g in zip(w + h, gradients, strict=True)]
        w, h = moved[: len(w)], moved[len(w) :]
        np.testing.assert_allclose(out.loss.item(), loss.item(), rtol=1e-9)
        for own, want in ((method.query, w), (method.predictor, h), (method.key, slow)):
            for p, value in zip(own.parameters(), want, strict=True):
                torch.testing.assert_close(p.detach(), value.detach(), rtol=1e-7, atol=1e-9)


def test_heads_of_both_kinds() -> None:
    names = [type(m).__name__ for m in method_of(Body()).query.projector]
    assert names == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    resnet = method_of(Body(), projector_layers=2, predictor_norm=False)
    assert [type(m).__name__ for m in resnet.query.projector] == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [type(m).__name__ for m in resnet.predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    for head in (resnet.query.projector, resnet.predictor):
        assert all(m.bias is None for m in head if isinstance(m, nn.Linear))
    assert resnet.query.projector[-1].weight is None  # no scale, no shift
    config = load_recipe("moco-v3-resnet50").method
    assert (config.projector_layers, config.predictor_norm, config.temperature) == (2, False, 1.0)


def test_the_keys_follow_before_they_are_made() -> None:
    """At rate 0 the key network still moves in the first step, if it differs; and its keys are those of the moved weights."""
    method = method_of(Body(), momentum=0.5)
    with torch.no_grad():
        for p in method.query.parameters():
            p.add_(0.3)
    before = [p.clone() for p in method.key.parameters()]
    method.before_step(progress(0))
    moved = copy.deepcopy(method.key)
    for old, new, query in zip(before, moved.parameters(), method.query.parameters(), strict=True):
        torch.testing.assert_close(new, 0.5 * old + 0.5 * query, **EXACT)
    x1, x2 = torch.randn(2, 8, 6, dtype=torch.float64)
    out = method(two_views(x1, x2), progress(0))
    with torch.no_grad():
        k = nn.functional.normalize(moved(x2), dim=1)
        q = nn.functional.normalize(method.predictor(method.query(x1)), dim=1)
    assert float(out.metrics["positive_cosine"]) == pytest.approx(float((q * k).sum(1).mean()), abs=1e-9)


def test_m_of_one_leaves_the_keys_and_no_gradient_reaches_them() -> None:
    method = method_of(Body(), momentum=1.0)
    before = copy.deepcopy(method.key.state_dict())
    method.before_step(progress(3))
    method(two_views(*torch.randn(2, 8, 6, dtype=torch.float64)), progress(3)).loss.backward()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in method.key.named_parameters())


def test_advice_and_remedies() -> None:
    short = RunFacts(global_batch_size=8, steps_per_epoch=10, total_steps=100)
    (warning,) = MoCoV3Config(momentum=0.996).hints(short).warnings
    assert "method.momentum=0.996" in warning
    assert not MoCoV3Config().hints(short).warnings
    assert "method.momentum=0.97," in MoCoV3Config().hints(short).remedies


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"momentum": 1.1}, {"projector_layers": 0}, {"projection_dim": 1}])
def test_settings_that_cannot_work_are_refused(settings: dict) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ConfigError, match=rf"method\.{name}={value}: "):
        MoCoV3Config(**settings)


# ---------------------------------------------------------------------------- vision transformers


def test_what_a_vit_trains() -> None:
    torch.manual_seed(0)
    method = method_of(small_vit())
    fixed = {"query.backbone.pos_embed", "query.backbone.patch_embed.proj.weight", "query.backbone.patch_embed.proj.bias"}
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    [group] = method.param_groups()
    assert group.decay and {id(p) for p in group.params} == {
        id(p) for name, p in method.named_parameters() if name not in fixed and not name.startswith("key.")
    }
    optimizer = build_optimizer(OptimConfig(name="adamw", base_lr=1e-3, weight_decay=0.1), [group])
    for step in range(2):
        method.before_step(progress(step))
        method(two_views(*torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)), progress(step)).loss.backward()
        assert all((p.grad is None) == (name in fixed or name.startswith("key.")) for name, p in method.named_parameters())
        optimizer.step()
    still = {name for name, p in method.named_parameters() if torch.equal(p.detach(), before[name])}
    assert still == fixed | {name.replace("query.", "key.") for name in fixed}
    assert method_of(small_vit(), freeze_patches=False).query.backbone.patch_embed.proj.weight.requires_grad


def test_published_settings() -> None:
    small, base = load_recipe("moco-v3-vits16"), load_recipe("moco-v3-vitb16")
    facts = RunFacts(global_batch_size=1024, steps_per_epoch=1251, total_steps=375_300)
    assert resolve(small, 1_281_167).lr == pytest.approx(6e-4) and resolve(base, 1_281_167).lr == pytest.approx(2.4e-3)
    assert resolve(load_recipe("moco-v3-resnet50"), 1_281_167).lr == pytest.approx(4.8)
    backbone = build_method(override(small, {"backbone.depth": (2,)}), facts).evaluation_backbone()
    assert backbone.blocks[0].attn.num_heads == 12 and backbone.num_features == 384
    for name in ("moco-v3-small", "moco-v3-cifar10-small"):
        config = load_recipe(name)
        method = build_method(config, facts)
        assert sum(p.numel() for p in method.evaluation_backbone().parameters()) < 3e6


def test_crops_must_be_whole_patches_before_training() -> None:
    config = load_recipe("moco-v3-small")
    for key, size in (("views.second.size", 30), ("evaluate.size", 34)):
        with pytest.raises(ConfigError, match=rf"{key}={size}: not a multiple of .* 4 pixels"):
            build_method(override(config, {key: size}), FACTS)
    method = build_method(override(config, {"train.gradient_checkpointing": True, "train.compile": True}), FACTS)
    assert method.evaluation_backbone().grad_checkpointing
    with pytest.raises(ConfigError, match=r"train\.compile=True"):
        build_method(override(load_recipe("byol-small"), {"train.compile": True}), FACTS)


# ---------------------------------------------------------------------------- workers


def _steps(rank: int, world: int) -> dict[str, Any]:
    """Three steps over eight images in `world` workers, batch norm over all of them."""
    torch.manual_seed(0)
    method = method_of(small_vit(), momentum=0.7)
    if world > 1:
        convert_sync_batchnorm(method)
    optimizer = torch.optim.SGD(method.param_groups()[0].params, lr=0.1, momentum=0.9)
    losses, gradients = [], {}
    for step in range(3):
        x1, x2 = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64).chunk(world, dim=1)[rank]
        method.before_step(progress(step))
        out = method(two_views(x1, x2), progress(step))
        optimizer.zero_grad()
        out.loss.backward()
        average_gradients(method.parameters())
        gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
        optimizer.step()
        method.after_step([out.outputs], progress(step))
        losses.append(float(all_gather_rows(out.loss.detach()[None]).mean()))
    average_statistics(method)
    return {"losses": losses, "gradients": gradients, "state": method.state_dict()}


def test_two_workers_equal_one(tmp_path: Path) -> None:
    one, two = _steps(0, 1), in_processes(2, tmp_path, _steps)
    for worker in two:
        np.testing.assert_allclose(worker["losses"], one["losses"], rtol=1e-9)
        for kind in ("gradients", "state"):
            assert worker[kind].keys() == one[kind].keys()
            for name, value in one[kind].items():
                torch.testing.assert_close(worker[kind][name], value, rtol=1e-7, atol=1e-9, msg=name)
