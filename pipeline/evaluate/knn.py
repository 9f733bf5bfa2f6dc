"""Nearest-neighbour classification of frozen features: the weighted vote of DINO (Caron et al. 2021, sec. 3.1, `eval_knn`)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.parts.errors import ConfigError, require

Metric = Literal["cosine", "l2"]


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    metric: Metric = "cosine",
    chunk: int | None = None,
) -> Tensor:
    """Predict the class of each query `(M, D)` by the vote of its k nearest rows of the bank `(N, D)`: `(M,)` int64.

    `cosine`: rows have unit norm, and a neighbour of similarity s votes with exp(s / temperature). `l2`: Euclidean
    distance of the rows, one vote each (for raw pixels). Equal votes go to the class with the nearest neighbour, then to
    the lowest label. Rows with label -1 do not vote; k is at most the number of rows that vote. Half types are promoted
    to float32, float64 stays. `chunk` queries are compared at a time; None = as many as keep the similarities below half
    a gigabyte, at most 512.

    Raises:
        ConfigError: a bank without labels, or features that are not finite.
    """
    require(k >= 1, "evaluate.knn_k", k, "use 1 or more")
    require(temperature > 0, "evaluate.knn_temperature", temperature, "use a positive number")
    bank_labels = bank_labels.to(bank.device)
    voters = bank_labels >= 0
    require(bool(voters.any()), "evaluate.knn_bank", len(bank), "none of these images has a label; kNN needs labelled images")
    bank, queries = _prepared(bank[voters], metric), _prepared(queries, metric)
    classes, targets = bank_labels[voters].unique(return_inverse=True)  # sorted, so a lower target is a lower label
    k = min(k, len(bank))
    chunk = chunk or min(512, max(1, 2**27 // len(bank)))
    winners = [_vote(bank, targets, len(classes), rows, k, temperature, metric) for rows in queries.split(chunk)]
    return classes[torch.cat(winners)] if winners else classes[:0]


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    *,
    metric: Metric = "cosine",
    chunk: int | None = None,
) -> float:
    """Return the top-1 accuracy of `knn_predict`, a fraction in [0, 1]. Queries with label -1 are left out.

    Raises:
        ConfigError: no labelled row in the bank or among the queries, or features that are not finite.
    """
    known = query_labels >= 0
    require(bool(known.any()), "evaluate.knn_queries", len(queries), "none of these images has a label; kNN needs labelled images")
    predicted = knn_predict(bank, bank_labels, queries[known], k=k, temperature=temperature, metric=metric, chunk=chunk)
    return (predicted == query_labels[known].to(predicted.device)).double().mean().item()


def centred(bank: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the mean of the bank from both, so that a direction common to all features does not dominate."""
    mean = bank.mean(0, dtype=torch.float64).to(bank.dtype)
    return bank - mean, queries - mean


def _prepared(features: Tensor, metric: Metric) -> Tensor:
    features = features if features.dtype == torch.float64 else features.float()
    if not bool(features.isfinite().all()):
        raise ConfigError("features=nan: the backbone gives values that are not finite; use an earlier checkpoint, or lower optim.base_lr")
    return F.normalize(features, dim=1) if metric == "cosine" else features


def _vote(bank: Tensor, targets: Tensor, num_classes: int, rows: Tensor, k: int, temperature: float, metric: Metric) -> Tensor:
    if metric == "cosine":
        closeness, neighbours = (rows @ bank.T).topk(k)  # (m, k)
    else:
        closeness, neighbours = torch.cdist(rows, bank).neg().topk(k)
    labels = targets[neighbours]
    # equally near neighbours in the order of their labels, so that ties do not depend on the order of topk
    order = labels.argsort(dim=1, stable=True)
    order = order.gather(1, closeness.gather(1, order).argsort(dim=1, descending=True, stable=True))
    closeness, labels = closeness.gather(1, order), labels.gather(1, order)
    # minus the maximum of the row: the same ranking without overflow at a small temperature
    weights = ((closeness - closeness[:, :1]) / temperature).exp() if metric == "cosine" else torch.ones_like(closeness)
    votes = torch.zeros(len(rows), num_classes, dtype=weights.dtype, device=weights.device).scatter_add_(1, labels, weights)
    wins = votes.gather(1, labels) == votes.amax(1, keepdim=True)  # (m, k): this neighbour's class has the most votes
    first = (wins * torch.arange(k, 0, -1, device=wins.device)).argmax(1, keepdim=True)
    return labels.gather(1, first).squeeze(1)
