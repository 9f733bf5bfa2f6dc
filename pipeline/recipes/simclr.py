"""SimCLR recipes."""

from __future__ import annotations

from dataclasses import replace

from methods.parts.backbones import BackboneConfig
from methods.parts.views import CropGroup
from methods.simclr import SimCLR, SimCLRConfig
from pipeline.config import DataConfig, EvaluateConfig, OptimConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe


@recipe("simclr")
def simclr() -> RunConfig:
    """The paper's run: ResNet-50 at 2x224, batch 4096, LARS, 1000 epochs; published: 69.3 % linear on ImageNet."""
    return RunConfig(
        data=DataConfig(path="imagenet/train", num_shards=64),
        views=SimCLR.default_views(),
        backbone=BackboneConfig(name="resnet50"),
        method=SimCLRConfig(),
        optim=OptimConfig(name="lars", base_lr=0.3, lr_rule="linear", warmup_epochs=10, warmup_reaches_base=False, weight_decay=1e-6),
        train=TrainConfig(global_batch_size=4096, epochs=1000, checkpoint_every=1000),
    )


@recipe("simclr-v2")
def v2() -> RunConfig:
    """SimCLR v2: three-layer projector, a memory of 65,536, batch 4096, 800 epochs."""
    return replace(v2_nomemory(), method=SimCLRConfig(projector_layers=3, memory_size=65536))


@recipe("simclr-v2-nomemory")
def v2_nomemory() -> RunConfig:
    """SimCLR v2 as its published code trains it: three-layer projector, no memory; published: 71.7 % linear on ImageNet."""
    first = simclr()
    return replace(
        first,
        method=SimCLRConfig(projector_layers=3),
        # 0.1 sqrt(4096) = 6.4, and 5 % of the epochs for the warm-up
        optim=replace(first.optim, base_lr=1.6, lr_rule="sqrt", warmup_epochs=40, weight_decay=1e-4),
        train=replace(first.train, epochs=800),
    )


@recipe("simclr-v2-resnet50x2-sk")
def v2_wide() -> RunConfig:
    """SimCLR v2 with ResNet-50, twice as wide, with selective kernels (144.4 M parameters); published: 77.7 % linear on ImageNet."""
    return replace(v2_nomemory(), backbone=BackboneConfig(name="resnet50", width=2, selective_kernels=True))


@recipe("simclr-v2-resnet152x3-sk")
def v2_widest() -> RunConfig:
    """SimCLR v2's largest, ResNet-152, three times as wide, with selective kernels (800.8 M); published: 79.8 % linear on ImageNet."""
    return replace(v2_nomemory(), backbone=BackboneConfig(name="resnet152", width=3, selective_kernels=True))


@recipe("simclr-cifar10")
def cifar10() -> RunConfig:
    """CIFAR-10 with ResNet-18 (3x3 stem), 2x32 without blur, batch 512, 1000 epochs; published: about 91 % linear; a GPU helps."""
    return RunConfig(
        data=DataConfig(path="cifar10/train", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
        views={"global": CropGroup(count=2, size=32, scale=(0.08, 1.0), interpolation="bicubic", jitter=(0.4, 0.4, 0.4, 0.1), blur=0.0)},
        backbone=BackboneConfig(name="resnet18", stem="full"),
        method=SimCLRConfig(temperature=0.5, projector_layers=3),
        optim=OptimConfig(name="lars", base_lr=1.0, lr_rule="linear", warmup_epochs=10, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=512, epochs=1000),
    )


@recipe("simclr-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a 0.7 M-parameter ResNet, 2x32, batch 128."""
    large = cifar10()
    return replace(
        large,
        backbone=BackboneConfig(name="resnet18", stem="strided", width=0.25),
        method=SimCLRConfig(temperature=0.2, projector_hidden=256, projection_dim=64),
        optim=OptimConfig(name="adamw", base_lr=4e-3, warmup_epochs=0.15, weight_decay=1e-4),
        train=TrainConfig(global_batch_size=128, steps=1000),
    )


@recipe("simclr-small")
def small() -> RunConfig:
    """Patches of 19 photographs, a 0.7 M-parameter ResNet, 2x32, on two CPU cores."""
    base = cifar10_small()
    # as in swav-small: these photographs differ in colour more than in shape
    views = {name: replace(group, scale=(0.2, 1.0), jitter=(0.2, 0.2, 0.1, 0.0), grayscale=0.0) for name, group in base.views.items()}
    return replace(
        base,
        data=DataConfig(path="patches"),
        views=views,
        optim=replace(base.optim, warmup_epochs=0.5),
        train=TrainConfig(global_batch_size=128, steps=250),
        evaluate=EvaluateConfig(knn_every=50),
    )


@recipe("simclr-v2-small")
def v2_small() -> RunConfig:
    """Patches of 19 photographs with v2's deeper projector and a memory of 1,024, on two CPU cores."""
    settings = SimCLRConfig(temperature=0.2, projector_layers=3, projector_hidden=256, projection_dim=64)
    return replace(small(), method=replace(settings, memory_size=1024, memory_momentum=0.99))
