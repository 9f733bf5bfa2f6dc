"""MSN: a crop with missing patches is assigned to prototypes like the whole image. Assran et al. 2022, arXiv:2204.07141.

With the anchor encoder f (ViT, head; parameters theta), the target encoder f' (theta'), M anchors x_m and one target x' of
each image, prototypes q_k, and unit rows everywhere (cos):

    p_m     = softmax(cos(f(x_m without its masked patches), q) / tau)
    p+      = softmax(cos(f'(x'), q) / tau+)                       no gradient; sharper, tau+ < tau
    p+     <- sinkhorn(p+) over all workers                        if `sinkhorn`: every prototype gets the same mass
    pbar    = mean of p_m over anchors, images and workers
    loss    = mean_m mean_b H(p+, p_m) + lambda (ln K - H(pbar))   eq. (1); the second term is me-max
    theta, q <- optimizer(theta, q; gradient)
    theta'  <- m_t theta' + (1 - m_t) theta                        m_t from m_0 to 1 on a straight line

H(a, b) = - sum_k a_k ln b_k. Anchors are the global crops (the paper's random masks) and the local ones (its focal masks). Of
global ones, patches drawn at random are dropped before the first block, so they cost nothing and there is no mask token.
Each group is one pass of the encoder, and the head's batch norm sees one group at a time. Prototypes have a gradient through
their normalisation, from the anchors only, are not decayed and not clipped.

All schedules end at 1.25 times the run, so training stops at 80 % of them (`schedule_stretch`; for learning rate and weight
decay `optim.schedule_stretch`).

Departs:
    Every image has a mask of its own (the original draws one for all images of a worker: `shared_mask=True`).
    Gradients of the prototypes are averaged over workers like all others; the original adds them up, which changes AdamW's steps little.
    Learning rate and weight decay are those of one step earlier; the original counts its first step as done.
    Target and masked anchors may have any sizes: which crops are masked follows from their role, not from their width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from methods.parts import (
    LARGER_BATCH, LOWER_RATE, ConfigError, CropGroup, Hints, Masks, MethodConfig, Metrics, MomentumTeacher, Outputs, ParamGroup, Progress,
    RunFacts, SearchRange, StepOutput, ViT, Views, ViewsConfig, at_least, autocast_disabled, below_one, blunt_targets, code_meters,
    draw_seed, ema, embedding_std, entropy, fraction, gather_with_gradient, hidden_by, l2_normalize, many_clusters, mlp, num_kept,
    num_patches, one_of, param_groups_weight_decay, positive, random_keep, register, require, require_vit, sinkhorn, slow_average, told,
    trunc_normal_linears, upcast_half,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MSNConfig(MethodConfig):
    #: tau
    temperature: float = positive(0.1, SearchRange(0.05, 0.2, "log", reason="sharpness of the predictions"))
    #: tau+; the original writes it as a power 1/T of softmax(cos / tau), T = tau+ / tau = 0.25
    target_temperature: float = positive(0.025, SearchRange(0.01, 0.05, "log", reason="without sharpening the targets collapse"))
    final_target_temperature: float | None = positive(None)  # tau+ rises or falls to it on a straight line; None = constant
    sinkhorn: bool = True  # balance the targets over the prototypes; without it, give me_max a weight of 5
    sinkhorn_iterations: int = at_least(1, 3)
    #: lambda
    me_max: float = at_least(0, 1.0, SearchRange(0.5, 10.0, "log", reason="1 with Sinkhorn, 5 without"))
    #: K
    num_prototypes: int = at_least(2, 1024, SearchRange(scale="choice", choices=(64, 128, 256, 1024, 2048), reason="few hurt, many do not"))
    train_prototypes: bool = True
    label_smoothing: float = below_one(0.0)  # s: predictions are (1 - s) p + s / K
    projector_layers: int = at_least(1, 3)
    projector_hidden: int = at_least(1, 2048)
    projection_dim: int = at_least(2, 256)
    #: mean share of its patches that a masked crop loses; the larger the ViT, the more
    mask_ratio: float = below_one(0.15, SearchRange(0.0, 0.7, "linear", reason="0.15 for ViT-S, 0.3 for ViT-B, 0.7 for ViT-L"))
    mask_spread: float = 0.0  # the share is uniform in mask_ratio +- mask_spread, one for all crops of a step
    mask_probability: float = fraction(1.0)  # of a step having masks at all
    shared_mask: bool = False  # one mask for all images of a crop
    #: m_0; the shorter the run, the lower
    momentum: float = fraction(0.996, SearchRange(0.95, 0.999, "linear", reason="short runs need a faster target"))
    final_momentum: float = fraction(1.0)  # m at the end of the schedule; equal to momentum: constant
    schedule_stretch: float = positive(1.25)  # where the schedules of momentum and tau+ end, in runs

    def check(self) -> None:
        most = min(self.mask_ratio, 1 - self.mask_ratio)
        require(0 <= self.mask_spread <= most, "method.mask_spread", self.mask_spread, f"use 0 to {most:g} with this mask_ratio")

    def hints(self, facts: RunFacts) -> Hints:
        hottest = max(self.target_temperature, self.final_target_temperature or 0.0)
        large = facts.num_features is not None and facts.num_features >= 1024
        return Hints(
            chance_loss=(math.log(self.num_prototypes), "ln K"),
            uniform_metric="code_entropy",
            remedies=one_of(
                f"method.target_temperature={self.target_temperature / 2:g}",
                LOWER_RATE,
                "" if self.sinkhorn else "method.sinkhorn=True",
                LARGER_BATCH,
            ),
            warnings=told(
                blunt_targets("target", hottest, self.temperature, f"{self.temperature / 4:g}"),
                not self.sinkhorn
                and self.me_max < 3
                and f"method.me_max={self.me_max:g} without Sinkhorn leaves prototypes unused; use 5",
                large
                and self.mask_ratio < 0.5
                and f"method.mask_ratio={self.mask_ratio:g} with a ViT this large gave NaN in the paper; use 0.5 or more",
                slow_average(self.momentum, facts, "target"),
                many_clusters("method.num_prototypes", self.num_prototypes, self.num_prototypes, facts, images_each=1, advised=10),
            ),
        )


class Encoder(nn.Module):
    """A ViT on the kept patches, and a head on its CLS token: `(B, 3, H, W) -> (B, out)`."""

    def __init__(self, backbone: ViT, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.head(self.backbone.tokens(images, keep=keep).cls)  # type: ignore[no-any-return]


@register("msn", MSNConfig)
class MSN(MomentumTeacher):
    config: MSNConfig
    paper = "Assran et al. 2022, arXiv:2204.07141"
    shards = True
    whole_batch_remedy = "the prototypes are balanced over the batch; train.gradient_checkpointing needs less memory"

    def __init__(self, config: MSNConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        self.config = config
        vit = require_vit(backbone, "MSN")
        d = config.projection_dim
        head = mlp(vit.embed_dim, config.projector_hidden, d, config.projector_layers, activation=nn.GELU)
        trunc_normal_linears(head)
        self.anchor = Encoder(vit, head)
        self.target = ema.teacher_of(self.anchor)
        rows = torch.empty(config.num_prototypes, d).uniform_(-(d**-0.5), d**-0.5)
        self.prototypes = nn.Parameter(rows, requires_grad=config.train_prototypes)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return a target and a masked anchor of 224, and 10 focal anchors of 96 (sec. 5)."""
        random = CropGroup(count=1, size=224, scale=(0.3, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur=0.5)
        focal = replace(random, role="local", count=10, size=96, scale=(0.05, 0.3))
        return {"target": replace(random, role="target"), "random": random, "focal": focal}

    def draw_masks(self, views: Views, progress: Progress) -> Masks:
        """Draw the patches that each group of global crops keeps, `(V_g B, n)`, crop by crop; no entry where none is missing."""
        c, generator = self.config, progress.generator
        draws = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        ratio = c.mask_ratio + c.mask_spread * (2 * draws[0] - 1)
        if ratio == 0 or draws[1] >= c.mask_probability:
            return []
        ids, masks = torch.zeros_like(views.image_ids) if c.shared_mask else views.image_ids, []
        for name, stack in views.of("global").stacks.items():
            patches = num_patches(self.anchor.backbone, stack.shape[-1])
            masks.append(random_keep(ids, patches, num_kept(patches, ratio), seed=draw_seed(generator), crops=views.counts[name]))
        return masks

    def hidden_patches(self, views: Views, masks: Masks) -> dict[int, Tensor]:
        stacks = zip(masks, views.of("global").stacks.values(), strict=bool(masks))
        hidden = [hidden_by(keep, num_patches(self.anchor.backbone, images.shape[-1])) for keep, images in stacks]
        return dict(zip(views.positions("global"), (crop for rows in hidden for crop in views.split(rows)), strict=bool(masks)))

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        masks = self.draw_masks(views, progress) if masks is None else masks
        kept = dict(zip(views.of("global").stacks, masks, strict=bool(masks)))
        targets, anchors = views.of("target").crops, views.of("global", "local").stacks
        if len(targets) != 1 or not anchors:
            counts = ", ".join(f"views.{name}.count={count}" for name, count in views.counts.items())
            raise ConfigError(f"{counts}: MSN compares anchors with one target; use a group target of 1 crop, and random or focal ones")
        with torch.no_grad():
            z_target = upcast_half(self.target(targets[0]))  # (B, D)
        z = upcast_half(torch.cat([self.anchor(stack, kept.get(name)) for name, stack in anchors.items()]))  # (M B, D)
        with autocast_disabled(z):
            log_p = self.log_predictions(z)  # (M B, K)
            codes = self.targets(z_target, progress)  # (B, K)
            ce = -(codes * log_p.unflatten(0, (-1, len(codes)))).sum(dim=-1).mean()
            me_max = math.log(self.config.num_prototypes) - entropy(mean_prediction(log_p))
            loss = ce + self.config.me_max * me_max
            if not progress.reports:
                return StepOutput(loss=loss)
            metrics = self.diagnostics(codes, log_p.detach(), z_target, progress)
            metrics |= {"cross_entropy": ce.detach(), "me_max": me_max.detach()}
            if masks:
                metrics["tokens"] = float(masks[0].shape[1])
            return StepOutput(loss=loss, metrics=metrics)

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        self.follow(self.target, self.anchor, progress)

    def log_predictions(self, z: Tensor) -> Tensor:
        """Return ln p of projections of any length: `(n, D) -> (n, K)`."""
        k, s = self.config.num_prototypes, self.config.label_smoothing
        log_p = torch.log_softmax(self.cosines(z) / self.config.temperature, dim=1)
        return log_p if s == 0 else ((1 - s) * log_p.exp() + s / k).log()

    @torch.no_grad()
    def targets(self, z: Tensor, progress: Progress) -> Tensor:
        """Return p+, the soft assignments of the targets: `(B, D) -> (B, K)`, rows sum to 1."""
        power = self.config.temperature / self.target_temperature(progress)  # 1 / T
        log_p = torch.log_softmax(self.log_predictions(z) * power, dim=1)
        if not self.config.sinkhorn:
            return log_p.exp()
        span = 2 / self.target_temperature(progress) + math.log(self.config.num_prototypes)  # of cosines / tau+, less their logsumexp
        return sinkhorn(log_p, 1.0, self.config.sinkhorn_iterations, span=span)

    def cosines(self, z: Tensor) -> Tensor:
        """Return cosines of projections with the prototypes: `(n, D) -> (n, K)`."""
        return l2_normalize(z) @ l2_normalize(self.prototypes).T

    def target_temperature(self, progress: Progress) -> float:
        """Return tau+ of this step."""
        start, end = self.config.target_temperature, self.config.final_target_temperature
        return start if end is None else self.scheduled(progress, start, end)

    def momentum(self, progress: Progress) -> float:
        """Return m_t."""
        return self.scheduled(progress, self.config.momentum, self.config.final_momentum)

    def scheduled(self, progress: Progress, start: float, end: float) -> float:
        """Return the value of this step on a straight line from `start` to `end`, reached at `schedule_stretch` times the run."""
        return start + (end - start) * min(1.0, progress.step / (progress.total_steps * self.config.schedule_stretch))

    @torch.no_grad()
    def diagnostics(self, codes: Tensor, log_p: Tensor, z_target: Tensor, progress: Progress) -> Metrics:
        """Return meters of this worker's targets and predictions; entropies as fractions of ln K.

        Collapse to one prototype: `mean_entropy` and `prototypes_used` fall to 0. Collapse to uniform: `code_entropy` and
        `prediction_entropy` rise to 1, `code_max` falls to 1 / K.
        """
        p, most = log_p.exp(), math.log(self.config.num_prototypes)
        return code_meters(codes) | {
            "prediction_entropy": entropy(p).mean() / most,
            "mean_entropy": entropy(p.mean(dim=0)) / most,
            "embedding_std": embedding_std(l2_normalize(z_target)),
            "momentum": self.momentum(progress),
        }

    def param_groups(self) -> list[ParamGroup]:
        """Return matrices, vectors and prototypes. Tokens and position table decay; prototypes neither decay nor count in clipping."""
        groups = param_groups_weight_decay(self.anchor)
        if self.config.train_prototypes:
            groups.append(ParamGroup(params=[self.prototypes], name="prototypes", decay=False, adapt=False, clip=False))
        return groups

    def evaluation_backbone(self) -> nn.Module:
        """Return the target encoder's backbone."""
        return self.target.backbone

    def cluster_scores(self, images: Tensor) -> Tensor:
        """Return cosines of the target encoder's projections with the prototypes."""
        z = upcast_half(self.target(images))
        with autocast_disabled(z):
            return self.cosines(z)



def mean_prediction(log_p: Tensor) -> Tensor:
    """Return pbar, over the rows of all workers: `(n, K) -> (K,)`. Every worker must bring n rows.

    With the gather's gradient each worker has d loss / d pbar at its own rows, so parameter gradients that are averaged
    over workers are those of one process.
    """
    return gather_with_gradient(log_p.exp().mean(dim=0, keepdim=True)).mean(dim=0)
