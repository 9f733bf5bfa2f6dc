"""NNCLR recipes."""

from __future__ import annotations

from dataclasses import replace

from methods.nnclr import NNCLR, NNCLRConfig
from methods.parts.backbones import BackboneConfig
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe


@recipe("nnclr")
def nnclr() -> RunConfig:
    """The paper's run: ResNet-50 at 2x224, a support set of 98,304, batch 4096, 1000 epochs; published: 75.4 % linear on ImageNet."""
    return RunConfig(
        data=DataConfig(path="imagenet/train", num_shards=64),
        views=NNCLR.default_views(),
        backbone=BackboneConfig(name="resnet50"),
        method=NNCLRConfig(),
        optim=OptimConfig(name="lars", base_lr=0.3, lr_rule="linear", warmup_epochs=10, warmup_reaches_base=False, weight_decay=1e-6),
        train=TrainConfig(global_batch_size=4096, epochs=1000, checkpoint_every=1000),
    )


@recipe("nnclr-cifar10")
def cifar10() -> RunConfig:
    """CIFAR-10 with ResNet-18 (3x3 stem), 2x32 without blur, a support set of 32,768, batch 512, 1000 epochs; a GPU helps."""
    views = NNCLR.default_views()
    return RunConfig(
        data=DataConfig(path="cifar10/train", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        views={name: replace(group, size=32, scale=(0.2, 1.0), blur=0.0, blur_taps=None) for name, group in views.items()},
        backbone=BackboneConfig(name="resnet18", stem="full"),
        method=NNCLRConfig(temperature=0.2, support_set_size=32768),
        optim=OptimConfig(name="lars", base_lr=1.0, lr_rule="linear", warmup_epochs=10, weight_decay=1e-5),
        train=TrainConfig(global_batch_size=512, epochs=1000),
    )


@recipe("nnclr-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a 0.7 M-parameter ResNet, 2x32, a support set of 4,096, batch 128."""
    large = cifar10()
    # in so short a run, predictions that repel each other, as in SimCLR's loss, help: kNN 41.8 % beside 39.1 with the paper's
    # loss (10,000 images, equal steps, seeds 0 and 1)
    return replace(
        large,
        backbone=BackboneConfig(name="resnet18", stem="strided", width=0.25),
        method=NNCLRConfig(
            temperature=0.2,
            support_set_size=4096,
            projector_hidden=256,
            projection_dim=64,
            predictor_hidden=256,
            column_term=True,
            own_kind_negatives=True,
        ),
        optim=OptimConfig(name="adamw", base_lr=4e-3, warmup_epochs=0.15, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=128, steps=940),
    )


@recipe("nnclr-small")
def small() -> RunConfig:
    """Patches of 19 photographs, a 0.7 M-parameter ResNet, 2x32, a support set of 1,024, on two CPU cores."""
    base = cifar10_small()
    # as in swav-small: these photographs differ in colour more than in shape
    jitter = (0.2, 0.2, 0.1, 0.0)
    return replace(
        base,
        data=DataConfig(path="patches"),
        views={name: replace(group, jitter=jitter, grayscale=0.0, solarize=0.0) for name, group in base.views.items()},
        method=NNCLRConfig(temperature=0.2, support_set_size=1024, projector_hidden=256, projection_dim=64, predictor_hidden=256),
        optim=replace(base.optim, warmup_epochs=0.5),
        train=TrainConfig(global_batch_size=128, steps=250),
        evaluate=EvaluateConfig(knn_every=50),
    )
