"""CoKe recipes. One pass in each is epoch 0, which assigns images to clusters and trains nothing."""

from __future__ import annotations

from dataclasses import replace

from methods.coke import CoKe, CoKeConfig
from methods.parts.backbones import BackboneConfig
from methods.parts.views import CropGroup
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe


@recipe("coke")
def coke() -> RunConfig:
    """The paper's single view: ResNet-50 at 224, batch 1024 on 8 GPUs, 1000 epochs; published: 72.5 % linear on ImageNet."""
    return RunConfig(
        data=DataConfig(path="imagenet/train"),
        views=CoKe.default_views(),
        backbone=BackboneConfig(name="resnet50"),
        method=CoKeConfig(dual_learning_rate=20),
        optim=OptimConfig(name="lars", base_lr=1.6, zero_lr_epochs=1, warmup_epochs=10, warmup_reaches_base=False, weight_decay=1e-6),
        train=TrainConfig(global_batch_size=1024, epochs=1001, checkpoint_every=1000),
    )


@recipe("coke-stage2")
def stage2() -> RunConfig:
    """The paper's single view whose last 200 epochs learn labels and centres that are averages over epochs."""
    single = coke()
    return replace(single, method=CoKeConfig(dual_learning_rate=20, averaging_start_epoch=801))


@recipe("coke-two-views")
def two_views() -> RunConfig:
    """The paper's two views: 2x224 with BYOL's colours, soft labels, 1000 epochs; published: 74.9 % linear on ImageNet."""
    single = coke()
    first = CropGroup(count=1, jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0)
    return replace(
        single,
        views={"first": first, "second": replace(first, blur=0.1, solarize=0.2)},
        method=CoKeConfig(dual_learning_rate=20, temperature=0.05, predictor_weight=0.5),
    )


@recipe("coke-multicrop")
def multicrop() -> RunConfig:
    """The paper's 2x224 + 6x96, 800 epochs; published: 76.4 % linear on ImageNet."""
    pair = two_views()
    views = pair.views | {"local": CropGroup(role="local", count=6, size=96, scale=(0.05, 0.6))}
    return replace(pair, views=views, train=replace(pair.train, epochs=801))


@recipe("coke-cifar10")
def cifar10() -> RunConfig:
    """CIFAR-10 with ResNet-18 (3x3 stem), one crop of 32, 100/130/160 clusters, batch 256, 800 epochs; wants a GPU."""
    return RunConfig(
        data=DataConfig(path="cifar10/train", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        views={"global": CropGroup(count=1, size=32, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur=0.0)},
        backbone=BackboneConfig(name="resnet18", stem="full"),
        method=CoKeConfig(num_clusters=(100, 130, 160), projector_layers=2, projector_hidden=512, predictor_hidden=512),
        optim=OptimConfig(name="sgd", base_lr=0.06, lr_rule="linear", zero_lr_epochs=1, warmup_epochs=10, weight_decay=5e-4),
        train=TrainConfig(global_batch_size=256, epochs=801),
    )


@recipe("coke-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a 0.7 M-parameter ResNet, one crop of 32, batch 128, 3,000 steps."""
    large = cifar10()
    return replace(
        large,
        backbone=BackboneConfig(name="resnet18", stem="strided", width=0.25),
        method=CoKeConfig(num_clusters=(100, 130, 160), projector_layers=2, projector_hidden=256, predictor_hidden=256),
        optim=OptimConfig(name="adamw", base_lr=4e-3, zero_lr_epochs=1, warmup_epochs=0.15, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=128, steps=3000),
    )


@recipe("coke-two-views-cifar10-small")
def two_views_cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a 0.7 M-parameter ResNet, two crops of 32 with soft labels, batch 128, 1,500 steps."""
    single = cifar10_small()
    first = single.views["global"]
    # in so few passes the paper's 0.2 and 0.05 leave the predictions even: the soft labels agree on nothing, and win
    clusters = CoKeConfig(num_clusters=(100, 130, 160), temperature=0.1, predictor_weight=0.5, label_weight=0.6)
    return replace(
        single,
        views={"first": first, "second": replace(first, solarize=0.2)},
        method=replace(clusters, projector_layers=2, projector_hidden=256, predictor_hidden=256),
        train=replace(single.train, steps=1500),
    )


@recipe("coke-small")
def small() -> RunConfig:
    """Patches of 19 photographs, a 0.7 M-parameter ResNet, on two CPU cores."""
    # the photographs differ in colour more than in shape: colours are jittered far less than in the paper, and kept
    view = CropGroup(count=1, size=32, scale=(0.2, 1.0), jitter=(0.2, 0.2, 0.1, 0.0), grayscale=0.0, blur=0.0)
    return RunConfig(
        data=DataConfig(path="patches"),
        views={"global": view},
        backbone=BackboneConfig(name="resnet18", stem="strided", width=0.25),
        method=CoKeConfig(num_clusters=(40, 60, 80), projector_layers=2, projector_hidden=256, predictor_hidden=256),
        optim=OptimConfig(name="adamw", base_lr=4e-3, zero_lr_epochs=1, warmup_epochs=0.5, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=128, steps=400),
        evaluate=EvaluateConfig(knn_every=50),
    )
