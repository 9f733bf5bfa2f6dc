"""MSN recipes."""

from __future__ import annotations

from dataclasses import replace

from methods.msn import MSN, MSNConfig
from methods.parts.backbones import BackboneConfig
from methods.parts.views import CropGroup
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe


@recipe("msn-vits16")
def vits16() -> RunConfig:
    """The paper's ViT-S/16 on 16 GPUs: 1 + 1x224 + 10x96, batch 1024, 800 epochs; published: linear 76.9 % on ImageNet (600 epochs)."""
    return RunConfig(
        data=DataConfig(path="imagenet/train", num_shards=16),
        views=MSN.default_views(),
        backbone=BackboneConfig(name="vit_small_patch16_224", positions="learned-plain"),  # how the original resizes them for focal crops
        method=MSNConfig(),
        optim=OptimConfig(
            name="adamw",
            base_lr=1e-3,
            warmup_epochs=15,
            warmup_start_lr=2e-4,
            warmup_reaches_base=False,
            final_lr=1e-6,
            schedule_stretch=1.25,
            weight_decay=0.04,
            final_weight_decay=0.4,
            clip_norm=3.0,
        ),
        train=TrainConfig(global_batch_size=1024, epochs=800, checkpoint_every=1000, precision="float32"),
    )


@recipe("msn-vits16-mean-entropy")
def vits16_mean_entropy() -> RunConfig:
    """ViT-S/16 without Sinkhorn, me-max of weight 5; published: 67.2 % with 1 % of ImageNet's labels, 66.4 % with Sinkhorn."""
    base = vits16()
    return replace(base, method=replace(base.method, sinkhorn=False, me_max=5.0))  # type: ignore[call-arg]


@recipe("msn-vitb16")
def vitb16() -> RunConfig:
    """ViT-B/16, 30 % of the patches masked, 600 epochs; published: 83.4 % fine-tuned on ImageNet, 65.5 % from 5 images a class."""
    base = vits16()
    return replace(
        base,
        backbone=replace(base.backbone, name="vit_base_patch16_224"),
        method=replace(base.method, mask_ratio=0.3),  # type: ignore[call-arg]
        train=replace(base.train, epochs=600),
    )


@recipe("msn-vitb4")
def vitb4() -> RunConfig:
    """ViT-B with patches of 4, 70 % of them masked, 300 epochs; published: 72.4 % on ImageNet from 5 images a class."""
    base = vits16()
    return replace(
        base,
        backbone=replace(base.backbone, name="vit_base_patch16_224", patch_size=4),
        method=replace(base.method, mask_ratio=0.7),  # type: ignore[call-arg]
        train=replace(base.train, epochs=300, gradient_checkpointing=True),
    )


@recipe("msn-vitl7")
def vitl7() -> RunConfig:
    """ViT-L with patches of 7, 70 % of them masked, 200 epochs; published: linear 80.7 % on ImageNet, 72.1 % from 5 images a class."""
    base = vitb4()
    # 96 pixels are not cut into patches of 7
    return replace(
        base,
        views=base.views | {"focal": replace(base.views["focal"], size=98)},
        backbone=replace(base.backbone, name="vit_large_patch16_224", patch_size=7),
        train=replace(base.train, epochs=200),
    )


@recipe("msn-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a ViT of 0.47 M parameters with patches of 8 pixels, 1 + 1x32 + 2x16, batch 128."""
    anchor = CropGroup(count=1, size=32, scale=(0.4, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur=0.0)
    focal = replace(anchor, role="local", count=2, size=16, scale=(0.2, 0.5))
    return RunConfig(
        data=DataConfig(path="cifar10/train", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        views={"target": replace(anchor, role="target"), "random": anchor, "focal": focal},
        # patches of 4 cost four times as much, and in so little time are worth less
        backbone=BackboneConfig(name="vit_tiny_patch16_224", width=0.5, depth=(4,), image_size=32, patch_size=8),
        # a target that slows down learns a little less in so few steps (final_momentum=1: 35.5 %, this: 36.4 % after 1,000, seed 0)
        method=MSNConfig(num_prototypes=128, projector_hidden=256, projection_dim=64, momentum=0.95, final_momentum=0.95),
        optim=OptimConfig(name="adamw", base_lr=1e-3, warmup_epochs=0.5, weight_decay=0.04, clip_norm=3.0, schedule_stretch=1.25),
        train=TrainConfig(global_batch_size=128, steps=900),
    )


@recipe("msn-small")
def small() -> RunConfig:
    """Patches of 19 photographs, a ViT of 0.46 M parameters, on two CPU cores: about 8 CPU minutes, kNN 80.4 % (untrained 66.6 %)."""
    base = cifar10_small()
    # the photographs differ in colour more than in shape: colours are jittered far less than in the paper, and kept
    anchor = replace(base.views["random"], scale=(0.3, 1.0), jitter=(0.2, 0.2, 0.1, 0.0), grayscale=0.0)
    focal = replace(anchor, role="local", count=2, size=16, scale=(0.1, 0.3))
    return replace(
        base,
        data=DataConfig(path="patches"),
        views={"target": replace(anchor, role="target"), "random": anchor, "focal": focal},
        backbone=replace(base.backbone, patch_size=4),
        method=replace(base.method, momentum=0.98, final_momentum=1.0),  # type: ignore[call-arg]
        optim=replace(base.optim, base_lr=2e-3),
        train=TrainConfig(global_batch_size=128, steps=250),
        evaluate=EvaluateConfig(knn_every=50),
    )
