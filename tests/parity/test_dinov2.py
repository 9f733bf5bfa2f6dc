"""DINOv2 against the original's values, a literal float64 transcription, and two workers against one; its regularisers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.dinov2 import DINOv2, DINOv2Config, released_blur
from methods.parts.centering import Center
from methods.parts.contract import RunFacts
from methods.parts.distributed import average_gradients, world_size
from methods.parts.losses import gram_loss, koleo, sigreg
from methods.parts.patch_masks import masked_patches
from methods.parts.soft_targets import cross_entropy_sum
from methods.parts.views import Views
from pipeline.build import prepare
from pipeline.config import OptimConfig, from_yaml, override, to_yaml
from pipeline.recipes import load_recipe
from pipeline.train.optim import build_optimizer, prepare_step
from tests.parity.common import EXACT, in_processes
from tests.parity.dino_cases import plan
from tests.parity.ibot_cases import FACTS, ROLES, assert_equal_steps, crops, dinov2, given, progress, rows_of, vit
from tests.parity.test_ibot import literal_loss

# ---------------------------------------------------------------------------- the original's values


def of_values(values: dict[str, np.ndarray], step: int, **settings: Any) -> tuple[Any, Views, list[Tensor], dict[str, Tensor]]:
    """The method whose teacher gives the values' scores, crops, masks, and the student's scores.

    The original's values have masked patches only; they are put where the masks are.
    """
    masked = torch.from_numpy(values["masks"])
    masks = masked_patches(masked, 20, torch.device("cpu"))
    np.testing.assert_allclose(masks[2][:12].numpy(), values["mask_weight"], rtol=1e-6)

    def whole(x: Tensor) -> Tensor:
        out = torch.zeros(12, 16, 36, dtype=torch.float64)
        out[masked] = x
        return out

    student = {name: torch.from_numpy(values[name]).double().requires_grad_() for name in ("student_global", "student_local")}
    student["patch"] = torch.from_numpy(values["student_patch_masked"]).double().requires_grad_()
    settings = {"num_prototypes": 40, "shared_head": False, "num_patch_prototypes": 36, "koleo_weight": 0.0, **settings}
    temperature = float(values["teacher_temp"])
    method = dinov2(teacher_temperature=temperature, warmup_teacher_temperature_epochs=0, **settings)
    teacher = torch.from_numpy(values["teacher"][step]).double(), whole(torch.from_numpy(values["teacher_patch_masked"][step]).double())
    method = given(method, (student["student_global"], whole(student["patch"]), student["student_local"]), teacher)
    stacks = {"global": torch.zeros(12, 3, 16, 16, dtype=torch.float64), "local": torch.ones(24, 3, 8, 8, dtype=torch.float64)}
    ids = torch.arange(6)
    return method, Views(stacks=stacks, counts={"global": 2, "local": 4}, image_ids=ids, labels=ids, roles=ROLES), masks, student


@pytest.mark.parametrize(("targets", "suffix", "tolerance"), [("centering", "", 1e-6), ("sinkhorn", "_sk", 1e-5)])
def test_losses_equal_the_original(golden, targets: str, suffix: str, tolerance: float) -> None:
    """CLS of local crops, and masked patches: losses and gradients; with centres, those of the second of two steps."""
    values = golden("dinov2_losses")
    step = 1 if targets == "centering" else 0
    if targets == "centering":
        first, views, masks, _ = of_values(values, 0)
        out = first(views, progress(), masks)
        first.center.update([out.outputs["mean"]])
        first.patch_center.update([out.outputs["patch_mean"]])
        np.testing.assert_allclose(first.center.value.numpy(), values["dino_center_step1"][0], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(first.patch_center.value.numpy(), values["ibot_center_step1"][0, 0], rtol=1e-6, atol=1e-9)
    method, views, masks, student = of_values(values, step, teacher_targets=targets)
    if targets == "centering":
        method.center.load_state_dict(first.center.state_dict())
        method.patch_center.load_state_dict(first.patch_center.state_dict())
    out = method(views, progress(), masks)
    np.testing.assert_allclose(out.metrics["patch_loss"].item(), values[f"ibot_loss{suffix}"], rtol=tolerance)
    out.loss.backward()
    largest = np.abs(values[f"ibot_grad{suffix}"]).max()
    np.testing.assert_allclose(student["patch"].grad.numpy(), values[f"ibot_grad{suffix}"], atol=10 * tolerance * largest)
    # the original's sum over pairs of a global and a local crop, of 10 pairs in all
    local = values[f"dino_local_grad{suffix}"]
    np.testing.assert_allclose(10 * student["student_local"].grad.numpy(), local, atol=10 * tolerance * np.abs(local).max())
    q = torch.from_numpy(values["dino_sk" if targets == "sinkhorn" else "dino_softmax_step1"]).double()
    np.testing.assert_allclose(method.targets(torch.from_numpy(values["teacher"][step]).double(), progress()).numpy(), q, atol=tolerance)
    a, b = q.chunk(2)
    x, y = student["student_global"].detach().chunk(2)
    pairs = cross_entropy_sum([b], x, 0.1) + cross_entropy_sum([a], y, 0.1)
    want = (float(values[f"dino_local_loss_sum{suffix}"]) + pairs.item()) / 10
    np.testing.assert_allclose(out.metrics["cls_loss"].item(), want, rtol=10 * tolerance)


def targets_of_this_worker(rank: int, world: int, values: dict[str, np.ndarray]) -> dict[str, Tensor]:
    tokens = slice(0, 7) if rank == 0 else slice(7, 12)
    own = [3 * rank + i for i in range(3)] + [6 + 3 * rank + i for i in range(3)]
    t, patches = torch.from_numpy(values["teacher"]).double()[:, own], torch.from_numpy(values["teacher_patch_masked"]).double()[:, tokens]
    settings = {"num_prototypes": 40, "shared_head": False, "num_patch_prototypes": 36, "teacher_targets": "sinkhorn"}
    method = dinov2(teacher_temperature=0.05, warmup_teacher_temperature_epochs=0, **settings)
    filled = torch.cat([patches[0], patches[0][:1].expand(9 - len(patches[0]), -1)])
    weights = torch.tensor([1.0] * len(patches[0]) + [0.0] * (9 - len(patches[0])))
    center = Center(36).double()
    center.update([patches[0].mean(dim=0)])
    assert world_size() == 2
    return {
        "dino": method.targets(t[0], progress()),
        "ibot": method.patch_targets(filled, weights, progress())[: len(patches[0])],
        "center": center.value,
    }


def test_targets_and_centres_of_two_workers_equal_the_original(golden, tmp_path: Path) -> None:
    """Masked patches are balanced over all workers, which have different numbers of them; places that fill up do not count."""
    values = golden("dinov2_losses")
    for rank, result in enumerate(in_processes(2, tmp_path, partial(targets_of_this_worker, values=values))):
        np.testing.assert_allclose(result["dino"].numpy(), values[f"rank{rank}_dino_sk"], atol=1e-6)
        np.testing.assert_allclose(result["ibot"].numpy(), values[f"rank{rank}_ibot_sk"], atol=1e-6)
        np.testing.assert_allclose(result["center"].numpy(), values[f"rank{rank}_ibot_center"][0, 0], rtol=1e-6, atol=1e-9)


def test_koleo_equals_the_original(golden) -> None:
    values = golden("dinov2_losses")
    x = torch.from_numpy(values["koleo_input"]).double().requires_grad_()
    loss = koleo(x)
    loss.backward()
    np.testing.assert_allclose(loss.item(), values["koleo_loss"], rtol=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), values["koleo_grad"], atol=1e-6 * np.abs(values["koleo_grad"]).max())


def test_masks_are_distributed_as_the_originals(golden) -> None:
    """Means and quantiles of the masked patches of a crop, where they lie, how many crops have masks, and the most there can be."""
    values = golden("vit_masks")
    facts = RunFacts(global_batch_size=8, steps_per_epoch=10, total_steps=100)
    for images, patches, most, masked_crops in values["collate_cases"]:
        side = math.isqrt(int(patches))
        method = dinov2(facts, {"image_size": 4 * side, "patch_size": 4, "depth": (1,)})
        ids = torch.arange(int(images))
        stack = torch.empty(2 * len(ids), 3, 4 * side, 4 * side)
        views = Views(stacks={"global": stack}, counts={"global": 2}, image_ids=ids, labels=ids)
        masked, index, _ = method.draw_masks(views, progress(3))
        assert len(index) == most and int((masked.sum(1) > 0).sum()) == masked_crops
        if (images, patches) == (8, 196):
            drawn = np.stack([np.sort(method.draw_masks(views, progress(step))[0].sum(1).numpy()) for step in range(400)])
            want = values["collate_sorted_counts_B16_N196"].astype(float)
            assert np.abs(drawn.mean(0) - want.mean(0)).max() < 0.5 and np.abs(drawn.std(0) - want.std(0)).max() < 0.6
    method = dinov2(facts, {"image_size": 56, "patch_size": 4, "depth": (1,)})
    for target, counts in zip(values["dinov2_targets"], values["dinov2_counts"], strict=True):
        drawn = np.array([method.blocks(Random(f"{target} {i}"), 14, int(target)).bit_count() for i in range(2000)])
        assert drawn.max() <= target and abs(drawn.mean() - counts.mean()) < 0.15


# ---------------------------------------------------------------------------- the equations


def literal_koleo(h: Tensor) -> Tensor:
    x = h / h.norm(dim=1, keepdim=True)
    terms = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        nearest = max(others, key=lambda j: float((x[i] @ x[j]).detach()))
        terms.append(-torch.log((x[i] - x[nearest] + 1e-8).norm() + 1e-8))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("shared", [True, False])
def test_steps_equal_the_equations(shared: bool) -> None:
    """Losses, gradients and both centres; the centre of the patches is that of the masked ones; temperatures rise by step."""
    settings: dict[str, Any] = {"shared_head": shared, "teacher_temperature": 0.07, "warmup_teacher_temperature_epochs": 2, "momentum": 0.9}
    method = dinov2(freeze_prototypes_epochs=0, **settings)
    optimizer = build_optimizer(OptimConfig(name="adamw", base_lr=0.01, weight_decay=0.1), method.param_groups())
    c, c2 = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for step in range(4):
        views = crops(step, batch=3)
        masks = method.draw_masks(views, progress(step))
        masked = masks[0]
        tau = 0.04 + 0.03 * step / 5  # over six steps
        want, mean, _ = literal_loss(method, views, masked, tau, tau, c, c2)
        cls = method.backbone.tokens(views.stacks["global"], masked=masked, mask_token=method.mask_token).cls
        want = want + 0.1 * sum(literal_koleo(h) for h in cls.chunk(2))
        out = method(views, progress(step), masks)
        assert_equal_steps(method, want, out.loss)
        teacher = method.evaluation_backbone()
        scores = method.patch_teacher()(teacher.tokens(views.stacks["global"]).patches[masked])
        optimizer.step()
        optimizer.zero_grad()
        method.after_step([out.outputs], progress(step))
        c, c2 = 0.9 * c + 0.1 * mean, 0.9 * c2 + 0.1 * scores.detach().mean(0)
        torch.testing.assert_close(method.center.value, c, **EXACT)
        torch.testing.assert_close(method.patch_center.value, c2, **EXACT)


def trained(rank: int, world: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A few steps with the same masks on any number of workers, each of which has as many masked patches."""
    method = dinov2(**settings)
    optimizer = build_optimizer(OptimConfig(name="adamw", base_lr=0.02, weight_decay=0.04, final_weight_decay=0.4), method.param_groups())
    per, losses = 4 // world, []
    own = slice(per * rank, per * (rank + 1))
    for step in range(4):
        masked = torch.zeros(2, 4, 16, dtype=torch.bool)
        masked[0, 0, :5] = masked[1, 1, 4:7] = masked[1, 2, 8:12] = masked[0, 3, 1:5] = True
        masks = masked_patches(masked[:, own].flatten(0, 1), 20, torch.device("cpu"))
        method.before_step(progress(step))
        out = method(rows_of(crops(step), own), progress(step), masks)
        out.loss.backward()
        average_gradients(method.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step([out.outputs], progress(step))
        losses.append(out.loss.item())
    return {"losses": losses, "state": method.state_dict()}


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
def test_two_processes_equal_one(targets: str, tmp_path: Path) -> None:
    """Without KoLeo, whose neighbours are those of a worker; with Gram anchoring."""
    settings = {"koleo_weight": 0.0, "teacher_targets": targets, "shared_head": targets == "centering", "gram_weight": 1.0}
    alone = trained(0, 1, settings)
    results = in_processes(2, tmp_path, partial(trained, settings=settings))
    np.testing.assert_allclose(np.mean([r["losses"] for r in results], axis=0), alone["losses"], rtol=1e-9)
    for name, value in alone["state"].items():
        for r in results:
            np.testing.assert_allclose(r["state"][name].numpy(), value.numpy(), rtol=1e-7, atol=1e-9, err_msg=name)


# ---------------------------------------------------------------------------- regularisers


def test_koleo_of_known_rows() -> None:
    assert koleo(torch.eye(5, dtype=torch.float64)).item() == pytest.approx(-math.log(math.sqrt(2)), abs=1e-7)
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(koleo(3 * x), koleo(x))
    one = torch.randn(1, 4, requires_grad=True)
    koleo(one).backward()
    assert koleo(one).item() == 0 and not one.grad.any()


def test_duplicates_leave_the_other_rows_their_gradient() -> None:
    x = torch.randn(6, 4)
    x[3] = x[1]
    alike = x.clone().requires_grad_()
    koleo(alike).backward()
    assert torch.isfinite(alike.grad).all() and alike.grad.norm() < 10
    assert not alike.grad[1].any() or alike.grad[1].norm() < 10
    assert all(row.norm() > 1e-3 for row in alike.grad[[0, 2, 4, 5]])
    assert torch.isfinite(koleo(x.half().float().bfloat16()))


def statistic(s: np.ndarray) -> float:
    """Epps and Pulley's, with 17 points from -5 to 5."""
    t = np.linspace(-5, 5, 17)
    phi = np.exp(1j * np.outer(t, s)).mean(1)
    return float(len(s) * np.trapezoid(np.abs(phi - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2), t))


def test_sigreg_is_the_mean_statistic_along_random_directions() -> None:
    z = torch.randn(50, 6, dtype=torch.float64) * 1.3 + 0.2
    seed = torch.Generator().manual_seed(3)
    got = sigreg(z, torch.Generator().manual_seed(3), directions=9).item()
    draw = torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=seed)))
    a = torch.randn(6, 9, generator=draw, dtype=torch.float64)
    want = np.mean([statistic((z @ (column / column.norm())).numpy()) for column in a.T])
    assert got == pytest.approx(want, rel=1e-10)


def test_sigreg_tells_collapse_from_a_normal_cloud() -> None:
    normal, ones = torch.randn(512, 8), torch.ones(512, 8) * 0.1
    assert sigreg(normal, None).item() < 3 and sigreg(ones, None).item() > 50
    z = ones.clone().add_(0.01 * torch.randn(512, 8)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        sigreg(z, torch.Generator().manual_seed(step), directions=64).backward()
        optimizer.step()
    assert 0.6 < z.std(dim=0).mean() < 1.5


def sigreg_of_this_worker(rank: int, world: int) -> tuple[Tensor, Tensor]:
    z = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).chunk(world)[rank].requires_grad_()
    loss = sigreg(z, torch.Generator().manual_seed(1), directions=7)
    loss.backward()
    return loss.detach(), z.grad / world  # as workers average


def test_sigreg_of_two_workers_is_that_of_one(tmp_path: Path) -> None:
    loss, gradient = sigreg_of_this_worker(0, 1)
    results = in_processes(2, tmp_path, sigreg_of_this_worker)
    for other, _ in results:
        torch.testing.assert_close(other, loss, **EXACT)
    torch.testing.assert_close(torch.cat([g for _, g in results]), gradient, **EXACT)


def test_gram_compares_cosines_image_by_image() -> None:
    x, y = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    loss = gram_loss(x, y)
    want = [
        (torch.cosine_similarity(x[b, i], x[b, j], dim=0) - torch.cosine_similarity(y[b, i], y[b, j], dim=0)) ** 2
        for b in range(3) for i in range(5) for j in range(5)
    ]  # fmt: skip
    torch.testing.assert_close(loss, torch.stack(want).mean())
    loss.backward()
    assert y.grad is None and x.grad.abs().sum() > 0
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert gram_loss(2 * x @ rotation, x).item() < 1e-20


# ---------------------------------------------------------------------------- settings


def test_predictions_that_tell_nothing_are_known_beside_koleo() -> None:
    method, views = dinov2(), crops()
    with torch.no_grad():
        method.head.prototypes.lengths.zero_()  # all scores of the student are 0
    found = method(views, progress()).metrics["cls_loss"].item()
    hints = method.config.hints(FACTS)
    assert hints.chance_loss is None and hints.chance_parts == {"cls_loss": (pytest.approx(found, rel=1e-9), "ln K of CLS")}
    alone = DINOv2Config(koleo_weight=0.0).hints(FACTS)
    assert alone.chance_loss is not None and not alone.chance_parts


def test_rates_fall_by_layer() -> None:
    method = dinov2(backbone={"depth": (12,), "registers": 2, "layer_scale": 1e-2, "drop_path": 0.0}, layer_decay=0.9)
    names = {id(p): name for name, p in method.named_parameters()}
    scale = {names[id(p)]: group.lr_scale for group in method.param_groups() for p in group.params}
    decays = {names[id(p)]: group.decay for group in method.param_groups() for p in group.params}
    assert set(scale) == {name for name, p in method.named_parameters() if p.requires_grad}
    for name in ("backbone.cls_token", "backbone.pos_embed", "backbone.reg_token", "mask_token"):
        assert scale[name] == pytest.approx(0.9**13) == pytest.approx(0.2542, abs=1e-4) and decays[name]
    assert scale["backbone.patch_embed.proj.weight"] == pytest.approx(0.0508, abs=1e-4)
    assert scale["backbone.blocks.0.attn.qkv.weight"] == pytest.approx(0.2824, abs=1e-4)
    assert scale["backbone.norm.weight"] == scale["head.mlp.0.weight"] == scale["head.prototypes.directions"] == 1
    assert not decays["backbone.blocks.3.ls1.gamma"] and not decays["backbone.norm.weight"] and not decays["head.mlp.0.bias"]


def test_gradients_are_clipped_by_module() -> None:
    method = dinov2(shared_head=False)
    optimizer = build_optimizer(OptimConfig(name="adamw"), method.param_groups())
    for p in method.parameters():
        p.grad = torch.full_like(p, 0.5) if p.requires_grad else None
    prepare_step(optimizer, plan(), 5, 0.25, "module")
    for network in (method.head, method.patch_head):
        assert torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in network.parameters()])).item() == pytest.approx(0.25, rel=1e-4)
    backbone = [method.mask_token, *method.backbone.parameters()]
    assert torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in backbone])).item() == pytest.approx(0.25, rel=1e-4)


def test_the_released_denominator_differs_without_local_crops_only() -> None:
    for small, ratio in ((3, 1.0), (0, 2 / 3)):
        views = crops(small=small)
        losses = []
        for how in ("pairs", "released"):
            method = dinov2(cls_denominator=how, koleo_weight=0.0, patch_weight=0.0)
            losses.append(method(views, progress(), method.draw_masks(views, progress())).loss.item())
        assert losses[1] / losses[0] == pytest.approx(ratio)


def test_released_blur_is_that_of_the_release() -> None:
    views = DINOv2.default_views()
    assert [group.blur for group in views.values()] == [1.0, 0.1, 0.5]
    assert [group.blur for group in released_blur(views).values()] == [0.0, 0.9, 0.5]
    assert DINOv2Config().num_prototypes == 65536


@pytest.mark.parametrize(
    ("images", "steps", "prototypes", "momentum"),
    [(100, 50, 64, 0.9), (2000, 240, 500, 0.9583), (100_000, 20_000, 1024, 0.996), (None, 1000, 1024, 0.99)],
)
def test_prototypes_and_momentum_follow_from_the_run_where_they_are_left_to(
    images: int | None, steps: int, prototypes: int, momentum: float
) -> None:
    facts = RunFacts(global_batch_size=64, steps_per_epoch=10, total_steps=steps, num_images=images)
    settled = DINOv2Config(num_prototypes=0, momentum=0, final_momentum=0).settled(facts)
    assert (settled.num_prototypes, settled.momentum, settled.final_momentum) == (prototypes, momentum, momentum)
    assert DINOv2Config(momentum=0).settled(facts).final_momentum == 1
    assert settled.settled(facts) == settled
    assert DINOv2Config(num_prototypes=300, momentum=0.5).settled(facts) == DINOv2Config(num_prototypes=300, momentum=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_targets": "centering"}, "a handful of prototypes; use sinkhorn"),
        ({"teacher_temperature": 0.07}, "temperature of 0.07 with a batch of 128 can make the targets uniform"),
        ({"warmup_teacher_temperature": 0.06, "warmup_teacher_temperature_epochs": 5}, "temperature of 0.06 with a batch of 128"),
        ({"num_prototypes": 10_000}, "can have its own"),
        ({"num_prototypes": 5000}, "for 4000 images"),
        ({"momentum": 0.9999}, "hardly moves"),
    ],
)
def test_the_recipe_for_own_images_warns_outside_of_its_safe_region_only(settings: dict[str, Any], words: str) -> None:
    method = load_recipe("dinov2-own-images").method
    facts = RunFacts(global_batch_size=128, steps_per_epoch=1000, total_steps=20_000, num_images=4000)
    for images, batch in ((320, 32), (2000, 64), (4000, 128), (100_000, 256)):
        run = replace(facts, num_images=images, global_batch_size=batch)
        assert method.settled(run).hints(run).warnings == ()
    warnings = replace(method, **settings).settled(facts).hints(facts).warnings
    assert any(words in sentence for sentence in warnings)


def test_a_run_is_built_with_and_keeps_what_followed_from_it() -> None:
    tiny = {
        "data.path": "patches:pixels=32,per_photo=6", "data.num_shards": 1, "train.global_batch_size": 16, "train.steps": 40,
        "backbone.depth": (1,), "backbone.width": 0.25, "backbone.image_size": 32, "method.projector_hidden": 16,
        "views.global.size": 32, "views.local.size": 16,
    }  # fmt: skip
    asked = override(load_recipe("dinov2-own-images"), tiny)
    ready = prepare(asked)
    kept = from_yaml(to_yaml(ready.config)).method
    assert (asked.method.num_prototypes, asked.method.momentum) == (0, 0)
    assert (kept.num_prototypes, kept.momentum) == (64, 0.9)
    assert next(ready.method.head.prototypes.parameters()).shape[0] == 64
    assert prepare(ready.config).config == ready.config


def test_the_loss_grows_by_the_weight_of_sigreg() -> None:
    views = crops()
    plain, weighted = dinov2(), dinov2(sigreg_weight=0.5)
    masks = plain.draw_masks(views, progress())
    losses = [method(views, progress(), masks).loss.item() for method in (plain, weighted)]
    cls = plain.backbone.tokens(views.stacks["global"], masked=masks[0], mask_token=plain.mask_token).cls
    rows = (plain.head.project(h) * math.sqrt(plain.config.projection_dim) for h in cls.chunk(2))
    generator = progress().generator
    want = sum(sigreg(z, generator).item() for z in rows) / 2
    assert losses[1] - losses[0] == pytest.approx(0.5 * want)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.9])
def test_paths_work_on_a_part_of_the_batch(rate: float) -> None:
    """Each path of each block sees max(1, floor(B (1 - rate))) rows; what it adds counts B over that number; the mean is kept."""
    torch.manual_seed(0)
    network, plain = vit(drop_path=rate, drop_path_mode="subset", depth=(1,)).double(), vit(depth=(1,)).double()
    plain.load_state_dict(network.state_dict())
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    seen: list[int] = []
    for path in (network.blocks[0].attn, network.blocks[0].mlp):
        path.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    x = network.embed(images)
    out = network.through_blocks(x)
    assert seen == [max(1, int(8 * (1 - rate)))] * 2
    changed = ((out - x).abs().amax(dim=(1, 2)) > 0).sum()
    assert max(seen) <= changed <= sum(seen)
    torch.testing.assert_close(network.eval()(images), plain.eval()(images), **EXACT)
    block = plain.blocks[0].train()
    attended = block.ls1(block.attn(block.norm1(x)))
    network.train()
    mean = torch.stack([network_step(network, x) for _ in range(400)]).mean(0)
    assert (mean - attended).abs().mean() < 0.2 * attended.abs().mean() * (rate / (1 - rate)) ** 0.5 + 1e-9


def network_step(network: Any, x: Tensor) -> Tensor:
    """What attention alone adds in one draw."""
    rows = network.subsets.draw(1, len(x), x.device)
    block, out = network.blocks[0], torch.zeros_like(x)
    return out.index_add(0, rows[0], block.ls1(block.attn(block.norm1(x[rows[0]]))), alpha=len(x) / rows.shape[1]).detach()
