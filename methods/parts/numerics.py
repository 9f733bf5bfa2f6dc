"""Small numerical helpers that keep one precision rule: half types become float32, float64 is never demoted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def upcast_half(x: Tensor) -> Tensor:
    """Return float16 and bfloat16 as float32, anything else unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextlib.contextmanager
def autocast_disabled(x: Tensor) -> Iterator[None]:
    """Disable autocast on the device of `x`, where there is autocast."""
    has_autocast = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if has_autocast else contextlib.nullcontext():
        yield


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor that was made on the CPU; a GPU fetches it from pinned memory, so that the CPU does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def count_of_each(labels: Tensor, classes: int, weights: Tensor | None = None) -> Tensor:
    """Count the labels `(B,)` that are k, for each k: `(K,)` int64. `torch.bincount` would wait for the device to learn its size.

    Args:
        weights: `(B,)` int64, how much each label counts; None = 1.
    """
    weights = torch.ones_like(labels) if weights is None else weights
    return torch.zeros(classes, dtype=torch.int64, device=labels.device).scatter_add_(0, labels, weights)


def l2_normalize(x: Tensor) -> Tensor:
    """Scale rows to unit length, in float32 or better: x / max(||x||_2, 1e-12)."""
    return F.normalize(upcast_half(x), dim=-1, eps=1e-12)


def chunk_rows(x: Tensor) -> int:
    """Return how many rows of `(B, K)` to work on at a time: 1 MB on a CPU, which stays in its cache; 64 MB on other devices."""
    values = 1 << (18 if x.device.type == "cpu" else 24)
    return max(1, values // max(1, x.shape[1]))


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy in nats of each row: `(B, K) -> (B,)`; 0 log 0 = 0."""
    rows: Tensor = torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
    return -rows
