"""A new phase of a run (`continue`): what it may change, and the state of the earlier phase made to fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from methods.parts.backbones import build_backbone
from methods.parts.contract import Method, RunFacts
from methods.parts.errors import ConfigError
from methods.parts.vit import ViT, require_vit
from pipeline.config import RunConfig

STEPS = 10_000
SIDES = {14: 518, 16: 416}  # of global crops by the size of a patch, pixels


def high_resolution(config: RunConfig) -> RunConfig:
    """Return the settings of DINOv2's last phase: large crops, positions for them, 10,000 steps, a tenth of the learning rate.

    Global crops have 518 pixels with patches of 14, 416 with patches of 16, twice as many as before with others. The other crops
    grow by the same factor, to whole patches. The paper gives neither their size nor the rate.

    Raises:
        ConfigError: the backbone is no ViT.
    """
    with torch.device("meta"):
        patch = int(require_vit(build_backbone(config.backbone), "this phase").patch_embed.patch_size[0])
    before = max(group.size for group in config.views.values() if group.count)
    side = SIDES.get(patch, 2 * before)
    return replace(
        config,
        views={name: replace(group, size=round(group.size * side / before / patch) * patch) for name, group in config.views.items()},
        backbone=replace(config.backbone, image_size=side),
        optim=replace(config.optim, base_lr=config.optim.base_lr / 10),
        train=replace(config.train, steps=STEPS),
    )


def shortened(config: RunConfig, earlier: RunFacts, checkpoint_every: int) -> RunConfig:
    """Return a config whose schedules are those of an earlier run, compressed into its own number of steps.

    All lengths in epochs shrink with `train.steps_per_epoch`, their unit.

    Args:
        checkpoint_every: steps between checkpoints of the earlier run, where the config gives none.
    """
    train = config.train
    steps = train.steps or max(1, round(train.epochs * earlier.steps_per_epoch))
    unit = max(1, round(earlier.steps_per_epoch * steps / earlier.total_steps))
    every = train.checkpoint_every or checkpoint_every
    return replace(config, train=replace(train, steps=steps, steps_per_epoch=unit, checkpoint_every=every))


def require_continuable(config: RunConfig, before: RunConfig, name: str) -> None:
    """Check that a run can go on from the state of the run `name`, which had the config `before`.

    Raises:
        ConfigError: another backbone (but for the size of its images), method or optimizer.
    """
    kept = {key: getattr(before.method, key) for key in before.method.phase_settings}
    same_method = type(config.method) is type(before.method) and replace(config.method, **kept) == before.method
    same_backbone = replace(config.backbone, image_size=before.backbone.image_size) == before.backbone
    for key, same in (("backbone", same_backbone), ("method", same_method)):
        if not same:
            raise ConfigError(f"{key}: another {key} cannot continue {name}; use pretrain --backbone.init {name}")
    if config.optim.name != before.optim.name:
        raise ConfigError(f"optim.name={config.optim.name}: {name} holds the state of {before.optim.name}; keep that one")


def fit_state(state: dict[str, Any], before: Method, method: Method) -> dict[str, Any]:
    """Return the state of a run, made to fit the method of a new phase.

    Tables of positions are resized as the earlier run resized them for such images, so its features stay the same. What only the
    new method has keeps its first values. The optimizer's moments are kept, as the gradients they describe go on, but for resized
    tables: bicubic weights are negative in places, and a second moment must not be.

    Args:
        before: the method of the earlier run; it takes over that run's weights.

    Raises:
        ConfigError: a tensor other than a table of positions has another shape.
    """
    before.load_state_dict(state["method"])
    own = method.state_dict()
    values = own | {name: value for name, value in state["method"].items() if name in own}
    earlier = dict(before.named_modules())
    for name, vit in method.named_modules():
        if isinstance(vit, ViT) and isinstance(old := earlier.get(name), ViT):
            values[f"{name}.pos_embed"] = old.position_table(*vit.patch_embed.grid_size).detach()
    for name, value in values.items():
        if value.shape != own[name].shape:
            raise ConfigError(f"backbone.image_size: {name} cannot be resized; keep that of the earlier run")
    params = [p for group in method.param_groups() for p in group.params]
    moments = {i: kept for i, kept in state["optimizer"]["state"].items() if _fits(kept, params[i])}
    return state | {"method": values, "optimizer": state["optimizer"] | {"state": moments}}


def _fits(kept: dict[str, Any], parameter: torch.Tensor) -> bool:
    return all(value.shape == parameter.shape for value in kept.values() if isinstance(value, torch.Tensor) and value.ndim)
