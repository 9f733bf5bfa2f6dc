"""Small numerical helpers that keep one precision rule: half types become float32, float64 is never demoted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def promote(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; anything else unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextlib.contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Leave autocast on the device of `x`."""
    with torch.autocast(x.device.type, enabled=False):
        yield


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of unit length: x / max(||x||_2, 1e-12)."""
    return F.normalize(x, dim=-1, eps=1e-12)


def rows_at_once(x: Tensor) -> int:
    """How many rows of `(B, K)` to work on at a time: 1 MB on a CPU, so that they stay in its cache; 64 MB on other devices."""
    values = 1 << (18 if x.device.type == "cpu" else 24)
    return max(1, values // max(1, x.shape[1]))


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of each row: `(B, K) -> (B,)`; 0 log 0 = 0."""
    rows: Tensor = torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
    return -rows


def embedding_std(z: Tensor) -> Tensor:
    """Collapse meter: mean over dimensions of the std of unit rows `(B, D)`, times sqrt(D). About 1 when spread out, 0 when collapsed."""
    spread: Tensor = z.std(dim=0, unbiased=False).mean()
    return spread * math.sqrt(z.shape[-1])


def cosines(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of the pairs (a_i, b_i), and of all (a_i, b_j) with i != j. Both `(B, D)`, rows of any length but 0."""
    a, b = l2_normalize(a), l2_normalize(b)
    batch, positive = len(a), (a * b).sum(dim=-1)
    others = a.sum(dim=0) @ b.sum(dim=0) - positive.sum()
    return positive.mean(), others / max(1, batch * (batch - 1))
