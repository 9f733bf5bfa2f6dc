"""NNCLR: the positive of a view is its nearest neighbour among earlier images. Dwibedi et al. 2021, arXiv:2104.14548.

With z = projector(backbone(x)), p = predictor(z), n(v) = v / |v|, and Q a support set of K earlier n(z) `(K, D)`:

    NN(z) = the row of Q nearest to n(z)                                                                (eq. 2)
    A(z, p)_i = - log( exp(NN(z_i) . n(p_i) / tau) / sum_k exp(NN(z_i) . n(p_k) / tau) ),   k = 1..N     (eq. 3)
    loss = 1/(2N) sum_i A(z1, p2)_i + A(z2, p1)_i                                    (symmetric, Algorithm 1)
    n(z1) enters Q, the oldest rows leave it                                          (after the step)

No gradient passes through the neighbours: it reaches the network through the predictions alone.

Departs:
    Rows of the support set are normalised when they enter; so the nearest by cosine is the nearest by distance.
    `column_term` and `own_kind_negatives` (off as in the paper) together make SimCLR's loss of neighbours and predictions:
    predictions repel each other, which helps short runs on small images.
    `warmup_with_views` (off as in the paper): while the support set is not full, the positive is n(z) itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from methods.parts import (
    CropGroup, FeatureQueue, Hints, Masks, Method, MethodConfig, Outputs, ParamGroup, Progress, RunFacts, SearchRange, StepOutput, Views,
    ViewsConfig, all_gather_rows, at_least, autocast_disabled, contrast_meters, embedding_std, gather_with_gradient, info_nce, l2_normalize,
    mlp, num_features, one_of, param_groups_weight_decay, positive, queue_beyond_images, queue_filled_late, rank, register, told,
)  # fmt: skip

LOOKUP_ROWS = 1024  # rows whose neighbours are looked up at a time: 400 MB of cosines with 98,304 rows in the set


@dataclass(frozen=True, kw_only=True)
class NNCLRConfig(MethodConfig):
    #: tau in eq. (3)
    temperature: float = positive(0.1, SearchRange(0.05, 0.5, "log", reason="0.2 on small images"))
    #: K, over all workers
    support_set_size: int = at_least(
        1, 98304, SearchRange(scale="choice", choices=(1024, 4096, 16384, 65536, 98304), reason="larger is better, up to the images")
    )
    projector_hidden: int = at_least(1, 2048)
    projection_dim: int = at_least(2, 256)  # D
    projector_last_norm: bool = True  # batch norm behind the projector's last layer
    predictor_hidden: int = at_least(1, 4096)
    column_term: bool = False  # add the transposed softmax: predictions against the neighbours of all images
    own_kind_negatives: bool = False  # an anchor's candidates are also the other images' rows of its own kind, as in SimCLR
    warmup_with_views: bool = False  # until the support set is full, the positive is the other view, as in SimCLR

    def hints(self, facts: RunFacts) -> Hints:
        size, key, n = self.support_set_size, "method.support_set_size", facts.global_batch_size
        candidates, formula = (2 * n - 1, "ln(2N - 1)") if self.own_kind_negatives else (n, "ln N")
        terms = 2 if self.column_term else 1
        return Hints(
            chance_loss=(terms * math.log(candidates), f"2 {formula}" if self.column_term else formula),
            remedies=one_of("method.warmup_with_views=true", f"method.temperature={self.temperature * 2:g}", "a lower optim.base_lr"),
            warnings=told(
                queue_beyond_images(key, size, facts, "neighbours are mostly the image itself"),
                queue_filled_late(key, size, facts, "and holds noise until then; use fewer rows"),
            ),
        )


@register("nnclr", NNCLRConfig)
class NNCLR(Method):
    config: NNCLRConfig
    paper = "Dwibedi et al. 2021, arXiv:2104.14548"
    whole_batch_remedy = "the support set gives varied positives to a small batch, too"

    labels: Tensor  # (K,), of the rows of the support set; -1 = unknown

    def __init__(self, config: NNCLRConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        widths = (num_features(backbone), config.projector_hidden, config.projection_dim)
        self.projector = mlp(*widths, layers=3, final_norm="affine" if config.projector_last_norm else None)
        self.predictor = mlp(config.projection_dim, config.predictor_hidden, config.projection_dim)
        self.support_set = FeatureQueue(config.support_set_size, config.projection_dim)
        self.register_buffer("labels", torch.full((config.support_set_size,), -1, dtype=torch.int64))

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return 2 x 224, one of BYOL's augmentations each: the first always blurred, the second at times solarised."""
        first = CropGroup(
            count=1, size=224, scale=(0.08, 1.0), interpolation="bicubic", jitter=(0.4, 0.4, 0.2, 0.1), blur=1.0, blur_taps=23
        )
        return {"first": first, "second": replace(first, blur=0.1, solarize=0.2)}

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        z1, z2 = (self.projector(self.backbone(x)) for x in views.pair())  # (n, D) each
        p1, p2 = (l2_normalize(self.predictor(z)) for z in (z1, z2))
        with autocast_disabled(p1):
            u1, u2 = (l2_normalize(z.detach()) for z in (z1, z2))
            (nn1, labels1), (nn2, _) = self.neighbours(u1), self.neighbours(u2)
            logits, positives = self.logits(nn1, p2)
            loss = 0.5 * info_nce(logits, positives) + 0.5 * info_nce(*self.logits(nn2, p1))
            if self.config.column_term:
                loss = loss + 0.5 * info_nce(*self.logits(p2, nn1)) + 0.5 * info_nce(*self.logits(p1, nn2))
            outputs = {"u1": u1, "labels": views.labels}
            if not progress.reports:
                return StepOutput(loss=loss, outputs=outputs)
            metrics = contrast_meters(logits, positives, self.config.temperature)
        known = (views.labels >= 0) & (labels1 >= 0)
        metrics |= {
            "embedding_std": embedding_std(u1),
            "neighbour_agreement": (known & (labels1 == views.labels)).sum() / known.sum().clamp(min=1),  # 0 without labels
            "queue_age": self.support_set.age,
            "queue_fill": self.support_set.fill,
        }
        return StepOutput(loss=loss, metrics=metrics, outputs=outputs)

    @torch.no_grad()
    def neighbours(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest row of the support set for each unit row, and its label: `(n, D) -> (n, D), (n,)`."""
        rows = self.support_set.rows
        nearest = torch.cat([(part @ rows.T).argmax(dim=1) for part in u.split(LOOKUP_ROWS)])
        warming = self.config.warmup_with_views and not self.support_set.full
        return u if warming else rows[nearest], self.labels[nearest]

    def logits(self, anchors: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Compare own anchors with the candidates of all workers.

        Args:
            anchors: unit neighbours or predictions `(n, D)`.
            candidates: unit predictions or neighbours `(n, D)`.

        Returns:
            Cosines / tau `(n, N)`, and the column of each anchor's positive `(n,)`. With `own_kind_negatives` `(n, 2N)`: the
            anchors of all workers follow as candidates, with -inf where an anchor meets itself.
        """
        n = len(anchors)
        own = torch.arange(n, device=anchors.device) + rank() * n
        s = anchors @ gather_with_gradient(candidates).T / self.config.temperature
        if self.config.own_kind_negatives:
            others = anchors @ gather_with_gradient(anchors).T / self.config.temperature
            s = torch.cat([s, others.scatter(1, own[:, None], -math.inf)], dim=1)
        return s, own

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        places = self.support_set.push(outputs[0]["u1"])
        self.labels[places] = all_gather_rows(outputs[0]["labels"])[-len(places) :]

    def param_groups(self) -> list[ParamGroup]:
        return param_groups_weight_decay(self)
