"""DeepCluster-v2: learn the labels that k-means gave to the features of the epoch before.

Caron et al. 2020, arXiv:2006.09882 (appendix D); the first version: Caron et al. 2018, arXiv:1807.05520.

A memory holds the unit projections `(D,)` of both global crops of every image, from the last step with that image.
At the start of every epoch, head h clusters the memory m of crop h mod 2 into K clusters by spherical k-means:

    C_h = K random rows of m; then ten times: y_n = argmax_k m_n c_k and c_k = n(sum of the m_n with y_n = k)
    y_h = argmax_k m_n c_k                                            the labels of the epoch; empty clusters keep c_k

    loss = 1/H sum_h 1/V sum_v CE(y_h, z_v C_h^T / tau)               all V crops; the centroids C_h learn nothing

with n(x) = x / ||x||. The first epoch only fills the memory: it has no loss, no label and no backward pass.

Departs:
    The first centroids are random images of all workers, the same for any number of workers; the original takes them
    from worker 0. Memory and labels go by image id, so each epoch may have an order of its own and a run may go on with
    another number of workers. The first pass counts as an epoch; the original makes it before the first. A repeated
    image is memorised once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.parts import (
    LOWER_RATE, CropGroup, Hints, Masks, MemoryBank, Method, MethodConfig, Metrics, Outputs, Progress, RunFacts, SearchRange, StepOutput,
    Views, ViewsConfig, all_gather_rows, all_reduce_sum, at_least, autocast_disabled, chunk_rows, count_of_each, embedding_std,
    first_places, l2_normalize, many_clusters, mlp, num_features, one_of, positive, rank, register, require, told, world_size,
)  # fmt: skip

CROPS = 2  # global crops that are memorised
UNKNOWN = -1  # label of an image that was not seen yet


@dataclass(frozen=True, kw_only=True)
class DeepClusterConfig(MethodConfig):
    #: tau
    temperature: float = positive(0.1, SearchRange(0.05, 0.5, "log", reason="sharpness of the predictions"))
    #: K; several times the number of kinds of things in the images
    num_prototypes: int = at_least(2, 3000, SearchRange(scale="choice", choices=(100, 300, 1000, 3000), reason="flat once large enough"))
    heads: int = at_least(1, 3)  # H, independent clusterings of the same projections
    kmeans_iterations: int = at_least(1, 10)
    projector_layers: int = at_least(1, 2)
    projector_hidden: int = at_least(1, 2048)
    projection_dim: int = at_least(2, 128)  # D

    def hints(self, facts: RunFacts) -> Hints:
        k = self.num_prototypes
        return Hints(
            chance_loss=(math.log(k), "ln K"),
            remedies=one_of(LOWER_RATE, "fewer method.num_prototypes", "softer crops and jitter"),
            warnings=told(
                many_clusters("method.num_prototypes", k, k, facts, images_each=10, advised=10),
                facts.total_steps <= facts.steps_per_epoch
                and f"train.steps={facts.total_steps} end before the second epoch: the first only looks, and nothing is learned",
            ),
        )


@register("deepcluster-v2", DeepClusterConfig)
class DeepCluster(Method):
    config: DeepClusterConfig
    paper = "Caron et al. 2020, arXiv:2006.09882"
    needs_full_epochs = True
    prototypes: Tensor  # (H, K, D), the centroids: unit rows
    empty: Tensor  # (), share of clusters without an image at the last clustering

    def __init__(self, config: DeepClusterConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        images, ids, k = facts.num_images, facts.num_ids or facts.num_images, config.num_prototypes
        assert images is not None and ids is not None  # needs_full_epochs
        require(k <= images, "method.num_prototypes", k, f"more than the {images} images; use {max(2, images // 10)} or fewer")
        self.config = config
        self.backbone = backbone
        self.projector = mlp(num_features(backbone), config.projector_hidden, config.projection_dim, config.projector_layers)
        self.register_buffer("prototypes", l2_normalize(torch.randn(config.heads, k, config.projection_dim)))
        self.register_buffer("empty", torch.zeros(()))
        # both are sharded alike, so that each worker clusters its own rows; a row of zeros was never written
        self.memory = MemoryBank(ids, (CROPS, config.projection_dim), dtype=torch.float32, fill=0, sharded=True)
        self.labels = MemoryBank(ids, (config.heads,), dtype=torch.int32, fill=UNKNOWN, sharded=True)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return 2 x 224 + 6 x 96, as SwAV."""
        local = CropGroup(role="local", count=6, size=96, scale=(0.05, 0.14))
        return {"global": CropGroup(count=CROPS, size=224, scale=(0.14, 1.0)), "local": local}

    def memory_banks(self) -> dict[str, MemoryBank]:
        return {"memory": self.memory, "labels": self.labels}

    @torch.no_grad()
    def start_epoch(self, progress: Progress) -> None:
        """Cluster the memory anew: centroids and labels of every head."""
        if progress.epoch == 0:
            return
        memory, labels = (table.rows_on(self.prototypes.device) for table in (self.memory, self.labels))
        seen = memory[:, 0].any(dim=1)
        self.empty.zero_()
        for h, centroids in enumerate(self.prototypes):
            features = memory[seen, h % CROPS]  # (N_w, D)
            first = random_rows(features, len(centroids), progress.generator)
            found, nearest, sizes = spherical_kmeans(features, first, self.config.kmeans_iterations)
            centroids.copy_(found)
            labels[seen, h] = nearest.to(labels.dtype)
            self.empty += (sizes == 0).double().mean() / self.config.heads

    def has_loss(self, progress: Progress) -> bool:
        return progress.epoch > 0

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        # one backbone pass per resolution, one pass of the projector over all crops
        z = l2_normalize(self.projector(views.map_crops(self.backbone))).unflatten(0, (-1, len(views.image_ids)))  # (V, B, D)
        unit = z[views.positions("global")].detach().transpose(0, 1)  # (B, 2, D)
        outputs = {"ids": views.image_ids, "z": unit}
        with autocast_disabled(z):
            metrics: Metrics = {"embedding_std": embedding_std(unit[:, 0])} if progress.reports else {}
            if not self.has_loss(progress):
                return StepOutput(loss=None, metrics=metrics, outputs=outputs)
            scores = (z.flatten(0, 1) @ self.prototypes.flatten(0, 1).T).view(*z.shape[:2], *self.prototypes.shape[:2])  # (V, B, H, K)
            labels = self.labels.read(views.image_ids).long().expand(scores.shape[:3])  # (V, B, H)
            known = all_reduce_sum((labels != UNKNOWN).sum())  # over all workers: their mean must be that of the joined batch
            total = F.cross_entropy(scores.flatten(0, 2) / self.config.temperature, labels.flatten(), ignore_index=UNKNOWN, reduction="sum")
            if progress.reports:
                metrics["label_accuracy"] = (scores.argmax(dim=-1) == labels).sum() * world_size() / known.clamp(min=1)
                metrics["clusters_empty_epoch"] = self.empty
            return StepOutput(loss=total * world_size() / known.clamp(min=1), metrics=metrics, outputs=outputs)

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        ids = all_gather_rows(torch.cat([o["ids"] for o in outputs]))
        unit = all_gather_rows(torch.cat([o["z"] for o in outputs]))
        self.memory.write(ids, unit[first_places(ids)])  # a repeated image is memorised at its first place

    def cluster_scores(self, images: Tensor) -> Tensor:
        """Return cosines with the first head's centroids."""
        z = l2_normalize(self.projector(self.backbone(images)))
        with autocast_disabled(z):
            return z @ self.prototypes[0].T



@torch.no_grad()
def random_rows(features: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Return random rows `(count, D)` of all workers' `(N_w, D)`, the same on every worker and however the rows are cut over workers.

    Rows repeat only if there are fewer than `count`.
    """
    held = all_gather_rows(torch.tensor([len(features)], device=features.device))
    order = torch.randperm(int(held.sum()), generator=generator)[:count].to(features.device)
    places = order.repeat(-(-count // max(1, len(order))))[:count] - held[: rank()].sum()
    here = (places >= 0) & (places < len(features))
    rows = features.new_zeros(count, features.shape[1])
    rows[here] = features[places[here]]
    return all_reduce_sum(rows)


@torch.no_grad()
def spherical_kmeans(features: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run k-means by cosine over the rows of all workers, a few rows at a time.

    Args:
        features: unit rows, `(N_w, D)` on each worker; N_w may differ.
        centroids: the first ones, unit rows `(K, D)`, the same on every worker.

    Returns:
        Centroids `(K, D)`, the nearest of them to each row `(N_w,)`, and the number of rows of all workers of each `(K,)`.
    """
    size = chunk_rows(centroids.T)  # rows of (N, K)
    for _ in range(iterations):
        # sums in float64: nearly the same however the rows are cut over workers
        sums = centroids.new_zeros(centroids.shape, dtype=torch.float64)
        for rows in features.split(size):
            sums.index_add_(0, (rows @ centroids.T).argmax(dim=1), rows.double())
        sums = all_reduce_sum(sums)
        centroids = torch.where(sums.any(dim=1, keepdim=True), l2_normalize(sums), centroids.double()).to(centroids.dtype)
    nearest = torch.cat([(rows @ centroids.T).argmax(dim=1) for rows in features.split(size)])
    return centroids, nearest, all_reduce_sum(count_of_each(nearest, len(centroids)))
