"""Cross entropy with one positive, for contrastive methods, and its meters."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from methods.parts.meters import Metrics
from methods.parts.numerics import chunk_rows


def info_nce(logits: Tensor, positives: Tensor) -> Tensor:
    """Return the mean over A anchors of - log softmax(logits)[positive].

    Args:
        logits: cosine / temperature of each anchor with C candidates, `(A, C)`; -inf where it is no candidate.
        positives: the column of each anchor's positive, `(A,)`.
    """
    return F.cross_entropy(logits, positives)


def info_nce_with_queue(
    logits: Tensor, positives: Tensor, anchors: Tensor, rows: Tensor, temperature: float, *, meters: bool = True
) -> tuple[Tensor, Metrics]:
    """Return `info_nce` with the rows of a queue as further candidates, and its meters. The logits of the queue are never held.

    Args:
        logits: cosine / temperature of each anchor with the candidates that are not in the queue, `(A, C)`.
        positives: the column of each anchor's positive, `(A,)`.
        anchors: unit rows `(A, D)`.
        rows: the queue, unit rows `(K, D)`; no gradient.
        meters: False = return no meters.
    """
    queued, nearest, total = _QueuedLogits.apply(anchors, rows, temperature, meters)
    positive = logits.gather(1, positives[:, None]).squeeze(1)
    loss = (torch.logaddexp(logits.logsumexp(dim=1), queued) - positive).mean()
    return loss, _meters(logits.detach(), positives, temperature, nearest, total, len(rows) * len(anchors)) if meters else {}


class _QueuedLogits(torch.autograd.Function):
    """With s_c = anchor . row_c / temperature: log sum_c exp(s_c) and max_c s_c, both `(A,)`, and the sum of all s.

    The rows are read part by part with a running maximum, so that the parts stay in the cache. The gradient of the first,
    sum_c softmax(s)_c row_c / temperature, is summed on the way.
    """

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, rows: Tensor, temperature: float, meters: bool) -> tuple[Tensor, Tensor, Tensor]:
        scaled = anchors / temperature
        largest = anchors.new_full((len(anchors), 1), -math.inf)
        mass, mean, total = torch.zeros_like(largest), torch.zeros_like(anchors), anchors.new_zeros(())
        for part in rows.split(chunk_rows(anchors.T)):
            s = scaled @ part.T
            if meters:
                total += s.sum()
            before, largest = largest, torch.maximum(largest, s.amax(dim=1, keepdim=True))
            s.sub_(largest).exp_()
            kept = (before - largest).exp_()
            mass.mul_(kept).add_(s.sum(dim=1, keepdim=True))
            mean.mul_(kept).addmm_(s, part)
        ctx.save_for_backward(mean.div_(mass * temperature))
        nearest = largest.squeeze(1)
        ctx.mark_non_differentiable(nearest, total)
        return (largest + mass.log()).squeeze(1), nearest, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (mean,) = ctx.saved_tensors
        return gradient[:, None] * mean, None, None, None


@torch.no_grad()
def contrast_meters(logits: Tensor, positives: Tensor, temperature: float) -> Metrics:
    """Return how often the positive alone is nearest, and mean cosines of positives and negatives; arguments as of `info_nce`."""
    zero = logits.new_zeros(())
    return _meters(logits, positives, temperature, zero - math.inf, zero, 0)


@torch.no_grad()
def _meters(logits: Tensor, positives: Tensor, temperature: float, nearest: Tensor, total: Tensor, count: int) -> Metrics:
    """Return the meters of logits and of `count` further negatives in all: `nearest` of each anchor `(A,)`, and `total`, their sum."""
    positive = logits.gather(1, positives[:, None])  # (A, 1)
    first = ((logits >= positive).sum(dim=1) == 1) & (nearest < positive.squeeze(1))  # equal logits of a collapsed network do not count
    candidates = logits.isfinite()
    negatives = (candidates.sum() - len(logits) + count).clamp(min=1)
    others = torch.where(candidates, logits, 0).sum() - positive.sum() + total
    return {
        "contrastive_top1": first.double().mean(),
        "positive_cosine": positive.mean() * temperature,
        "negative_cosine": others / negatives * temperature,
    }
