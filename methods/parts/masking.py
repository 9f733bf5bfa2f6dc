"""Random masks: which patches a ViT is given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.parts.distributed import rank, world_size
from methods.parts.vit import ViT, require_whole_patches


def num_patches(backbone: ViT, size: int) -> int:
    """Patches of a square crop of `size` pixels.

    Raises:
        ConfigError: the crop is not cut into whole patches.
    """
    require_whole_patches(backbone, "views.size", size)
    return (size // int(backbone.patch_embed.patch_size[0])) ** 2


def num_kept(patches: int, mask_ratio: float) -> int:
    """floor(N (1 - mask_ratio)), at least 1."""
    return max(1, math.floor(patches * (1.0 - mask_ratio)))


def random_keep(batch: int, patches: int, kept: int, *, generator: torch.Generator | None = None, shared: bool = False) -> Tensor:
    """Indices of the patches that stay, uniformly random without repetition, rising in each row: `(B, kept)` int64 on the CPU.

    Drawn for the images of all workers together, of which each worker takes its own B rows: with a generator that stands
    alike on all of them, no two images of a global batch have the same numbers, however many workers there are.

    Args:
        batch: B, images of this worker.
        shared: one draw for all images of all workers.
    """
    rows = 1 if shared else world_size() * batch
    order = torch.rand(rows, patches, generator=generator)
    own = order.expand(batch, -1) if shared else order[rank() * batch : (rank() + 1) * batch]
    return own.argsort(dim=1)[:, :kept].sort(dim=1).values


def masked_of(keep: Tensor, patches: int) -> Tensor:
    """The other patches, rising in each row: `(B, n) -> (B, N - n)`."""
    gone = torch.ones(len(keep), patches, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
    return gone.nonzero()[:, 1].view(len(keep), -1)
