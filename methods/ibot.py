"""iBOT: DINO, and a student that names hidden patches as its teacher names them when it sees them. Zhou et al. 2022, arXiv:2111.07832.

With the student and the teacher of DINO (which see below), G global crops u_g of N patches, masks m_gn in {0, 1} and a learned
mask token, which stands for the masked patches of the crops that the student is given; patches have scores like CLS has, by the
same head or one of their own:

    L_cls   = DINO's loss; the student's global crops are masked
    q_gn    = softmax((t_gn - c2) / tau_t2)                the teacher's scores of patch n, from the whole crop; no gradient
    p_gn    = softmax(s_gn / tau_s)                        the student's scores of the same patch
    L_patch = mean_g mean_b sum_n m_gn H(q_gn, p_gn) / max(1, sum_n m_gn)
    loss    = lambda_1 L_cls + lambda_2 L_patch
    c2     <- 0.9 c2 + 0.1 mean(t_gn)                      over all patches, masked or not, of all workers

A global crop is masked with probability 1/2; then a share of its patches, uniform in 0.3 +- 0.2, is hidden: in blocks, or anywhere
(`mask_shape=random`). Local crops are never masked, and only their CLS is compared.

Scores are linear in the unit projections z, so the mean score of all patches is the score of the mean z, and only masked patches meet
the prototypes. Their number is filled up to the most that it can be: shapes do not depend on the masks.

Departs:
    As DINO does. The masks follow the image, the same on any number of workers.
    Without local crops the loss is divided by the number of pairs, as with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import torch
from torch import Tensor, nn

from methods.dino import DINO, DINOConfig
from methods.parts import (
    Center, ConfigError, DINOHead, Hints, Masks, Metrics, Outputs, ParamGroup, Progress, RunFacts, SearchRange, StepOutput, ViT, Views,
    ViewsConfig, at_least, autocast_disabled, block_mask, cross_entropy_sum, cross_view_loss, draw_seed, entropy, fraction,
    linear_by_epoch, masked_patches, new_mask_token, num_patches_of_side, positive, random_mask, register, require, require_vit, told,
    unpack, upcast_half,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IBOTConfig(DINOConfig):
    #: tau_t
    teacher_temperature: float = positive(0.07, SearchRange(0.02, 0.07, "log", reason="the loss sticks at ln K when it is too high"))
    warmup_teacher_temperature_epochs: int = at_least(0, 30)  # of tau_t and tau_t2
    patch_teacher_temperature: float | None = positive(None)  # tau_t2; None = teacher_temperature
    warmup_patch_teacher_temperature: float | None = positive(None)  # None = warmup_teacher_temperature
    #: K
    num_prototypes: int = at_least(2, 8192, SearchRange(scale="choice", choices=(512, 1024, 4096, 8192), reason="more for more data"))
    unit_prototypes: bool = False
    shared_head: bool = True  # one head for CLS and patches; their centres stay apart
    num_patch_prototypes: int | None = at_least(2, None)  # K of a patch head of its own; None = num_prototypes
    patch_projection_dim: int | None = at_least(2, None)  # bottleneck of a patch head of its own; None = projection_dim
    cls_weight: float = at_least(0, 1.0)  # lambda_1
    patch_weight: float = at_least(0, 1.0, SearchRange(0.5, 2.0, "log", reason="the share of the patches in the loss"))  # lambda_2
    mask_shape: Literal["block", "random"] = "block"
    #: mean share of its patches that a masked crop hides
    mask_ratio: float = fraction(0.3, SearchRange(0.15, 0.5, "linear", reason="more makes the task harder"))
    mask_spread: float = fraction(0.2)  # the share is uniform in mask_ratio +- mask_spread
    mask_probability: float = fraction(0.5, SearchRange(0.3, 1.0, "linear", reason="the share of the crops that are masked"))
    mask_start_epoch: float = at_least(0, 0.0)  # no masks before; the rise of tau_t2 waits with them

    def check(self) -> None:
        super().check()
        most = min(self.mask_ratio, 1 - self.mask_ratio)
        require(self.mask_spread <= most, "method.mask_spread", self.mask_spread, f"use 0 to {most:g} with this mask_ratio")
        if self.shared_head:
            for key in ("num_patch_prototypes", "patch_projection_dim"):
                require(getattr(self, key) is None, f"method.{key}", getattr(self, key), "leave it out, or use method.shared_head=False")
            remedy = "use False with ViTs, or method.shared_head=False: places of patches that are not masked would count"
            require(not self.projector_batch_norm, "method.projector_batch_norm", self.projector_batch_norm, remedy)

    def hints(self, facts: RunFacts) -> Hints:
        hints, k = super().hints(facts), self.num_patch_prototypes or self.num_prototypes
        patches = self.patch_weight * self.mask_probability * math.log(k)  # crops without masks count 0
        most = self.mask_ratio + self.mask_spread
        hidden = most > 0.75 and f"method.mask_ratio={self.mask_ratio:g} +- {self.mask_spread:g}: little is left to see; use 0.3 +- 0.2"
        chance = self.cls_weight * math.log(self.num_prototypes) + patches, "ln K of CLS and of masked patches"
        return replace(hints, chance_loss=chance, warnings=(*hints.warnings, *told(hidden)))


@dataclass
class Compared:
    """The losses of one batch, and what later steps need."""

    cls_loss: Tensor
    patch_loss: Tensor
    cls: Tensor  # the student's, of global crops, (G B, D)
    patches: Tensor  # likewise, (G B, N, D)
    projected: Tensor  # z / ||z|| of these CLS, (G B, bottleneck)
    metrics: Metrics
    outputs: Outputs


@register("ibot", IBOTConfig)
class IBOT(DINO):
    config: IBOTConfig
    backbone: ViT
    paper = "Zhou et al. 2022, arXiv:2111.07832"

    def __init__(self, config: IBOTConfig, backbone: nn.Module, facts: RunFacts) -> None:
        vit = require_vit(backbone, type(self).__name__)
        super().__init__(config, vit, facts)
        self.mask_token = new_mask_token(vit)
        self.mask_start = round(config.mask_start_epoch * facts.steps_per_epoch)  # steps
        k = config.num_patch_prototypes or config.num_prototypes
        self.patch_center = Center(k, config.center_momentum) if config.teacher_targets == "centering" else None

    def build_heads(self, features: int) -> None:
        super().build_heads(features)
        c = self.config
        self.patch_head = None if c.shared_head else DINOHead(
            features,
            c.num_patch_prototypes or c.num_prototypes,
            hidden_features=c.projector_hidden,
            bottleneck=c.patch_projection_dim or c.projection_dim,
            layers=c.projector_layers,
            unit_prototypes=c.unit_prototypes,
        )  # fmt: skip

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return 2 x 224 + 10 x 96, above and below a quarter of the image; blur and solarisation as DINO's."""
        views = {name: replace(group, scale=(0.25, 1.0)) for name, group in super().default_views().items()}
        return views | {"local": replace(views["local"], count=10, scale=(0.05, 0.25))}

    # ------------------------------------------------------------------------ masks

    def draw_masks(self, views: Views, progress: Progress) -> Masks:
        """Return the masks of the global crops as `masked_patches` does, `(G B, N)` crop by crop. They follow the image."""
        images, seed, off = self.global_crops(views), draw_seed(progress.generator), progress.step < self.mask_start
        side = num_patches_of_side(self.backbone, images.shape[-1])
        keys = [f"{seed} {crop} {image}" for crop in range(len(images) // len(views.host_ids)) for image in views.host_ids.tolist()]
        masks = [0 if off else self.draw_mask(Random(key), side, side) for key in keys]
        most = int((self.config.mask_ratio + self.config.mask_spread) * side**2)  # of a crop
        return masked_patches(unpack(masks, side**2), len(images) * most, images.device)

    def draw_mask(self, draw: Random, h: int, w: int) -> int:
        c = self.config
        if draw.random() >= c.mask_probability:
            return 0
        target = (c.mask_ratio + c.mask_spread * (2 * draw.random() - 1)) * h * w
        if c.mask_shape == "random":
            return random_mask(draw, h * w, target)
        return block_mask(draw, h, w, target, smallest=(min(h, w) // 3) ** 2)

    def hidden_patches(self, views: Views, masks: Masks) -> dict[int, Tensor]:
        return dict(zip(views.positions("global"), views.split(masks[0]), strict=True))

    def global_crops(self, views: Views) -> Tensor:
        """Return all global crops as one stack, `(G B, 3, H, W)`.

        Raises:
            ConfigError: they have several sizes, or there are none.
        """
        stacks = views.of("global").by_resolution()
        if len(stacks) != 1:
            raise ConfigError(f"views: global crops of {len(stacks)} sizes; {type(self).__name__} masks crops of one size")
        return stacks[0]

    # ------------------------------------------------------------------------ a step

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        it = self.compare(views, self.draw_masks(views, progress) if masks is None else masks, progress)
        loss = self.config.cls_weight * it.cls_loss + self.config.patch_weight * it.patch_loss
        return StepOutput(loss=loss, metrics=it.metrics, outputs=it.outputs)

    def compare(self, views: Views, masks: Masks, progress: Progress) -> Compared:
        """Return both losses, without their weights."""
        masked, index, weights = masks
        images, batch = self.global_crops(views), len(views.image_ids)
        large, small = views.positions("global"), views.positions("local")
        with torch.no_grad():
            whole = require_vit(self.evaluation_backbone(), "the teacher").tokens(images)
            t = self.teacher.get_submodule("head")(whole.cls)  # (G B, K)
            t_patch, patch_mean = self.teacher_scores(whole.patches.flatten(0, 1), index, weights)  # (U, K2), (K2,)
        seen = self.backbone.tokens(images, masked=masked, mask_token=self.mask_token)
        cls = torch.cat([seen.cls, views.of("local").map_crops(self.backbone)]) if small else seen.cls
        z, s, s_patch = self.student_scores(cls, seen.patches.flatten(0, 1)[index])
        with autocast_disabled(s):
            q, q_patch = self.targets(t, progress), self.patch_targets(t_patch, weights, progress)
            codes = dict(zip(large, views.split(q), strict=True))
            cls_loss = cross_view_loss(codes, dict(zip([*large, *small], views.split(s), strict=True)), self.config.temperature)
            patch_loss = cross_entropy_sum([q_patch], s_patch, self.config.temperature, weights.to(s.dtype) / len(images))
            metrics: Metrics = {}
            if progress.reports:
                metrics = self.diagnostics(q, whole.cls[:batch], cls_loss.detach(), progress)
                metrics |= {"cls_loss": cls_loss.detach(), "patch_loss": patch_loss.detach()}
                metrics |= self.patch_diagnostics(q_patch, weights, masked, whole.raw_patches)
        outputs = {"mean": t.mean(dim=0), "patch_mean": patch_mean}
        return Compared(cls_loss, patch_loss, seen.cls, seen.patches, z[: len(images)], metrics, outputs)

    def teacher_scores(self, patches: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's scores of the masked patches `(U, K2)`, and the mean score of all `(K2,)`."""
        head = self.patch_teacher()
        z = head.project(patches)  # (G B N, bottleneck)
        return head.scores(z[index]), head.scores(z.mean(dim=0, keepdim=True))[0]

    def student_scores(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return CLS tokens as projected `(V B, bottleneck)`, their scores `(V B, K)`, and those of masked patches `(U, K2)`.

        With one head, it is called once.
        """
        if self.patch_head is not None:
            z = self.head.project(cls)
            return z, self.head.scores(z), self.patch_head(patches)
        z = self.head.project(torch.cat([cls, patches]))
        s, s_patch = self.head.scores(z).split([len(cls), len(patches)])
        return z[: len(cls)], s, s_patch

    def patch_targets(self, t: Tensor, weights: Tensor, progress: Progress) -> Tensor:
        """Return the teacher's soft targets of masked patches, `(U, K2) -> (U, K2)`. Padding does not count in Sinkhorn's balance."""
        temperature = self.patch_teacher_temperature(progress)
        if self.patch_center is not None:
            return self.patch_center.targets(t, temperature)
        return self.balanced(t, temperature, present=weights > 0)

    def patch_teacher_temperature(self, progress: Progress) -> float:
        """Return tau_t2 of this step."""
        c, epoch = self.config, max(0, progress.epoch - int(self.config.mask_start_epoch))
        start, end = c.warmup_patch_teacher_temperature, c.patch_teacher_temperature
        return linear_by_epoch(
            epoch,
            epochs=c.warmup_teacher_temperature_epochs,
            start=c.warmup_teacher_temperature if start is None else start,
            end=c.teacher_temperature if end is None else end,
        )

    def after_step(self, outputs: list[Outputs], progress: Progress) -> None:
        super().after_step(outputs, progress)
        if self.patch_center is not None:
            self.patch_center.update([part["patch_mean"] for part in outputs])

    # ------------------------------------------------------------------------ its parts

    def student(self) -> nn.Sequential:
        network = super().student()
        if self.patch_head is not None:
            network.add_module("patch_head", self.patch_head)
        return network

    def heads(self) -> list[DINOHead]:
        return [self.head] if self.patch_head is None else [self.head, self.patch_head]

    def patch_teacher(self) -> DINOHead:
        """Return the teacher's head for patches."""
        return self.teacher.get_submodule("head" if self.patch_head is None else "patch_head")  # type: ignore[return-value]

    @torch.no_grad()
    def patch_diagnostics(self, q: Tensor, weights: Tensor, masked: Tensor, patches: Tensor) -> Metrics:
        """Return the mean entropy of the targets of masked patches as a fraction of ln K, and the masked share of all patches.

        `patch_norm_ratio` is the largest norm of a crop's patches `(G B, N, D)` over their median, as a mean: it grows with patches
        that hold something of the whole image instead of their place (arXiv:2309.16588), which `backbone.registers` keep out.
        """
        share = (weights / weights.sum().clamp(min=1e-12)).to(q.dtype)
        norms = torch.linalg.vector_norm(upcast_half(patches), dim=-1)
        return {
            "patch_teacher_entropy": (entropy(q) * share).sum() / torch.tensor(float(q.shape[1]), device=q.device).log(),
            "masked_share": masked.float().mean(),
            "patch_norm_ratio": (norms.amax(dim=1) / norms.median(dim=1).values).mean(),
        }

    def param_groups(self) -> list[ParamGroup]:
        """Return DINO's groups; the mask token decays like the other tokens."""
        matrices, *others = super().param_groups()
        return [replace(matrices, params=[*matrices.params, self.mask_token]), *others]
