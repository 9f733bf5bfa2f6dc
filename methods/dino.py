"""DINO: a student that sees any crop predicts the output of its moving average for a global crop. Caron et al. 2021, arXiv:2104.14294.

With the student (backbone f, head h; parameters theta) and the teacher (f', h'; theta'), G global crops of V crops, scores
s_v = h(f(x_v)) and t_g = h'(f'(x_g)) with K prototypes, centre c, and the temperatures tau_s and tau_t of the epoch:

    q_g    = softmax((t_g - c) / tau_t)                                   no gradient; sharp, and centred against collapse
    p_v    = softmax(s_v / tau_s)
    loss   = 1 / (G (V - 1)) sum_g sum_{v != g} mean_b H(q_g, p_v)         eq. (3); H(q, p) = - sum_k q_k ln p_k
    theta <- optimizer(theta, gradient), the prototypes held still in the first epochs
    theta' <- m theta' + (1 - m) theta                                     with the new theta; m rises to 1 on a cosine
    c      <- 0.9 c + 0.1 mean(t)                                          eq. (4), after the loss, over all workers

H is linear in q, so one log-softmax of each crop meets the sum of the targets of the other global crops.
`teacher_targets=sinkhorn` balances t / tau_t over the batch in the place of the centre (DINOv2, arXiv:2304.07193).

Departs:
    With micro-batches the centre moves once in an optimizer step, by their joint mean, so cutting the batch changes
    nothing (the original has no micro-batches).
    Prototypes and losses are float32 under autocast (the original's scores are fp16): at tau_t = 0.04 the rounding of half
    types would shift the exponents by 0.05.
    ViTs begin with timm's weights, whose CLS token is near 0 (the original draws it at 0.02), and resize their positions for
    the local crops with antialiasing (`backbone.positions=learned-offset`: as the original does).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from methods.parts import (
    LARGER_BATCH, Center, CropGroup, DINOHead, Hints, Masks, MethodConfig, Metrics, MomentumTeacher, Outputs, ParamGroup, Progress,
    RunFacts, SearchRange, StepOutput, Views, ViewsConfig, at_least, autocast_disabled, blunt_targets, cross_view_loss, ema, embedding_std,
    entropy, fraction, l2_normalize, linear_by_epoch, many_clusters, num_features, one_of, param_groups_weight_decay, positive, register,
    sinkhorn, slow_average, told, used_share,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DINOConfig(MethodConfig):
    temperature: float = positive(0.1)  # tau_s
    #: tau_t; 0.07 for long runs, with a rise from 0.04 over 30 epochs
    teacher_temperature: float = positive(0.04, SearchRange(0.02, 0.07, "log", reason="the loss sticks at ln K when it is too high"))
    warmup_teacher_temperature: float = positive(0.04)  # tau_t in epoch 0; it rises to teacher_temperature on a straight line by epoch
    warmup_teacher_temperature_epochs: int = at_least(0, 0)  # 0: teacher_temperature from the start
    #: m at the first step; 0.9995 for long runs with batches of 256 or fewer
    momentum: float = fraction(0.996, SearchRange(0.97, 0.9995, "linear", reason="short runs need a faster teacher"))
    final_momentum: float = fraction(1.0)  # m at the last step; equal to momentum: constant
    center_momentum: float = fraction(0.9, SearchRange(scale="choice", choices=(0.9, 0.99), reason="slower for small batches"))
    teacher_targets: Literal["centering", "sinkhorn"] = "centering"  # sinkhorn: small batches and short runs use all prototypes
    sinkhorn_iterations: int = at_least(1, 3)
    #: K; the original's out_dim
    num_prototypes: int = at_least(2, 65536, SearchRange(scale="choice", choices=(512, 1024, 4096, 65536), reason="more for more data"))
    unit_prototypes: bool = True  # the original's norm_last_layer; False is better for ViT-S, less stable for larger ones
    freeze_prototypes_epochs: float = at_least(0, 1.0)  # epochs in which prototypes neither learn nor decay; more if the loss stays
    projector_layers: int = at_least(1, 3)
    projector_hidden: int = at_least(1, 2048)
    projection_dim: int = at_least(2, 256)  # the bottleneck
    projector_batch_norm: bool = False  # for ResNets

    def hints(self, facts: RunFacts) -> Hints:
        batch, k, frozen = facts.global_batch_size, self.num_prototypes, self.freeze_prototypes_epochs * facts.steps_per_epoch
        hottest = max(self.teacher_temperature, self.warmup_teacher_temperature if self.warmup_teacher_temperature_epochs else 0.0)
        return Hints(
            chance_loss=(math.log(k), "ln K"),
            remedies=one_of(
                f"method.teacher_temperature={self.teacher_temperature / 2:g}",
                "method.momentum=0.99" if self.momentum > 0.99 else "",
                f"method.num_prototypes={max(2, k // 4)}",
                "a lower optim.base_lr",
                f"method.freeze_prototypes_epochs={self.freeze_prototypes_epochs + 1:g}",
                LARGER_BATCH,
            ),
            warnings=told(
                blunt_targets("teacher", hottest, self.temperature, "0.04 to 0.07"),
                slow_average(self.momentum, facts, "teacher"),
                self.teacher_targets == "sinkhorn"
                and k > 64 * batch
                and f"method.teacher_targets=sinkhorn balances {batch} images over {k} prototypes, of which each image can have its own; "
                f"use method.num_prototypes={16 * batch} or fewer",
                many_clusters("method.num_prototypes", k, k, facts, images_each=1, advised=4),
                round(frozen) >= facts.total_steps
                and f"method.freeze_prototypes_epochs={self.freeze_prototypes_epochs:g} is the whole run: the prototypes never learn",
            ),
            settling_steps=(frozen,),
        )


@register("dino", DINOConfig)
class DINO(MomentumTeacher):
    config: DINOConfig
    paper = "Caron et al. 2021, arXiv:2104.14294"
    shards = True

    def __init__(self, config: DINOConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.build_heads(num_features(backbone))
        self.teacher = ema.teacher_of(self.student())
        centers = config.teacher_targets == "centering"
        self.center = Center(config.num_prototypes, config.center_momentum) if centers else None  # Sinkhorn has none
        self.frozen_steps = round(config.freeze_prototypes_epochs * facts.steps_per_epoch)
        if not centers:
            self.whole_batch_remedy = "method.teacher_targets=centering works with micro-batches"

    def build_heads(self, features: int) -> None:
        c = self.config
        self.head = DINOHead(
            features,
            c.num_prototypes,
            hidden_features=c.projector_hidden,
            bottleneck=c.projection_dim,
            layers=c.projector_layers,
            batch_norm=c.projector_batch_norm,
            unit_prototypes=c.unit_prototypes,
        )

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return 2 x 224 + 8 x 96; the global crops differ in blur and solarisation (appendix B, after BYOL)."""
        jitter = (0.4, 0.4, 0.2, 0.1)
        first = CropGroup(count=1, size=224, scale=(0.4, 1.0), interpolation="bicubic", jitter=jitter, blur=1.0)
        return {
            "global": first,
            "global_solarized": replace(first, blur=0.1, solarize=0.2),
            "local": replace(first, role="local", count=8, size=96, scale=(0.05, 0.4), blur=0.5),
        }

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        batch = len(views.image_ids)
        large = views.positions("global")
        with torch.no_grad():
            h = views.of("global").map_crops(self.teacher.get_submodule("backbone"))  # (G B, D)
            t = self.teacher.get_submodule("head")(h)  # (G B, K)
        s = self.head(views.map_crops(self.backbone))  # (V B, K), crop by crop
        with autocast_disabled(s):
            q = self.targets(t, progress)
            codes = dict(zip(large, views.split(q), strict=True))
            loss = cross_view_loss(codes, dict(enumerate(views.split(s))), self.config.temperature)
            metrics = self.diagnostics(q, h[:batch], loss.detach(), progress) if progress.reports else {}
            return StepOutput(loss=loss, metrics=metrics, outputs={"mean": t.mean(dim=0)})

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        self.follow(self.teacher, self.student(), progress)
        if self.center is not None:
            self.center.update([part["mean"] for part in outputs])

    def targets(self, t: Tensor, progress: Progress) -> Tensor:
        """Return the teacher's soft targets q of its crops: `(G B, K) -> (G B, K)`, rows sum to 1, no gradient."""
        if self.center is None:
            return self.balanced(t, self.teacher_temperature(progress))
        return self.center.targets(t, self.teacher_temperature(progress))

    def balanced(self, t: Tensor, temperature: float, present: Tensor | None = None) -> Tensor:
        """Return targets that use all prototypes alike (Sinkhorn)."""
        span = 2.0 if self.config.unit_prototypes else math.inf  # of cosines
        return sinkhorn(t, temperature, self.config.sinkhorn_iterations, span=span, present=present)

    def teacher_temperature(self, progress: Progress) -> float:
        """Return tau_t of this step."""
        c = self.config
        epochs, start = c.warmup_teacher_temperature_epochs, c.warmup_teacher_temperature
        return linear_by_epoch(progress.epoch, epochs=epochs, start=start, end=c.teacher_temperature)

    def student(self) -> nn.Sequential:
        """Return backbone and head as one network, of which the teacher is an average."""
        return nn.Sequential(OrderedDict(backbone=self.backbone, head=self.head))

    def heads(self) -> list[DINOHead]:
        return [self.head]

    @torch.no_grad()
    def diagnostics(self, q: Tensor, h: Tensor, loss: Tensor, progress: Progress) -> Metrics:
        """Return meters of the targets `(G B, K)` and of the teacher's features of one crop `(B, D)`; entropies as fractions of ln K.

        Collapse to one prototype: `teacher_mean_entropy` falls to 0. Collapse to uniform targets: `teacher_entropy` rises to 1.
        """
        own, k = entropy(q).mean(), self.config.num_prototypes
        metrics: Metrics = {
            "teacher_entropy": own / math.log(k),
            "teacher_mean_entropy": entropy(q.mean(dim=0)) / math.log(k),
            "kl": loss - own,  # mean of KL(q_g || p_v) over the pairs: every q_g stands in V - 1 of them
            "prototypes_used": used_share(q),
            "embedding_std": embedding_std(l2_normalize(h)),
            "teacher_temperature": self.teacher_temperature(progress),
            "momentum": self.momentum(progress),
        }
        return metrics if self.center is None else metrics | {"center_norm": self.center.value.norm()}

    def param_groups(self) -> list[ParamGroup]:
        """Return matrices, vectors and prototypes. Biases and norms do not decay; tokens, position table and prototypes do."""
        heads = self.heads()
        prototypes = [p for head in heads for p in head.prototypes.parameters() if p.requires_grad]
        return [
            *param_groups_weight_decay(self.backbone, *(head.mlp for head in heads)),
            ParamGroup(params=prototypes, name="prototypes", frozen_steps=self.frozen_steps),
        ]

    def evaluation_backbone(self) -> nn.Module:
        """Return the teacher's backbone, which is better than the student's all along (sec. 5.2)."""
        return self.teacher.get_submodule("backbone")

    def cluster_scores(self, images: Tensor) -> Tensor:
        """Return the teacher's scores, centred if its targets are: t - c."""
        t: Tensor = self.teacher.get_submodule("head")(self.teacher.get_submodule("backbone")(images))
        return t if self.center is None else t - self.center.value
