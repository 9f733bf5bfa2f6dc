"""Barlow Twins: make the correlation of two views' projections the identity. Zbontar et al. 2021, arXiv:2103.03230.

With z^A, z^B the projections `(N, D)` of two views of N images, each dimension brought to mean 0 and variance 1 over the
batch, and C their cross-correlation:

    C_ij = sum_n z^A_ni z^B_nj / N                                           eq. (2)
    loss = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2             eq. (1): invariance, redundancy reduction

N is the batch of all workers. Each worker makes its own D / W rows of C and weighs them by W, so that the mean of the
workers' losses is the loss, and the mean of their gradients its gradient.

Departs: nothing known. The original's first code scaled the loss; its later one gives biases and norms a learning rate of
0.0048 beside 0.2 instead, as here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.parts import (
    LOWER_RATE, CropGroup, Hints, Masks, Method, MethodConfig, Metrics, ParamGroup, Progress, RunFacts, SearchRange, StepOutput, Views,
    ViewsConfig, at_least, autocast_disabled, gather_with_gradient, mlp, num_features, one_of, own_columns, pair_meters,
    param_groups_weight_decay, positive, register, upcast_half, world_size,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BarlowTwinsConfig(MethodConfig):
    #: lambda in eq. (1)
    redundancy_weight: float = at_least(0, 0.005, SearchRange(0.001, 0.05, "log", reason="smaller for more dimensions"))
    projector_layers: int = at_least(1, 3)
    projector_hidden: int = at_least(1, 8192)
    #: D; the wider the better
    projection_dim: int = at_least(2, 8192, SearchRange(scale="choice", choices=(512, 2048, 8192), reason="wide helps, at a cost of D^2"))
    vector_lr_scale: float = positive(0.024)  # biases and norms: 0.0048 / 0.2

    def hints(self, facts: RunFacts) -> Hints:
        return Hints(
            chance_loss=(float(self.projection_dim), "D"),
            remedies=one_of(f"method.redundancy_weight={self.redundancy_weight / 2:g}", LOWER_RATE),
        )


@register("barlow-twins", BarlowTwinsConfig)
class BarlowTwins(Method):
    config: BarlowTwinsConfig
    paper = "Zbontar et al. 2021, arXiv:2103.03230"
    whole_batch_remedy = "a smaller train.global_batch_size works too: 256 loses little"

    def __init__(self, config: BarlowTwinsConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        widths = (num_features(backbone), config.projector_hidden, config.projection_dim)
        self.projector = mlp(*widths, config.projector_layers, hidden_bias=False, bias=False)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return BYOL's T and T' (appendix A), which differ in blur and solarisation."""
        t = CropGroup(count=1, size=224, interpolation="bicubic", jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0)
        return {"first": t, "second": replace(t, blur=0.1, solarize=0.2)}

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        # one pass for each view: batch norm sees the statistics of one view at a time
        z = [upcast_half(self.projector(self.backbone(v))) for v in views.pair()]  # each (B, D)
        with autocast_disabled(z[0]):
            a, b = (standardize(gather_with_gradient(z_v)) for z_v in z)  # each (N, D): of all workers
            rows, first = own_columns(a)
            c = rows.T @ b / len(b)  # (D / W, D): this worker's rows of C
            diagonal = c.diagonal(offset=first)
            invariance = ((1 - diagonal) ** 2).sum()
            redundancy = (c**2).sum() - (diagonal**2).sum()
            loss = world_size() * (invariance + self.config.redundancy_weight * redundancy)
            return StepOutput(loss=loss, metrics=self.diagnostics(z[0], z[1], a, b, redundancy) if progress.reports else {})

    @torch.no_grad()
    def diagnostics(self, z1: Tensor, z2: Tensor, a: Tensor, b: Tensor, redundancy: Tensor) -> Metrics:
        """Return meters of the projections `(B, D)`, and of C: the mean of its diagonal, and of the squares beside it."""
        d = a.shape[1]
        return pair_meters(z1, z1, z2) | {"correlation": (a * b).mean(), "redundancy": world_size() * redundancy / (d * (d - 1))}

    def param_groups(self) -> list[ParamGroup]:
        return param_groups_weight_decay(self.backbone, self.projector, vector_lr_scale=self.config.vector_lr_scale)


def standardize(z: Tensor) -> Tensor:
    """Bring every dimension to mean 0 and biased variance 1 over the rows: `(N, D) -> (N, D)`. The paper's batch norm, eps 1e-5."""
    return F.batch_norm(z, None, None, training=True, eps=1e-5)
