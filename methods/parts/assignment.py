"""Balanced soft assignment of samples to prototypes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from methods.parts.distributed import all_gather_rows, all_reduce_max, all_reduce_sum
from methods.parts.numerics import upcast_half, chunk_rows

LARGEST_EXPONENT = 80.0  # exp(-80) is still a normal float32


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, *, span: float = math.inf, present: Tensor | None = None) -> Tensor:
    """Return balanced codes: entropic optimal transport with uniform marginals over all workers (Caron et al. 2020, eq. 3).

    With Q = exp(scores / epsilon), each iteration scales the prototypes (columns) to mass 1/K, then the samples (rows)
    to mass 1/B; samples last, so rows sum to 1 exactly and prototype masses approximately.

    Scaling vectors are used instead of rewriting Q: u_b = 1 / sum_k E_bk v_k and v_k = 1 / sum_b u_b E_bk, with
    E = exp((scores - global maximum) / epsilon). A group of rows that fits the cache is read once for its u and for its
    part of the next v. Where the exponents may span more than `LARGEST_EXPONENT`, the same iteration runs on logarithms.

    Args:
        scores: `(B, K)` on each worker; B may differ between workers if every worker calls.
        epsilon: entropy weight.
        iterations: at least 1.
        span: the largest difference that two scores can have, e.g. 2 for cosines. It decides between the two forms, so that
            all workers take the same one and none waits for its device.
        present: `(B,)`, 1 for the rows that count and 0 for rows that only pad the matrix; None = all count. The prototypes are
            balanced over the rows that count. Where none counts, the codes are finite and have no meaning.

    Returns:
        Codes `(B, K)`, float32 or better, without gradient. No other matrix of this size is allocated.
    """
    scores = upcast_half(scores)
    highest = all_reduce_max(scores.max())
    codes = torch.empty_like(scores)
    rows = codes.split(chunk_rows(codes))  # views: what is written to them is written to the codes
    for e, s in zip(rows, scores.split(len(rows[0])), strict=True):
        torch.sub(s, highest, out=e).div_(epsilon)
    ones = torch.ones(len(scores), dtype=codes.dtype, device=codes.device)
    counts = (ones if present is None else present.to(codes.dtype)).split(len(rows[0]))
    if span / epsilon > LARGEST_EXPONENT:
        _scale_logarithms(rows, None if present is None else counts, iterations)
        return codes
    first = (e.exp_().sum(dim=0) if present is None else n @ e.exp_() for e, n in zip(rows, counts, strict=True))
    v = _inverse(all_reduce_sum(_sum(first)))
    for _ in range(iterations - 1):
        v = _inverse(all_reduce_sum(_sum((n / (e @ v)) @ e for e, n in zip(rows, counts, strict=True))))
    for e in rows:
        u = (e @ v).reciprocal_()
        e.mul_(v).mul_(u[:, None])
    return codes


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """Add one by one: with many prototypes, hundreds of groups of rows have no room beside each other."""
    parts = iter(parts)
    total = next(parts)
    for part in parts:
        total += part
    return total


def _inverse(sums: Tensor) -> Tensor:
    """Return 1 / sums, in place; large but finite where no row counts."""
    return sums.clamp_(min=1e-37).reciprocal_()


def _scale_logarithms(rows: Sequence[Tensor], counts: Sequence[Tensor] | None, iterations: int) -> None:
    """Turn (scores - highest) / epsilon into codes, in place, a group of rows at a time."""

    def sums() -> Tensor:
        if counts is None:
            return torch.stack([logits.logsumexp(dim=0) for logits in rows])
        return torch.stack([(logits + n.log()[:, None]).logsumexp(dim=0) for logits, n in zip(rows, counts, strict=True)])

    columns = sums()
    for last in [False] * (iterations - 1) + [True]:
        columns = all_gather_rows(columns.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0).clamp_(min=-1e30)
        for logits in rows:
            logits.sub_(columns)
            logits.sub_(logits.logsumexp(dim=1, keepdim=True))
        if not last:
            columns = sums()
    for logits in rows:
        logits.exp_()
