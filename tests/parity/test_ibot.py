"""iBOT against the original's values, a literal float64 transcription over several steps, and two workers against one."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.ibot import IBOTConfig
from methods.parts.distributed import average_gradients
from methods.parts.errors import ConfigError
from methods.parts.patch_masks import masked_patches, unpack
from methods.parts.views import Views
from pipeline.config import OptimConfig
from pipeline.train.optim import build_optimizer
from tests.parity.common import EXACT, in_processes
from tests.parity.ibot_cases import EPOCH, ROLES, SMALL, TOTAL, assert_equal_steps, crops, given, ibot, progress, rows_of, vit

# ---------------------------------------------------------------------------- the original's values


def of_values(values: dict[str, np.ndarray], call: int, images: slice, dtype: torch.dtype) -> tuple[Any, Views, list[Tensor], list[Tensor]]:
    """The method, crops, masks and the student's scores of some images of one call."""

    def rows(name: str) -> Tensor:
        x = torch.from_numpy(values[name][call]).to(dtype)
        return torch.cat([crop[images] for crop in x.split(4)])

    masked = torch.cat([crop[images] for crop in torch.from_numpy(values["masks"][call])]).flatten(1)
    student = [rows(name).requires_grad_() for name in ("student_cls", "student_patch", "student_local_cls")]
    settings = {
        "num_prototypes": 48, "shared_head": False, "num_patch_prototypes": 40, "patch_weight": float(values["lambda2"]),
        "teacher_temperature": float(values["teacher_temp"][call]), "warmup_teacher_temperature_epochs": 0,
        "patch_teacher_temperature": float(values["teacher_patch_temp"][call]),
    }  # fmt: skip
    method = given(ibot(**settings).to(dtype), tuple(student), (rows("teacher_cls"), rows("teacher_patch")))
    batch = len(masked) // 2
    stacks = {"global": torch.zeros(2 * batch, 3, 16, 16, dtype=dtype), "local": torch.ones(4 * batch, 3, 8, 8, dtype=dtype)}
    views = Views(stacks=stacks, counts={"global": 2, "local": 4}, image_ids=torch.arange(batch), labels=torch.arange(batch), roles=ROLES)
    return method, views, masked_patches(masked, masked.numel(), torch.device("cpu")), student


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_three_steps_of_the_loss_equal_the_original(golden, dtype: torch.dtype, tolerance: float) -> None:
    """Both losses, gradients of the scores, and both centres, which each step leaves for the next."""
    values = golden("ibot_loss")
    center, patch_center = torch.zeros(48, dtype=dtype), torch.zeros(40, dtype=dtype)
    for call in range(3):
        method, views, masks, student = of_values(values, call, slice(None), dtype)
        np.testing.assert_allclose(center.numpy(), values["center_cls"][call].squeeze(), rtol=tolerance, atol=1e-7)
        np.testing.assert_allclose(patch_center.numpy(), values["center_patch"][call].squeeze(), rtol=tolerance, atol=1e-7)
        method.center.value.copy_(center)
        method.patch_center.value.copy_(patch_center)
        out = method(views, progress(), masks)
        out.loss.backward()
        np.testing.assert_allclose(out.loss.item(), values["loss"][call], rtol=tolerance)
        np.testing.assert_allclose(out.metrics["cls_loss"].item(), values["loss_cls"][call], rtol=tolerance)
        np.testing.assert_allclose(0.7 * out.metrics["patch_loss"].item(), values["loss_patch"][call], rtol=tolerance)
        for scores, name in zip(student, ("grad_student_cls", "grad_student_patch", "grad_student_local"), strict=True):
            largest = np.abs(values[name][call]).max()
            np.testing.assert_allclose(scores.grad.numpy(), values[name][call], atol=max(tolerance, 1e-5) * largest)
        method.center.update([out.outputs["mean"]])
        method.patch_center.update([out.outputs["patch_mean"]])
        center, patch_center = method.center.value, method.patch_center.value


def losses_of_this_worker(rank: int, world: int, values: dict[str, np.ndarray]) -> list[float]:
    losses, centers = [], [torch.zeros(48, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)]
    for call in range(3):
        method, views, masks, _ = of_values(values, call, slice(2 * rank, 2 * rank + 2), torch.float64)
        for center, value in zip((method.center, method.patch_center), centers, strict=True):
            center.value.copy_(value)
        out = method(views, progress(), masks)
        method.center.update([out.outputs["mean"]])
        method.patch_center.update([out.outputs["patch_mean"]])
        centers = [method.center.value, method.patch_center.value]
        losses.append(out.loss.item())
    return losses


def test_losses_of_two_workers_equal_the_original(golden, tmp_path: Path) -> None:
    values = golden("ibot_loss")
    results = in_processes(2, tmp_path, partial(losses_of_this_worker, values=values))
    np.testing.assert_allclose(np.transpose(results), values["rank_loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("paper", {}),
        ("fixed30", {"mask_spread": 0.0, "mask_probability": 1.0}),
        ("rand", {"mask_shape": "random", "mask_ratio": 0.7, "mask_spread": 0.05}),
    ],
)
def test_masks_are_distributed_as_the_originals(golden, name: str, settings: dict[str, Any]) -> None:
    """4,000 masks of 14 x 14 patches: how many patches, how often none, where they lie."""
    values, method = golden("vit_masks"), ibot(**settings)
    drawn = unpack([method.draw_mask(Random(f"{name} {i}"), 14, 14) for i in range(4000)], 196).numpy()
    count, want = drawn.sum(1), values[f"ibot_{name}_count"].astype(int)
    assert abs(count.mean() - want.mean()) < 2.5 and abs((count == 0).mean() - (want == 0).mean()) < 0.03
    for share in (0.6, 0.75, 0.9, 1.0):
        assert abs(np.quantile(count, share) - np.quantile(want, share)) <= 4
    np.testing.assert_allclose(drawn.reshape(-1, 14, 14).mean(0), values[f"ibot_{name}_occupancy"], atol=0.045)


# ---------------------------------------------------------------------------- the equations


def literal_head(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Scores of one token, `(D,) -> (K,)`."""
    for layer in (0, 2):
        a = w[f"{name}.mlp.{layer}.weight"] @ x + w[f"{name}.mlp.{layer}.bias"]
        x = a * (1 + torch.erf(a / math.sqrt(2))) / 2
    z = w[f"{name}.mlp.4.weight"] @ x + w[f"{name}.mlp.4.bias"]
    v = w[f"{name}.prototypes.directions"]
    return w[f"{name}.prototypes.lengths"][:, 0] * (v @ (z / z.norm())) / (v**2).sum(1).sqrt()


def literal_loss(method: Any, views: Views, masked: Tensor, tau: float, tau2: float, c: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
    """The loss, and the mean scores that move the two centres, crop by crop, image by image, patch by patch."""
    theta, xi = dict(method.student().named_parameters()), dict(method.teacher.named_parameters())
    patch = "patch_head" if "patch_head.prototypes.lengths" in theta else "head"
    b, crops_ = len(views.image_ids), views.crops

    def h(p: Tensor, q: Tensor) -> Tensor:
        return -(q * torch.log_softmax(p / 0.1, 0)).sum()

    teacher = method.teacher.get_submodule("backbone")
    student: dict[tuple[int, int], Any] = {}
    taught: dict[tuple[int, int], Any] = {}
    for v, crop in enumerate(crops_):
        for i in range(b):
            image = crop[i : i + 1]
            if v < 2:
                mask = masked[v * b + i : v * b + i + 1]
                tokens = method.backbone.tokens(image, masked=mask, mask_token=method.mask_token)
                whole = teacher.tokens(image)
                student[v, i] = literal_head(theta, "head", tokens.cls[0]), [literal_head(theta, patch, x) for x in tokens.patches[0]]
                taught[v, i] = literal_head(xi, "head", whole.cls[0]), [literal_head(xi, patch, x) for x in whole.patches[0]]
            else:
                student[v, i] = (literal_head(theta, "head", method.backbone(image)[0]), None)
    cls = [
        h(student[v, i][0], torch.softmax((taught[g, i][0] - c) / tau, 0)).mean()
        for g in range(2) for v in range(len(crops_)) if v != g for i in range(b)
    ]  # fmt: skip
    patches = []
    for g in range(2):
        for i in range(b):
            hidden = [n for n in range(16) if masked[g * b + i, n]]
            terms = [h(student[g, i][1][n], torch.softmax((taught[g, i][1][n] - c2) / tau2, 0)) for n in hidden]
            patches.append(sum(terms, torch.zeros((), dtype=torch.float64)) / max(1, len(hidden)))
    means = [torch.stack([taught[g, i][0] for g in range(2) for i in range(b)]).mean(0)]
    means.append(torch.stack([t for g in range(2) for i in range(b) for t in taught[g, i][1]]).mean(0))
    return sum(cls) / len(cls) + method.config.patch_weight * sum(patches) / len(patches), *(m.detach() for m in means)


@pytest.mark.parametrize("shared", [True, False])
def test_steps_equal_the_equations(shared: bool) -> None:
    """Five steps: losses, gradients, the teacher and both centres; masks begin in the second epoch, tau_t2 rises from there."""
    settings: dict[str, Any] = {"shared_head": shared, "teacher_temperature": 0.07, "warmup_teacher_temperature_epochs": 2, "momentum": 0.9}
    if not shared:
        settings |= {"num_patch_prototypes": 5, "patch_projection_dim": 3}
    method = ibot(mask_probability=0.7, mask_start_epoch=1, patch_weight=0.6, freeze_prototypes_epochs=0, **settings)
    optimizer = build_optimizer(OptimConfig(name="adamw", base_lr=0.01, weight_decay=0.1), method.param_groups())
    c, c2 = torch.zeros(7, dtype=torch.float64), torch.zeros(7 if shared else 5, dtype=torch.float64)
    some_masked = 0
    for step in range(7):
        views, masks = crops(step, batch=2), None
        masks = method.draw_masks(views, progress(step))
        assert masks[0].any() or step < EPOCH or step > EPOCH
        assert not masks[0].any() or step >= EPOCH
        some_masked += int(masks[0].any())
        tau = 0.04 if step < EPOCH else 0.07
        tau2 = 0.04 if step < 2 * EPOCH else 0.07
        want, mean, mean2 = literal_loss(method, views, masks[0], tau, tau2, c, c2)
        out = method(views, progress(step), masks)
        assert_equal_steps(method, want, out.loss)
        optimizer.step()
        optimizer.zero_grad()
        before = {name: p.clone() for name, p in method.teacher.named_parameters()}
        method.after_step([out.outputs], progress(step))
        m = 1 - 0.1 * (math.cos(math.pi * step / TOTAL) + 1) / 2
        for name, p in method.student().named_parameters():
            torch.testing.assert_close(method.teacher.get_parameter(name), m * before[name] + (1 - m) * p.detach(), **EXACT)
        c, c2 = 0.9 * c + 0.1 * mean, 0.9 * c2 + 0.1 * mean2
        torch.testing.assert_close(method.center.value, c, **EXACT)
        torch.testing.assert_close(method.patch_center.value, c2, **EXACT)
    assert some_masked >= 3


def trained(rank: int, world: int, settings: dict[str, Any]) -> dict[str, Any]:
    method = ibot(**settings)
    optimizer = build_optimizer(OptimConfig(name="adamw", base_lr=0.02, weight_decay=0.04, final_weight_decay=0.4), method.param_groups())
    per = 4 // world
    losses = []
    for step in range(4):
        views = rows_of(crops(step), slice(per * rank, per * (rank + 1)))
        at = progress(step)
        out = method(views, at)
        out.loss.backward()
        average_gradients(method.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step([out.outputs], at)
        losses.append(out.loss.item())
    return {"losses": losses, "state": method.state_dict()}


@pytest.mark.parametrize("settings", [{}, {"shared_head": False}, {"teacher_targets": "sinkhorn"}])
def test_two_processes_equal_one(settings: dict[str, Any], tmp_path: Path) -> None:
    """Losses, both networks and the centres; the masks follow the images."""
    alone = trained(0, 1, settings)
    results = in_processes(2, tmp_path, partial(trained, settings=settings))
    np.testing.assert_allclose(np.mean([r["losses"] for r in results], axis=0), alone["losses"], rtol=1e-9)
    assert results[0]["losses"] != results[1]["losses"]
    for name, value in alone["state"].items():
        for r in results:
            np.testing.assert_allclose(r["state"][name].numpy(), value.numpy(), rtol=1e-7, atol=1e-9, err_msg=name)


# ---------------------------------------------------------------------------- invariants


def test_without_masks_only_cls_counts() -> None:
    method, views = ibot(), crops()
    masks = masked_patches(torch.zeros(8, 16, dtype=torch.bool), 20, torch.device("cpu"))
    out = method(views, progress(), masks)
    assert out.metrics["patch_loss"].item() == 0 and out.loss.item() == pytest.approx(out.metrics["cls_loss"].item())
    balanced = ibot(teacher_targets="sinkhorn")(views, progress(), masks)
    assert math.isfinite(balanced.loss.item()) and balanced.metrics["patch_loss"].item() == 0


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
@pytest.mark.parametrize("unit", [True, False])
def test_places_that_fill_up_and_the_order_of_patches_change_nothing(targets: str, unit: bool) -> None:
    views = crops()
    results = []
    for more, order in ((0, slice(None)), (9, slice(None)), (5, torch.randperm(40, generator=torch.Generator().manual_seed(0)))):
        method = ibot(teacher_targets=targets, unit_prototypes=unit)
        masked = torch.zeros(8, 16, dtype=torch.bool)
        masked[0, :10] = masked[3, 3:13] = masked[6, :5] = masked[7, :15] = True
        masks = masked_patches(masked, 40 + more, torch.device("cpu"))
        masks[1:] = [torch.cat([x[:40][order], x[40:]]) for x in masks[1:]]
        out = method(views, progress(), masks)
        out.loss.backward()
        results.append((out.loss, [p.grad for p in method.parameters() if p.requires_grad]))
    for loss, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0], **EXACT)
        for ours, other in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(ours, other, **EXACT)


def test_the_student_does_not_see_what_is_masked() -> None:
    """A masked patch's pixels reach the loss through the teacher only."""
    method, views = ibot(momentum=1.0), crops(small=0)
    masks = method.draw_masks(views, progress(3))
    masked = masks[0]
    assert masked.any()
    hidden = masked.view(8, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    images = views.stacks["global"].clone()
    seen = method.backbone.tokens(images, masked=masked, mask_token=method.mask_token).cls
    other = torch.where(hidden, torch.randn_like(images), images)
    torch.testing.assert_close(method.backbone.tokens(other, masked=masked, mask_token=method.mask_token).cls, seen, **EXACT)
    assert not torch.allclose(method.backbone(other), method.backbone(images))


def test_the_norms_of_patches_are_those_before_the_final_norm() -> None:
    method, views = ibot(), crops(batch=2)
    teacher = method.evaluation_backbone()
    with torch.no_grad():
        teacher.pos_embed[:, 6] += 30  # one place stands out
        tokens = teacher.through_blocks(teacher.embed(views.stacks["global"]))[:, 1:]
    norms = [sorted(patch.norm().item() for patch in crop) for crop in tokens]
    want = sum(crop[-1] / crop[7] for crop in norms) / 4  # torch's median of 16 is the lower one
    found = method(views, progress()).metrics["patch_norm_ratio"].item()
    assert found == pytest.approx(want, rel=1e-9) and found > 4


def test_masks_follow_the_image() -> None:
    method, views = ibot(), crops(batch=8)
    whole = method.draw_masks(views, progress(5))[0].unflatten(0, (2, 8))
    part = method.draw_masks(rows_of(views, slice(2, 5)), progress(5))[0].unflatten(0, (2, 3))
    assert torch.equal(part, whole[:, 2:5])
    assert not torch.equal(method.draw_masks(views, progress(6))[0], whole.flatten(0, 1))
    many = torch.cat([method.draw_masks(views, progress(5, seed))[0] for seed in range(40)])
    assert 0.4 < (many.sum(1) > 0).double().mean() < 0.6
    assert many.sum(1).max() <= 8, "0.5 of 16"


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.num_patch_prototypes=5: leave it out, or use method\.shared_head=False"):
        IBOTConfig(**SMALL, num_patch_prototypes=5)
    with pytest.raises(ConfigError, match=r"method\.projector_batch_norm=True: use False"):
        IBOTConfig(**SMALL, projector_batch_norm=True)
    with pytest.raises(ConfigError, match=r"method\.mask_spread=0\.4: use 0 to 0\.3"):
        IBOTConfig(**SMALL, mask_spread=0.4)
    views = crops()
    views.stacks["other"], views.counts = torch.zeros(4, 3, 8, 8, dtype=torch.float64), {**views.counts, "other": 1}
    with pytest.raises(ConfigError, match="global crops of 2 sizes"):
        ibot().draw_masks(views, progress())


def test_groups_and_state() -> None:
    method = ibot(shared_head=False)
    held = [p for group in method.param_groups() for p in group.params]
    assert {id(p) for p in held} == {id(p) for p in method.parameters() if p.requires_grad} and len({*map(id, held)}) == len(held)
    (of_token,) = [group for group in method.param_groups() if any(p is method.mask_token for p in group.params)]
    assert of_token.decay
    assert {"center.value", "patch_center.value", "mask_token", "teacher.patch_head.prototypes.directions"} <= set(method.state_dict())
    assert not any(name.endswith("mask_token") for name in vit().state_dict())
