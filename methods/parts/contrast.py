"""What contrastive methods share: cross entropy with one positive, and its meters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.parts.contract import Metrics


def info_nce(logits: Tensor, positives: Tensor) -> Tensor:
    """Mean over A anchors of - log softmax(logits)[positive].

    Args:
        logits: cosine / temperature of each anchor with C candidates, `(A, C)`; -inf where it is no candidate.
        positives: the column of each anchor's positive, `(A,)`.
    """
    return F.cross_entropy(logits, positives)


@torch.no_grad()
def contrast_meters(logits: Tensor, positives: Tensor, temperature: float) -> Metrics:
    """Of `info_nce`'s arguments: how often the positive alone is nearest, and mean cosines of positives and negatives."""
    positive = logits.gather(1, positives[:, None])  # (A, 1)
    first = (logits >= positive).sum(dim=1) == 1  # equal logits of a collapsed network do not count
    candidates = logits.isfinite()
    negatives = (candidates.sum() - len(logits)).clamp(min=1)
    others = torch.where(candidates, logits, 0).sum() - positive.sum()
    return {
        "contrastive_top1": first.double().mean(),
        "positive_cosine": positive.mean() * temperature,
        "negative_cosine": others / negatives * temperature,
    }
