"""MAE recipes."""

from __future__ import annotations

from dataclasses import replace

from methods.mae import MAE, MAEConfig
from methods.parts.backbones import BackboneConfig
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe


@recipe("mae-vitb16")
def vitb16() -> RunConfig:
    """The paper's ViT-B/16: 75 % masked, batch 4096, 800 epochs; published: 83.6 % fine-tuned on ImageNet (1600 epochs)."""
    return RunConfig(
        data=DataConfig(path="imagenet/train", num_shards=64),
        views=MAE.default_views(),
        backbone=BackboneConfig(name="vit_base_patch16_224", positions="sincos", xavier=True),
        method=MAEConfig(),
        optim=OptimConfig(
            name="adamw",
            base_lr=1.5e-4,
            lr_rule="linear",
            warmup_epochs=40,
            warmup_reaches_base=False,
            weight_decay=0.05,
            betas=(0.9, 0.95),
        ),
        train=TrainConfig(global_batch_size=4096, epochs=800, checkpoint_every=1000),
    )


@recipe("mae-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a ViT of 0.46 M parameters with patches of 4 pixels, one crop of 32, batch 128."""
    crop = replace(MAE.default_views()["global"], size=32)
    return RunConfig(
        data=DataConfig(path="cifar10/train", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        views={"global": crop},
        backbone=BackboneConfig(
            name="vit_tiny_patch16_224", width=0.5, depth=(4,), image_size=32, patch_size=4, positions="sincos", xavier=True
        ),
        method=MAEConfig(decoder_width=96, decoder_depth=1, decoder_heads=3),
        optim=OptimConfig(name="adamw", base_lr=2e-3, warmup_epochs=0.5, warmup_reaches_base=False, weight_decay=0.05, betas=(0.9, 0.95)),
        train=TrainConfig(global_batch_size=128, steps=2000),
    )


@recipe("mae-small")
def small() -> RunConfig:
    """Patches of 19 photographs, a ViT of 0.46 M parameters, on two CPU cores: about 7 CPU minutes, kNN 76.2 % (untrained 67.6 %)."""
    return replace(
        cifar10_small(),
        data=DataConfig(path="patches"),
        train=TrainConfig(global_batch_size=128, steps=500),
        evaluate=EvaluateConfig(knn_every=100),
    )
