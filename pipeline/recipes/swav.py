"""SwAV recipes."""

from __future__ import annotations

from dataclasses import replace

from methods.parts.backbones import BackboneConfig
from methods.parts.views import CropGroup
from methods.swav import SwAV, SwAVConfig
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe

# the original code's 0.228 for red, instead of the usual 0.229
SWAV_STD = (0.228, 0.224, 0.225)


@recipe("swav-imagenet")
def imagenet() -> RunConfig:
    """The paper's 4096-image batch on 64 GPUs: ResNet-50, 2x224 + 6x96, 3000 prototypes."""
    return RunConfig(
        data=DataConfig(path="imagenet/train", std=SWAV_STD, num_shards=64),
        views=SwAV.default_views(),
        backbone=BackboneConfig(name="resnet50"),
        method=SwAVConfig(),
        optim=OptimConfig(name="larc", base_lr=4.8, warmup_epochs=10, warmup_start_lr=0.3, final_lr=0.0048, weight_decay=1e-6),
        train=TrainConfig(global_batch_size=4096, epochs=800, checkpoint_every=1000),
    )


@recipe("swav-batch256")
def batch256() -> RunConfig:
    """The paper's small batch: 256 images, a queue of 3840 from epoch 15, 200 epochs."""
    large = imagenet()
    return replace(
        large,
        data=replace(large.data, num_shards=8),
        method=SwAVConfig(queue_length=3840, queue_start_epoch=15),
        optim=replace(large.optim, base_lr=0.6, warmup_epochs=0, warmup_start_lr=0.0, final_lr=0.0006),
        train=replace(large.train, global_batch_size=256, epochs=200),
    )


@recipe("swav")
def swav() -> RunConfig:
    """Your own photographs on one machine: ResNet-50 at 2x224 + 6x96, 300 prototypes, batch 64."""
    small = batch256()
    return replace(
        small,
        data=replace(small.data, path="patches:pixels=128", num_shards=4),
        method=SwAVConfig(num_prototypes=300, epsilon=0.03, queue_length=256, queue_start_epoch=1),
        optim=replace(small.optim, base_lr=0.15, warmup_epochs=1, final_lr=0.00015),
        train=replace(small.train, global_batch_size=64, epochs=100),
    )


@recipe("swav-photos-small")
def photos_small() -> RunConfig:
    """A few hundred of your own photographs on two CPU cores, 2x224 + 2x96: a 0.7 M-parameter ResNet, batch 32, 30 passes."""
    large = swav()
    return replace(
        large,
        views={"global": large.views["global"], "local": replace(large.views["local"], count=2)},
        backbone=BackboneConfig(name="resnet18", width=0.25),
        method=SwAVConfig(num_prototypes=30, epsilon=0.03, projector_hidden=256),
        optim=OptimConfig(name="adamw", base_lr=2e-3, warmup_epochs=1, weight_decay=1e-4),
        train=replace(large.train, global_batch_size=32, epochs=30),
    )


@recipe("swav-cifar10")
def cifar10() -> RunConfig:
    """CIFAR-10 with ResNet-18 (3x3 stem), 2x32 + 4x16, batch 512, 200 epochs; a GPU helps."""
    jitter = (0.4, 0.4, 0.4, 0.1)
    return RunConfig(
        data=DataConfig(path="cifar10/train", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        views={
            "global": CropGroup(count=2, size=32, scale=(0.2, 1.0), jitter=jitter, blur=0.0),
            "local": CropGroup(role="local", count=4, size=16, scale=(0.1, 0.3), jitter=jitter, blur=0.0),
        },
        backbone=BackboneConfig(name="resnet18", stem="full"),
        method=SwAVConfig(num_prototypes=300, epsilon=0.03, projector_hidden=512),
        optim=OptimConfig(name="larc", base_lr=1.2, warmup_epochs=5, final_lr=0.0012, weight_decay=1e-6),
        train=TrainConfig(global_batch_size=512, epochs=200),
    )


@recipe("swav-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a 0.7 M-parameter ResNet, 2x32, batch 128."""
    large = cifar10()
    return replace(
        large,
        # a stem with stride leaves one place of a crop of 16: with such crops too, 3 kNN points less after 300 steps
        views={"global": large.views["global"]},
        backbone=BackboneConfig(name="resnet18", stem="strided", width=0.25),
        # epsilon: sharper codes are learned sooner (kNN after 300 steps: 0.03 34.9 %, 0.02 35.8 %, 0.01 36.4 %)
        method=SwAVConfig(num_prototypes=128, epsilon=0.01, projector_hidden=256, freeze_prototypes_epochs=0.1),
        optim=OptimConfig(name="adamw", base_lr=4e-3, warmup_epochs=0.15, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=128, steps=850),
    )


@recipe("swav-small")
def small() -> RunConfig:
    """The demo: patches of 19 photographs, a 0.7 M-parameter ResNet, on two CPU cores."""
    base = cifar10_small()
    # the photographs differ in colour more than in shape: colours are jittered far less than in the paper, and kept
    views = {name: replace(g, count=2, jitter=(0.2, 0.2, 0.1, 0.0), grayscale=0.0) for name, g in cifar10().views.items()}
    return replace(
        base,
        data=DataConfig(path="patches"),
        views=views,
        optim=replace(base.optim, warmup_epochs=0.5),
        method=SwAVConfig(num_prototypes=64, epsilon=0.03, projector_hidden=256, freeze_prototypes_epochs=1.0),
        train=TrainConfig(global_batch_size=128, steps=250),
        evaluate=EvaluateConfig(knn_every=50),
    )
