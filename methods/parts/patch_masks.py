"""Which patches of a crop are hidden from the student: blocks (iBOT, DINOv2), drawn on the CPU, and what a device needs to know of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from methods.parts.numerics import to_device

TRIES = 10  # to place a block
ASPECT = math.log(1 / 0.3)  # the logarithm of a block's height over its width is uniform in +- this


def block_mask(draw: Random, h: int, w: int, target: float, *, smallest: float, largest: float = math.inf) -> int:
    """Return a mask of blocks that covers at most `target` patches of h x w, and about as many (iBOT, arXiv:2111.07832).

    Blocks are added until `target` patches are covered or ten tries to place one have failed. A block's area is uniform between
    `smallest` and what is missing, at most `largest`; it is smaller than the grid both ways, and covers at least one new patch and
    at most what is missing.

    Returns:
        An integer whose bit i * w + j says whether the patch in row i and column j is masked.
    """
    rows_of_ones = [sum(1 << i * w for i in range(rows)) for rows in range(h)]
    mask = count = tries = 0
    while count < target and tries < TRIES:
        tries += 1
        most = min(target - count, largest)
        area = smallest + (most - smallest) * draw.random()
        aspect = math.exp(ASPECT * (2 * draw.random() - 1))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows >= h or columns >= w:
            continue
        top, left = int(draw.random() * (h - rows + 1)), int(draw.random() * (w - columns + 1))
        block = ((1 << columns) - 1) * rows_of_ones[rows] << (top * w + left)
        new = (block & ~mask).bit_count()
        if 0 < new <= most:
            mask, count, tries = mask | block, count + new, 0
    return mask


def random_mask(draw: Random, patches: int, target: float) -> int:
    """Return a mask of floor(target) patches anywhere; bits as those of `block_mask`."""
    return sum(1 << i for i in draw.sample(range(patches), int(target)))


def unpack(masks: Sequence[int], patches: int) -> Tensor:
    """Return bits as rows: `(n, N)` bool."""
    size = (patches + 7) // 8
    packed = torch.frombuffer(bytearray().join(mask.to_bytes(size, "little") for mask in masks), dtype=torch.uint8)
    bits = packed.view(len(masks), size, 1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(1)[:, :patches].bool()


def masked_patches(masked: Tensor, most: int, device: torch.device) -> list[Tensor]:
    """Return what a step needs to know of its masks, on the device; shapes do not depend on the masks.

    Args:
        masked: `(n, N)` bool, on the CPU.
        most: U, the most patches that the masks of such a batch can have.

    Returns:
        `masked`; where its patches stand among n * N, `(U,)` int64, filled up with 0; and how much each counts, `(U,)` float64: 1 / masked
        patches of its crop, filled up with 0.
    """
    index = masked.flatten().nonzero()[:, 0]
    counts = masked.sum(dim=1)
    weights = (1 / counts.double())[index // masked.shape[1]]
    missing = max(1, most) - len(index)
    assert missing >= 0, f"{len(index)} masked patches, at most {most} are expected"
    filled = [torch.cat([x, x.new_zeros(missing)]) for x in (index, weights)]
    return [to_device(x, device) for x in (masked, *filled)]
