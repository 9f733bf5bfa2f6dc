"""DINOv2: iBOT with a regulariser that spreads features, made stable for large ViTs. Oquab et al. 2023, arXiv:2304.07193.

With iBOT's student and teacher (which see), B images a worker, G = 2 global crops, h_gb the student's CLS of global crop g of image b:

    L_cls   = DINO's loss, the student's global crops masked
    L_patch = 1 / (G B) sum over masked patches of H(q, p) / masked patches of that crop
    L_koleo = sum_g - mean_b ln || h_gb - h_g,nearest(b) ||      unit rows, of one crop and one worker (`koleo` says more)
    loss    = L_cls + L_patch + 0.1 L_koleo + gram_weight L_gram

`sigreg_weight` adds another regulariser, of the projections sqrt(d) z_gb of all workers (`sigreg`, arXiv:2511.08544), whose d values meet
the prototypes as unit rows; 0 in the paper.
CLS and patches have one head in the short recipe and one each in the large ones, where Sinkhorn-Knopp balances the targets in the
place of centres (`teacher_targets=sinkhorn`). The centre of the patches is the mean over the masked ones of a worker, then over workers.
Half of a worker's global crops are masked; their shares of hidden patches cover 0.1 to 0.5 evenly, one crop in each part of it.
Both temperatures rise by step, the learning rate of block i falls by `layer_decay` for each block above it, that of the patch projection
by another `patch_lr_scale`, and gradients are clipped for backbone and heads apart (`optim.clip_scope=module`).

`backbone.drop_path_mode=subset` is the paper's stochastic depth. Blur of the global crops: the paper's probabilities, 1 and 0.1, or those
that the released weights were trained with, 0 and 0.9 (`released_blur`).

Gram anchoring (DINOv3, Siméoni et al. 2025, arXiv:2508.10104) is for a later phase of a long run, in which patch features decay. X_S are
the student's unit patch features of a global crop, masked patches among them, X_G those of the Gram teacher, which is the teacher as
it was when the phase began or at the last refresh:

    L_gram  = mean over crops and pairs of patches of (X_S X_S^T - X_G X_G^T)^2      no gradient into X_G

Departs:
    As iBOT does.
    Prototypes that wait for the first epoch have no gradient then; the original gives them a rate of 0, and Adam's moments move.
    KoLeo has no gradient between rows that are nearer than 1e-4: duplicates would take all of a clipped gradient.
    Without local crops L_cls is divided by the number of pairs; `cls_denominator=released`: by 3.
    The Gram teacher sees the student's crop with its colours and blur, and with `gram_scale` above 1 that crop enlarged; the original
    cuts it again from the image, larger and without them. A crop of its own would at least double the pixels of the global crops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.ibot import IBOT, IBOTConfig
from methods.parts import (
    LARGER_BATCH, Hints, Masks, ParamGroup, Progress, RunFacts, SearchRange, StepOutput, ViT, Views, ViewsConfig, at_least,
    autocast_disabled, block_mask, draw_seed, ema, fraction, gram_loss, koleo, linear_by_epoch, masked_patches, num_patches_of_side,
    one_of, param_groups_by_layer, positive, random_mask, rank, register, require, resize_grid, sigreg, told, unpack,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DINOv2Config(IBOTConfig):
    #: K; 131072 in the large recipes; 0 = a quarter of the images, 16 times the batch at most, 64 at least
    num_prototypes: int = at_least(0, 65536, SearchRange(scale="choice", choices=(512, 1024, 4096, 65536), reason="more for more data"))
    #: m at the first step; 0 = 1 - 10 / steps, from 0.9 to 0.996
    momentum: float = fraction(0.992, SearchRange(0.97, 0.9995, "linear", reason="short runs need a faster teacher"))
    final_momentum: float = fraction(1.0)  # m at the last step; 0 = momentum, all along
    #: weight of L_koleo
    koleo_weight: float = at_least(0, 0.1, SearchRange(0.0, 0.3, "linear", reason="0 where many images are nearly the same"))
    sigreg_weight: float = at_least(0, 0.0)  # of SIGReg, e.g. 0.05 beside KoLeo where the targets of CLS become uniform
    cls_denominator: Literal["pairs", "released"] = "pairs"
    layer_decay: float = positive(1.0, SearchRange(scale="choice", choices=(0.9, 1.0), reason="0.9 for large rates"))  # of the rate
    patch_lr_scale: float = positive(0.2)  # of the rate of the patch projection
    gram_weight: float = at_least(0, 0.0)  # of L_gram, up to 2, in a phase after the first; 0 = no Gram teacher
    gram_refresh_steps: int = at_least(1, 10_000)  # steps after which the Gram teacher becomes the teacher of that step
    gram_refreshes: int = at_least(0, 3)  # at most so often
    gram_scale: int = at_least(1, 1)  # multiplies the side of what the Gram teacher sees; its map is resized to the student's grid

    phase_settings = frozenset({"gram_weight", "gram_refresh_steps", "gram_refreshes", "gram_scale"})

    def check(self) -> None:
        super().check()
        require(self.num_prototypes != 1, "method.num_prototypes", self.num_prototypes, "use 2 or more, or 0: it follows from the images")

    def settled(self, facts: RunFacts) -> DINOv2Config:
        most = 16 * facts.global_batch_size
        follows = max(64, min(facts.num_images // 4, most) if facts.num_images else most)
        prototypes = self.num_prototypes or follows
        momentum = self.momentum or min(max(0.9, round(1 - 10 / facts.total_steps, 4)), 0.996)
        return replace(self, num_prototypes=prototypes, momentum=momentum, final_momentum=self.final_momentum or momentum)

    def hints(self, facts: RunFacts) -> Hints:
        hints = super().hints(facts)
        early = f"method.gram_weight={self.gram_weight:g} holds patches to those of random weights; use it in a later phase (`continue`)"
        if self.koleo_weight or self.gram_weight:  # neither has a chance value
            hints = replace(hints, chance_loss=None, chance_parts={"cls_loss": (math.log(self.num_prototypes), "ln K of CLS")})
        batch, centred = facts.global_batch_size, self.teacher_targets == "centering"
        hottest = max(self.teacher_temperature, self.warmup_teacher_temperature if self.warmup_teacher_temperature_epochs else 0.0)
        warnings = told(
            self.gram_weight > 0 and not facts.trained and early,
            batch <= 256
            and centred
            and f"method.teacher_targets=centering with a batch of {batch} can end in a handful of prototypes; use sinkhorn",
            batch <= 256
            and hottest > 0.04
            and f"a teacher temperature of {hottest:g} with a batch of {batch} can make the targets uniform; use 0.0125 to 0.025",
        )
        remedies = one_of(
            "method.teacher_targets=sinkhorn" if centred else "",
            f"method.teacher_temperature={self.teacher_temperature / 2:g}",
            "" if self.sigreg_weight else "method.sigreg_weight=0.05",
            "a lower optim.base_lr",
            LARGER_BATCH,
        )
        return replace(hints, remedies=remedies, warnings=(*hints.warnings, *warnings))


@register("dinov2", DINOv2Config)
class DINOv2(IBOT):
    config: DINOv2Config
    paper = "Oquab et al. 2023, arXiv:2304.07193"

    def __init__(self, config: DINOv2Config, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__(config, backbone, facts)
        self.whole_batch_remedy = "masks and neighbours are those of a whole batch; train.gradient_checkpointing needs less memory"
        self.gram_teacher: ViT | None = ema.teacher_of(self.backbone) if config.gram_weight else None

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return 2 x 224 + 8 x 98, above and below 0.32 of the image; blur and solarisation as DINO's (98 pixels are 7 patches of 14)."""
        views = {name: replace(group, scale=(0.32, 1.0)) for name, group in super().default_views().items()}
        return views | {"local": replace(views["local"], count=8, size=98, scale=(0.05, 0.32))}

    def draw_masks(self, views: Views, progress: Progress) -> Masks:
        """Return the masks of this worker's global crops as `masked_patches` does, `(G B, N)` crop by crop."""
        c, images, draw = self.config, self.global_crops(views), Random(f"{draw_seed(progress.generator)} {rank()}")
        side, n = num_patches_of_side(self.backbone, images.shape[-1]), len(images)
        count, off = int(n * c.mask_probability), progress.step < self.mask_start
        low, high = round(c.mask_ratio - c.mask_spread, 9), round(c.mask_ratio + c.mask_spread, 9)
        borders = [low + i * ((high - low) / count) for i in range(count)] + [high] if count else [high]
        targets = [int(side**2 * (a + (b - a) * draw.random())) for a, b in pairwise(borders)]
        masks = [0 if off else self.blocks(draw, side, target) for target in targets] + [0] * (n - count)
        draw.shuffle(masks)
        return masked_patches(unpack(masks, side**2), sum(int(side**2 * b) for b in borders[1:]), images.device)

    def blocks(self, draw: Random, side: int, target: int) -> int:
        if self.config.mask_shape == "random":
            return random_mask(draw, side**2, target)
        return block_mask(draw, side, side, target, smallest=4, largest=0.5 * side**2)

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        c = self.config
        it = self.compare(views, self.draw_masks(views, progress) if masks is None else masks, progress)
        with autocast_disabled(it.cls):
            spread = torch.stack([koleo(h) for h in views.split(it.cls)]).sum()
        loss = c.cls_weight * self.cls_scale(views) * it.cls_loss + c.patch_weight * it.patch_loss + c.koleo_weight * spread
        metrics = it.metrics | ({"koleo": spread.detach()} if progress.reports else {})
        if c.sigreg_weight:
            normal = torch.stack([sigreg(z, progress.generator) for z in views.split(it.projected * it.projected.shape[1] ** 0.5)]).mean()
            loss = loss + c.sigreg_weight * normal
            metrics |= {"sigreg": normal.detach()} if progress.reports else {}
        if self.gram_teacher is not None:
            gram = gram_loss(it.patches, self.anchors(self.gram_teacher, self.global_crops(views)))
            loss = loss + c.gram_weight * gram
            metrics |= {"gram": gram.detach()} if progress.reports else {}
        return StepOutput(loss=loss, metrics=metrics, outputs=it.outputs)

    def before_step(self, progress: Progress) -> None:
        """Refresh the Gram teacher if it is due; at step 0 it becomes the teacher that a phase begins with."""
        refreshes, since = divmod(progress.step, self.config.gram_refresh_steps)
        if self.gram_teacher is not None and since == 0 and refreshes <= self.config.gram_refreshes:
            self.gram_teacher.load_state_dict(self.evaluation_backbone().state_dict())

    @torch.no_grad()
    def anchors(self, teacher: ViT, images: Tensor) -> Tensor:
        """Return a teacher's patches of crops enlarged by `gram_scale`, on the grid of the crops: `(G B, 3, H, W) -> (G B, N, D)`."""
        scale, side = self.config.gram_scale, num_patches_of_side(self.backbone, images.shape[-1])
        if scale == 1:
            return teacher.tokens(images).patches
        patches = teacher.tokens(F.interpolate(images, scale_factor=float(scale), mode="bicubic")).patches
        grid = patches.unflatten(1, (scale * side, scale * side)).permute(0, 3, 1, 2)
        return resize_grid(grid, side, side).flatten(2).transpose(1, 2)

    def cls_scale(self, views: Views) -> float:
        """Return the factor from a mean over pairs of crops to the original's denominator; 1 with local crops."""
        small = len(views.positions("local"))
        return 2 * (small + 1) / (max(2 * small, 1) + 2) if self.config.cls_denominator == "released" else 1.0

    def teacher_scores(self, patches: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's scores of the masked patches `(U, K2)`, and their mean `(K2,)`."""
        head = self.patch_teacher()
        z = head.project(patches[index])  # (U, bottleneck)
        with autocast_disabled(z):
            present = (weights > 0).to(z.dtype)
            mean = (present @ z) / present.sum().clamp(min=1)
        return head.scores(z), head.scores(mean[None])[0]

    def teacher_temperature(self, progress: Progress) -> float:
        """Return tau_t, which rises by step."""
        return self.risen(progress, self.config.warmup_teacher_temperature, self.config.teacher_temperature)

    def patch_teacher_temperature(self, progress: Progress) -> float:
        """Return tau_t2, which rises by step."""
        c, start, end = self.config, self.config.warmup_patch_teacher_temperature, self.config.patch_teacher_temperature
        start, end = (c.warmup_teacher_temperature if start is None else start), (c.teacher_temperature if end is None else end)
        return self.risen(progress, start, end)

    def risen(self, progress: Progress, start: float, end: float) -> float:
        steps = self.config.warmup_teacher_temperature_epochs * progress.steps_per_epoch
        return linear_by_epoch(progress.step, epochs=steps, start=start, end=end)

    def param_groups(self) -> list[ParamGroup]:
        """Return groups with rates by layer. Biases, norms and layer scales do not decay, tokens and prototypes do; the prototypes wait."""
        c = self.config
        groups = param_groups_by_layer(self.backbone, decay=c.layer_decay, patch_lr_scale=c.patch_lr_scale, tokens=[self.mask_token])
        for i, head in enumerate(self.heads()):
            module = ("head", "patch_head")[i]
            vectors = [p for p in head.mlp.parameters() if p.ndim == 1]
            matrices = [p for p in head.mlp.parameters() if p.ndim > 1]
            prototypes = [p for p in head.prototypes.parameters() if p.requires_grad]
            groups += [
                ParamGroup(params=matrices, name=f"{module}_matrices", module=module),
                ParamGroup(params=vectors, name=f"{module}_vectors", module=module, decay=False, adapt=False),
                ParamGroup(params=prototypes, name=f"{module}_prototypes", module=module, frozen_steps=self.frozen_steps),
            ]
        return groups


def released_blur(views: ViewsConfig) -> ViewsConfig:
    """Return the same crops with the blur that DINOv2's released weights were trained with: 0, 0.9 and 0.5 of the three groups."""
    released = {"global": 0.0, "global_solarized": 0.9, "local": 0.5}
    return {name: replace(group, blur=released.get(name, group.blur)) for name, group in views.items()}
