"""CoKe: classify images by the clusters of the last epoch, which constrained online k-means finds. Qian et al. 2022, arXiv:2105.11527.

Clustering and discrimination are decoupled: epoch t assigns images while it learns the labels and centres of epoch t - 1,
so one view of an image in an epoch is enough. Clusters solve, by one dual rho_k for each constraint,

    max sum_i f_i . c_{l_i}   so that every cluster holds at least r' N / K images

With unit projections x and predictions y of the B images of a global batch, f = x (two views: (x_1 + x_2) / 2), each step is

    l_i    = argmax_k f_i . c_k + rho_k                                 all images of the batch see the same c and rho
    rho_k <- rho_k - eta (b_k / B - r' / K), then max(rho_k, 0)         b_k images with label k; r' = 1: free in sign
    c_k   <- normalize((n_k c_k + sum_{l_i = k} f_i) / (n_k + b_k))     n_k images of this epoch before the batch
    loss   = beta CE(q, y c' / tau) + (1 - beta) CE(q, x c' / tau)      q: label of epoch t - 1, c' its centres

as a mean over heads, each with its own K. With two views, q of one is alpha onehot(l) + (1 - alpha) softmax(x' c' / tau),
x' of the other. Local crops take no part in clustering. Their q is the average over all large views, and half of the loss is theirs.

Stage 2 (from `averaging_start_epoch` s on, share w = 1 / (t - s + 1)): images are assigned by c', centres are averages over epochs,
c' <- normalize((1 - w) c' + w c), and so are labels: of an image's weights w_k, q_k = exp(w_k / 0.5) / sum (t > s).

Departs:
    A label that is not known yet (the original: label 1) takes no part in the loss, which stays a sum over B images.
    A free place among the labels of stage 2 has none; the original writes label 1 there, which an image may so keep twice.
    An image that comes twice in a batch, because it stands in for a bad one, is clustered once.
    Epoch 0, in which the original's learning rate is 0, runs forward only; `train_first_epoch` runs it backward.
    The original's checkpoints hold the counters n of epoch 0; ours those of the epoch. Stage 2 takes several views too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.parts import (
    LOWER_RATE, ConfigError, CropGroup, Hints, Masks, MemoryBank, Method, MethodConfig, Metrics, Outputs, ParamGroup, Progress, RunFacts,
    SearchRange, StepOutput, Views, ViewsConfig, all_gather_rows, at_least, autocast_disabled, count_of_each, embedding_std, first_places,
    fraction, l2_normalize, many_clusters, mlp, num_features, one_of, param_groups_weight_decay, positive, register, require, told,
)  # fmt: skip

AVERAGES = ("averaged_labels", "averaged_weights")  # the tables of stage 2


@dataclass(frozen=True, kw_only=True)
class CoKeConfig(MethodConfig):
    #: K of each head; several are better than one, and better when they differ
    num_clusters: tuple[int, ...] = (3000, 4000, 5000)
    #: r': least size of a cluster as a fraction of N / K; 0 = plain online k-means, 1 = balanced
    constraint_ratio: float = fraction(0.4, SearchRange(0.0, 1.0, "linear", reason="low: empty clusters; high: restless labels"))
    #: eta, in the paper 20 for K >= 3000. None = K min(3 / steps_per_epoch, 0.05): the dual of an empty cluster rises by 3 r' in an
    #: epoch, beside cosines in [-1, 1], and by 0.05 r' at most in a step. With larger steps, whole batches fall into one cluster
    dual_learning_rate: float | None = positive(None)
    #: tau; 0.05 with two views
    temperature: float = positive(0.1, SearchRange(0.03, 0.3, "log", reason="sharpness of the predictions"))
    predictor_weight: float = fraction(1.0)  # beta: 1 = predictions only, 0 = projections only and no predictor
    label_weight: float = fraction(0.2)  # alpha, with two or more crops
    projector_layers: int = at_least(1, 3)
    projector_hidden: int = at_least(1, 2048)
    projection_dim: int = at_least(2, 128)  # D
    predictor_hidden: int = at_least(1, 2048)
    train_first_epoch: bool = False  # backward in epoch 0 too, with the labels just found; False = it only assigns
    labels_from: Literal["previous", "current"] = "previous"  # epoch of the labels in the loss
    centers_from: Literal["previous", "current"] = "previous"  # epoch of the centres in the loss
    averaging_start_epoch: int | None = at_least(1, None)  # first epoch of stage 2 (the paper's long run: 801 of 1001); None = no stage 2
    averaging_labels: int = at_least(1, 5)  # labels kept for an image in stage 2
    shard_tables: bool = False  # each worker keeps the labels of its share of the images: beyond some 100 million

    def check(self) -> None:
        enough = bool(self.num_clusters) and min(self.num_clusters) >= 2
        require(enough, "method.num_clusters", self.num_clusters, "give one or more numbers of 2 or more, e.g. 3000 4000 5000")

    def hints(self, facts: RunFacts) -> Hints:
        steps, most = facts.steps_per_epoch, max(self.num_clusters)
        return Hints(
            chance_loss=(sum(map(math.log, self.num_clusters)) / len(self.num_clusters), "ln K"),
            remedies=one_of(f"method.temperature={self.temperature * 0.5:g}", LOWER_RATE, "fewer method.num_clusters"),
            warnings=told(
                facts.total_steps <= steps
                and not self.train_first_epoch
                and f"the first pass only assigns labels, and {facts.total_steps} steps end in it; use train.epochs=2 or more",
                many_clusters("method.num_clusters", self.num_clusters, most, facts, images_each=2, advised=100),
                *(self._dual_warning(k, steps) for k in self.num_clusters),
            ),
        )

    def _dual_warning(self, k: int, steps: int) -> str:
        rise = (self.dual_learning_rate or 0) * self.constraint_ratio / k  # of an empty cluster's dual in a step
        if not (rise > 0.1 or 0 < rise * steps < 0.1):
            return ""
        near = f"use {default_dual_learning_rate(k, steps):.2g}, or leave it out"
        return f"method.dual_learning_rate={self.dual_learning_rate:g}: {'high' if rise > 0.1 else 'low'} for {k} clusters; {near}"


@register("coke", CoKeConfig)
class CoKe(Method):
    config: CoKeConfig
    paper = "Qian et al. 2022, arXiv:2105.11527"
    needs_full_epochs = True
    begun: Tensor

    def __init__(self, config: CoKeConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        ids = facts.num_ids or facts.num_images
        if ids is None:
            raise ConfigError("data.path: has no end, but coke keeps labels of every image; use a folder, Parquet or tars")
        self.config, self.backbone = config, backbone
        d, heads = config.projection_dim, len(config.num_clusters)
        self.projector = mlp(num_features(backbone), config.projector_hidden, d, config.projector_layers, final_norm="affine")
        self.predictor = mlp(d, config.predictor_hidden, d) if config.predictor_weight else None
        steps, eta = facts.steps_per_epoch, config.dual_learning_rate
        self.clusters = nn.ModuleList(
            OnlineClusters(k, d, config.constraint_ratio, eta or default_dual_learning_rate(k, steps)) for k in config.num_clusters
        )
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))  # whether a first pass is done, also before `continue`
        self.has_labels = False  # as `begun`, without asking the device
        self.register_load_state_dict_post_hook(_note_first_pass)
        self.labels = MemoryBank(ids, (heads,), dtype=torch.int32, fill=-1, sharded=config.shard_tables)
        self.tables = {"labels": self.labels}
        if config.averaging_start_epoch is not None:
            shape, kinds = (heads, config.averaging_labels), ((torch.int32, -1), (torch.float64, 0))
            for name, (dtype, fill) in zip(AVERAGES, kinds, strict=True):
                self.tables[name] = MemoryBank(ids, shape, dtype=dtype, fill=fill, sharded=config.shard_tables)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return one crop of 224 (the single-view run)."""
        return {"global": CropGroup(count=1)}

    def start_epoch(self, progress: Progress) -> None:
        for clusters in self.heads():
            clusters.counts.zero_()

    def first(self, progress: Progress) -> bool:
        """Return whether this is the first pass over the images, which has no epoch t - 1."""
        return progress.epoch == 0 and not self.has_labels

    def has_loss(self, progress: Progress) -> bool:
        return self.config.train_first_epoch or not self.first(progress)

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        first = self.first(progress)
        # one backbone pass per resolution, one pass of each head over all crops
        z = self.projector(views.map_crops(self.backbone))
        x = views.split(l2_normalize(z))  # V times (B, D)
        y = x if self.predictor is None else views.split(l2_normalize(self.predictor(z)))  # likewise
        with autocast_disabled(x[0]):
            large = views.positions("global")
            require(bool(large), "views.global.count", 0, "coke clusters the global crops; use 1 or 2")
            features = torch.stack([x[v].detach() for v in large]).mean(dim=0)
            averaging = self.share(progress) is not None
            new = torch.stack([clusters.assign(features, averaging) for clusters in self.heads()], dim=1)  # (B, heads)
            old = self.labels.read(views.image_ids).long()  # of epoch t - 1: `after_step` writes
            metrics = self.diagnostics(new, old, features, first) if progress.reports else {}
            outputs = {"ids": views.image_ids, "features": features, "labels": new}
            if not self.has_loss(progress):
                return StepOutput(loss=None, metrics=metrics, outputs=outputs)
            labels = list((new if first or self.config.labels_from == "current" else old).unbind(dim=1))
            if averaging and progress.epoch != self.config.averaging_start_epoch:
                labels = self.averaged(views.image_ids, features.dtype)
            losses = [self.loss(clusters, x, y, label, large) for clusters, label in zip(self.heads(), labels, strict=True)]
            return StepOutput(loss=torch.stack(losses).mean(), metrics=metrics, outputs=outputs)

    @torch.no_grad()
    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        """Cluster the whole global batch, equally on every worker."""
        ids, features, new = (torch.cat([part[name] for part in outputs]) for name in ("ids", "features", "labels"))
        share, averages = self.share(progress), dict[str, Tensor]()
        if share is not None:
            labels, weights = (self.tables[name].read(ids) for name in AVERAGES)
            kept = remember(labels, weights, new, share)
            averages = {name: all_gather_rows(values) for name, values in zip(AVERAGES, kept, strict=True)}
        # labels are gathered too: with the last bits of two workers an image could have two
        gathered, features = all_gather_rows(torch.cat([ids[:, None], new], dim=1)), all_gather_rows(features)
        ids, new, first = gathered[:, 0], gathered[:, 1:], first_places(gathered[:, 0])
        counted = (first == torch.arange(len(ids), device=ids.device)).long()  # a repeated image counts at its first place
        for h, clusters in enumerate(self.heads()):
            clusters.update(features, new[:, h], counted, normalize=share is None)
        self.labels.write(ids, new[first])
        for name, values in averages.items():
            self.tables[name].write(ids, values[first])

    def end_epoch(self, progress: Progress) -> None:
        for clusters in self.heads():
            clusters.end_epoch(self.share(progress))
        self.begun.fill_(True)
        self.has_labels = True

    def loss(self, clusters: OnlineClusters, x: list[Tensor], y: list[Tensor], label: Tensor, large: list[int]) -> Tensor:
        """Return the loss of one head.

        Args:
            x, y: projections and predictions of each crop, V times `(B, D)`.
            label: `(B,)` int64, -1 = unknown, or its distribution `(B, K)`.
            large: the crops that take part in clustering.
        """
        c = self.config
        centers = clusters.current if c.centers_from == "current" else clusters.previous
        soft = {v: torch.softmax(F.linear(x[v].detach(), centers) / c.temperature, dim=1) for v in large} if len(x) > 1 else {}
        terms: dict[bool, list[Tensor]] = {True: [], False: []}  # True: of large crops
        for v in range(len(x)):
            others = [q for u, q in soft.items() if u != v]
            target = mixed(label, torch.stack(others).mean(dim=0), c.label_weight) if others else label
            for weight, embedding in ((c.predictor_weight, y[v]), (1 - c.predictor_weight, x[v])):
                if weight:
                    scores = F.linear(embedding, centers) / c.temperature  # (B, K)
                    total = F.cross_entropy(scores, target, ignore_index=-1, reduction="sum")  # unknown labels add nothing
                    terms[v in large].append(weight * total / len(scores))
        parts = [(terms[True], len(large)), (terms[False], len(x) - len(large))]
        return torch.stack([torch.stack(part).sum() / crops for part, crops in parts if crops]).mean()

    def share(self, progress: Progress) -> float | None:
        """Return w of stage 2, the share of this epoch in an average; None in stage 1."""
        start = self.config.averaging_start_epoch
        return None if start is None or progress.epoch < start else 1 / (progress.epoch - start + 1)

    def averaged(self, ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return q of each head `(B, K)` from the weights of labels over the epochs of stage 2; a row of 0 = unknown."""
        labels, weights = (self.tables[name].read(ids) for name in AVERAGES)  # (B, heads, kept)
        q = torch.where(weights > 0, torch.exp(weights / 0.5), 0)
        q = q / q.sum(dim=2, keepdim=True).clamp(min=1)  # exp(w / 0.5) > 1
        return [
            torch.zeros(len(ids), k, dtype=dtype, device=ids.device).scatter_add_(1, labels[:, h].long().clamp(min=0), q[:, h].to(dtype))
            for h, k in enumerate(self.config.num_clusters)
        ]

    def heads(self) -> list[OnlineClusters]:
        return list(self.clusters)  # type: ignore[arg-type]

    @torch.no_grad()
    def diagnostics(self, new: Tensor, old: Tensor, features: Tensor, first: bool) -> Metrics:
        """Return meters over all heads; sizes of clusters, in images, and the share of empty ones for each head and of the last epoch."""
        duals, known = torch.cat([clusters.duals for clusters in self.heads()]), old >= 0
        largest = [count_of_each(labels, k).max() for labels, k in zip(new.unbind(dim=1), self.config.num_clusters, strict=True)]
        metrics: Metrics = {
            "mean_dual": duals.mean(),
            "largest_dual": duals.max(),
            "largest_batch_share": torch.stack(largest).max() / len(new),
            "embedding_std": embedding_std(features),
        }
        if first:
            return metrics
        metrics |= {"known_labels": known.double().mean(), "label_agreement": torch.sum(new == old) / known.sum().clamp(min=1)}
        for h, clusters in enumerate(self.heads()):
            sizes, head = clusters.sizes, f"_{h + 1}" if len(self.heads()) > 1 else ""
            metrics |= {f"smallest_cluster{head}": sizes.min(), f"largest_cluster{head}": sizes.max()}
            metrics[f"clusters_empty_epoch{head}"] = (sizes == 0).double().mean()
        return metrics

    def memory_banks(self) -> dict[str, MemoryBank]:
        return self.tables

    def param_groups(self) -> list[ParamGroup]:
        return param_groups_weight_decay(self.backbone, self.projector, *([self.predictor] if self.predictor is not None else []))

    def cluster_scores(self, images: Tensor) -> Tensor:
        """Return f c' of the first head, without its duals: nearness, not balance."""
        x = l2_normalize(self.projector(self.backbone(images)))
        with autocast_disabled(x):
            return F.linear(x, self.heads()[0].previous)



class OnlineClusters(nn.Module):
    """Online k-means of one head, with a lower bound on the sizes of clusters.

    A step is `assign`, then `update`, with the same values on every worker.

    Args:
        num_clusters: K.
        dim: D.
        constraint_ratio: r' in [0, 1].
        dual_learning_rate: eta.
    """

    previous: Tensor  # (K, D) c', unit rows: centres of epoch t - 1
    current: Tensor  # (K, D) c: running centres of epoch t
    duals: Tensor  # (K,) rho
    counts: Tensor  # (K,) n, images of this epoch so far
    sizes: Tensor  # (K,) images of the last whole epoch

    def __init__(self, num_clusters: int, dim: int, constraint_ratio: float, dual_learning_rate: float) -> None:
        super().__init__()
        self.constraint_ratio, self.dual_learning_rate = constraint_ratio, dual_learning_rate
        centers = l2_normalize(torch.randn(num_clusters, dim))
        self.register_buffer("previous", centers)
        self.register_buffer("current", centers.clone())
        self.register_buffer("duals", torch.zeros(num_clusters))
        self.register_buffer("counts", torch.zeros(num_clusters, dtype=torch.int64))
        self.register_buffer("sizes", torch.zeros(num_clusters, dtype=torch.int64))

    @torch.no_grad()
    def assign(self, features: Tensor, averaging: bool = False) -> Tensor:
        """Return argmax_k f . c_k + rho_k: `(B, D) -> (B,)` int64.

        Args:
            averaging: use the centres of epoch t - 1 (stage 2).
        """
        return torch.addmm(self.duals, features, (self.previous if averaging else self.current).T).argmax(dim=1)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, counted: Tensor | None = None, *, normalize: bool = True) -> None:
        """Update the duals, then the centres. Clusters without an image in the batch keep their centre.

        Args:
            features: f of the whole batch, unit rows `(B, D)`.
            labels: `(B,)` int64.
            counted: `(B,)` int64, 1, or 0 for an image that the batch holds already; None = all 1.
            normalize: scale centres to unit length.
        """
        k = len(self.duals)
        counted = torch.ones_like(labels) if counted is None else counted
        batch = count_of_each(labels, k, counted)  # b
        self.duals -= self.dual_learning_rate * (batch.to(self.duals.dtype) / counted.sum() - self.constraint_ratio / k)
        if self.constraint_ratio < 1:
            self.duals.clamp_(min=0)
        after = self.counts + batch
        centers = (self.counts[:, None] * self.current + sums(features, labels, counted, k)) / after.clamp(min=1)[:, None]
        centers = l2_normalize(centers) if normalize else centers
        self.current.copy_(torch.where(batch[:, None] > 0, centers, self.current))
        self.counts.copy_(after)

    @torch.no_grad()
    def end_epoch(self, share: float | None = None) -> None:
        """Replace the centres of epoch t - 1 by those of epoch t, or, with a share w, by their average (stage 2). Duals stay."""
        if share is not None:
            self.current.copy_(l2_normalize((1 - share) * self.previous + share * l2_normalize(self.current)))
        self.previous.copy_(self.current)
        self.sizes.copy_(self.counts)
        self.counts.zero_()


def default_dual_learning_rate(num_clusters: int, steps_per_epoch: int) -> float:
    """Return eta = K min(3 / steps_per_epoch, 0.05)."""
    return num_clusters * min(3 / steps_per_epoch, 0.05)


def sums(features: Tensor, labels: Tensor, counted: Tensor, num_clusters: int) -> Tensor:
    """Sum the counted features `(B, D)` of every label: `(K, D)`, the same bits on every worker."""
    weights = counted[:, None].to(features.dtype)
    if features.device.type == "cpu":  # on a GPU the order of index_add's sums varies, and the centres of workers would drift apart
        return features.new_zeros(num_clusters, features.shape[1]).index_add_(0, labels, features * weights)
    return features.new_zeros(len(labels), num_clusters).scatter_(1, labels[:, None], weights).T @ features


def _note_first_pass(method: CoKe, _: Any) -> None:
    """Read `begun` from the device: after a state was loaded, and at no other time."""
    method.has_labels = bool(method.begun)


def mixed(label: Tensor, soft: Tensor, label_weight: float) -> Tensor:
    """Return label_weight * label + (1 - label_weight) * soft, `(B, K)`; a row of 0 where the label is unknown.

    Args:
        label: `(B,)` int64, -1 = unknown, or its distribution `(B, K)`.
        soft: `(B, K)`.
    """
    if label.dim() == 1:
        rows = torch.arange(len(label), device=label.device)
        hard = torch.zeros_like(soft)
        hard[rows, label.clamp(min=0)] = (label >= 0).to(soft.dtype)
        label = hard
    known = (label.sum(dim=1, keepdim=True) > 0).to(soft.dtype)
    return label_weight * label + (1 - label_weight) * known * soft


def remember(labels: Tensor, weights: Tensor, new: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Average a new label of share w into an image's labels and weights (stage 2); return both.

    A label that the image has gains w, and the others keep 1 - w of their weights. A label that it does not have takes the
    place of the label of least weight v, and the others keep (1 - w) / (1 - v). A free place has v = 0.

    Args:
        labels, weights: `(..., kept)`.
        new: `(...)`.
        share: w.
    """
    there = (labels == new[..., None]) & (weights > 0)
    known = there.any(dim=-1, keepdim=True)
    place = torch.where(known, there.int().argmax(dim=-1, keepdim=True), weights.argmin(dim=-1, keepdim=True))
    least = torch.where(known, 0, weights.gather(-1, place))
    kept = torch.where(known, weights, weights.scatter(-1, place, 0)) * ((1 - share) / (1 - least).clamp(min=1e-12))
    gained = torch.zeros_like(kept).scatter(-1, place, share)
    return labels.scatter(-1, place, new[..., None].to(labels.dtype)), kept + gained
