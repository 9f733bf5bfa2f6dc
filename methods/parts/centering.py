"""A teacher's soft targets, kept from collapse by centring (Caron et al. 2021, arXiv:2104.14294, sec. 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from methods.parts.distributed import all_reduce_sum, world_size
from methods.parts.numerics import upcast_half, chunk_rows


class Center(nn.Module):
    """The running mean c of a teacher's scores over all workers: c <- m c + (1 - m) mean(t), from 0.

    The targets of a step see the centre of the step before it.

    Args:
        num_prototypes: K.
        momentum: m.
    """

    value: Tensor  # (K,)

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(num_prototypes))

    @torch.no_grad()
    def targets(self, scores: Tensor, temperature: float) -> Tensor:
        """Return softmax((t - c) / temperature): `(B, K) -> (B, K)`, float32 or better. One matrix of this size is allocated."""
        scores = upcast_half(scores)
        targets = torch.empty_like(scores)
        rows = chunk_rows(scores)
        for q, t in zip(targets.split(rows), scores.split(rows), strict=True):
            torch.softmax(t.sub(self.value).div_(temperature), dim=1, out=q)
        return targets

    @torch.no_grad()
    def update(self, means: Sequence[Tensor]) -> None:
        """Move the centre, once after an optimizer step.

        Args:
            means: the mean score of every micro-batch of this worker, each `(K,)`; all have the same number of rows.
        """
        mean = all_reduce_sum(torch.stack(list(means)).mean(dim=0)) / world_size()
        self.value.lerp_(mean, 1 - self.momentum)
