"""SimCLR: pick out the other view of the same image among all views of the batch. Chen et al. 2020, arXiv:2002.05709.

SimCLR v2 (Chen et al. 2020, arXiv:2006.10029) has a deeper projector and, as an option, a memory of earlier views. With N
images, two views each, z unit projections `(2N, D)` and s_ij = z_i . z_j / tau (eq. 1; Algorithm 1):

    loss_i = - s_ip + log( sum_{j != i} exp(s_ij)  +  sum_k exp(z_i . m_k / tau) ),     loss = 1/(2N) sum_i loss_i

where p is the other view of i's image. The second sum is there with a memory only: m_k are K unit projections of second
views of earlier batches, made by a slow copy of the network, theta_k <- m theta_k + (1 - m) theta before every step.

Departs:
    The loss is the mean over all 2N views; the original code adds the means of the two views, which is twice as much.
    Batch norm follows every linear layer of the projector, the last one without a shift, as in the original code (the
    paper writes linear layers and ReLU only).
    The memory has no formula and no code in the paper; rows join the negatives, and enter after the step, as in MoCo.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.parts import (
    LOWER_RATE, CropGroup, FeatureQueue, Hints, Masks, Method, MethodConfig, Outputs, ParamGroup, Progress, RunFacts, SearchRange,
    StepOutput, Views, ViewsConfig, at_least, autocast_disabled, contrast_meters, ema, embedding_std, fraction, gather_with_gradient,
    info_nce, info_nce_with_queue, l2_normalize, mlp, num_features, one_of, param_groups_weight_decay, positive, queue_beyond_images, rank,
    register, require, told, upcast_half,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(MethodConfig):
    #: tau
    temperature: float = positive(0.1, SearchRange(0.05, 1.0, "log", reason="small: hard negatives count more; large batches take less"))
    projector_layers: int = at_least(1, 2)  # v2: 3
    projector_hidden: int | None = at_least(1, None)  # None = the width of the features
    projection_dim: int = at_least(2, 128)  # D
    #: K rows over all workers; 0 = v1
    memory_size: int = at_least(0, 0, SearchRange(scale="choice", choices=(0, 4096, 16384, 65536), reason="negatives beyond the batch"))
    memory_momentum: float = fraction(0.999)  # m: how slowly the network of the memory follows

    def hints(self, facts: RunFacts) -> Hints:
        size = self.memory_size
        return Hints(
            chance_loss=(math.log(2 * facts.global_batch_size - 1 + size), f"ln(2N - 1 + {size})" if size else "ln(2N - 1)"),
            remedies=one_of(f"method.temperature={self.temperature * 2:g}", LOWER_RATE, "softer crops and jitter"),
            warnings=told(
                queue_beyond_images("method.memory_size", size, facts, "it holds several copies of each, all taken for negatives")
            ),
        )


@register("simclr", SimCLRConfig)
class SimCLR(Method):
    config: SimCLRConfig
    paper = "Chen et al. 2020, arXiv:2002.05709; v2: arXiv:2006.10029"
    whole_batch_remedy = "method.memory_size adds negatives without a larger batch"

    def __init__(self, config: SimCLRConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        self.config = config
        width = num_features(backbone)
        projector = head(width, config.projector_hidden or width, config.projection_dim, config.projector_layers)
        self.network = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        if config.memory_size:
            self.slow_network = ema.frozen_copy(self.network)
            self.memory = FeatureQueue(config.memory_size, config.projection_dim)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return 2 x 224, colour strength 1 (v1, appendix A)."""
        return {"global": CropGroup(count=2, size=224, scale=(0.08, 1.0), interpolation="bicubic", blur_taps=23)}

    def before_step(self, progress: Progress) -> None:
        if self.config.memory_size:
            ema.update(self.slow_network, self.network, self.config.memory_momentum)

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        x1, x2 = views.pair()
        (both,) = views.by_resolution()
        z = l2_normalize(self.network(both))  # (2n, D): batch norm sees both views
        with autocast_disabled(z):
            logits, partners = self.logits(z)
            if self.config.memory_size:
                settings = (self.memory.rows, self.config.temperature)
                loss, metrics = info_nce_with_queue(logits, partners, z, *settings, meters=progress.reports)
            else:
                loss = info_nce(logits, partners)
                metrics = contrast_meters(logits, partners, self.config.temperature) if progress.reports else {}
            if progress.reports:
                metrics["embedding_std"] = embedding_std(z[: len(x1)].detach())
        if not self.config.memory_size:
            return StepOutput(loss=loss, metrics=metrics)
        with torch.no_grad():
            rows = self.slow_network(x2)
        if progress.reports:
            metrics |= {"queue_age": self.memory.age, "queue_fill": self.memory.fill}
        return StepOutput(loss=loss, metrics=metrics, outputs={"memory": rows})

    def logits(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Compare own views with all candidates.

        Args:
            z: unit projections of the n own images, first views and then second ones, `(2n, D)`.

        Returns:
            s `(2n, 2N)`, with -inf where a view meets itself, and the column of each view's partner p `(2n,)`.
        """
        n = len(z) // 2
        everyone = gather_with_gradient(torch.stack(z.chunk(2), dim=1))  # (N, 2, D): pairs stay together
        total = len(everyone)
        own = torch.arange(n, device=z.device) + rank() * n
        themselves = torch.cat([own, own + total])
        partners = torch.cat([own + total, own])
        candidates = everyone.transpose(0, 1).flatten(0, 1)  # (2N, D)
        s = z @ candidates.T / self.config.temperature
        return s.scatter(1, themselves[:, None], -math.inf), partners

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        if self.config.memory_size:
            self.memory.push(upcast_half(outputs[0]["memory"]))

    def param_groups(self) -> list[ParamGroup]:
        return param_groups_weight_decay(self.network)

    def evaluation_backbone(self) -> nn.Module:
        return self.network.get_submodule("backbone")

    def network_up_to(self, layer: int) -> nn.Module:
        """Return the backbone and the first layers of the projector, norm and ReLU included; SimCLR v2 fine-tunes up to layer 1.

        Raises:
            ConfigError: the projector has fewer layers.
        """
        projector = self.network.get_submodule("projector")
        assert isinstance(projector, nn.Sequential)
        require(0 <= layer <= len(projector), "layer", layer, f"use 0 for the backbone alone, at most {len(projector)}")
        return nn.Sequential(self.evaluation_backbone(), *projector[:layer])



def head(in_features: int, hidden_features: int, out_features: int, layers: int) -> nn.Sequential:
    """Return layers of Linear, batch norm and ReLU, each a module: `(B, in) -> (B, out)`. The last has no ReLU, its norm no shift."""
    flat = mlp(in_features, hidden_features, out_features, layers, hidden_bias=False, bias=False, final_norm="scale", std=0.01)
    return nn.Sequential(*(nn.Sequential(*flat[i : i + 3]) for i in range(0, len(flat), 3)))
