"""MSN against the original's values, a literal float64 transcription over several steps, and two workers against one."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.msn import MSN, MSNConfig
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import Progress, RunFacts
from methods.parts.distributed import average_gradients
from methods.parts.masking import random_keep
from methods.parts.norms import convert_sync_batchnorm
from methods.parts.views import Role, Views
from pipeline.config import override
from pipeline.recipes import load_recipe
from pipeline.resolve import resolve
from pipeline.train.optim import scheduled_lr, scheduled_weight_decay
from tests.parity.common import EXACT, in_processes, progress

FACTS = RunFacts(global_batch_size=8, steps_per_epoch=10, total_steps=100)


ROLES: dict[str, Role] = {"target": "target", "random": "global", "focal": "local"}


def small_vit(**settings: Any) -> nn.Module:
    plain = {"width": 0.125, "depth": (2,), "image_size": 16, "patch_size": 4}
    return build_backbone(BackboneConfig(name="vit_tiny_patch16_224", **{**plain, **settings}))


def method_of(**settings: Any) -> MSN:
    small = {"projector_hidden": 12, "projection_dim": 6, "num_prototypes": 10, "mask_ratio": 0.3}
    return MSN(MSNConfig(**{**small, **settings}), small_vit(), FACTS).double()


def views_of(batch: int = 8, focal: int = 2, random: int = 1, seed: int = 0) -> Views:
    g = torch.Generator().manual_seed(seed)
    counts = {"target": 1, "random": random, "focal": focal}
    sizes = {"target": 16, "random": 16, "focal": 8}
    stacks = {name: torch.randn(n * batch, 3, sizes[name], sizes[name], dtype=torch.float64, generator=g) for name, n in counts.items()}
    return Views(stacks=stacks, counts=counts, roles=ROLES, image_ids=torch.arange(batch), labels=torch.full((batch,), -1))


# ---------------------------------------------------------------------------- loss


class Fixed(nn.Module):
    """An encoder that gives what it holds."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.z


def loss_of(anchor: Tensor, target: Tensor, prototypes: Tensor, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Loss, its parts, the targets, and the gradients of anchors and prototypes, with projections in the place of the networks'."""
    method = method_of(num_prototypes=len(prototypes), projection_dim=prototypes.shape[1], mask_ratio=0.0, **settings)
    batch, anchors = len(target), len(anchor) // len(target)
    anchor = anchor.clone().requires_grad_()
    method.anchor, method.target = Fixed(anchor), Fixed(target)
    method.prototypes = nn.Parameter(prototypes.clone())
    stacks = {"target": torch.zeros(batch, 1), "focal": torch.zeros(anchors * batch, 1)}
    counts = {"target": 1, "focal": anchors}
    views = Views(stacks=stacks, counts=counts, roles=ROLES, image_ids=torch.arange(batch), labels=torch.zeros(batch))
    out = method(views, progress(), [])
    out.loss.backward()
    return {
        "total": out.loss.detach(),
        "ce": out.metrics["cross_entropy"],
        "memax": out.metrics["me_max"],
        "targets": method.targets(target, progress()),
        "grad_anchor": anchor.grad,
        "grad_proto": method.prototypes.grad,
    }


@pytest.mark.parametrize("name", ["nosink_l1", "nosink_l5", "sink_l1", "nosink_nomemax", "T05_l1", "smooth01_sink"])
def test_loss_equals_the_original(golden, name: str) -> None:
    values = golden("msn_loss")
    tau, sharpening, weight, balanced, smoothing = values[f"{name}__cfg"]
    settings = {
        "temperature": tau,
        "target_temperature": tau * sharpening,
        "me_max": weight,
        "sinkhorn": bool(balanced),
        "label_smoothing": smoothing,
    }
    found = loss_of(*(torch.from_numpy(values[key]) for key in ("anchor", "target", "proto")), settings)
    parts = ["total", "ce", "grad_anchor", "grad_proto"] + (["memax"] if weight else [])  # the original does not compute it at 0
    for key in parts:
        np.testing.assert_allclose(found[key].numpy(), values[f"{name}__{key}"], rtol=1e-9, atol=1e-11, err_msg=key)
    repeated = found["targets"].repeat(int(values["num_views"]), 1)
    np.testing.assert_allclose(repeated.numpy(), values[f"{name}__targets"], rtol=1e-9, atol=1e-11)


def test_loss_in_float32_equals_the_original(golden) -> None:
    values = golden("msn_loss")
    method = method_of(num_prototypes=24, projection_dim=16, mask_ratio=0.0).float()
    anchor, target, rows = (torch.from_numpy(values[key]).float() for key in ("anchor", "target", "proto"))
    method.anchor, method.target, method.prototypes = Fixed(anchor), Fixed(target), nn.Parameter(rows)
    stacks = {"target": torch.zeros(8, 1), "focal": torch.zeros(40, 1)}
    views = Views(stacks=stacks, counts={"target": 1, "focal": 5}, roles=ROLES, image_ids=torch.arange(8), labels=torch.zeros(8))
    loss = method(views, progress(), []).loss
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), values["f32_sink_l1__total"], atol=2e-5)


def test_equal_features_give_uniform_targets_under_sinkhorn(golden) -> None:
    values = golden("msn_loss")
    target, rows = torch.ones(8, 16, dtype=torch.float64), torch.from_numpy(values["proto"])
    found = loss_of(torch.ones(40, 16, dtype=torch.float64), target, rows, {"sinkhorn": True})
    torch.testing.assert_close(found["targets"], torch.full((8, 24), 1 / 24, dtype=torch.float64), **EXACT)


def _worker_loss(rank: int, world: int, parts: list[Tensor], settings: dict[str, Any], anchors: int) -> dict[str, Tensor]:
    anchor, target, rows = parts
    own = anchor.unflatten(0, (anchors, -1)).chunk(world, dim=1)[rank].flatten(0, 1)
    return loss_of(own, target.chunk(world)[rank], rows, settings)


@pytest.mark.parametrize("mode", ["nosink", "sink"])
def test_loss_of_two_workers_equals_the_original(golden, tmp_path: Path, mode: str) -> None:
    values = golden("msn_loss_ranks")
    parts = [torch.from_numpy(values[key]) for key in ("anchor", "target", "proto")]
    what = partial(_worker_loss, parts=parts, settings={"sinkhorn": mode == "sink"}, anchors=int(values["num_views"]))
    found = in_processes(2, tmp_path, what)
    for rank, one in enumerate(found):
        names = {"ce": "ce_per_rank", "memax": "memax_per_rank", "targets": "targets", "grad_anchor": "grad_anchor_per_rank"}
        for key, name in names.items():
            np.testing.assert_allclose(one[key].numpy(), values[f"{mode}_{name}"][rank], rtol=1e-9, atol=1e-11, err_msg=key)
    # ours are averaged over workers, and so the gradient of one process; the original's sum is twice as much
    mean = (found[0]["grad_proto"] + found[1]["grad_proto"]) / 2
    np.testing.assert_allclose(mean.numpy(), values[f"{mode}_single_grad_proto"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(2 * mean.numpy(), values[f"{mode}_grad_proto_allreduce_sum"], rtol=1e-9, atol=1e-11)
    single = loss_of(*parts, {"sinkhorn": mode == "sink"})
    np.testing.assert_allclose(single["total"].item(), values[f"{mode}_single_total"], rtol=1e-9)


@pytest.mark.parametrize("recipe", ["msn-vits16", "msn-vits16-mean-entropy", "msn-vitb16", "msn-vitb4", "msn-vitl7"])
def test_focal_crops_of_the_papers_recipes_have_bicubic_positions_without_antialiasing(recipe: str) -> None:
    config = load_recipe(recipe)
    network = build_backbone(replace(config.backbone, width=0.125, depth=(1,)))
    side, focal = (config.views[group].size // network.patch_embed.patch_size[0] for group in ("random", "focal"))
    grid = network.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(focal, focal), mode="bicubic", align_corners=False)
    assert torch.equal(network.position_table(focal, focal)[:, 1:], resized.flatten(2).transpose(1, 2))
    smooth = F.interpolate(grid, size=(focal, focal), mode="bicubic", antialias=True)
    assert not torch.allclose(resized, smooth, atol=1e-3)


# ---------------------------------------------------------------------------- schedules


def test_schedules_equal_the_original(golden) -> None:
    """Rate and weight decay are those of one step earlier from the second step on; the run stops at 80 % of the schedules."""
    values = golden("clustering_schedules_optim")
    per_epoch, epochs, warmup = (int(x) for x in values["msn_cfg"])
    changes = {"train.steps_per_epoch": per_epoch, "train.epochs": epochs, "optim.warmup_epochs": warmup}
    resolved = resolve(override(load_recipe("msn-vits16"), changes), 10**6)
    total, method = per_epoch * epochs, method_of(momentum=0.996)
    assert resolved.facts.total_steps == total == len(values["msn_lr"])
    for step in range(total):
        at = Progress(step=step, total_steps=total, steps_per_epoch=per_epoch)
        np.testing.assert_allclose(method.momentum(at), values["msn_ema"][step], rtol=1e-9)
        np.testing.assert_allclose(scheduled_lr(resolved, step), values["msn_lr"][max(0, step - 1)], rtol=1e-9)
        decay = values["msn_wd"][step - 1] if step else 0.04
        np.testing.assert_allclose(scheduled_weight_decay(resolved, step), decay, rtol=1e-9)


# ---------------------------------------------------------------------------- steps


def literal_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * scale + shift


def literal_layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def literal_tokens(
    w: dict[str, Tensor], images: Tensor, keep: Tensor | None = None, masked: Tensor | None = None, heads: int = 3
) -> Tensor:
    """Patches, the mask token for masked ones, positions, the kept patches only, blocks, norm; one image after the other: CLS first."""
    rows, p, side = [], 4, images.shape[-1] // 4
    table = w["backbone.pos_embed"][0]
    patch_table = table[1:]
    if side * side != len(patch_table):  # on another grid
        grid = patch_table.T.reshape(1, -1, 4, 4)
        patch_table = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)[0].flatten(1).T
    for i, image in enumerate(images):
        patches = [image[:, a * p : a * p + p, b * p : b * p + p].flatten() for a in range(side) for b in range(side)]
        tokens = torch.stack(patches) @ w["backbone.patch_embed.proj.weight"].flatten(1).T + w["backbone.patch_embed.proj.bias"]
        if masked is not None:
            tokens = torch.where(masked[i][:, None], w["mask_token"], tokens)
        tokens = tokens + patch_table
        if keep is not None:
            tokens = tokens[keep[i]]
        x = torch.cat([w["backbone.cls_token"][0] + table[:1], tokens])
        for block in range(2):
            name = f"backbone.blocks.{block}"
            y = literal_layer_norm(x, w, f"{name}.norm1") @ w[f"{name}.attn.qkv.weight"].T + w[f"{name}.attn.qkv.bias"]
            q, k, v = (part.unflatten(1, (heads, -1)).transpose(0, 1) for part in y.chunk(3, dim=1))
            weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
            y = (weights @ v).transpose(0, 1).flatten(1)
            x = x + y @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
            y = literal_layer_norm(x, w, f"{name}.norm2")
            y = gelu(y @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"])
            x = x + y @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]
        rows.append(literal_layer_norm(x, w, "backbone.norm"))
    return torch.stack(rows)


def literal_encoder(w: dict[str, Tensor], images: Tensor, keep: Tensor | None, heads: int = 3) -> Tensor:
    """CLS of the kept patches, and the head."""
    x = literal_tokens(w, images, keep, heads=heads)[:, 0]
    for linear, norm in (("0", "1"), ("3", "4")):
        x = x @ w[f"head.{linear}.weight"].T + w[f"head.{linear}.bias"]
        x = gelu(literal_norm(x, w[f"head.{norm}.weight"], w[f"head.{norm}.bias"]))
    return x @ w["head.6.weight"].T + w["head.6.bias"]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("balanced", "weight"), [(True, 1.0), (False, 5.0)])
def test_steps_equal_the_equations(balanced: bool, weight: float) -> None:
    """Four steps of SGD with the schedules of m and tau+, masks, Sinkhorn or none."""
    torch.manual_seed(0)
    settings = {"sinkhorn": balanced, "me_max": weight, "momentum": 0.6, "target_temperature": 0.03, "final_target_temperature": 0.02}
    method = method_of(**settings)
    with torch.no_grad():
        for p in method.anchor.parameters():  # so that no weight of a norm or bias hides behind 1 or 0
            p.add_(0.1 * torch.randn_like(p))
        method.target.load_state_dict(method.anchor.state_dict())
    w = {name: p.detach().clone() for name, p in method.anchor.named_parameters()}
    slow, rows = {name: p.clone() for name, p in w.items()}, method.prototypes.detach().clone()
    optimizer = torch.optim.SGD([p for group in method.param_groups() for p in group.params], lr=0.05)
    for step in range(4):
        at = Progress(step=step, total_steps=4, steps_per_epoch=4, generator=torch.Generator().manual_seed(step))
        views = views_of(seed=step)
        masks = method.draw_masks(views, at)
        assert masks[0].shape == (8, 11)  # floor(16 * 0.7)
        out = method(views, at, masks)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        method.after_step([out.outputs], at)

        w = {name: p.detach().requires_grad_() for name, p in w.items()}
        rows = rows.detach().requires_grad_()
        share = step / 5  # the schedules end at 1.25 times the run
        tau_target = 0.03 + (0.02 - 0.03) * share
        z = torch.cat([literal_encoder(w, views.stacks["random"], masks[0]), literal_encoder(w, views.stacks["focal"], None)])
        p = torch.softmax(unit(z) @ unit(rows).T / 0.1, dim=1)
        with torch.no_grad():
            r = torch.softmax(unit(literal_encoder(slow, views.stacks["target"], None)) @ unit(rows).T / tau_target, dim=1)
            if balanced:
                r = r / r.sum()
                for _ in range(3):
                    r = r / r.sum(0, keepdim=True) / 10
                    r = r / r.sum(1, keepdim=True) / 8
                r = r * 8
        loss = torch.zeros((), dtype=torch.float64)
        for row in range(24):
            loss = loss - (r[row % 8] * p[row].log()).sum() / 24
        mean = p.mean(0)
        loss = loss + weight * ((mean * mean.log()).sum() + math.log(10))
        gradients = torch.autograd.grad(loss, [*w.values(), rows])
        w = {name: (p - 0.05 * g).detach() for (name, p), g in zip(w.items(), gradients, strict=False)}
        rows = (rows - 0.05 * gradients[-1]).detach()
        m = 0.6 + 0.4 * share
        slow = {name: m * slow[name] + (1 - m) * w[name] for name in w}

        np.testing.assert_allclose(out.loss.item(), loss.item(), rtol=1e-9)
        for own, want in ((method.anchor, w), (method.target, slow)):
            for name, p in own.named_parameters():
                torch.testing.assert_close(p.detach(), want[name].detach(), rtol=1e-6, atol=1e-9, msg=name)
        torch.testing.assert_close(method.prototypes.detach(), rows, rtol=1e-7, atol=1e-10)


def _two_steps(rank: int, world: int, views: list[Views], masks: list[Tensor]) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    method = method_of(momentum=0.7)
    convert_sync_batchnorm(method) if world > 1 else None
    optimizer = torch.optim.SGD([p for group in method.param_groups() for p in group.params], lr=0.05)
    losses = []
    for step, (joined, keep) in enumerate(zip(views, masks, strict=True)):
        batch = len(joined.image_ids) // world

        def own(rows: Tensor, batch: int = batch) -> Tensor:
            return rows.unflatten(0, (-1, world, batch))[:, rank].flatten(0, 1)

        stacks = {name: own(stack) for name, stack in joined.stacks.items()}
        part = Views(stacks=stacks, counts=joined.counts, roles=ROLES, image_ids=own(joined.image_ids), labels=own(joined.labels))
        out = method(part, progress(step), [own(keep)])
        optimizer.zero_grad()
        out.loss.backward()
        average_gradients(method.parameters())
        optimizer.step()
        method.after_step([out.outputs], progress(step))
        losses.append(out.loss.item())
    return losses, {name: p.detach() for name, p in method.named_parameters()}


def test_two_workers_equal_one_with_the_same_masks(tmp_path: Path) -> None:
    views = [views_of(seed=step) for step in range(3)]
    masks = [random_keep(torch.arange(8), 16, 11, seed=step) for step in range(3)]
    losses, weights = _two_steps(0, 1, views, masks)
    found = in_processes(2, tmp_path, partial(_two_steps, views=views, masks=masks))
    np.testing.assert_allclose(np.mean([one for one, _ in found], axis=0), losses, rtol=1e-9)
    for _, own in found:
        for name, value in weights.items():
            torch.testing.assert_close(own[name], value, rtol=1e-6, atol=1e-9, msg=name)


def _own_masks(rank: int, world: int) -> Tensor:
    views = views_of(batch=8 // world)
    views.image_ids = torch.arange(rank, 8, world)
    return method_of().draw_masks(views, progress(3))[0]


def test_masks_follow_the_image_to_its_worker(tmp_path: Path) -> None:
    whole = _own_masks(0, 1)
    for rank, own in enumerate(in_processes(2, tmp_path, _own_masks)):
        assert own.shape == (4, 11) and torch.equal(own, whole[rank::2])
