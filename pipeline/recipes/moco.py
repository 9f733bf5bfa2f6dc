"""MoCo recipes, versions 1 and 2."""

from __future__ import annotations

from dataclasses import replace

from methods.moco import MoCo, MoCoConfig
from methods.parts.backbones import BackboneConfig
from methods.parts.views import CropGroup
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe


@recipe("moco-v2")
def v2() -> RunConfig:
    """MoCo v2: ResNet-50 at 2x224, a queue of 65,536, batch 256, 200 epochs; published: 67.5 % linear on ImageNet."""
    return RunConfig(
        data=DataConfig(path="imagenet/train"),
        views=MoCo.default_views(),
        backbone=BackboneConfig(name="resnet50"),
        method=MoCoConfig(),
        optim=OptimConfig(name="sgd", base_lr=0.03, lr_rule="linear", weight_decay=1e-4),
        train=TrainConfig(global_batch_size=256, epochs=200),
    )


@recipe("moco-v1")
def v1() -> RunConfig:
    """MoCo v1: one linear layer, temperature 0.07, stronger and certain jitter, no blur; published: 60.8 % linear on ImageNet."""
    second = v2()
    return replace(
        second,
        views={
            name: replace(group, jitter=(0.4, 0.4, 0.4, 0.4), jitter_probability=1.0, grayscale_first=True, blur=0.0)
            for name, group in second.views.items()
        },
        method=MoCoConfig(temperature=0.07, projector_layers=1),
        optim=replace(second.optim, schedule="steps", milestones=(0.6, 0.8)),  # epochs 120 and 160
    )


@recipe("moco-v2-cifar10")
def cifar10() -> RunConfig:
    """CIFAR-10 with ResNet-18 (3x3 stem), 2x32 without blur, a queue of 32,768, batch 256, 1000 epochs; a GPU helps."""
    return RunConfig(
        data=DataConfig(path="cifar10/train", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        views={"global": CropGroup(count=2, size=32, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur=0.0)},
        backbone=BackboneConfig(name="resnet18", stem="full"),
        method=MoCoConfig(queue_length=32768, momentum=0.99, projector_hidden=2048, projection_dim=256),
        optim=OptimConfig(name="sgd", base_lr=0.3, lr_rule="linear", warmup_epochs=10, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=256, epochs=1000),
    )


@recipe("moco-v2-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a 0.7 M-parameter ResNet, 2x32, a queue of 4,096, batch 128."""
    large = cifar10()
    return replace(
        large,
        backbone=BackboneConfig(name="resnet18", stem="strided", width=0.25),
        # one part for batch norm: parts of 32 cost more than they keep from leaking in so short a run
        method=MoCoConfig(temperature=0.1, queue_length=4096, momentum=0.99, projector_hidden=256, projection_dim=64, bn_groups=1),
        optim=OptimConfig(name="adamw", base_lr=4e-3, warmup_epochs=0.15, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=128, steps=1500),
    )


@recipe("moco-v2-small")
def v2_small() -> RunConfig:
    """Patches of 19 photographs, a 0.7 M-parameter ResNet, 2x32, a queue of 1,024, on two CPU cores."""
    base = cifar10_small()
    # as in swav-small: these photographs differ in colour more than in shape
    views = {name: replace(group, jitter=(0.2, 0.2, 0.1, 0.0), grayscale=0.0) for name, group in base.views.items()}
    return replace(
        base,
        data=DataConfig(path="patches"),
        views=views,
        method=MoCoConfig(queue_length=1024, momentum=0.99, projector_hidden=256, projection_dim=64, bn_groups=4),
        optim=replace(base.optim, warmup_epochs=0.5),
        train=TrainConfig(global_batch_size=128, steps=250),
        evaluate=EvaluateConfig(knn_every=50),
    )


@recipe("moco-v1-small")
def v1_small() -> RunConfig:
    """As moco-v2-small, with v1's one linear layer and temperature, on two CPU cores."""
    method = MoCoConfig(temperature=0.07, queue_length=1024, momentum=0.99, projector_layers=1, projection_dim=64, bn_groups=4)
    return replace(v2_small(), method=method)
