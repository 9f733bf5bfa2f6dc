"""BYOL: predict the projection that a moving average of the network makes of another view. Grill et al. 2020, arXiv:2006.07733.

With views v ~ T and v' ~ T', the online network (backbone f, projector g, predictor q; parameters theta), the target
network (f', g'; parameters xi), p = q(g(f(v))), y = g'(f'(v)), n(x) = x / ||x|| and sg = stop gradient:

    r(p, y) = ||n(p) - n(y)||^2 = 2 - 2 cos(p, y)                                    eq. (2)
    loss    = mean_i r(p_i, sg y'_i) + r(p'_i, sg y_i)                               both directions; in [0, 8]
    theta  <- optimizer(theta, gradient)
    xi     <- tau_k xi + (1 - tau_k) theta                                           eq. (1), with the new theta
    tau_k   = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2                             step k of K

Why it works (sec. 1 and table 5a), by configuration alone, with the online network's features as the measure:

    a random network          method.train_online=False           no gradient; the batches calibrate batch norm
    a fixed random target     method.momentum=1 method.independent_target_init=True
    a slow average            method.momentum=0.99 method.final_momentum=0.99, or the schedule above (the default)
    no average                method.momentum=0 method.final_momentum=0               target = online after every step
    no predictor              method.predictor=False

Departs:
    The target starts as a copy of the online network (the original draws another one); `independent_target_init` draws
    it anew. No classifier is trained beside the network: the kNN figure takes its place.
    With a ViT, the target runs without drop path, as the teachers of the papers on ViTs do; the paper has ResNets only.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from methods.parts import (
    LARGER_BATCH, LOWER_RATE, CropGroup, Hints, Masks, MethodConfig, Metrics, MomentumTeacher, Outputs, ParamGroup, Progress, RunFacts,
    SearchRange, StepOutput, Views, ViewsConfig, at_least, autocast_disabled, ema, faster_average, fraction, l2_normalize, mlp,
    num_features, one_of, pair_meters, param_groups_weight_decay, register, upcast_half,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BYOLConfig(MethodConfig):
    #: tau_base; the shorter the run, the lower
    momentum: float = fraction(0.996, SearchRange(0.9, 0.999, "linear", reason="short runs need a faster target"))
    final_momentum: float = fraction(1.0)  # tau at the last step; equal to momentum: constant
    projector_hidden: int = at_least(1, 4096, SearchRange(scale="choice", choices=(512, 1024, 4096), reason="wide heads help, at a cost"))
    projection_dim: int = at_least(2, 256)  # D
    predictor_hidden: int = at_least(1, 4096)
    predictor: bool = True  # False: the online projection itself is compared, which collapses
    independent_target_init: bool = False  # the target starts from other random weights
    train_online: bool = True  # False: nothing learns, batch norm is calibrated

    def hints(self, facts: RunFacts) -> Hints:
        return Hints(
            chance_loss=(4.0, "cosine 0") if self.train_online else None,
            remedies=one_of(faster_average(self.momentum), LOWER_RATE, "method.predictor=True", LARGER_BATCH),
        )


@register("byol", BYOLConfig)
class BYOL(MomentumTeacher):
    config: BYOLConfig
    paper = "Grill et al. 2020, arXiv:2006.07733"

    def __init__(self, config: BYOLConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        d = config.projection_dim
        self.projector = mlp(num_features(backbone), config.projector_hidden, d, bias=False)
        self.predictor = mlp(d, config.predictor_hidden, d, bias=False) if config.predictor else nn.Identity()
        self.target = ema.teacher_of(self.online())
        if config.independent_target_init:
            redraw(self.target)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return T and T' (appendix B), which differ in blur and solarisation."""
        t = CropGroup(count=1, size=224, interpolation="bicubic", jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0, blur_taps=23)
        return {"first": t, "second": replace(t, blur=0.1, solarize=0.2)}

    def has_loss(self, progress: Progress) -> bool:
        return self.config.train_online

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        pair, online = views.pair(), self.online()
        # one pass for each view: batch norm sees the statistics of one view at a time, in the target too
        z = [online(v) for v in pair]  # each (B, D)
        p = [upcast_half(self.predictor(z_v)) for z_v in z]
        with torch.no_grad():
            y = [upcast_half(self.target(v)) for v in pair]
        with autocast_disabled(p[0]):
            loss = (distance(p[0], y[1]) + distance(p[1], y[0])).mean()
            metrics = self.diagnostics(z[0], p[0], y[1], progress) if progress.reports else {}
        return StepOutput(loss=loss if self.config.train_online else None, metrics=metrics)

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        self.follow(self.target, self.online(), progress)  # eq. (1), with the new theta

    def online(self) -> nn.Sequential:
        """Return backbone and projector as one network, of which the target is an average."""
        return nn.Sequential(OrderedDict(backbone=self.backbone, projector=self.projector))

    @torch.no_grad()
    def diagnostics(self, z: Tensor, p: Tensor, y: Tensor, progress: Progress) -> Metrics:
        """Return the meters of one direction. All `(B, D)`."""
        return pair_meters(z, p, y) | {"momentum": self.momentum(progress)}

    def param_groups(self) -> list[ParamGroup]:
        return param_groups_weight_decay(self.backbone, self.projector, self.predictor)


def distance(p: Tensor, y: Tensor) -> Tensor:
    """Return r(p, y) of eq. (2), without gradient to `y`: both `(B, D) -> (B,)`."""
    squares = (l2_normalize(p) - l2_normalize(y.detach())) ** 2
    return squares.sum(dim=-1)


@torch.no_grad()
def redraw(network: nn.Module) -> None:
    """Draw every parameter tensor anew, in place, from a normal of its own mean and std."""
    for p in network.parameters():
        p.copy_(p.mean() + p.std(correction=0) * torch.randn_like(p))
