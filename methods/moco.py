"""MoCo: match a query to the key of the same image among a queue of earlier keys. He et al. 2019, arXiv:1911.05722.

MoCo v2 (Chen et al. 2020, arXiv:2003.04297) adds a hidden layer to the projector, blur, and a higher temperature. With
q = query(x1) and k = key(x2) unit rows `(N, D)` and a queue of K keys of earlier batches (eq. 1; Algorithm 1):

    theta_k <- m theta_k + (1 - m) theta_q                                        (eq. 2, before the keys are made)
    loss = - 1/N sum_i log( exp(q_i . k_i / tau) / ( exp(q_i . k_i / tau) + sum_j exp(q_i . queue_j / tau) ) )
    the keys enter the queue, the oldest leave it                                 (after the step)

Shuffled batch norm: the keys' images are permuted over the whole batch, then every norm sees one part of it. So a query
and its key are normalised with different images, and their statistics do not reveal that they belong together.

Departs:
    The batch norm of the original sees the images of one of eight GPUs. Here it sees one of `bn_groups` parts of the batch, on any
    number of workers up to `bn_groups`, so one device does the same as eight.
    The queue takes batches of any size (the original asks that they divide its length).
    The learning rate of v2 falls with every step, as all schedules here do; the original's falls once an epoch.
    With micro-batches, all of one step see the same queue, and their keys enter it together.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from methods.parts import (
    ConfigError, CropGroup, FeatureQueue, Hints, Masks, Method, MethodConfig, Outputs, Progress, RunFacts, SearchRange, StepOutput, Views,
    ViewsConfig, at_least, autocast_disabled, convert_split_batchnorm, ema, embedding_std, fraction, has_batch_norm, info_nce_with_queue,
    l2_normalize, mlp, num_features, one_of, positive, queue_beyond_images, queue_filled_late, rank, register, to_device, told, world_size,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(MethodConfig):
    #: tau; v1: 0.07
    temperature: float = positive(0.2, SearchRange(0.05, 0.5, "log", reason="best near 0.07 with one linear layer, 0.2 with two"))
    #: m in eq. (2): how slowly the key network follows
    momentum: float = fraction(0.999, SearchRange(scale="choice", choices=(0.9, 0.99, 0.996, 0.999), reason="short runs take less"))
    #: K, over all workers
    queue_length: int = at_least(1, 65536, SearchRange(scale="choice", choices=(1024, 4096, 16384, 65536), reason="at most the images"))
    projector_layers: int = at_least(1, 2)  # v1: 1
    projector_hidden: int | None = at_least(1, None)  # None = the width of the features
    projection_dim: int = at_least(2, 128)  # D
    bn_groups: int = at_least(1, 8)  # parts of the batch, each with batch-norm statistics of its own; 1 = the whole, which may reveal keys

    def hints(self, facts: RunFacts) -> Hints:
        length, key = self.queue_length, "method.queue_length"
        return Hints(
            chance_loss=(math.log(length + 1), "ln(K + 1)"),
            remedies=one_of(
                f"method.temperature={self.temperature * 2:g}", "method.momentum=0.99 for a short run", "a lower optim.base_lr"
            ),
            warnings=told(
                queue_beyond_images(key, length, facts, "it holds several copies of each, all taken for negatives"),
                queue_filled_late(key, length, facts, "the loss rises until then; use a shorter queue"),
            ),
            settling_steps=(length / facts.global_batch_size,),
        )


@register("moco", MoCoConfig)
class MoCo(Method):
    config: MoCoConfig
    paper = "He et al. 2019, arXiv:1911.05722; v2: arXiv:2003.04297"

    def __init__(self, config: MoCoConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        batch, groups = facts.global_batch_size, config.bn_groups
        self.has_batch_norm = has_batch_norm(backbone)  # a ViT has none and needs no shuffling
        if self.has_batch_norm and (batch % groups or batch < 2 * groups):
            near = max(g for g in range(1, groups + 1) if batch % g == 0 and batch >= 2 * g)
            raise ConfigError(
                f"method.bn_groups={groups}: cannot share train.global_batch_size={batch} evenly, two images or more to each; use {near}"
            )
        self.config = config
        width = num_features(backbone)
        projector = mlp(width, config.projector_hidden or width, config.projection_dim, config.projector_layers, norm=False)
        network = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.sync_batchnorm = groups == 1
        self.query = network if self.sync_batchnorm else convert_split_batchnorm(network, groups)
        self.key = ema.frozen_copy(self.query)
        self.queue = FeatureQueue(config.queue_length, config.projection_dim)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return 2 x 224 with v2's colours and blur."""
        return {"global": CropGroup(count=2, size=224, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1))}

    def before_step(self, progress: Progress) -> None:
        ema.update(self.key, self.query, self.config.momentum)  # eq. (2)

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        x1, x2 = views.pair()
        q = l2_normalize(self.query(x1))  # (n, D)
        k = self.keys(x2, progress)  # (n, D)
        with autocast_disabled(q):
            positive = (q * k).sum(dim=1, keepdim=True) / self.config.temperature  # (n, 1)
            first = torch.zeros(len(q), dtype=torch.int64, device=q.device)
            settings = (self.queue.rows, self.config.temperature)
            loss, metrics = info_nce_with_queue(positive, first, q, *settings, meters=progress.reports)
        if progress.reports:
            metrics |= {"embedding_std": embedding_std(q.detach()), "queue_age": self.queue.age, "queue_fill": self.queue.fill}
        return StepOutput(loss=loss, metrics=metrics, outputs={"k": k})

    @torch.no_grad()
    def keys(self, images: Tensor, progress: Progress) -> Tensor:
        """Return unit keys of the own images, `(n, 3, H, W) -> (n, D)`; batch norm sees random parts of the batch (v1 sec. 3.3)."""
        if not self.has_batch_norm or self.sync_batchnorm:
            return l2_normalize(self.key(images))
        order = torch.randperm(len(images) * world_size(), generator=progress.generator)  # the same on every worker
        k = self.key(permuted(images, order))
        return l2_normalize(permuted(k, order.argsort()))

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        self.queue.push(torch.cat([part["k"] for part in outputs]))

    def evaluation_backbone(self) -> nn.Module:
        return self.query.get_submodule("backbone")



def permuted(value: Tensor, order: Tensor) -> Tensor:
    """Return row order[r n + i] of the joined rows of all workers as row i of worker r: `(n, ...) -> (n, ...)`.

    Every row travels once, to the worker that wants it, and keeps its layout in memory.

    Args:
        order: a permutation of the W n joined rows, `(W n,)` int64 on the CPU, the same on every worker.
    """
    channels_last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    laid_out = value.permute(0, 2, 3, 1) if channels_last else value
    holder, place = order // len(value), order % len(value)
    own = holder.view(world_size(), -1)[rank()]  # who holds the rows that this worker wants
    sent = laid_out[to_device(place[holder == rank()], value.device)]  # in the order of the workers that want them
    received = sent
    if world_size() > 1:
        received = torch.empty_like(sent)
        wanted = [int((part == rank()).sum()) for part in holder.view(world_size(), -1)]
        dist.all_to_all_single(received, sent, own.bincount(minlength=world_size()).tolist(), wanted)
    result = received[to_device(own.argsort(stable=True).argsort(), value.device)]  # they came holder by holder
    return result.permute(0, 3, 1, 2) if channels_last else result
