"""A new phase of a run: what may change, larger tables of positions, compressed schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from methods.dinov2 import DINOv2, DINOv2Config
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import RunFacts
from methods.parts.errors import ConfigError
from pipeline.config import OptimConfig, RunConfig, TrainConfig
from pipeline.phase import fit_state, high_resolution, require_continuable, shortened
from pipeline.recipes import load_recipe
from pipeline.train.optim import build_optimizer
from tests.parity.ibot_cases import FACTS, SMALL, crops, progress


def dinov2(side: int, positions: Any = "learned", **settings: Any) -> DINOv2:
    torch.manual_seed(side)
    backbone = BackboneConfig(name="vit_tiny_patch16_224", width=0.125, depth=(1,), patch_size=4, image_size=side, positions=positions)
    return DINOv2(DINOv2Config(**SMALL, freeze_prototypes_epochs=0, **settings), build_backbone(backbone), FACTS).double()


def state_of(method: DINOv2) -> dict[str, Any]:
    """The state after two steps."""
    optimizer = build_optimizer(OptimConfig(name="adamw", base_lr=0.01), method.param_groups())
    for k in range(2):
        out = method(crops(k), progress(k))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step([out.outputs], progress(k))
    return {"method": method.state_dict(), "optimizer": optimizer.state_dict(), "threads": 1}


@pytest.mark.parametrize(
    ("positions", "how"),
    [
        ("learned", {"size": (8, 8), "antialias": True}),
        ("learned-plain", {"size": (8, 8)}),
        ("learned-offset", {"scale_factor": (8.1 / 4, 8.1 / 4), "recompute_scale_factor": False}),
    ],
)
def test_tables_of_positions_are_resized_and_all_else_is_carried_over(positions: str, how: dict[str, Any]) -> None:
    earlier, new = dinov2(16, positions), dinov2(32, positions, gram_weight=1.0)
    saved = state_of(earlier)
    state = fit_state(saved, dinov2(16, positions), new)
    new.load_state_dict(state["method"])
    tables = ["backbone.pos_embed", "teacher.backbone.pos_embed"]
    for name in tables:
        table = saved["method"][name]
        grid = F.interpolate(table[:, 1:].reshape(1, 4, 4, -1).movedim(-1, 1), mode="bicubic", **how)
        want = torch.cat([table[:, :1], grid.movedim(1, -1).reshape(1, 64, -1)], dim=1)
        torch.testing.assert_close(state["method"][name], want, rtol=1e-12, atol=1e-15)
    assert all(torch.equal(state["method"][name], value) for name, value in saved["method"].items() if name not in tables)
    large = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(new.backbone(large), earlier.backbone(large))
    assert new.backbone.pos_embed.shape == (1, 65, earlier.backbone.pos_embed.shape[-1]) and new.backbone.pos_embed.requires_grad


def test_the_optimizer_goes_on_but_for_the_resized_table() -> None:
    earlier, new = dinov2(16), dinov2(32)
    saved = state_of(earlier)
    state = fit_state(saved, dinov2(16), new)
    new.load_state_dict(state["method"])
    optimizer = build_optimizer(OptimConfig(name="adamw", base_lr=0.01), new.param_groups())
    optimizer.load_state_dict(state["optimizer"])
    begun = {id(p) for p in optimizer.state}
    fresh = [name for name, p in new.named_parameters() if p.requires_grad and id(p) not in begun]
    assert fresh == ["backbone.pos_embed"]
    kept = optimizer.state[new.mask_token]
    old = [p for group in earlier.param_groups() for p in group.params].index(earlier.mask_token)
    assert torch.equal(kept["exp_avg_sq"], saved["optimizer"]["state"][old]["exp_avg_sq"]) and kept["exp_avg_sq"].any()
    table = new.backbone.pos_embed.detach().clone()
    new(crops(5), progress(2)).loss.backward()
    optimizer.step()
    assert not torch.equal(new.backbone.pos_embed, table) and optimizer.state[new.backbone.pos_embed]["step"] == 1


def test_a_phase_of_the_same_size_changes_nothing() -> None:
    saved = state_of(dinov2(16))
    state = fit_state(saved, dinov2(16), dinov2(16))
    assert list(state["method"]) == list(saved["method"]) and state["optimizer"]["state"].keys() == saved["optimizer"]["state"].keys()
    assert all(torch.equal(state["method"][name], value) for name, value in saved["method"].items())


def test_a_phase_may_change_the_size_of_images_and_gram_anchoring_alone() -> None:
    before = load_recipe("dinov2-small")
    assert isinstance(before.method, DINOv2Config)
    may = replace(before, backbone=replace(before.backbone, image_size=64), method=replace(before.method, gram_weight=2.0, gram_scale=2))
    require_continuable(may, before, "first")
    for key, change in {
        "backbone": {"backbone": replace(before.backbone, width=1.0)},
        "method": {"method": replace(before.method, koleo_weight=0.2)},
        "optim.name": {"optim": replace(before.optim, name="sgd")},
    }.items():
        with pytest.raises(ConfigError, match=f"^{key}.*first"):
            require_continuable(replace(before, **change), before, "first")
    with pytest.raises(ConfigError, match=r"^method: another method cannot continue first"):
        require_continuable(replace(before, method=load_recipe("ibot-small").method), before, "first")


@pytest.mark.parametrize(
    ("recipe", "sides"),
    [
        ("dinov2-vitl14", {"global": 518, "global_solarized": 518, "local": 224}),  # 224 and 98 before
        ("dinov2-vitl16", {"global": 416, "global_solarized": 416, "local": 176}),  # 224 and 96
        ("dinov2-small", {"global": 64, "local": 32}),  # 32 and 16, patches of 8
    ],
)
def test_high_resolution_keeps_the_ratio_of_the_crops(recipe: str, sides: dict[str, int]) -> None:
    before = load_recipe(recipe)
    config = high_resolution(before)
    assert {name: group.size for name, group in config.views.items()} == sides
    assert config.backbone == replace(before.backbone, image_size=sides["global"])
    assert config.optim == replace(before.optim, base_lr=before.optim.base_lr / 10)
    assert config.train == replace(before.train, steps=10_000) and config.method == before.method
    require_continuable(config, before, "first")


def test_high_resolution_is_for_vits() -> None:
    with pytest.raises(ConfigError, match=r"^backbone\.name: this phase works on patches"):
        high_resolution(load_recipe("swav"))


def test_schedules_are_compressed_into_the_steps_of_the_phase() -> None:
    """The warm-up of 10 epochs of 1250 steps, 10 % of 125,000, is 10 % of 10,000 steps, and so is every length in epochs."""
    earlier = RunFacts(global_batch_size=2048, steps_per_epoch=1250, total_steps=125_000)
    config = shortened(high_resolution(load_recipe("dinov2-vitl16")), earlier, 1250)
    assert (config.train.steps, config.train.steps_per_epoch, config.train.checkpoint_every) == (10_000, 100, 1250)
    often = replace(config, train=replace(config.train, checkpoint_every=7))
    assert shortened(often, earlier, 1250).train.checkpoint_every == 7
    two = RunConfig(train=TrainConfig(epochs=2, steps=None))
    assert shortened(two, earlier, 1250).train == TrainConfig(epochs=2, steps=2500, steps_per_epoch=25, checkpoint_every=1250)
