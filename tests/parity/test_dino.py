"""DINO against the original's values and against a literal float64 transcription of its equations."""

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
import torch.nn.functional as F
from torch import Tensor, nn

from methods.dino import DINO, DINOConfig
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.centering import Center
from methods.parts.contract import Progress, RunFacts
from methods.parts.dino_head import DINOHead
from methods.parts.distributed import average_gradients
from methods.parts.errors import ConfigError
from methods.parts.norms import synchronized
from methods.parts.schedules import cosine, linear_by_epoch, warmup_cosine
from methods.parts.views import Views
from pipeline.config import OptimConfig, Resolved, override, resolve
from pipeline.recipes import load_recipe
from pipeline.train.optim import build_optimizer, prepare_step
from pipeline.train.prepare import build_method
from tests.parity.common import EXACT, SINGLE, Same, in_processes
from tests.parity.test_swav import literal_sinkhorn

TOTAL, EPOCH = 12, 3  # steps of a test run, and of its epochs
FACTS = RunFacts(global_batch_size=4, steps_per_epoch=EPOCH, total_steps=TOTAL)
SMALL = {"num_prototypes": 7, "projector_hidden": 9, "projection_dim": 4}


class Encoder(nn.Module):
    """Mean over pixels plus a token, Linear, GELU: takes crops of any size; has a matrix, a vector and a token of three dimensions."""

    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.full((1, 1, 3), 0.5))
        self.linear = nn.Linear(3, features)
        self.num_features = features

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x.mean((2, 3)) + self.token[0]))


class Given(nn.Module):
    """Hands out what was given, whatever the input."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def dino(backbone: nn.Module | None = None, facts: RunFacts = FACTS, **settings: Any) -> DINO:
    torch.manual_seed(0)
    method = DINO(DINOConfig(**{**SMALL, **settings}), backbone or Encoder(), facts).double()
    with torch.no_grad():  # a head drawn at 0.02 gives features of length zero, to which every test would be blind
        for module in (method.head.mlp, method.backbone):
            for p in module.parameters():
                p.add_(torch.randn_like(p) * 0.5)
        for mine, his in zip(method.teacher.parameters(), method.student().parameters(), strict=True):
            mine.copy_(his + 0.1 * torch.randn_like(his) * his.requires_grad)
    return method


def progress(step: int = 0) -> Progress:
    return Progress(step=step, total_steps=TOTAL, steps_per_epoch=EPOCH)


def images(seed: int, batch: int = 4, large: int = 2, small: int = 3) -> Views:
    draw = torch.Generator().manual_seed(seed)
    stacks = {
        "global": torch.randn(batch * large, 3, 6, 6, dtype=torch.float64, generator=draw),
        "local": torch.randn(batch * small, 3, 4, 4, dtype=torch.float64, generator=draw),
    }
    return Views(stacks=stacks, counts={"global": large, "local": small}, image_ids=torch.arange(batch), labels=torch.arange(batch))


def rows_of(views: Views, rows: slice) -> Views:
    """The same crops of some of the images."""
    stacks = {n: torch.cat([c[rows] for c in s.chunk(views.counts[n])]) for n, s in views.stacks.items()}
    return Views(stacks=stacks, counts=views.counts, image_ids=views.image_ids[rows], labels=views.labels[rows])


def of_scores(student: Tensor, teacher: Tensor, large: int, batch: int, **settings: Any) -> tuple[DINO, Views]:
    """A method whose student and teacher give these scores, `(V B, K)` and `(G B, K)`."""
    k = student.shape[1]
    method = dino(Same(k), **{"num_prototypes": k, **settings}).to(student.dtype)
    method.head = nn.Identity()
    method.teacher = nn.Sequential()
    method.teacher.add_module("backbone", Given(teacher))
    method.teacher.add_module("head", nn.Identity())
    stacks = {"global": student[: large * batch], "local": student[large * batch :]}
    counts = {"global": large, "local": len(student) // batch - large}
    return method, Views(stacks=stacks, counts=counts, image_ids=torch.arange(batch), labels=torch.arange(batch))


# ---------------------------------------------------------------------------- the head

HEAD_NAMES = {
    "prototypes.lengths": "last_layer.weight_g",
    "prototypes.directions": "last_layer.weight_v",
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, {"rtol": 1e-6, "atol": 1e-9}), (torch.float32, SINGLE)])
@pytest.mark.parametrize("kind", ["fixed", "free"])
def test_head_equals_the_original(golden, kind: str, dtype: torch.dtype, tolerance: dict) -> None:
    values = {name.removeprefix(f"{kind}_"): torch.from_numpy(v) for name, v in golden("dino_head").items() if name.startswith(kind)}
    head = DINOHead(8, 10, hidden_features=16, bottleneck=6, unit_prototypes=kind == "fixed").to(dtype)
    names = {name: HEAD_NAMES.get(name, name) for name, _ in head.named_parameters()}
    with torch.no_grad():
        for name, p in head.named_parameters():
            p.copy_(values[f"param.{names[name]}"])
    x = values["x"].to(dtype).requires_grad_()
    y = head(x)
    (y * values["out_weight"].to(dtype)).sum().backward()
    np.testing.assert_allclose(y.detach().numpy(), values["y"].numpy(), **tolerance)
    np.testing.assert_allclose(x.grad.numpy(), values["grad_x"].numpy(), **tolerance)
    assert {names[n] for n, p in head.named_parameters() if p.grad is not None} == {n[5:] for n in values if n.startswith("grad.")}
    for name, p in head.named_parameters():
        if p.grad is not None:
            np.testing.assert_allclose(p.grad.numpy(), values[f"grad.{names[name]}"].numpy(), **tolerance)


def test_head_begins_as_the_original_does() -> None:
    """MLP weights near 0.02 and never beyond two units, zero biases, g = 1, directions as torch draws a Linear."""
    torch.manual_seed(0)
    head = DINOHead(64, 100, hidden_features=256, bottleneck=32)
    weights = [m.weight for m in head.mlp if isinstance(m, nn.Linear)]
    assert [tuple(w.shape) for w in weights] == [(256, 64), (256, 256), (32, 256)]
    assert all(0.018 < float(w.detach().std()) < 0.022 for w in weights)
    assert not any(m.bias.any() for m in head.mlp if isinstance(m, nn.Linear))
    assert torch.equal(head.prototypes.lengths, torch.ones(100, 1)) and not head.prototypes.lengths.requires_grad
    bound = 1 / math.sqrt(32)
    assert 0.9 * bound < float(head.prototypes.directions.detach().abs().max()) <= bound
    assert DINOHead(8, 10, unit_prototypes=False).prototypes.lengths.requires_grad
    with_norm = DINOHead(8, 10, hidden_features=16, batch_norm=True).mlp
    assert [type(m).__name__ for m in with_norm] == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear"]


def test_scores_of_unit_prototypes_are_cosines_whatever_their_length() -> None:
    head = DINOHead(8, 10, hidden_features=16, bottleneck=6).double()
    x = torch.randn(40, 8, dtype=torch.float64)
    scores = head(x)
    assert float(scores.detach().abs().max()) <= 1 + 1e-12
    with torch.no_grad():
        head.prototypes.directions.mul_(torch.rand(10, 1) * 9 + 0.1)
    torch.testing.assert_close(head(x), scores, rtol=0, atol=1e-12)


def test_prototypes_and_loss_are_computed_in_float32_under_autocast() -> None:
    method, views = dino().float(), images(0)
    views.stacks = {name: stack.float() for name, stack in views.stacks.items()}
    z = method.head.mlp(method.backbone(views.stacks["global"]).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = method(views, progress())
        scores = method.head(method.backbone(views.stacks["global"]))
    assert scores.dtype == out.loss.dtype == torch.float32 and out.outputs["mean"].dtype == torch.float32
    exact = F.normalize(z) @ F.normalize(method.head.prototypes.directions).T
    assert 0 < float((scores - exact).detach().abs().max()) < 0.05  # the MLP is in bf16
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in method.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_three_steps_of_the_loss_equal_the_original(golden, dtype: torch.dtype, tolerance: float) -> None:
    """Losses, gradients of the scores, and the centre, which each step leaves for the next."""
    values = golden("dino_loss")
    center = torch.zeros(40, dtype=dtype)
    for call in range(3):
        student = torch.from_numpy(values["student_logits"][call]).to(dtype).requires_grad_()
        teacher = torch.from_numpy(values["teacher_logits"][call]).to(dtype)
        method, views = of_scores(student, teacher, 2, 6, teacher_temperature=float(values["teacher_temp"][call]))
        np.testing.assert_allclose(center.numpy(), values["center"][call][0], rtol=tolerance, atol=1e-8)
        method.center.value.copy_(center)
        out = method(views, progress())
        out.loss.backward()
        method.center.update([out.outputs["mean"]])
        center = method.center.value
        np.testing.assert_allclose(out.loss.item(), values["loss"][call], rtol=tolerance)
        largest = np.abs(values["grad_student"][call]).max()
        np.testing.assert_allclose(student.grad.numpy(), values["grad_student"][call], atol=max(tolerance, 1e-5) * largest)
    np.testing.assert_allclose(center.numpy(), values["center"][3][0], rtol=tolerance, atol=1e-8)


def loss_of_this_worker(rank: int, world: int, values: dict[str, np.ndarray]) -> dict[str, Any]:
    losses, centers, value = [], [], torch.zeros(40, dtype=torch.float64)
    own = [crop * 6 + image for crop in range(8) for image in range(6 // world * rank, 6 // world * (rank + 1))]
    for call in range(3):
        student = torch.from_numpy(values["student_logits"][call][own]).double().requires_grad_()
        teacher = torch.from_numpy(values["teacher_logits"][call][own[: len(own) // 4]]).double()
        method, views = of_scores(student, teacher, 2, 6 // world, teacher_temperature=float(values["teacher_temp"][call]))
        method.center.value.copy_(value)
        out = method(views, progress())
        method.center.update([out.outputs["mean"]])
        value = method.center.value
        losses.append(out.loss.item())
        centers.append(value.clone())
        if call == 0:
            out.loss.backward()
            gradient = student.grad
    return {"losses": losses, "centers": torch.stack(centers), "gradient": gradient}


def test_loss_and_center_of_two_workers_equal_the_original(golden, tmp_path: Path) -> None:
    values = golden("dino_loss")
    results = in_processes(2, tmp_path, partial(loss_of_this_worker, values=values))
    for rank, result in enumerate(results):
        np.testing.assert_allclose(result["losses"], values["rank_loss"][:, rank], rtol=1e-6)
        np.testing.assert_allclose(result["centers"].numpy(), values["rank_center"][:, 0], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(results[0]["gradient"].numpy(), values["rank0_grad_step0"], rtol=1e-5, atol=1e-9)


def test_no_opinion_costs_ln_k_and_gradients_sum_to_zero() -> None:
    k = 11
    student, teacher = torch.zeros(20, k, dtype=torch.float64), torch.randn(8, k, dtype=torch.float64)
    method, views = of_scores(student, teacher, 2, 4)
    assert method(views, progress()).loss.item() == pytest.approx(math.log(k), abs=1e-12) and method.chance_loss() == (math.log(k), "ln K")
    student = torch.randn(20, k, dtype=torch.float64, requires_grad=True)
    method, views = of_scores(student, teacher, 2, 4)
    method(views, progress()).loss.backward()
    torch.testing.assert_close(student.grad.sum(dim=1), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-14)
    assert all(float(crop.abs().sum()) > 0 for crop in student.grad.chunk(5))


def test_rows_are_crop_major() -> None:
    """The same permutation of the images of every crop changes nothing; of one crop's alone, it changes the loss."""
    method, views = dino(), images(0)
    loss = method(views, progress()).loss.item()
    order = torch.tensor([2, 0, 3, 1])
    assert method(rows_of(views, order), progress()).loss.item() == pytest.approx(loss, abs=1e-12)
    first, *others = views.stacks["local"].chunk(3)
    views.stacks["local"] = torch.cat([first[order], *others])
    assert abs(method(views, progress()).loss.item() - loss) > 1e-3


def test_every_group_but_local_is_of_global_crops() -> None:
    method, views = dino(), images(0)
    loss = method(views, progress()).loss
    a, b = views.stacks["global"].chunk(2)
    stacks = {"global": a, "global_solarized": b, "local": views.stacks["local"]}
    counts = {"global": 1, "global_solarized": 1, "local": 3}
    split = Views(stacks=stacks, counts=counts, image_ids=views.image_ids, labels=views.labels)
    assert torch.equal(method(split, progress()).loss, loss)
    first = {"local": views.stacks["local"], "global": views.stacks["global"]}  # the order of the groups is free
    turned = Views(stacks=first, counts=views.counts, image_ids=views.image_ids, labels=views.labels)
    torch.testing.assert_close(method(turned, progress()).loss, loss, **EXACT)
    alone = Views(stacks={"global": a}, counts={"global": 1}, image_ids=views.image_ids, labels=views.labels)
    with pytest.raises(ConfigError, match=r"views: 1 crop, 1 of them global; use 2 or more"):
        method(alone, progress())


# ---------------------------------------------------------------------------- targets


def test_targets_see_the_centre_of_the_step_before() -> None:
    method, views = dino(momentum=1.0), images(0)
    first = method(views, progress())
    assert not method.center.value.any()  # the step itself moves nothing
    method.after_step([first.outputs], progress())
    t = method.teacher(views.stacks["global"])
    torch.testing.assert_close(method.center.value, 0.1 * t.mean(0), **EXACT)
    assert method(views, progress()).loss.item() != pytest.approx(first.loss.item(), abs=1e-6)
    want = torch.softmax((t - method.center.value) / 0.04, dim=1)
    torch.testing.assert_close(method.targets(t, progress()), want, **EXACT)


def test_targets_of_many_rows_are_made_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("methods.parts.centering.rows_at_once", lambda x: 3)
    center, t = Center(6).double(), torch.randn(10, 6, dtype=torch.float64)
    center.value.normal_()
    torch.testing.assert_close(center.targets(t, 0.05), torch.softmax((t - center.value) / 0.05, dim=1), **EXACT)
    assert center.float().targets(t.bfloat16(), 0.05).dtype == torch.float32


def test_sinkhorn_teacher_equals_the_algorithm_box_and_keeps_no_centre() -> None:
    method, views = dino(teacher_targets="sinkhorn", momentum=1.0, teacher_temperature=0.05), images(0)
    t = method.teacher(views.stacks["global"])
    out = method(views, progress())
    np.testing.assert_allclose(method.targets(t, progress()).numpy(), literal_sinkhorn(t.numpy(), 0.05, 3), atol=1e-9)
    q = torch.from_numpy(literal_sinkhorn(t.numpy(), 0.05, 3)).chunk(2)
    p = [torch.log_softmax(method.head(method.backbone(x)) / 0.1, dim=1) for x in views.crops]
    pairs = [(g, v) for g in range(2) for v in range(5) if v != g]
    want = sum(-(q[g] * p[v]).sum(1).mean() for g, v in pairs) / 8
    torch.testing.assert_close(out.loss, want, rtol=0, atol=1e-9)
    method.after_step([out.outputs], progress())
    assert method.center is None and not any("center" in name for name in [*method.state_dict(), *out.metrics])
    torch.testing.assert_close(method.cluster_scores(views.crops[0]), method.teacher(views.crops[0]))


def test_sinkhorn_targets_equal_those_of_the_original_dinov2(golden) -> None:
    values = golden("dinov2_losses")
    method = dino(teacher_targets="sinkhorn", teacher_temperature=float(values["teacher_temp"]))
    got = method.targets(torch.from_numpy(values["teacher"][0]).double(), progress())
    np.testing.assert_allclose(got.numpy(), values["dino_sk"], atol=2e-6)  # the original works in float32


def test_settings_decide_whether_micro_batches_are_exact() -> None:
    assert dino().accumulation == "exact" and dino(teacher_targets="sinkhorn").accumulation == "refuse"
    halves = override(load_recipe("dino-small"), {"train.accumulation_steps": 2, "method.teacher_targets": "centering"})
    assert build_method(halves, FACTS).accumulation == "exact"
    with pytest.raises(ConfigError, match=r"accumulation_steps=2: dino needs the whole batch at once; use 1 \(method.teacher_targets=cent"):
        build_method(override(halves, {"method.teacher_targets": "sinkhorn"}), FACTS)


def test_paper_settings() -> None:
    """Rates at the recipes' batches, decay, clipping and crops."""
    for name, lr, batch, crops, clip in (
        ("dino-vits16", 1e-3, 512, 10, 3.0),
        ("dino-vitb16", 2e-3, 1024, 12, 0.3),
        ("dino-resnet50", 0.06, 512, 10, 3.0),
    ):
        config = load_recipe(name)
        numbers = resolve(config, 1_281_167)
        assert numbers.lr == pytest.approx(lr) and numbers.final_lr == pytest.approx(1e-6)
        assert numbers.weight_decays == (None if name == "dino-resnet50" else (0.04, 0.4))
        assert (config.train.global_batch_size, config.optim.clip_norm, config.optim.clip_scope) == (batch, clip, "tensor")
        assert sum(group.count for group in config.views.values()) == crops
        assert (config.method.num_prototypes, config.method.temperature, config.method.momentum) == (65536, 0.1, 0.996)
    assert load_recipe("dino-resnet50").optim.weight_decay == 1e-4


# ---------------------------------------------------------------------------- schedules


def test_schedules_equal_the_original(golden) -> None:
    values = golden("vit_schedules")
    epoch, total = 1251, 125100
    for step, lr, wd, m in zip(*(values[f"dino_{name}"] for name in ("steps", "lr", "wd", "momentum")), strict=True):
        step = int(step)
        settings = {"total_steps": total, "warmup_steps": 10 * epoch, "start": 0.0, "base": 0.002, "final": 1e-6}
        assert warmup_cosine(step, **settings) == pytest.approx(lr, rel=1e-9, abs=1e-15)
        assert cosine(step, total, 0.04, 0.4) == pytest.approx(wd, rel=1e-9)
        method = dino()
        at = Progress(step=step, total_steps=total, steps_per_epoch=epoch)
        assert method.momentum(at) == pytest.approx(m, rel=1e-12)
    for e, tau in enumerate(values["dino_teacher_temp_per_epoch"]):
        method = dino(teacher_temperature=0.07, warmup_teacher_temperature=0.04, warmup_teacher_temperature_epochs=30)
        for step in (e * epoch, (e + 1) * epoch - 1):
            at = Progress(step=step, total_steps=total, steps_per_epoch=epoch)
            assert method.teacher_temperature(at) == pytest.approx(tau, rel=1e-12)
    tiny = {"total_steps": 20, "warmup_steps": 8, "start": 0.0, "base": 1.0, "final": 0.1}
    np.testing.assert_allclose([warmup_cosine(i, **tiny) for i in range(20)], values["tiny_lr"], atol=1e-12)
    np.testing.assert_allclose([cosine(i, 20, 0.04, 0.4) for i in range(20)], values["tiny_wd"], atol=1e-12)


def test_shape_of_the_schedules() -> None:
    """The first rate is 0, the base comes twice; decay and momentum rise, and momentum stays below 1."""
    method = dino()
    lr = [warmup_cosine(i, total_steps=12, warmup_steps=4, start=0.0, base=1.0, final=0.0) for i in range(12)]
    assert lr[0] == 0 and lr[3] == lr[4] == 1 and lr[-1] > 0
    momenta = [method.momentum(progress(i)) for i in range(TOTAL)]
    assert momenta == sorted(momenta) and momenta[0] == 0.996 and momenta[-1] < 1
    assert [linear_by_epoch(e, epochs=0, start=0.04, end=0.07) for e in (0, 1)] == [0.07, 0.07]
    assert [linear_by_epoch(e, epochs=1, start=0.04, end=0.07) for e in (0, 1)] == [0.04, 0.07]


# ---------------------------------------------------------------------------- several steps


def plan(base: float = 0.02) -> Resolved:
    settings = {"lr": base, "start_lr": 0.0, "final_lr": 1e-3, "warmup_steps": 3, "weight_decays": (0.04, 0.4)}
    return Resolved(facts=FACTS, chunk=1, window=1, checkpoint_every=1, knn_every=1, **settings)


def fresh_optimizer(method: DINO) -> torch.optim.Optimizer:
    return build_optimizer(OptimConfig(name="adamw", base_lr=0.02, weight_decay=0.04, final_weight_decay=0.4), method.param_groups())


def advance(method: DINO, optimizer: torch.optim.Optimizer, parts: list[Views], step: int, clip: float = 0.3) -> float:
    """One optimizer step as the loop makes it."""
    at, outputs = progress(step), []
    method.before_step(at)
    for part in parts:
        out = method(part, at)
        (out.loss / len(parts)).backward()
        outputs.append(out)
    average_gradients(method.parameters())
    prepare_step(optimizer, plan(), step, clip, "tensor")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    method.after_step([out.outputs for out in outputs], at)
    return sum(out.loss.item() for out in outputs) / len(parts)


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
        synchronized(method)
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
    views = Views(stacks=stacks, counts={"global": 2, "local": 3}, image_ids=ids, labels=ids)
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


# ---------------------------------------------------------------------------- meters, advice


def test_meters_tell_both_kinds_of_collapse() -> None:
    k, batch = 16, 64
    spread = 0.5 * torch.eye(k, dtype=torch.float64).repeat(2 * batch // k, 1)  # each image has a prototype of its own
    one = torch.zeros(2 * batch, k, dtype=torch.float64)
    one[:, 3] = 0.5
    uniform = torch.zeros(2 * batch, k, dtype=torch.float64)
    student = torch.zeros(2 * batch, k, dtype=torch.float64)
    meters = []
    for teacher in (spread, one, uniform):
        method, views = of_scores(student, teacher, 2, batch)
        meters.append({name: float(value) for name, value in method(views, progress()).metrics.items()})
    own, mean, used = ([m[name] for m in meters] for name in ("teacher_entropy", "teacher_mean_entropy", "prototypes_used"))
    assert own == pytest.approx([0, 0, 1], abs=1e-3) and mean == pytest.approx([1, 0, 1], abs=1e-3)
    assert used == [1.0, 1 / k, 1 / k]
    assert [m["kl"] for m in meters] == pytest.approx([math.log(k)] * 2 + [0], abs=1e-3)
    assert meters[1]["embedding_std"] < 1e-6 < 0.5 < meters[0]["embedding_std"]


def test_cluster_scores_are_the_teachers() -> None:
    method, views = dino(), images(0)
    method.center.value.normal_()
    images_ = views.crops[0]
    torch.testing.assert_close(method.cluster_scores(images_), method.teacher(images_) - method.center.value, **EXACT)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_temperature": 0.1}, "not below method.temperature"),
        ({"momentum": 0.996}, "the teacher hardly moves; use 0.9 or less"),
        ({"teacher_targets": "sinkhorn", "num_prototypes": 16}, "too few; use centering, method.num_prototypes=8"),
        ({"num_prototypes": 5000}, "for 1000 images; use 250 or fewer"),
        ({"freeze_prototypes_epochs": 99.0}, "never learn"),
    ],
)
def test_advice(settings: dict[str, Any], words: str) -> None:
    facts = RunFacts(global_batch_size=4, steps_per_epoch=EPOCH, total_steps=TOTAL, num_images=1000)
    assert any(words in sentence for sentence in dino(facts=facts, **settings).advice(facts))
    assert list(dino(facts=facts, momentum=0.7).advice(facts)) == []


@pytest.mark.parametrize(
    "settings", [{"teacher_temperature": 0.0}, {"momentum": 1.5}, {"num_prototypes": 1}, {"freeze_prototypes_epochs": -1.0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    (key,) = settings
    with pytest.raises(ConfigError, match=f"method.{key}="):
        DINOConfig(**settings)
