"""What contrastive methods share: two crops of each image, cross entropy with one positive, and its meters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.parts.contract import Metrics, ParamGroup
from methods.parts.errors import ConfigError
from methods.parts.views import Views


def pair(views: Views) -> tuple[Tensor, Tensor]:
    """The two crops of each image, `(B, 3, H, W)` each, in the declared order.

    Raises:
        ConfigError: more or fewer than two.
    """
    crops = views.crops
    if len(crops) != 2:
        raise ConfigError(f"views={', '.join(views.stacks)}: {len(crops)} crops of each image; use one group of count 2, or two of count 1")
    return crops[0], crops[1]


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


def weights_and_vectors(network: nn.Module) -> list[ParamGroup]:
    """Weights decay and adapt; vectors (biases, and scales and shifts of norms) do neither."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        ParamGroup(params=[p for p in trained if p.ndim > 1], name="weights"),
        ParamGroup(params=[p for p in trained if p.ndim <= 1], name="vectors", decay=False, adapt=False),
    ]
