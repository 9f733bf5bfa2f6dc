"""Balanced soft assignment of samples to prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.parts.distributed import all_gather_rows, all_reduce_max, all_reduce_sum, world_size
from methods.parts.numerics import promote

LARGEST_EXPONENT = 80.0  # exp(-80) is still a normal float32


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Entropic optimal transport with uniform marginals over all workers (Caron et al. 2020, eq. 3).

    With Q = exp(scores / epsilon), each iteration scales the prototypes (columns) to mass 1/K, then the samples (rows)
    to mass 1/B; samples last, so rows sum to 1 exactly and prototype masses approximately.

    Scaling vectors are used instead of rewriting Q: u_b = 1 / sum_k E_bk v_k and v_k = 1 / sum_b u_b E_bk, with
    E = exp((scores - global maximum) / epsilon). When the exponents span more than `LARGEST_EXPONENT`, the same
    iteration runs on logarithms; the span is that of all workers, so every worker takes the same branch.

    Args:
        scores: `(B, K)` on each worker; B may differ between workers if every worker calls.
        epsilon: entropy weight.
        iterations: at least 1.

    Returns:
        Codes `(B, K)`, float32 or better, without gradient.
    """
    scores = promote(scores)
    extremes = all_reduce_max(torch.stack([scores.max(), -scores.min()]))
    highest, span = extremes[0], extremes.sum()
    if span / epsilon > LARGEST_EXPONENT:
        return _sinkhorn_log((scores - highest) / epsilon, iterations)
    kernel = ((scores - highest) / epsilon).exp_()
    u = kernel.new_ones(len(kernel))
    for _ in range(iterations):
        v = 1 / all_reduce_sum(u @ kernel)
        u = 1 / (kernel @ v)
    return kernel.mul_(v).mul_(u[:, None])


def _sinkhorn_log(logits: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        columns = logits.logsumexp(dim=0)
        if world_size() > 1:
            columns = all_gather_rows(columns[None]).logsumexp(dim=0)
        logits = logits - columns
        logits = logits - logits.logsumexp(dim=1, keepdim=True)
    return logits.exp()
