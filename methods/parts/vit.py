"""timm's vision transformers with tokens, masks and positions for self-supervised methods. State-dict names stay timm's own.

`ViT` is timm's `VisionTransformer` with further methods and no further state. `build_backbone` returns it for every such
name, for images of any size that is a multiple of the patch. With p the patch size, the image is cut into N = h w
patches, h = H / p; x = [CLS, registers, patches] + positions goes through the blocks and the final LayerNorm:

    patch_embed -> masked patches become the mask token -> + positions -> only the kept patches -> blocks -> norm
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from methods.parts.drop_path import DropPath, DropPathSubsets, draw_keep, follow_images
from methods.parts.errors import ConfigError
from methods.parts.numerics import upcast_half

# learned: bicubic with antialiasing to the size of the grid (timm, DINOv2's models with registers)
# learned-offset: bicubic without, scale (h + 0.1) / M (DINO, iBOT, the other models of DINOv2)
# learned-plain: bicubic without, to the size of the grid (MSN)
# sincos: a table that is computed and stays (MoCo v3)
Positions = Literal["learned", "learned-offset", "learned-plain", "sincos"]


@dataclass
class Tokens:
    """The outputs of a ViT, after the final norm but for `raw_patches`."""

    cls: Tensor  # (B, D)
    registers: Tensor  # (B, R, D)
    patches: Tensor  # (B, N, D), row by row; of the kept patches, in the order of `keep`
    raw_patches: Tensor  # the same before the final norm, which hides outliers


class ViT(VisionTransformer):  # type: ignore[misc]
    """timm's ViT with a CLS token; `forward` is timm's: `(B, 3, H, W) -> (B, D)`, CLS after the final norm."""

    positions: Positions
    pos_embed: nn.Parameter
    subsets: DropPathSubsets | None

    @staticmethod
    def fits(model: Any) -> bool:
        """Return whether a model is a plain ViT: a CLS token, a table of positions, blocks of attention and MLP one after the other."""
        if type(model) is not VisionTransformer or model.cls_token is None or model.pos_embed is None:
            return False
        return all(type(block) is Block for block in model.blocks)

    def __init__(self, model: VisionTransformer, positions: Positions, *, subset_drop_path: float = 0.0) -> None:
        """Take over all parts of a timm model, whose functions know the arguments of every name; the model is not used again.

        Args:
            subset_drop_path: the rate of `DropPathSubsets` in every block, in the place of timm's stochastic depth.
        """
        nn.Module.__init__(self)
        self.__dict__.update(vars(model))
        self.positions = positions
        self.subsets = DropPathSubsets(subset_drop_path) if subset_drop_path else None
        follow_images(self)
        if positions == "sincos":
            h, w = self.patch_embed.grid_size
            table = sincos_table(h, w, self.embed_dim)
            prefix = torch.zeros(self.pos_embed.shape[1] - len(table), self.embed_dim)  # CLS has no position
            self.pos_embed = nn.Parameter(torch.cat([prefix, table])[None], requires_grad=False)

    # ------------------------------------------------------------------------ tokens

    def tokens(
        self, images: Tensor, *, keep: Tensor | None = None, masked: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tokens:
        """Return CLS, registers and patches after the final norm.

        Args:
            images: `(B, 3, H, W)`, both sides multiples of the patch size.
            keep: indices of the patches that go through the blocks, `(B, n)` int64, row by row; None = all.
            masked: patches whose content is replaced by the mask token, `(B, N)` bool; they keep their position.
            mask_token: `(D)`, learned, see `new_mask_token`; needed with `masked`.

        Raises:
            ConfigError: a side that is not a multiple of the patch size.
        """
        return self.split(self.through_blocks(self.embed(images, keep=keep, masked=masked, mask_token=mask_token)))

    def embed(
        self, images: Tensor, *, keep: Tensor | None = None, masked: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Return the input of the first block: `(B, 3, H, W) -> (B, 1 + R + n, D)`; arguments as those of `tokens`."""
        for side in images.shape[-2:]:
            require_whole_patches(self, "views.size", side)
        x = self.patch_embed(images)  # (B, h, w, D)
        if masked is not None:
            assert mask_token is not None
            x = torch.where(masked.view(*x.shape[:3], 1), mask_token.to(x.dtype), x)
        x = self.with_positions(x)
        if keep is not None:
            first = self.num_prefix_tokens
            patches = x[:, first:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
            x = torch.cat([x[:, :first], patches], dim=1)
        return self.norm_pre(x)  # type: ignore[no-any-return]

    def through_blocks(self, x: Tensor) -> Tensor:
        """Apply all blocks, without the final norm: `(B, T, D) -> (B, T, D)`."""
        again = self.grad_checkpointing and torch.is_grad_enabled()
        rows = self.subsets.draw(2 * len(self.blocks), len(x), x.device) if self.subsets is not None else None
        run, chosen = (_through, self.kept_paths(len(x))) if rows is None else (_through_subsets, rows.unflatten(0, (-1, 2)).unbind())
        for block, keep in zip(self.blocks, chosen, strict=True):
            x = checkpoint(run, block, x, keep, use_reentrant=False) if again else run(block, x, keep)
        return x

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return all tokens after the final norm, as timm: `(B, 3, H, W) -> (B, 1 + R + N, D)`."""
        assert attn_mask is None and not is_causal
        return self.norm(self.through_blocks(self.embed(x)))  # type: ignore[no-any-return]

    def kept_paths(self, rows: int) -> Sequence[Tensor | None]:
        """Return for each block the factors of its two paths, `(2, rows)`, drawn at once; None where nothing is dropped by image."""
        rates = [getattr(path, "drop_prob", 0.0) for block in self.blocks for path in (block.drop_path1, block.drop_path2)]
        keep = draw_keep(rows, rates) if self.training and any(rates) else None
        return [None] * len(self.blocks) if keep is None else list(keep.unflatten(0, (-1, 2)))

    def split(self, x: Tensor) -> Tokens:
        """Apply the final norm to the output of a block, `(B, 1 + R + n, D)`, and split it by kind."""
        first, normed = self.num_prefix_tokens, self.norm(x)
        return Tokens(cls=normed[:, 0], registers=normed[:, 1:first], patches=normed[:, first:], raw_patches=x[:, first:])

    def layers(self, images: Tensor, last: int) -> list[Tokens]:
        """Return the outputs of the `last` blocks, the deepest at the end, each after the final norm."""
        x, outputs = self.embed(images), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - last:
                outputs.append(self.split(x))
        return outputs

    def cls_attention(self, images: Tensor) -> Tensor:
        """Return the attention of the last block's CLS token to each patch: `(B, 3, H, W) -> (B, heads, N)`.

        softmax(q_CLS k^T / sqrt(d)) over all tokens; the columns of CLS and registers are left out.
        """
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        attention = last.attn
        b, t, _ = x.shape
        qkv = attention.qkv(last.norm1(x)).view(b, t, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(qkv[0, :, :, :1]), attention.k_norm(qkv[1])
        weights = (upcast_half(q) @ upcast_half(k).transpose(-2, -1) * attention.scale).softmax(dim=-1)  # (B, heads, 1, T)
        return weights[:, :, 0, self.num_prefix_tokens :]  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------ positions

    def with_positions(self, x: Tensor) -> Tensor:
        """Add prefix tokens and positions: `(B, h, w, D) -> (B, 1 + R + h w, D)`."""
        b, h, w, d = x.shape
        tokens = [self.cls_token] if self.reg_token is None else [self.cls_token, self.reg_token]
        prefix = torch.cat([token.expand(b, -1, -1) for token in tokens], dim=1)
        x, table = x.reshape(b, h * w, d), self.position_table(h, w)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([prefix, x + table], dim=1))  # type: ignore[no-any-return]
        return self.pos_drop(torch.cat([prefix, x], dim=1) + table)  # type: ignore[no-any-return]

    def position_table(self, h: int, w: int) -> Tensor:
        """Return the positions of h x w patches, behind those of the prefix tokens if they have any: `(1, P + h w, D)`."""
        rows, columns = self.patch_embed.grid_size
        if (h, w) == (rows, columns):
            return self.pos_embed
        first = self.pos_embed.shape[1] - rows * columns
        grid = self.pos_embed[:, first:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
        resized = resize_grid(grid, h, w, offset=0.1 if self.positions == "learned-offset" else 0.0, antialias=self.positions == "learned")
        return torch.cat([self.pos_embed[:, :first], resized.flatten(2).transpose(1, 2)], dim=1)


def _through(block: Block, x: Tensor, keep: Tensor | None) -> Tensor:
    """Apply one block with given factors of its paths, `(2, B)`. They are an argument so that recomputation drops the same."""
    for i, path in enumerate((block.drop_path1, block.drop_path2)):
        if isinstance(path, DropPath):
            path.keep = None if keep is None else keep[i]
    return block(x)  # type: ignore[no-any-return]


def _through_subsets(block: Block, x: Tensor, rows: Tensor) -> Tensor:
    """Apply one block whose two paths work on some rows each, `(2, n)`, and count len(x) / n times."""
    for keep, norm, path, scale in ((rows[0], block.norm1, block.attn, block.ls1), (rows[1], block.norm2, block.mlp, block.ls2)):
        x = x.index_add(0, keep, scale(path(norm(x[keep]))).to(x.dtype), alpha=len(x) / len(keep))
    return x


def resize_grid(grid: Tensor, h: int, w: int, *, offset: float = 0.0, antialias: bool = False) -> Tensor:
    """Return a table of positions on another grid: `(1, D, M, M') -> (1, D, h, w)`, bicubic.

    Pixel i of the result is read at (i + 1/2) M / (h + offset) - 1/2.

    Args:
        antialias: average over the old pixels that a new one covers; only without an offset.
    """
    grid = upcast_half(grid)
    if not offset:
        return F.interpolate(grid, size=(h, w), mode="bicubic", antialias=antialias)
    scales = ((h + offset) / grid.shape[-2], (w + offset) / grid.shape[-1])
    return F.interpolate(grid, scale_factor=scales, mode="bicubic", recompute_scale_factor=False)


def sincos_table(h: int, w: int, d: int, device: torch.device | None = None) -> Tensor:
    """Return the fixed positions of MoCo v3, `(h w, D)`, row by row.

    Patch (a, b) has [sin a omega, cos a omega, sin b omega, cos b omega], omega_i = 10000^(-i / (D/4)), i < D/4; a is its row.
    """
    if d % 4:
        raise ConfigError(f"backbone.positions=sincos: the width {d} is not a multiple of 4; use another backbone.width, or learned")
    omega = 10000.0 ** (-torch.arange(d // 4, dtype=torch.float64, device=device) / (d // 4))
    rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    a, b = rows.flatten()[:, None] * omega, columns.flatten()[:, None] * omega  # (h w, D/4)
    return torch.cat([a.sin(), a.cos(), b.sin(), b.cos()], dim=1).float()


# ---------------------------------------------------------------------------- making them


def vit_settings(plain: VisionTransformer, *, width: float, heads: int | None, registers: int, swiglu: bool) -> dict[str, Any]:
    """Return timm's arguments for a ViT of another width, number of heads or registers, or with SwiGLU blocks.

    SwiGLU is W3(silu(x W1) * (x W2)) with (8 D / 3, up to a multiple of 8) hidden features: as many weights as 4 D have.

    Args:
        plain: the model without these settings.
        width: multiplies D, which stays a multiple of the heads and of 4.
    """
    from timm.layers import SwiGLUPacked

    settings: dict[str, Any] = {}
    d, attention = plain.embed_dim, getattr(plain.blocks[0], "attn", None)
    own_heads = getattr(attention, "num_heads", 1)
    if heads is not None:
        settings["num_heads"] = heads
    if width != 1:
        unit = math.lcm(heads or own_heads, 4)
        d = settings["embed_dim"] = max(unit, round(d * width / unit) * unit)
    if d % (heads or own_heads):
        raise ConfigError(f"backbone.heads={heads}: does not divide the width {d}; use {math.gcd(d, heads or own_heads)}")
    if registers:
        settings |= {"reg_tokens": registers, "no_embed_class": True}  # neither registers nor CLS have a position
    if swiglu:
        hidden = (int(4 * d * 2 / 3) + 7) // 8 * 8
        settings |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": (2 * hidden + 0.5) / d}  # W1 and W2 in one
    return settings


@torch.no_grad()
def xavier(model: VisionTransformer) -> None:
    """Draw MoCo v3's first weights: uniform in +-sqrt(6 / (in + out)); q, k, v and the patch projection as a Linear each; biases 0."""
    xavier_linears(model)
    projection = model.patch_embed.proj
    bound = math.sqrt(6 / (projection.weight[0].numel() + projection.out_channels))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


@torch.no_grad()
def xavier_linears(network: nn.Module) -> None:
    """Draw the weights of every Linear uniformly in +-sqrt(6 / (in + out)); q, k, v as one each; set biases to 0."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            parts = 3 if name.endswith("qkv") else 1
            bound = math.sqrt(6 / (module.out_features // parts + module.in_features))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def new_mask_token(backbone: ViT) -> nn.Parameter:
    """Return a learned token for masked patches, `(D,)`, zeros at first. The method holds it: the backbone has timm's names only."""
    return nn.Parameter(torch.zeros(backbone.embed_dim))


def freeze_patch_projection(backbone: nn.Module) -> None:
    """Keep the projection of the patches as it is (MoCo v3 sec. 4.2); a backbone without one is left alone."""
    if isinstance(backbone, ViT):
        backbone.patch_embed.proj.requires_grad_(False)


def require_vit(backbone: nn.Module, method: str) -> ViT:
    """Return the backbone as a `ViT`.

    Raises:
        ConfigError: it is no ViT.
    """
    if not isinstance(backbone, ViT):
        kind = type(backbone).__name__
        raise ConfigError(f"backbone.name: {method} works on patches and cannot use a {kind}; use a ViT, e.g. vit_small_patch16_224")
    return backbone


def require_whole_patches(backbone: nn.Module, key: str, size: int) -> None:
    """Check that images of `size` pixels are cut into whole patches; a backbone without patches takes any size.

    Raises:
        ConfigError: `key=size` is not a multiple of the patch size.
    """
    if not isinstance(backbone, ViT):
        return
    patch = int(backbone.patch_embed.patch_size[0])
    if size % patch:
        low = size // patch * patch
        near = f"{low} or {low + patch}" if low else str(patch)
        raise ConfigError(f"{key}={size}: not a multiple of the backbone's patches of {patch} pixels; use {near}")


# ---------------------------------------------------------------------------- running them


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Make the blocks of every ViT inside keep only their inputs and be computed again in the backward pass."""
    for vit in vits(network, "train.gradient_checkpointing"):
        vit.set_grad_checkpointing(True)


def compile_blocks(network: nn.Module, **settings: Any) -> None:
    """Compile the blocks of every ViT inside with `torch.compile`, in place: names in the state dict do not change."""
    for vit in vits(network, "train.compile"):
        for block in vit.blocks:
            block.compile(**settings)


def attentions_and_mlps(network: nn.Module) -> list[nn.Module]:
    """Return the attention and the MLP of every transformer block inside: most of the weights, each used by one call of it."""
    return [part for block in network.modules() if isinstance(block, Block) for part in (block.attn, block.mlp)]


def vits(network: nn.Module, key: str) -> list[ViT]:
    """Return every ViT inside.

    Raises:
        ConfigError: there is none, so `key=True` cannot work.
    """
    found = [module for module in network.modules() if isinstance(module, ViT)]
    if not found:
        raise ConfigError(f"{key}=True: works on the blocks of a ViT, and this backbone has none; leave it out")
    return found
