"""VICReg: variance, invariance, covariance. Bardes et al. 2021, arXiv:2105.04906.

With z, z' the projections `(N, D)` of two views of N images, and cov(z) their covariance over the batch (divisor N - 1):

    s(z, z') = mean_n ||z_n - z'_n||^2 / D                                           eq. (5), as in the original code
    v(z)     = mean_d max(0, gamma - sqrt(cov(z)_dd + eps))                          eq. (1), (2)
    c(z)     = sum_{i != j} cov(z)_ij^2 / D                                          eq. (3), (4)
    loss     = lambda s(z, z') + mu (v(z) + v(z')) / 2 + nu (c(z) + c(z'))           eq. (6)

N is the batch of all workers. Each worker makes its own D / W rows of cov and weighs them by W, so that the mean of the
workers' losses is the loss, and the mean of their gradients its gradient.

Departs:
    s is divided by D, and the two v are averaged while the two c are added: the paper's equations have neither, its
    code has both, and its weights 25, 25, 1 belong to the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from methods.parts import (
    CropGroup, Hints, Masks, Method, MethodConfig, Metrics, ParamGroup, Progress, RunFacts, SearchRange, StepOutput, Views, ViewsConfig,
    at_least, autocast_disabled, gather_with_gradient, mlp, num_features, one_of, own_columns, pair_meters, param_groups_weight_decay,
    positive, register, upcast_half, world_size,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VICRegConfig(MethodConfig):
    #: lambda in eq. (6); it and mu must be equal or near for a stable run
    invariance_weight: float = at_least(0, 25.0, SearchRange(1, 50, "log", reason="near the weight of the variance"))
    variance_weight: float = at_least(0, 25.0, SearchRange(1, 50, "log", reason="small: collapse"))  # mu
    covariance_weight: float = at_least(0, 1.0, SearchRange(0.1, 10, "log", reason="large: noise instead of what views share"))  # nu
    target_std: float = positive(1.0)  # gamma in eq. (1)
    variance_epsilon: float = positive(1e-4)  # eps in eq. (2)
    projector_layers: int = at_least(1, 3)
    projector_hidden: int = at_least(1, 8192)
    #: D; the wider the better
    projection_dim: int = at_least(2, 8192, SearchRange(scale="choice", choices=(512, 2048, 8192), reason="wide helps, at a cost of D^2"))

    def hints(self, facts: RunFacts) -> Hints:
        return Hints(remedies=one_of(f"method.variance_weight={self.variance_weight * 2:g}", "a lower optim.base_lr", "a longer warm-up"))


@register("vicreg", VICRegConfig)
class VICReg(Method):
    config: VICRegConfig
    paper = "Bardes et al. 2021, arXiv:2105.04906"
    whole_batch_remedy = "a smaller train.global_batch_size works too: 256 loses little"

    def __init__(self, config: VICRegConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        widths = (num_features(backbone), config.projector_hidden, config.projection_dim)
        self.projector = mlp(*widths, config.projector_layers, bias=False)  # the paper's expander

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return BYOL's augmentation made symmetric: blur and solarisation between those of T and T'."""
        return {
            "global": CropGroup(count=2, size=224, interpolation="bicubic", jitter=(0.4, 0.4, 0.2, 0.1), blur=0.5, solarize=0.1),
        }

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        c = self.config
        # one pass for each view: batch norm sees the statistics of one view at a time
        z = [upcast_half(self.projector(self.backbone(x))) for x in views.pair()]  # each (B, D)
        with autocast_disabled(z[0]):
            invariance = F.mse_loss(z[0], z[1])  # over N and D
            centred = [centre(gather_with_gradient(z_v)) for z_v in z]  # each (N, D): of all workers
            variance = (self.variance(centred[0]) + self.variance(centred[1])) / 2
            covariance = self.covariance(centred[0]) + self.covariance(centred[1])
            loss = c.invariance_weight * invariance + c.variance_weight * variance + c.covariance_weight * covariance
            if not progress.reports:
                return StepOutput(loss=loss)
            terms: Metrics = {"invariance": invariance.detach(), "variance": variance.detach(), "covariance": covariance.detach()}
            return StepOutput(loss=loss, metrics=pair_meters(z[0], z[0], z[1]) | terms)

    def variance(self, centred: Tensor) -> Tensor:
        """Return v of centred projections `(N, D)`."""
        std = ((centred**2).sum(dim=0) / (len(centred) - 1) + self.config.variance_epsilon).sqrt()
        return F.relu(self.config.target_std - std).mean()

    def covariance(self, centred: Tensor) -> Tensor:
        """Return this worker's rows of c, times the number of workers, of centred projections `(N, D)`."""
        rows, first = own_columns(centred)
        cov = rows.T @ centred / (len(centred) - 1)  # (D / W, D)
        beside = (cov**2).sum() - (cov.diagonal(offset=first) ** 2).sum()
        return world_size() * beside / centred.shape[1]

    def param_groups(self) -> list[ParamGroup]:
        return param_groups_weight_decay(self.backbone, self.projector)


def centre(z: Tensor) -> Tensor:
    """Subtract the mean of the rows: `(N, D) -> (N, D)`."""
    return z - z.mean(dim=0)
