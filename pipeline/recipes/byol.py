"""BYOL recipes."""

from __future__ import annotations

from dataclasses import replace

from methods.byol import BYOL, BYOLConfig
from methods.parts.backbones import BackboneConfig
from methods.parts.views import CropGroup
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe


@recipe("byol")
def byol() -> RunConfig:
    """The paper's run: ResNet-50 at 2x224, batch 4096, LARS, 1000 epochs; published: 74.3 % linear on ImageNet."""
    return RunConfig(
        data=DataConfig(path="imagenet/train", num_shards=64),
        views=BYOL.default_views(),
        backbone=BackboneConfig(name="resnet50"),
        method=BYOLConfig(),
        optim=OptimConfig(name="lars", base_lr=0.2, lr_rule="linear", warmup_epochs=10, warmup_reaches_base=False, weight_decay=1.5e-6),
        train=TrainConfig(global_batch_size=4096, epochs=1000, checkpoint_every=1000),
    )


@recipe("byol-epochs300")
def epochs300() -> RunConfig:
    """The paper's 300 epochs: a higher learning rate and a faster target; published: 72.5 % linear on ImageNet."""
    long = byol()
    optim = replace(long.optim, base_lr=0.3, weight_decay=1e-6)
    return replace(long, method=BYOLConfig(momentum=0.99), optim=optim, train=replace(long.train, epochs=300))


@recipe("byol-cifar10")
def cifar10() -> RunConfig:
    """CIFAR-10 with ResNet-18 (3x3 stem), two crops of 32, batch 256, 800 epochs; wants a GPU."""
    t = CropGroup(count=1, size=32, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur=0.0)
    return RunConfig(
        data=DataConfig(path="cifar10/train", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        views={"first": t, "second": replace(t, solarize=0.2)},
        backbone=BackboneConfig(name="resnet18", stem="full"),
        method=BYOLConfig(momentum=0.99, projector_hidden=1024, predictor_hidden=1024),
        optim=OptimConfig(name="sgd", base_lr=0.06, lr_rule="linear", warmup_epochs=10, weight_decay=5e-4),
        train=TrainConfig(global_batch_size=256, epochs=800),
    )


@recipe("byol-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a 0.7 M-parameter ResNet, 2x32, batch 128."""
    return replace(
        cifar10(),
        backbone=BackboneConfig(name="resnet18", stem="strided", width=0.25),
        method=BYOLConfig(momentum=0.95, projector_hidden=256, projection_dim=128, predictor_hidden=256),
        optim=OptimConfig(name="adamw", base_lr=4e-3, warmup_epochs=0.15, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=128, steps=1000),
    )


@recipe("byol-small")
def small() -> RunConfig:
    """Patches of 19 photographs, a 0.7 M-parameter ResNet, on two CPU cores."""
    # the photographs differ in colour more than in shape: colours are jittered far less than in the paper, and kept
    t = CropGroup(count=1, size=32, scale=(0.2, 1.0), jitter=(0.2, 0.2, 0.1, 0.0), grayscale=0.0, blur=0.0)
    views = {"first": t, "second": replace(t, solarize=0.1)}
    return RunConfig(
        data=DataConfig(path="patches"),
        views=views,
        backbone=BackboneConfig(name="resnet18", stem="strided", width=0.25),
        method=BYOLConfig(momentum=0.9, projector_hidden=256, projection_dim=128, predictor_hidden=256),
        optim=OptimConfig(name="adamw", base_lr=4e-3, warmup_epochs=0.5, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=128, steps=250),
        evaluate=EvaluateConfig(knn_every=50),
    )
