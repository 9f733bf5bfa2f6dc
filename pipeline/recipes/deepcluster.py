"""DeepCluster-v2 recipes."""

from __future__ import annotations

from dataclasses import replace

from methods.deepcluster import DeepCluster, DeepClusterConfig
from pipeline.config import DataConfig, EvaluateConfig, RunConfig, TrainConfig
from pipeline.recipes import recipe, swav


@recipe("deepcluster-v2")
def imagenet() -> RunConfig:
    """The paper's 4096-image batch on 64 GPUs: SwAV's settings, three clusterings of 3000; 800 epochs after a first look."""
    base = swav.imagenet()
    return replace(base, views=DeepCluster.default_views(), method=DeepClusterConfig(), train=replace(base.train, epochs=801))


@recipe("deepcluster-v2-cifar10")
def cifar10() -> RunConfig:
    """CIFAR-10 with ResNet-18 (3x3 stem), 2x32 + 4x16, three clusterings of 300, batch 512, 200 epochs; a GPU helps."""
    return replace(swav.cifar10(), method=DeepClusterConfig(num_prototypes=300, projector_hidden=512))


@recipe("deepcluster-v2-cifar10-small")
def cifar10_small() -> RunConfig:
    """CIFAR-10 on two CPU cores: a 0.7 M-parameter ResNet, 2x32, batch 128; the first pass only looks."""
    return replace(
        swav.cifar10_small(),
        method=DeepClusterConfig(num_prototypes=128, projector_hidden=256),
        train=TrainConfig(global_batch_size=128, steps=1500),
    )


@recipe("deepcluster-v2-small")
def small() -> RunConfig:
    """Patches of 19 photographs, a 0.7 M-parameter ResNet, on two CPU cores; the first pass only looks."""
    base = swav.small()
    return replace(
        base,
        data=DataConfig(path="patches"),
        method=DeepClusterConfig(num_prototypes=64, projector_hidden=256),
        train=replace(base.train, steps=300),
        evaluate=EvaluateConfig(knn_every=50),
    )
