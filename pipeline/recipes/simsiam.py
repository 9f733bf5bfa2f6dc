"""SimSiam recipes."""

from __future__ import annotations

from methods.parts.backbones import BackboneConfig
from methods.parts.views import CropGroup
from methods.simsiam import SimSiam, SimSiamConfig
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe


@recipe("simsiam")
def simsiam() -> RunConfig:
    """The paper's run: ResNet-50 at 2x224, batch 512, SGD, 100 epochs; published: 68.1 % linear on ImageNet."""
    return RunConfig(
        data=DataConfig(path="imagenet/train", num_shards=8),
        views=SimSiam.default_views(),
        backbone=BackboneConfig(name="resnet50"),
        method=SimSiamConfig(),
        optim=OptimConfig(name="sgd", base_lr=0.05, lr_rule="linear", weight_decay=1e-4),
        train=TrainConfig(global_batch_size=512, epochs=100, checkpoint_every=1000),
    )


@recipe("simsiam-cifar10")
def cifar10() -> RunConfig:
    """The paper's CIFAR-10 run: ResNet-18 (3x3 stem), two crops of 32, batch 512, 800 epochs; wants a GPU."""
    return RunConfig(
        data=DataConfig(path="cifar10/train", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        views={"global": CropGroup(count=2, size=32, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur=0.0)},
        backbone=BackboneConfig(name="resnet18", stem="full"),
        method=SimSiamConfig(projector_layers=2),
        optim=OptimConfig(name="sgd", base_lr=0.03, lr_rule="linear", weight_decay=5e-4),
        train=TrainConfig(global_batch_size=512, epochs=800),
    )


@recipe("simsiam-small")
def small() -> RunConfig:
    """Patches of 19 photographs, a 0.7 M-parameter ResNet, on two CPU cores."""
    # the photographs differ in colour more than in shape: colours are jittered far less than in the paper, and kept
    views = {"global": CropGroup(count=2, size=32, scale=(0.2, 1.0), jitter=(0.2, 0.2, 0.1, 0.0), grayscale=0.0, blur=0.0)}
    return RunConfig(
        data=DataConfig(path="patches"),
        views=views,
        backbone=BackboneConfig(name="resnet18", stem="strided", width=0.25),
        method=SimSiamConfig(projector_hidden=256, projection_dim=256, predictor_hidden=64),
        optim=OptimConfig(name="adamw", base_lr=4e-3, warmup_epochs=0.5, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=128, steps=250),
        evaluate=EvaluateConfig(knn_every=50),
    )
