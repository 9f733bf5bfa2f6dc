"""What the clusters of a method hold: sizes, agreement with labels where there are any, the images to show of each."""

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
    """N images, each in the cluster whose prototype (or centre) it scores highest with.

    Attributes:
        images: `(N, H, W, 3)` uint8.
        labels: `(N,)`, -1 where unknown.
        assignments: `(N,)`, cluster of each image, from 0 to K - 1.
        scores: `(N,)`, its score with that cluster; higher is more typical.
        count: K, empty clusters too.
    """

    images: np.ndarray
    labels: np.ndarray
    assignments: np.ndarray
    scores: np.ndarray
    count: int

    @property
    def sizes(self) -> np.ndarray:
        """Images in each cluster, `(K,)`."""
        return np.bincount(self.assignments, minlength=self.count)

    @property
    def even(self) -> float:
        """N / K, what every cluster would hold if all held as many."""
        return len(self.assignments) / self.count

    def metrics(self) -> dict[str, float]:
        """The figures to follow during training.

        `cluster_min`, `cluster_max`: sizes in multiples of N / K, 1 = balanced (CoKe's lower bound is in the same unit).
        `clusters_empty`: share of the K clusters; some are always empty when N is not much more than K.
        `assignment_entropy`: of the sizes, as a fraction of ln K, 1 = balanced, 0 = one cluster holds everything.
        `nmi`, `purity`: only where images have labels, on those.
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
        """At most so many images of a cluster, the most typical first: rows of `images`."""
        rows = np.flatnonzero(self.assignments == cluster)
        return rows[np.argsort(-self.scores[rows], kind="stable")[:most]]

    def commonest(self, cluster: int) -> tuple[int, float] | None:
        """The label that most images of a cluster have, and its share of those with a label; None without labels."""
        labels = self.labels[(self.assignments == cluster) & (self.labels >= 0)]
        if not len(labels):
            return None
        counts = np.bincount(labels)
        return int(counts.argmax()), float(counts.max() / len(labels))

    def worth_showing(self, each: int = 3, fewest: int = 5) -> dict[str, list[int]]:
        """Clusters by why they are worth a look: `largest`, `smallest`, and `purest`, or `tightest` without labels.

        None is empty and none comes twice. A cluster of a few images is pure, or tight, by chance: `fewest` are wanted.
        Tight is a high mean score.
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
    """Share of images that have the commonest label of their cluster, in [0, 1]. It rises with K: one image is pure."""
    from sklearn.metrics.cluster import contingency_matrix

    return float(contingency_matrix(labels, assignments).max(axis=0).sum() / len(labels))


def assign(
    method: Method, images: Tensor, labels: Tensor, *, mean: Triple, std: Triple, device: torch.device, precision: Precision = "float32"
) -> Clusters:
    """The clusters of uint8 images `(N, H, W, 3)`, by `method.cluster_scores`. The method is left as it was found."""
    count = 0

    def best(x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 2): all scores of all images would not fit for many prototypes
        nonlocal count
        scores = method.cluster_scores(x)
        count = scores.shape[1]
        return torch.stack([part.float() for part in scores.max(dim=1)], dim=1)  # float32 holds numbers up to 2^24 exactly

    found = extract(method, images, mean=mean, std=std, device=device, precision=precision, forward=best)
    return Clusters(images.numpy(), labels.numpy(), found[:, 1].long().numpy(), found[:, 0].numpy(), count)
