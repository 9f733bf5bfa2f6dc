"""Random masks: the patches that a ViT is given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.parts.counter_random import random_words
from methods.parts.vit import ViT, require_whole_patches


def num_patches(backbone: ViT, size: int) -> int:
    """Return the number of patches of a square crop of `size` pixels.

    Raises:
        ConfigError: the crop is not cut into whole patches.
    """
    return num_patches_of_side(backbone, size) ** 2


def num_patches_of_side(backbone: ViT, size: int) -> int:
    """Patches in a row of a square crop; errors as those of `num_patches`."""
    require_whole_patches(backbone, "views.size", size)
    return size // int(backbone.patch_embed.patch_size[0])


def num_kept(patches: int, mask_ratio: float) -> int:
    """Return floor(N (1 - mask_ratio)), at least 1."""
    return max(1, math.floor(patches * (1.0 - mask_ratio)))


def random_keep(ids: Tensor, patches: int, kept: int, *, seed: int, crops: int = 1) -> Tensor:
    """Return indices of the patches that stay, uniformly random without repetition, rising in each row: `(crops * B, kept)` int64.

    They follow the image: an id has the same masks on any number of workers, and each worker draws those of its own images
    only, on its device. Row v * B + i belongs to crop v of image i.

    Args:
        ids: image ids, `(B,)` int64; equal ids have equal masks.
        seed: of the step, the same on every worker.
    """
    return random_words(ids, crops, patches, seed).argsort(dim=1)[:, :kept].sort(dim=1).values


def hidden_by(keep: Tensor, patches: int) -> Tensor:
    """Return whether each patch is not among those that stay: `(B, n) -> (B, N)` bool."""
    return torch.ones(len(keep), patches, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)


def masked_of(keep: Tensor, patches: int) -> Tensor:
    """Return the other patches, rising in each row: `(B, n) -> (B, N - n)`."""
    gone = torch.ones(len(keep), patches, dtype=torch.uint8, device=keep.device).scatter_(1, keep, 0)
    return gone.argsort(dim=1, stable=True)[:, keep.shape[1] :]
