"""Meters of a step, without gradient: spread of embeddings, cosines of pairs, use of prototypes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.parts.numerics import entropy, l2_normalize

Metrics = dict[str, Tensor | float]


def embedding_std(z: Tensor) -> Tensor:
    """Return the mean over dimensions of the std of unit rows `(B, D)`, times sqrt(D): about 1 if spread out, 0 if collapsed."""
    spread: Tensor = z.std(dim=0, unbiased=False).mean()
    return spread * math.sqrt(z.shape[-1])


def cosines(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cosine of pairs (a_i, b_i), and of all (a_i, b_j) with i != j. Both `(B, D)`, rows of any length but 0."""
    a, b = l2_normalize(a), l2_normalize(b)
    batch, positive = len(a), (a * b).sum(dim=-1)
    others = a.sum(dim=0) @ b.sum(dim=0) - positive.sum()
    return positive.mean(), others / max(1, batch * (batch - 1))


def used_share(scores: Tensor) -> Tensor:
    """Return how many columns of `(B, K)` are the largest of any row, as a share of the min(B, K) that could be."""
    used = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device)
    return used.index_fill_(0, scores.argmax(dim=1), 1.0).sum() / min(scores.shape)


@torch.no_grad()
def pair_meters(embeddings: Tensor, predictions: Tensor, targets: Tensor) -> Metrics:
    """Return the spread of the embeddings, and mean cosines of predictions with their own target and with others. All `(B, D)`."""
    positive, negative = cosines(predictions, targets)
    return {"embedding_std": embedding_std(l2_normalize(embeddings)), "positive_cosine": positive, "negative_cosine": negative}


@torch.no_grad()
def code_meters(codes: Tensor) -> Metrics:
    """Return the mean entropy of codes `(B, K)` as a fraction of ln K, their mean maximum, and the share of prototypes in use."""
    return {
        "code_entropy": entropy(codes).mean() / math.log(codes.shape[1]),
        "code_max": codes.amax(dim=1).mean(),
        "prototypes_used": used_share(codes),
    }
