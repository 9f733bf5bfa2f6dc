"""Counter-based random numbers: a pure function of seed, image id, crop and column, so any worker makes those of its images.

They are made on the device of the ids. Workers share no generator, and nothing is copied to the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
STRIDE = 0x9E3779B1  # odd, near 2^32 / golden ratio: consecutive columns lie far apart


def random_words(ids: Tensor, crops: int, columns: int, seed: int) -> Tensor:
    """Return uniform integers in [0, 2^32), `(crops * B, columns)` int64; row v * B + i belongs to crop v of image i.

    Args:
        ids: image ids, `(B,)` int64.
        seed: in [0, 2^62).
    """
    low, high = seed & WORD, seed >> 32
    rows = _mix((ids ^ (ids >> 32)) + low)  # (B,)
    places = torch.arange(crops * columns, device=ids.device).view(crops, 1, columns) * STRIDE
    # the low word again: id 4 of seed 5 and id 5 of seed 4 must not have the same words
    return _mix(rows[:, None] + places + (low * 0x85EBCA6B + high) % 2**32).flatten(0, 1)


def draw_seed(generator: torch.Generator | None) -> int:
    """Return a seed for `random_words`, drawn on the CPU; the same on every worker if the generator is."""
    return int(torch.randint(1 << 62, (), generator=generator))


def _mix(x: Tensor) -> Tensor:
    """Return a bijective hash of the lower 32 bits, in place: two rounds of xor-shift and multiplication.

    Both multipliers are below 2^31, so no product leaves int64.
    """
    x.bitwise_and_(WORD)
    x.bitwise_xor_(x >> 16).mul_(0x21F0AAAD).bitwise_and_(WORD)
    x.bitwise_xor_(x >> 15).mul_(0x735A2D97).bitwise_and_(WORD)
    return x.bitwise_xor_(x >> 15)
