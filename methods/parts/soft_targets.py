"""Cross entropy with soft targets over very many classes, a few rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from methods.parts.errors import ConfigError
from methods.parts.numerics import chunk_rows


def cross_entropy_sum(targets: Sequence[Tensor], scores: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """Return sum_b w_b sum_q CE(q_b, s_b), s = scores / temperature, CE(q, s) = - sum_k q_k log softmax(s)_k.

    The gradient with respect to s_b is w_b (G softmax(s_b) - sum_q q_b). Only the scores and the targets are kept for the
    backward pass, which allocates that gradient and no other matrix of its size.

    Args:
        targets: G >= 1 times `(B, K)`, rows sum to 1; no gradient.
        scores: before the temperature, `(B, K)`.
        weights: w, `(B,)`, no gradient; None = 1 / B each, which gives the mean over rows.
    """
    return _CrossEntropySum.apply(scores, temperature, weights, *targets)  # type: ignore[no-any-return]


def cross_view_loss(codes: Mapping[int, Tensor], scores: Mapping[int, Tensor], temperature: float) -> Tensor:
    """Return the mean over pairs of crops (g, v), g != v, of mean_b H(q_g, softmax(s_v / temperature)).

    Args:
        codes: the targets of each global crop by its position, `(B, K)`.
        scores: the student's of every crop by its position, `(B, K)`.

    Raises:
        ConfigError: no such pair.
    """
    others = {v: [q for g, q in codes.items() if g != v] for v in scores}
    pairs = sum(map(len, others.values()))
    if not pairs:
        raise ConfigError(f"views: {len(others)} crop, {len(codes)} of them global; use 2 or more crops, at least 1 global")
    return torch.stack([cross_entropy_sum(qs, scores[v], temperature) for v, qs in others.items() if qs]).sum() / pairs


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: float, weights: Tensor | None, *targets: Tensor) -> Tensor:
        ctx.save_for_backward(scores, *([] if weights is None else [weights]), *targets)
        ctx.temperature, ctx.weighted = temperature, weights is not None
        groups = _groups_of_rows(scores, *targets)
        if weights is None:
            sums = [torch.log_softmax(s / temperature, dim=1).mul_(_sum(qs)).sum() for s, *qs in groups]
            return -torch.stack(sums).sum() / len(scores)
        parts = weights.split(chunk_rows(scores))
        sums = [torch.log_softmax(s / temperature, dim=1).mul_(_sum(qs)).sum(dim=1) @ w for w, (s, *qs) in zip(parts, groups, strict=True)]
        return -torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scores, *targets = ctx.saved_tensors
        result = torch.empty_like(scores)
        if ctx.weighted:
            weights, *targets = targets
            scales = ((gradient / ctx.temperature) * weights)[:, None].split(chunk_rows(scores))
        else:
            scales = itertools.repeat(gradient / (ctx.temperature * len(scores)))
        for scale, (part, s, *qs) in zip(scales, _groups_of_rows(result, scores, *targets)):  # noqa: B905 (one may repeat)
            torch.softmax(s / ctx.temperature, dim=1, out=part)
            part.mul_(len(qs)).sub_(_sum(qs)).mul_(scale)
        return result, None, None, *[None] * len(targets)


def _groups_of_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = chunk_rows(tensors[0])
    return zip(*[x.split(rows) for x in tensors], strict=True)


def _sum(targets: list[Tensor]) -> Tensor:
    first, *others = targets
    return sum(others, first)
