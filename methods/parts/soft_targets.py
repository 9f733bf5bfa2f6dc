"""Cross entropy with soft targets over very many classes, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from methods.parts.numerics import chunk_rows


def cross_entropy_sum(targets: Sequence[Tensor], scores: Tensor, temperature: float) -> Tensor:
    """Return the mean over rows of sum_q CE(q, s), s = scores / temperature, CE(q, s) = - sum_k q_k log softmax(s)_k.

    The gradient with respect to s is G softmax(s) - sum_q q, divided by the number of rows. Only the scores and the targets are
    kept for the backward pass, which allocates that gradient and no other matrix of its size.

    Args:
        targets: G >= 1 times `(B, K)`, rows sum to 1; no gradient.
        scores: before the temperature, `(B, K)`.
    """
    return _CrossEntropySum.apply(scores, temperature, *targets)  # type: ignore[no-any-return]


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: float, *targets: Tensor) -> Tensor:
        ctx.save_for_backward(scores, *targets)
        ctx.temperature = temperature
        groups = _groups_of_rows(scores, *targets)
        return -torch.stack([(torch.log_softmax(s / temperature, dim=1).mul_(_sum(qs))).sum() for s, *qs in groups]).sum() / len(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scores, *targets = ctx.saved_tensors
        result = torch.empty_like(scores)
        scale = gradient / (ctx.temperature * len(scores))
        for part, s, *qs in _groups_of_rows(result, scores, *targets):
            torch.softmax(s / ctx.temperature, dim=1, out=part)
            part.mul_(len(qs)).sub_(_sum(qs)).mul_(scale)
        return result, None, *[None] * len(targets)


def _groups_of_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = chunk_rows(tensors[0])
    return zip(*[x.split(rows) for x in tensors], strict=True)


def _sum(targets: list[Tensor]) -> Tensor:
    first, *others = targets
    return sum(others, first)
