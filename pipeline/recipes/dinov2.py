"""DINOv2 recipes."""

from __future__ import annotations

from dataclasses import fields, replace

from methods.dinov2 import DINOv2, DINOv2Config
from methods.ibot import IBOTConfig
from methods.parts.backbones import BackboneConfig
from pipeline.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import ibot, recipe
from pipeline.recipes.dino import rescaled

EPOCH = 1250  # steps, the original's unit of every length


@recipe("dinov2-vitl16")
def vitl16() -> RunConfig:
    """The short ViT-L/16 on ImageNet, 32 GPUs: 2x224 + 8x96, batch 2048, 125,000 steps; published: kNN 81.6 %, linear 82.9 %."""
    views = DINOv2.default_views()
    return RunConfig(
        data=DataConfig(path="imagenet/train", num_shards=32),
        views=views | {"local": replace(views["local"], size=96)},
        backbone=BackboneConfig(name="vit_large_patch16_224", drop_path=0.3, drop_path_mode="subset", layer_scale=1e-5),
        method=DINOv2Config(layer_decay=0.9),
        optim=OptimConfig(
            name="adamw",
            base_lr=2e-3,  # 4e-3 times the root of batch / 1024
            lr_rule="sqrt",
            warmup_epochs=10,
            final_lr=1e-6 / 8**0.5,  # 1e-6 at batch 2048
            weight_decay=0.04,
            final_weight_decay=0.4,
            clip_norm=3.0,
            clip_scope="module",
        ),
        train=TrainConfig(global_batch_size=2048, steps=100 * EPOCH, steps_per_epoch=EPOCH, precision="bf16", checkpoint_every=EPOCH),
    )


@recipe("dinov2-vitl14")
def vitl14() -> RunConfig:
    """ViT-L/14, 32 GPUs: 2x224 + 8x98, batch 3072, 625,000 steps, Sinkhorn, two heads of 131,072; on ImageNet-22k kNN 82.0 %.

    Memory of a GPU: weights, gradients, Adam and teacher 0.4 G parameters x 20 bytes = 8 GB; 96 images of 2 x 257 and 8 x 50 tokens.
    """
    short = vitl16()
    return replace(
        short,
        views=DINOv2.default_views(),
        backbone=replace(short.backbone, name="vit_large_patch14_dinov2", image_size=224, drop_path=0.4),
        method=DINOv2Config(
            shared_head=False,
            teacher_targets="sinkhorn",
            num_prototypes=131072,
            projection_dim=384,
            patch_projection_dim=256,
            momentum=0.994,
        ),
        optim=replace(short.optim, base_lr=1e-4, warmup_epochs=80, final_lr=1e-6 / 12**0.5, final_weight_decay=0.2),
        train=replace(short.train, global_batch_size=3072, steps=500 * EPOCH),
    )


@recipe("dinov2-vitg14")
def vitg14() -> RunConfig:
    """ViT-g/14 with SwiGLU, 256 GPUs of 12 images: as ViT-L/14; published on LVD-142M: kNN 83.5 %, linear 86.5 %.

    Memory of a GPU: its share of 1.2 G parameters x 20 bytes (weights, gradients, Adam, teacher), 25 GB in all, and the heads whole in
    a step: 0.1 G parameters x 12 bytes (weights, gradients, teacher) = 1.2 GB. The first GPU holds student and teacher whole while it
    measures, 1.2 G parameters x 8 bytes = 10 GB. With `train.strategy=ddp` every GPU holds the 25 GB.
    """
    large = vitl14()
    return replace(
        large,
        data=replace(large.data, num_shards=256),
        backbone=replace(large.backbone, name="vit_giant_patch14_dinov2"),
        train=replace(large.train, gradient_checkpointing=True, strategy="fsdp"),
    )


@recipe("dinov2-own-images")
def own_images() -> RunConfig:
    """2,000 to 100,000 own images on one GPU: ViT-S/16, 2x224 + 6x96, batch 256 or less, 20,000 steps.

    Prototypes follow from the number of images, the teacher's momentum from the steps; every length is in steps, not passes.
    """
    large = vitl16()
    views = rescaled(DINOv2.default_views(), 0.32)
    return replace(
        large,
        data=DataConfig(path="images"),
        views=views | {"local": replace(views["local"], count=6, size=96)},
        backbone=BackboneConfig(name="vit_small_patch16_224", registers=4, positions="sincos", xavier=True),
        method=DINOv2Config(
            teacher_targets="sinkhorn",
            teacher_temperature=0.0125,
            warmup_teacher_temperature_epochs=0,
            num_prototypes=0,
            unit_prototypes=True,
            momentum=0,
            final_momentum=0,
            shared_head=False,
            projector_batch_norm=True,
            freeze_prototypes_epochs=0,
            patch_lr_scale=1.0,
        ),
        optim=replace(large.optim, base_lr=1e-3, warmup_epochs=1, final_lr=1e-6, weight_decay=0.04, final_weight_decay=None),
        train=TrainConfig(global_batch_size=256, steps=20_000, steps_per_epoch=1000, checkpoint_every=500),
    )


def of_ibot(config: RunConfig, **settings: object) -> RunConfig:
    """A small recipe of iBOT with DINOv2's masks and KoLeo."""
    assert isinstance(config.method, IBOTConfig)
    own = {f.name: getattr(config.method, f.name) for f in fields(IBOTConfig)}
    return replace(config, method=DINOv2Config(**{**own, "patch_lr_scale": 1.0, **settings}))


@recipe("dinov2-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: iBOT's small recipe with DINOv2's masks and KoLeo."""
    return of_ibot(ibot.cifar10_small())


@recipe("dinov2-small")
def small() -> RunConfig:
    """Patches of 19 photographs on two CPU cores: iBOT's small recipe with DINOv2's masks and KoLeo."""
    return of_ibot(ibot.small())
