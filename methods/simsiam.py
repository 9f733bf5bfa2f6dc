"""SimSiam: predict the projection of the other view, without gradient to it. Chen and He 2020, arXiv:2011.10566.

With views x1, x2 of one image, z = g(f(x)) (backbone f, projector g), p = h(z) (predictor h) and sg = stop gradient:

    D(p, z) = - p / ||p|| . z / ||z||                          eq. (1)
    loss    = D(p1, sg z2) / 2 + D(p2, sg z1) / 2              eq. (4); in [-1, 1], -1 also when all outputs are one vector

No negatives, no queue, no average of the network: BYOL with its momentum at 0.

Departs: nothing known.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from methods.parts import (
    LARGER_BATCH, CropGroup, Hints, Masks, Method, MethodConfig, ParamGroup, Progress, RunFacts, SearchRange, StepOutput, Views,
    ViewsConfig, at_least, autocast_disabled, l2_normalize, mlp, num_features, one_of, pair_meters, register, upcast_half,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SimSiamConfig(MethodConfig):
    projector_layers: int = at_least(1, 3)  # 2 for CIFAR-10
    projector_hidden: int = at_least(1, 2048)
    projection_dim: int = at_least(2, 2048, SearchRange(scale="choice", choices=(128, 512, 2048), reason="small networks need less"))  # D
    #: a bottleneck of D / 4
    predictor_hidden: int = at_least(1, 512, SearchRange(scale="choice", choices=(64, 128, 512), reason="a bottleneck is steadier"))
    constant_predictor_lr: bool = True  # the predictor should follow the newest projections to the end

    def hints(self, facts: RunFacts) -> Hints:
        return Hints(remedies=one_of("a lower optim.base_lr", "a warm-up", LARGER_BATCH, "a narrower method.predictor_hidden"))


@register("simsiam", SimSiamConfig)
class SimSiam(Method):
    config: SimSiamConfig
    paper = "Chen and He 2020, arXiv:2011.10566"

    def __init__(self, config: SimSiamConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        d = config.projection_dim
        # no bias before a batch norm; the last batch norm has neither scale nor shift
        widths = (num_features(backbone), config.projector_hidden, d)
        self.projector = mlp(*widths, config.projector_layers, hidden_bias=False, bias=False, final_norm="plain")
        self.predictor = mlp(d, config.predictor_hidden, d, hidden_bias=False)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return MoCo v2's augmentation (sec. 3)."""
        return {"global": CropGroup(count=2, size=224, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1))}

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        # one pass for each view: batch norm sees the statistics of one view at a time
        z = [self.projector(self.backbone(x)) for x in views.pair()]  # each (B, D)
        p = [upcast_half(self.predictor(z_v)) for z_v in z]
        z = [upcast_half(z_v) for z_v in z]
        with autocast_disabled(p[0]):
            loss = (distance(p[0], z[1]) + distance(p[1], z[0])).mean() / 2
            return StepOutput(loss=loss, metrics=pair_meters(z[0], p[0], z[1]) if progress.reports else {})

    def param_groups(self) -> list[ParamGroup]:
        """Return network and predictor, whose learning rate is constant. All parameters decay and adapt, as in the original."""
        return [
            ParamGroup(params=[*self.backbone.parameters(), *self.projector.parameters()], name="network"),
            ParamGroup(params=list(self.predictor.parameters()), name="predictor", lr_constant=self.config.constant_predictor_lr),
        ]


def distance(p: Tensor, z: Tensor) -> Tensor:
    """Return D(p, z) of eq. (1), without gradient to `z`: both `(B, D) -> (B,)`."""
    products = l2_normalize(p) * l2_normalize(z.detach())
    return -products.sum(dim=-1)
