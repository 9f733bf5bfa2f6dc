"""iBOT recipes."""

from __future__ import annotations

from dataclasses import fields, replace

from methods.dino import DINOConfig
from methods.ibot import IBOT, IBOTConfig
from pipeline.config import RunConfig
from pipeline.recipes import dino, recipe


@recipe("ibot-vits16")
def vits16() -> RunConfig:
    """The paper's ViT-S/16 on 16 GPUs: 2x224 + 10x96, batch 1024, 800 epochs; published: kNN 75.2 %, linear 77.9 % on ImageNet."""
    base = dino.vits16()
    return replace(
        base,
        data=replace(base.data, num_shards=16),
        views=IBOT.default_views(),
        method=IBOTConfig(),
        optim=replace(base.optim, final_lr=2.5e-7),  # 1e-6 at batch 1024, where the rates are four times as high
        train=replace(base.train, global_batch_size=1024, epochs=800),
    )


@recipe("ibot-vitb16")
def vitb16() -> RunConfig:
    """ViT-B/16 on 32 GPUs: as ViT-S, 400 epochs, unit prototypes; published: kNN 77.1 %, linear 79.5 % on ImageNet."""
    small = vits16()
    return replace(
        small,
        data=replace(small.data, num_shards=32),
        backbone=replace(small.backbone, name="vit_base_patch16_224"),
        method=replace(small.method, unit_prototypes=True),  # type: ignore[call-arg]
        optim=replace(small.optim, clip_norm=0.3),  # larger ViTs want a smaller norm
        train=replace(small.train, epochs=400),
    )


def of_dino(config: RunConfig, **settings: object) -> RunConfig:
    """A small recipe of DINO with iBOT's patches: a head of their own, because batch norm must not see places that only fill up."""
    assert isinstance(config.method, DINOConfig)
    own = {f.name: getattr(config.method, f.name) for f in fields(DINOConfig)} | {"warmup_teacher_temperature_epochs": 0}
    return replace(config, method=IBOTConfig(**{**own, "shared_head": False, **settings}))


@recipe("ibot-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: DINO's small recipe for longer, with masks of 4 x 4 patches and a sharper teacher."""
    base = dino.cifar10_small()
    return of_dino(replace(base, train=replace(base.train, steps=700)), teacher_temperature=0.0125)


@recipe("ibot-small")
def small() -> RunConfig:
    """Patches of 19 photographs on two CPU cores: DINO's small recipe, and masks of 4 x 4 patches."""
    return of_dino(dino.small())
