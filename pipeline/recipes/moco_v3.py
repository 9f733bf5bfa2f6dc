"""MoCo v3 recipes."""

from __future__ import annotations

from dataclasses import replace

from methods.moco_v3 import MoCoV3, MoCoV3Config
from methods.parts.backbones import BackboneConfig
from methods.parts.views import CropGroup
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe


@recipe("moco-v3-vitb16")
def vitb16() -> RunConfig:
    """The paper's run: ViT-B/16 at 2x224, batch 4096, AdamW, 300 epochs; published: 76.7 % linear on ImageNet."""
    return RunConfig(
        data=DataConfig(path="imagenet/train", num_shards=64),
        views=MoCoV3.default_views(),
        backbone=BackboneConfig(name="vit_base_patch16_224", positions="sincos", xavier=True),
        method=MoCoV3Config(),
        optim=OptimConfig(name="adamw", base_lr=1.5e-4, lr_rule="linear", warmup_epochs=40, warmup_reaches_base=False, weight_decay=0.1),
        train=TrainConfig(global_batch_size=4096, epochs=300),
    )


@recipe("moco-v3-vits16")
def vits16() -> RunConfig:
    """ViT-S/16 with twelve heads at 2x224, batch 1024 (one machine of eight GPUs), 300 epochs; published: 73.2 % linear on ImageNet."""
    base = vitb16()
    backbone = replace(base.backbone, name="vit_small_patch16_224", heads=12)
    return replace(base, backbone=backbone, train=replace(base.train, global_batch_size=1024))


@recipe("moco-v3-resnet50")
def resnet50() -> RunConfig:
    """ResNet-50 at 2x224, batch 4096, LARS, 300 epochs; published: 72.8 % linear on ImageNet."""
    base = vitb16()
    return replace(
        base,
        views={name: replace(group, scale=(0.2, 1.0)) for name, group in base.views.items()},
        backbone=BackboneConfig(name="resnet50"),
        method=MoCoV3Config(temperature=1.0, projector_layers=2, predictor_norm=False),
        optim=replace(base.optim, name="lars", base_lr=0.3, warmup_epochs=10, weight_decay=1e-6),
    )


@recipe("moco-v3-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a ViT of 0.5 M parameters with patches of 8, two crops of 32, batch 128."""
    first = CropGroup(count=1, size=32, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur=0.0)
    return RunConfig(
        data=DataConfig(path="cifar10/train", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        views={"first": first, "second": replace(first, solarize=0.2)},
        # patches of 4 cost four times as much, and in so little time are worth less
        backbone=BackboneConfig(
            name="vit_tiny_patch16_224", width=0.5, depth=(4,), image_size=32, patch_size=8, positions="sincos", xavier=True
        ),
        method=MoCoV3Config(projector_hidden=512, projection_dim=128, momentum=0.95),
        optim=OptimConfig(name="adamw", base_lr=2e-3, warmup_epochs=0.5, warmup_reaches_base=False, weight_decay=0.1),
        train=TrainConfig(global_batch_size=128, steps=640),
    )


@recipe("moco-v3-small")
def small() -> RunConfig:
    """Patches of 19 photographs, a ViT of 0.5 M parameters, on two CPU cores: about 10 CPU minutes, kNN 79.9 % (untrained 67.6 %)."""
    base = cifar10_small()
    # as in swav-small: these photographs differ in colour more than in shape
    views = {name: replace(group, jitter=(0.2, 0.2, 0.1, 0.0), grayscale=0.0, solarize=0.0) for name, group in base.views.items()}
    return replace(
        base,
        data=DataConfig(path="patches"),
        views=views,
        backbone=replace(base.backbone, patch_size=4),
        method=replace(base.method, momentum=0.97),  # type: ignore[call-arg]
        train=TrainConfig(global_batch_size=128, steps=250),
        evaluate=EvaluateConfig(knn_every=50),
    )
