"""MAE: a ViT that sees a quarter of the patches, and a small decoder that predicts the others. He et al. 2021, arXiv:2111.06377.

With an image's N patches x_i (vectors of p p 3 pixels), V the kept ones, drawn at random, and M the others:

    h      = encoder(x_V)                        CLS and the kept patches only; no mask tokens
    y_i    = W h_i for i in V, else mask token    all N patches, CLS in front
    x^     = pixels(decoder(y + positions))       fixed sine and cosine positions
    loss   = mean_{i in M} mean((x^_i - t_i)^2)    t_i = (x_i - mean(x_i)) / sqrt(var(x_i) + 1e-6) (`normalize_patches`), or x_i

Seen patches do not count. The decoder is not used after training. A fixed table of positions and the first
weights of the encoder are settings of the backbone (`positions=sincos`, `xavier=True`); the recipes have them.

Departs:
    The variance of a patch is its squares over their number p p 3; the paper does not say, the original divides by one less,
    which makes t smaller by a factor of sqrt(1 - 1 / (p p 3)): 0.9993 with patches of 16.
    The mask token does not decay; the original decays it with the matrices, because of its shape (1, 1, width).
    The warm-up is the loop's: its first step has the rate of the second one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from methods.parts import (
    CropGroup, Hints, Masks, Method, MethodConfig, Metrics, ParamGroup, Progress, RunFacts, SearchRange, StepOutput, Views, ViewsConfig,
    at_least, autocast_disabled, below_one, draw_seed, embedding_std, hidden_by, l2_normalize, masked_of, num_kept, num_patches, one_of,
    param_groups_weight_decay, random_keep, register, require, require_vit, sincos_table, told, upcast_half, xavier_linears,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MAEConfig(MethodConfig):
    #: share of the patches that the encoder does not see
    mask_ratio: float = below_one(0.75, SearchRange(0.4, 0.9, "linear", reason="40 to 80 % in the paper; linear probes want 0.75"))
    normalize_patches: bool = True  # predict pixels less their patch's mean, over its standard deviation; False: as they are
    decoder_width: int = 512
    decoder_depth: int = at_least(1, 8, SearchRange(scale="choice", choices=(1, 2, 4, 8), reason="1 does for fine-tuning"))
    decoder_heads: int = at_least(1, 16)

    def check(self) -> None:
        require(self.mask_ratio > 0, "method.mask_ratio", self.mask_ratio, "use a fraction between 0 and 1, e.g. 0.75")
        heads, width = self.decoder_heads, self.decoder_width
        whole = width >= 4 and width % 4 == 0 and width % heads == 0
        require(whole, "method.decoder_width", width, f"use a multiple of 4 and of method.decoder_heads={heads}")

    def hints(self, facts: RunFacts) -> Hints:
        return Hints(
            chance_loss=(1.0, "1") if self.normalize_patches else None,  # every pixel at its patch's mean
            remedies=one_of("another optim.base_lr", "a longer warm-up", "a lower method.mask_ratio"),
            warnings=told(
                self.mask_ratio < 0.4 and f"method.mask_ratio={self.mask_ratio:g}: neighbours give the masked patches away; use 0.75"
            ),
        )


@register("mae", MAEConfig)
class MAE(Method):
    config: MAEConfig
    paper = "He et al. 2021, arXiv:2111.06377"
    shards = True

    def __init__(self, config: MAEConfig, backbone: nn.Module, facts: RunFacts) -> None:
        super().__init__()
        self.config = config
        self.backbone = require_vit(backbone, "MAE")
        self.patch = int(self.backbone.patch_embed.patch_size[0])
        self.decoder = Decoder(self.backbone.embed_dim, 3 * self.patch**2, config)

    @classmethod
    def default_views(cls) -> ViewsConfig:
        """Return one crop of 224, flipped or not; colours stay (sec. 4.1, data augmentation)."""
        return {"global": CropGroup(count=1, size=224, scale=(0.2, 1.0), interpolation="bicubic", jitter=(0, 0, 0, 0), grayscale=0, blur=0)}

    def draw_masks(self, views: Views, progress: Progress) -> Masks:
        """Draw the patches that the encoder sees, `(V B, n)` for each resolution."""
        return [self.draw(stack, views.image_ids, draw_seed(progress.generator)) for stack in views.by_resolution()]

    def draw(self, images: Tensor, ids: Tensor, seed: int) -> Tensor:
        """Draw the patches that the encoder sees of crops of one resolution: `(V B, 3, H, W) -> (V B, n)`."""
        patches = num_patches(self.backbone, images.shape[-1])
        return random_keep(ids, patches, num_kept(patches, self.config.mask_ratio), seed=seed, crops=len(images) // len(ids))

    def hidden_patches(self, views: Views, masks: Masks) -> dict[int, Tensor]:
        stacks = zip(masks, views.by_resolution(), strict=True)
        hidden = [hidden_by(keep, num_patches(self.backbone, images.shape[-1])) for keep, images in stacks]
        return dict(enumerate(crop for rows in hidden for crop in views.split(rows)))

    def training_step(self, views: Views, progress: Progress, masks: Masks | None = None) -> StepOutput:
        masks = self.draw_masks(views, progress) if masks is None else masks
        losses, metrics = [], Metrics()
        for images, keep in zip(views.by_resolution(), masks, strict=True):
            predicted, cls = self.predict(images, keep)
            with autocast_disabled(predicted):
                target = self.pixel_targets(images).to(predicted.dtype)
                masked = masked_of(keep, target.shape[1])
                errors = (rows_of(predicted, masked) - rows_of(target, masked)).square()  # (B, N - n, p p 3)
                losses.append(errors.mean())
                if progress.reports:
                    metrics = self.diagnostics(errors.detach(), rows_of(target, masked), cls.detach())
        return StepOutput(loss=torch.stack(losses).mean(), metrics=metrics)

    def predict(self, images: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder's prediction of every patch `(B, N, p p 3)`, and CLS of the encoder `(B, D)`."""
        seen = self.backbone.tokens(images, keep=keep)
        grid = [side // self.patch for side in images.shape[-2:]]
        return upcast_half(self.decoder(torch.cat([seen.cls[:, None], seen.patches], dim=1), keep, *grid)), upcast_half(seen.cls)

    def pixel_targets(self, images: Tensor) -> Tensor:
        """Return t: `(B, 3, H, W) -> (B, N, p p 3)`."""
        x = patchify(upcast_half(images), self.patch)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.config.normalize_patches else x

    @torch.no_grad()
    def diagnostics(self, errors: Tensor, target: Tensor, cls: Tensor) -> Metrics:
        """Return the share of the masked patches' variance that is explained, and the spread of the encoder's CLS less its mean."""
        return {
            "explained": 1 - errors.mean() / target.var(correction=0),
            "cls_std": embedding_std(l2_normalize(cls - cls.mean(dim=0))),
        }

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Return images with masked pixels NaN, and with predicted ones: `(B, 3, H, W) -> (B, 2, 3, H, W)`. Masks never change.

        A normalised prediction is given the mean and standard deviation of the patch itself, which the decoder does not know.
        """
        keep = self.draw(images, torch.arange(len(images), device=images.device), seed=0)
        predicted, _ = self.predict(images, keep)
        x = patchify(upcast_half(images), self.patch)
        if self.config.normalize_patches:
            predicted = predicted * (x.var(dim=-1, correction=0, keepdim=True) + 1e-6).sqrt() + x.mean(dim=-1, keepdim=True)
        kept = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, keep, True)[..., None]
        seen = torch.where(kept, x, torch.full_like(x, torch.nan))
        return torch.stack([unpatchify(part, self.patch, images.shape[-2]) for part in (seen, torch.where(kept, x, predicted))], dim=1)

    def param_groups(self) -> list[ParamGroup]:
        """Return matrices and vectors. Biases, norms and the mask token do not decay."""
        return param_groups_weight_decay(self.backbone, self.decoder)



class Decoder(nn.Module):
    """A light ViT over all patches, most of them mask tokens.

    Args:
        in_features: D, width of the encoder.
        pixels: values of a patch, p p 3.
    """

    def __init__(self, in_features: int, pixels: int, config: MAEConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.embed = nn.Linear(in_features, width)
        self.mask_token = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(width, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, pixels)
        xavier_linears(self)

    def forward(self, seen: Tensor, keep: Tensor, h: int, w: int) -> Tensor:
        """Predict the pixels of every patch: `(B, 1 + n, D) -> (B, h w, p p 3)`.

        Args:
            seen: CLS and the seen patches.
            keep: their indices, `(B, n)`.
            h, w: the grid of patches.
        """
        y = self.embed(seen)
        whole = self.mask_token.to(y.dtype).expand(len(y), h * w, -1)
        patches = whole.scatter(1, keep[..., None].expand(-1, -1, y.shape[-1]), y[:, 1:])
        patches = patches + self.positions(h, w, y)
        return self.pixels(self.norm(self.blocks(torch.cat([y[:, :1], patches], dim=1)))[:, 1:])  # type: ignore[no-any-return]

    def positions(self, h: int, w: int, like: Tensor) -> Tensor:
        """Return the fixed positions of a grid, `(h w, width)`. They are made once for each grid and are no part of the state."""
        name = f"positions_{h}x{w}"
        if not hasattr(self, name):
            self.register_buffer(name, sincos_table(h, w, like.shape[-1], like.device), persistent=False)
        return self.get_buffer(name).to(like)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into patches, `(B, 3, H, W) -> (B, h w, p p 3)`: row by row, in each its pixels row by row, colours last."""
    cut: Tensor = images.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # (B, 3, h, p, w, p)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int, height: int) -> Tensor:
    """Invert `patchify`: `(B, h w, p p 3) -> (B, 3, H, W)`."""
    h = height // patch
    cut: Tensor = patches.unflatten(1, (h, -1)).unflatten(3, (patch, patch, 3))  # (B, h, w, p, p, 3)
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows of `(B, N, P)` at the indices `(B, m)`: `(B, m, P)`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
