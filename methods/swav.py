"""SwAV: swap predictions between views using online codes. Caron et al. 2020, arXiv:2006.09882.

Codes of the global crops come from balanced optimal transport over the batch (eq. 3); every crop predicts the codes
of the other global crops (eq. 2, multi-crop: eq. 6):

    loss = 1/G sum_g 1/(V-1) sum_{v != g} CE(q_g, z_v C^T / tau)

with G global crops, V crops in all, z unit projections `(B, D)`, C unit prototypes `(K, D)`, q = sinkhorn(z_g C^T).

Departs:
    The queue is gathered over workers and part of the checkpoint (the original keeps one file per worker), so a run
    may go on with another number of workers. Its length must be a multiple of the global batch; it is not rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.parts import (
    ConfigError, CropGroup, FeatureQueue, Hints, Masks, Method, MethodConfig, Metrics, Outputs, ParamGroup, Progress, RunFacts, SearchRange,
    StepOutput, Views, ViewsConfig, all_reduce_sum, at_least, autocast_disabled, code_meters, count_of_each, cross_entropy_sum,
    embedding_std, l2_normalize, many_clusters, mlp, num_features, one_of, positive, register, sinkhorn, told,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SwAVConfig(MethodConfig):
    #: tau in eq. (2)
    temperature: float = positive(0.1, SearchRange(0.05, 0.5, "log", reason="sharpness of the predictions"))
    #: entropy weight in eq. (3); 0.03 or less if the loss sticks at ln K
    epsilon: float = positive(0.05, SearchRange(0.01, 0.1, "log", reason="small: sharper codes; large: the loss sticks at ln K"))
    sinkhorn_iterations: int = at_least(1, 3)
    #: K; about ten times the number of kinds of things in the images
    num_prototypes: int = at_least(2, 3000, SearchRange(scale="choice", choices=(100, 300, 1000, 3000), reason="flat once large enough"))
    projector_layers: int = at_least(1, 2)
    projector_hidden: int = at_least(1, 2048)
    projection_dim: int = at_least(2, 128)  # D
    #: rows per global crop, over all workers; 0 = no queue
    queue_length: int = at_least(0, 0, SearchRange(scale="choice", choices=(0, 256, 1024, 3840), reason="a multiple of the batch"))
    queue_start_epoch: float = at_least(0, 15)  # epochs before the queue begins to fill
    freeze_prototypes_epochs: float = at_least(0, 1.0)  # epochs in which the prototypes do not learn; more than the run has: never
    hard_codes: bool = False  # codes rounded to their largest entry; worse in the paper, a remedy where soft codes stay uniform

    def hints(self, facts: RunFacts) -> Hints:
        batch, k = facts.global_batch_size, self.num_prototypes
        seen = batch + self.queue_length  # features that the codes see
        filled = self.queue_start_epoch * facts.steps_per_epoch + self.queue_length / batch
        return Hints(
            chance_loss=(math.log(k), "ln K"),
            uniform_metric="code_entropy",
            remedies=one_of(
                f"method.epsilon={self.epsilon * 0.5:g}",
                "a lower optim.base_lr or a warm-up",
                f"method.freeze_prototypes_epochs={self.freeze_prototypes_epochs + 1:g}",
                "softer crops and jitter",
            ),
            warnings=told(
                seen < k
                and f"method.num_prototypes={k} is more than the {seen} features that the codes see; "
                f"use {seen} prototypes or fewer, or method.queue_length={math.ceil((k - batch) / batch) * batch}",
                many_clusters("method.num_prototypes", k, k, facts, images_each=10, advised=10),
                self.epsilon > 0.05
                and seen < 512
                and f"method.epsilon={self.epsilon:g} makes codes of {seen} features nearly uniform; use 0.05 or less",
            ),
            settling_steps=(filled if self.queue_length else 0, self.freeze_prototypes_epochs * facts.steps_per_epoch),
        )


@register("swav", SwAVConfig)
class SwAV(Method):
    config: SwAVConfig
    paper = "Caron et al. 2020, arXiv:2006.09882"
    unused_steps: Tensor  # (K,), steps since each prototype was the argmax of any code
    distinct: Tensor  # (), share of prototypes that resemble no earlier one, at the start of the epoch
    whole_batch_remedy = "method.queue_length enlarges the batch that the codes see"

    def __init__(self, config: SwAVConfig, backbone: nn.Module, facts: RunFacts, global_crops: int = 2) -> None:
        super().__init__()
        batch, length = facts.global_batch_size, config.queue_length
        if length % batch:
            near = f"{length // batch * batch} or {(length // batch + 1) * batch}" if length > batch else str(batch)
            raise ConfigError(f"method.queue_length={length}: not a multiple of train.global_batch_size={batch}; use {near}")
        self.config = config
        self.backbone = backbone
        self.projector = mlp(num_features(backbone), config.projector_hidden, config.projection_dim, config.projector_layers)
        self.prototypes = nn.Linear(config.projection_dim, config.num_prototypes, bias=False)
        self.queues = nn.ModuleList(FeatureQueue(length, config.projection_dim) for _ in range(global_crops if length else 0))
        self.register_buffer("unused_steps", torch.zeros(config.num_prototypes, dtype=torch.int64))
        self.register_buffer("distinct", torch.ones(()))
        self.steps_per_epoch = facts.steps_per_epoch
        self.queue_start = round(config.queue_start_epoch * facts.steps_per_epoch)
        self.frozen_steps = round(config.freeze_prototypes_epochs * facts.steps_per_epoch)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return 2 x 224 + 6 x 96 (appendix A)."""
        local = CropGroup(role="local", count=6, size=96, scale=(0.05, 0.14))
        return {"global": CropGroup(count=2, size=224, scale=(0.14, 1.0)), "local": local}

    def start_epoch(self, progress: Progress) -> None:
        self.distinct.fill_(distinct_share(self.prototypes.weight))  # K^2 D products, fewer than the scores of an epoch

    def before_step(self, progress: Progress) -> None:
        with torch.no_grad():
            self.prototypes.weight.copy_(l2_normalize(self.prototypes.weight))  # rows of C: unit norm

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        # one backbone pass per resolution, one pass of the projector over all crops
        z = views.split(l2_normalize(self.projector(views.map_crops(self.backbone))))  # V times (B, D)
        with autocast_disabled(z[0]):
            scores = [self.prototypes(z_v) for z_v in z]  # V times (B, K)
            global_crops = views.positions("global")
            codes = {g: self.codes(i, scores[g]) for i, g in enumerate(global_crops)}  # eq. (3)
            others = [[q for g, q in codes.items() if g != v] for v in range(len(scores))]  # eq. (6)
            terms = [cross_entropy_sum(q, s, self.config.temperature) for q, s in zip(others, scores, strict=True) if q]
            loss = torch.stack(terms).sum() / sum(map(len, others))
            unit = [z[g].detach() for g in global_crops]
            metrics = self.diagnostics(codes[global_crops[0]], unit[0]) if progress.reports else {}
            return StepOutput(loss=loss, metrics=metrics, outputs={"z": unit, "used": self.used(codes)})

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        if self.config.queue_length and progress.step >= self.queue_start:
            for queue, z in zip(self.crop_queues(), outputs[0]["z"], strict=True):
                queue.push(z)
        self.unused_steps.add_(1).masked_fill_(outputs[0]["used"], 0)

    def crop_queues(self) -> list[FeatureQueue]:
        """Return the queue of each global crop; none without a queue."""
        return list(self.queues)  # type: ignore[arg-type]

    @torch.no_grad()
    def codes(self, crop: int, scores: Tensor) -> Tensor:
        """Return balanced soft assignments of a global crop, eq. (3): `(B, K) -> (B, K)`, rows sum to 1."""
        batch = len(scores)
        queues = self.crop_queues()
        if queued := bool(queues) and queues[crop].full:
            scores = torch.cat([self.prototypes(queues[crop].share), scores])  # (L / W + B, K)
        codes = sinkhorn(scores, self.config.epsilon, self.config.sinkhorn_iterations, span=2.0)  # of cosines
        if queued:
            codes = codes[-batch:].clone()  # frees the queue's rows
        if self.config.hard_codes:
            best = codes.argmax(dim=1, keepdim=True)
            codes.zero_().scatter_(1, best, 1.0)
        return codes

    @torch.no_grad()
    def used(self, codes: dict[int, Tensor]) -> Tensor:
        """Return whether each prototype is the argmax of a code, on any worker: `(K,)`."""
        assigned = torch.cat([q.argmax(dim=1) for q in codes.values()])
        return all_reduce_sum(count_of_each(assigned, self.config.num_prototypes)) > 0

    @torch.no_grad()
    def diagnostics(self, codes: Tensor, z: Tensor) -> Metrics:
        """Return the meters of one global crop, and of the prototypes; entropies as fractions of ln K."""
        metrics: Metrics = code_meters(codes) | {
            "prototypes_dead": (self.unused_steps >= self.steps_per_epoch).double().mean(),  # unused for an epoch
            "prototypes_distinct": self.distinct,
            "embedding_std": embedding_std(z),
        }
        for queue in self.crop_queues()[:1]:
            metrics["queue_fill"] = queue.fill
        return metrics

    def param_groups(self) -> list[ParamGroup]:
        """Return the network and the prototypes. All parameters adapt and decay, biases and BN too, as in the original."""
        prototypes = list(self.prototypes.parameters())
        rest = [*self.backbone.parameters(), *self.projector.parameters()]
        return [
            ParamGroup(params=rest, name="network"),
            ParamGroup(params=prototypes, name="prototypes", frozen_steps=self.frozen_steps),
        ]

    def cluster_scores(self, images: Tensor) -> Tensor:
        """Return cosines z C^T with the prototypes."""
        z = l2_normalize(self.projector(self.backbone(images)))
        with autocast_disabled(z):
            return z @ l2_normalize(self.prototypes.weight).T  # the optimizer has just moved them off the sphere



@torch.no_grad()
def distinct_share(prototypes: Tensor) -> Tensor:
    """Return the share of rows of `(K, D)` whose cosine with every earlier row is at most 0.99: collapsed prototypes count once."""
    unit = l2_normalize(prototypes)
    first, copies = 0, unit.new_zeros(())
    for rows in unit.split(max(1, (1 << 24) // len(unit))):
        similar = (rows @ unit[: first + len(rows)].T).tril(first - 1) > 0.99  # row i beside rows 0 to i - 1
        copies += similar.any(dim=1).sum()
        first += len(rows)
    return 1 - copies / len(unit)
