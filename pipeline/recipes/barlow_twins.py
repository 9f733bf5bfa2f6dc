"""Barlow Twins recipes."""

from __future__ import annotations

from dataclasses import replace

from methods.barlow_twins import BarlowTwins, BarlowTwinsConfig
from methods.parts.backbones import BackboneConfig
from methods.parts.views import CropGroup
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe


@recipe("barlow-twins")
def barlow_twins() -> RunConfig:
    """The paper's run: ResNet-50 at 2x224, batch 2048, LARS, 1000 epochs; published: 73.2 % linear on ImageNet."""
    return RunConfig(
        data=DataConfig(path="imagenet/train", num_shards=32),
        views=BarlowTwins.default_views(),
        backbone=BackboneConfig(name="resnet50"),
        method=BarlowTwinsConfig(),
        optim=OptimConfig(name="lars", base_lr=0.2, lr_rule="linear", warmup_epochs=10, final_lr=0.0002, weight_decay=1.5e-6),
        train=TrainConfig(global_batch_size=2048, epochs=1000, checkpoint_every=1000),
    )


@recipe("barlow-twins-small")
def small() -> RunConfig:
    """Patches of 19 photographs, a 0.7 M-parameter ResNet, on two CPU cores."""
    # the photographs differ in colour more than in shape: colours are jittered far less than in the paper, and kept
    t = CropGroup(count=1, size=32, scale=(0.2, 1.0), jitter=(0.2, 0.2, 0.1, 0.0), grayscale=0.0, blur=0.0)
    views = {"first": t, "second": replace(t, solarize=0.1)}
    return RunConfig(
        data=DataConfig(path="patches"),
        views=views,
        backbone=BackboneConfig(name="resnet18", stem="strided", width=0.25),
        method=BarlowTwinsConfig(redundancy_weight=0.02, projector_hidden=256, projection_dim=256, vector_lr_scale=1.0),
        optim=OptimConfig(name="adamw", base_lr=4e-3, warmup_epochs=0.5, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=128, steps=250),
        evaluate=EvaluateConfig(knn_every=50),
    )
