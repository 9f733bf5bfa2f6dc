"""MoCo v3: match queries to the keys of the other view among those of the batch. Chen, Xie and He 2021, arXiv:2104.02057.

Query network f (backbone, projector), predictor h, key network m = an average of f. With q_v = h(f(x_v)) and k_v = m(x_v),
rows of unit length, of two views v and the N images of all workers (Algorithm 1):

    m_t       = 1 - (1 - m_0) (cos(pi t / T) + 1) / 2                               step t of T
    theta_k  <- m_t theta_k + (1 - m_t) theta_q                                     before the keys are made
    ctr(q, k) = 2 tau * mean_i - log( exp(q_i . k_i / tau) / sum_j exp(q_i . k_j / tau) )
    loss      = ctr(q_1, sg k_2) + ctr(q_2, sg k_1)

The factor 2 tau keeps gradients alike over tau. A ViT's patch projection keeps its random weights, which makes training
stable (sec. 4.2): gradients first grow too large there. A fixed table of positions, twelve heads for ViT-S and the first
weights are settings of the backbone (`positions=sincos`, `heads=12`, `xavier=True`); the recipes have them.

    backbone   projector                        predictor
    ViT        3 layers, batch norm at the end  2 layers, batch norm at the end
    ResNet     2 layers, batch norm at the end  2 layers, none at the end (`predictor_norm=False`)

Batch norm is over all workers and, for each network, over one view at a time; both networks stay in training mode. That at
the end has no scale and shift, and no Linear has a bias.

Departs:
    The warm-up is the loop's: its first step has the rate of the second one, in the original it has 0.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from methods.parts import (
    LARGER_BATCH, LOWER_RATE, CropGroup, Hints, Masks, MethodConfig, MomentumTeacher, ParamGroup, Progress, RunFacts, SearchRange,
    StepOutput, Views, ViewsConfig, all_gather_rows, at_least, autocast_disabled, contrast_meters, ema, embedding_std, faster_average,
    fraction, freeze_patch_projection, info_nce, l2_normalize, mlp, num_features, one_of, positive, rank, register, told,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MoCoV3Config(MethodConfig):
    #: tau; ResNet: 1
    temperature: float = positive(0.2, SearchRange(0.1, 1.0, "log", reason="0.2 for ViTs, 1 for ResNets"))
    #: m_0; the shorter the run, the lower
    momentum: float = fraction(0.99, SearchRange(0.9, 0.999, "linear", reason="short runs need faster keys; 0.996 for 1000 epochs"))
    final_momentum: float = fraction(1.0)  # m at the last step; equal to momentum: constant
    projector_layers: int = at_least(1, 3)  # ResNet: 2
    projector_hidden: int = at_least(1, 4096, SearchRange(scale="choice", choices=(512, 1024, 4096), reason="wide heads help, at a cost"))
    projection_dim: int = at_least(2, 256)  # D
    predictor_layers: int = at_least(1, 2)
    predictor_norm: bool = True  # batch norm at the end of the predictor; ResNet: False
    freeze_patches: bool = True  # a ViT's patch projection keeps its random weights

    def hints(self, facts: RunFacts) -> Hints:
        return Hints(
            chance_loss=(4 * self.temperature * math.log(facts.global_batch_size), "4 tau ln N"),
            remedies=one_of(LOWER_RATE, faster_average(self.momentum), LARGER_BATCH),
            warnings=told(
                facts.total_steps < 2000
                and self.momentum > 0.995
                and f"method.momentum={self.momentum} in {facts.total_steps} steps: the keys hardly follow; use 0.99 or less"
            ),
        )


@register("moco-v3", MoCoV3Config)
class MoCoV3(MomentumTeacher):
    config: MoCoV3Config
    paper = "Chen, Xie and He 2021, arXiv:2104.02057"
    shards = True
    whole_batch_remedy = "the negatives are the other images of the batch; a smaller train.global_batch_size needs less memory"

    def __init__(self, config: MoCoV3Config, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        self.config = config
        d, hidden = config.projection_dim, config.projector_hidden
        if config.freeze_patches:
            freeze_patch_projection(backbone)
        unbiased = partial(mlp, hidden_bias=False, bias=False)
        projector = unbiased(num_features(backbone), hidden, d, config.projector_layers, final_norm="plain")
        self.query = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.key = ema.teacher_of(self.query)
        self.predictor = unbiased(d, hidden, d, config.predictor_layers, final_norm="plain" if config.predictor_norm else None)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return two crops of 224 that differ in blur and solarisation; for ResNets `scale=(0.2, 1)`."""
        first = CropGroup(count=1, size=224, jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0)
        return {"first": first, "second": replace(first, blur=0.1, solarize=0.2)}

    def before_step(self, progress: Progress) -> None:
        self.follow(self.key, self.query, progress)  # before the keys are made

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        pair = views.pair()
        # one pass for each view: batch norm sees one of them at a time
        z = [self.query(x) for x in pair]  # each (n, D)
        q = [l2_normalize(self.predictor(z_v)) for z_v in z]
        with torch.no_grad():
            k = [l2_normalize(self.key(x)) for x in pair]
        with autocast_disabled(q[0]):
            logits, positives = self.logits(q[0], k[1])
            mirrored, _ = self.logits(q[1], k[0])
            tau = self.config.temperature
            loss = 2 * tau * (info_nce(logits, positives) + info_nce(mirrored, positives))
            if not progress.reports:
                return StepOutput(loss=loss)
            metrics = contrast_meters(logits, positives, tau)
        metrics |= {"embedding_std": embedding_std(l2_normalize(z[0].detach())), "momentum": self.momentum(progress)}
        return StepOutput(loss=loss, metrics=metrics)

    def logits(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines / tau of own queries with the keys of all workers `(n, N)`, and the column of each query's key `(n,)`."""
        positives = torch.arange(len(q), device=q.device) + rank() * len(q)
        return q @ all_gather_rows(k).T / self.config.temperature, positives

    def param_groups(self) -> list[ParamGroup]:
        """Return one group: AdamW decays vectors too, and LARS leaves them out by their shape."""
        return [ParamGroup(params=[p for p in self.parameters() if p.requires_grad], name="network")]

    def evaluation_backbone(self) -> nn.Module:
        return self.query.get_submodule("backbone")
