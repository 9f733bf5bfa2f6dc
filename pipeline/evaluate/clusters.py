"""The clusters of a method: sizes, agreement with labels, and images to show of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from methods.parts.contract import Method
from pipeline.evaluate.features import Precision, Triple, extract


@dataclass(frozen=True)
class Clusters:
    """N images, each in the cluster of its highest score with a prototype (or centre).

    Attributes:
        images: `(N, H, W, 3)` uint8.
        labels: `(N,)`, -1 if unknown.
        assignments: `(N,)`, cluster of each image, from 0 to K - 1.
        scores: `(N,)`, score of each image with its cluster; higher is more typical.
        count: K, empty clusters included.
        ids: `(N,)`, the ids of the images in their dataset; None if they are of none.
    """

    images: np.ndarray
    labels: np.ndarray
    assignments: np.ndarray
    scores: np.ndarray
    count: int
    ids: np.ndarray | None = None

    @property
    def sizes(self) -> np.ndarray:
        """The number of images in each cluster, `(K,)`."""
        return np.bincount(self.assignments, minlength=self.count)

    @property
    def even(self) -> float:
        """N / K, the size of clusters of equal size."""
        return len(self.assignments) / self.count

    def metrics(self) -> dict[str, float]:
        """Return metrics of the clusters.

        `cluster_min`, `cluster_max`: sizes in multiples of N / K, 1 = balanced (CoKe's lower bound is in the same unit).
        `clusters_empty`: fraction of empty clusters; some are always empty if N is not much larger than K.
        `assignment_entropy`: entropy of the sizes as a fraction of ln K, 1 = balanced, 0 = one cluster holds all images.
        `nmi`, `purity`: of the labelled images, if there are any.
        """
        sizes = self.sizes
        share = sizes[sizes > 0] / sizes.sum()
        found = {
            "cluster_min": sizes.min() / self.even,
            "cluster_max": sizes.max() / self.even,
            "clusters_empty": (sizes == 0).mean(),
            "assignment_entropy": -(share * np.log(share)).sum() / math.log(self.count) if self.count > 1 else 0.0,
        }
        known = self.labels >= 0
        if known.any():
            from sklearn.metrics import normalized_mutual_info_score

            found["nmi"] = normalized_mutual_info_score(self.labels[known], self.assignments[known])
            found["purity"] = purity(self.labels[known], self.assignments[known])
        return {name: float(value) for name, value in found.items()}

    def nearest(self, cluster: int, most: int) -> np.ndarray:
        """Return the rows of at most `most` images of a cluster, the most typical first."""
        rows = np.flatnonzero(self.assignments == cluster)
        return rows[np.argsort(-self.scores[rows], kind="stable")[:most]]

    def commonest(self, cluster: int) -> tuple[int, float] | None:
        """Return the most common label of a cluster and its fraction of the labelled images; None without labels."""
        labels = self.labels[(self.assignments == cluster) & (self.labels >= 0)]
        if not len(labels):
            return None
        counts = np.bincount(labels)
        return int(counts.argmax()), float(counts.max() / len(labels))

    def worth_showing(self, each: int = 3, fewest: int = 5) -> dict[str, list[int]]:
        """Return clusters to show by reason: `largest`, `smallest`, and `purest`, or `tightest` (highest mean score) without labels.

        None is empty and none is repeated. Pure and tight clusters have at least `fewest` images, because small ones are pure or
        tight by chance.
        """
        sizes = self.sizes
        full = [int(k) for k in np.argsort(-sizes, kind="stable") if sizes[k]]
        chosen = {"largest": full[:each]}
        chosen["smallest"] = full[each:][::-1][:each]
        rest = [k for k in full[each:][: -each or None] if sizes[k] >= fewest]
        if (self.labels >= 0).any():
            shares = {k: found[1] for k in rest if (found := self.commonest(k))}
            chosen["purest"] = sorted(shares, key=lambda k: -shares[k])[:each]
        else:
            chosen["tightest"] = sorted(rest, key=lambda k: -self.scores[self.assignments == k].mean())[:each]
        return {why: clusters for why, clusters in chosen.items() if clusters}


def purity(labels: np.ndarray, assignments: np.ndarray) -> float:
    """Return the fraction of images with the most common label of their cluster, in [0, 1]. It rises with K."""
    from sklearn.metrics.cluster import contingency_matrix

    return float(contingency_matrix(labels, assignments).max(axis=0).sum() / len(labels))


def assign(
    method: Method, images: Tensor, labels: Tensor, *, mean: Triple, std: Triple, device: torch.device, precision: Precision = "float32"
) -> Clusters:
    """Assign uint8 images `(N, H, W, 3)` to clusters by `method.cluster_scores`. The method's state does not change."""
    count = 0

    def best(x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 2), because all scores of all images may not fit into memory
        nonlocal count
        scores = method.cluster_scores(x)
        count = scores.shape[1]
        return torch.stack([part.float() for part in scores.max(dim=1)], dim=1)  # float32 holds numbers up to 2^24 exactly

    found = extract(method, images, mean=mean, std=std, device=device, precision=precision, forward=best)
    return Clusters(images.numpy(), labels.numpy(), found[:, 1].long().numpy(), found[:, 0].numpy(), count)
