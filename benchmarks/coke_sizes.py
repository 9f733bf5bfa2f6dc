"""Sizes of CoKe's clusters against their lower bound, on fixed features: what the bound does, apart from any learning.

Features are the images' pixels, centred and projected on their first principal components; clusters are those of
`methods/coke.py`, fed in a new order each epoch. At r' = 0 clusters stay empty; from r' = 0.4 on the smallest is near
r' N / K; the largest is about twice N / K, and nearer to it at r' = 1; labels change more from epoch to epoch as r' rises.

    python benchmarks/coke_sizes.py --data.path cifar10/train
"""

from __future__ import annotations

import argparse
import io
import time

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from methods.coke import OnlineClusters, default_dual_learning_rate
from methods.parts.numerics import l2_normalize
from pipeline.config import DataConfig
from pipeline.data.sources.base import open_source


def pixel_features(path: str, images: int | None, dim: int, size: int = 16) -> Tensor:
    """Unit features `(N, D)` of a source's images, shrunk to `size` pixels a side."""
    dataset = open_source(DataConfig(path=path))
    ids = np.arange(min(len(dataset), images or len(dataset)))
    pixels = np.empty((len(ids), size * size * 3), np.float32)
    for part in np.array_split(ids, -(-len(ids) // 2000)):
        for row in dataset.read(part):
            pixels[row.id] = np.asarray(Image.open(io.BytesIO(row.image)).convert("RGB").resize((size, size))).ravel() / 255
    x = torch.from_numpy(pixels)
    x = x - x.mean(dim=0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -dim:]
    return l2_normalize(x @ axes)


def epochs(features: Tensor, k: int, bound: float, rate: float, batch: int, count: int, seed: int) -> tuple[Tensor, float]:
    """Sizes `(K,)` of the last of `count` epochs, and the share of images that kept their label in it."""
    torch.manual_seed(seed)
    clusters = OnlineClusters(k, features.shape[1], bound, rate)
    labels = torch.full((len(features),), -1)
    for _ in range(count):
        before = labels.clone()
        for ids in torch.randperm(len(features)).split(batch):
            labels[ids] = clusters.assign(features[ids])
            clusters.update(features[ids], labels[ids])
        clusters.end_epoch()
    return clusters.sizes, float((labels == before).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.path", dest="path", required=True, help="as of `pretrain`: a folder, Parquet or tars")
    parser.add_argument("--images", type=int, help="at most so many")
    parser.add_argument("--clusters", type=int, default=100, help="K")
    parser.add_argument("--rate", type=float, help="dual learning rate; left out: CoKe's rule")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    features = pixel_features(options.path, options.images, options.dim)
    images, k = len(features), options.clusters
    rate = options.rate or default_dual_learning_rate(k, -(-images // options.batch))
    print(f"{images} images, K {k}, dual learning rate {rate:.3g}, batch {options.batch}, {options.epochs} epochs, seed {options.seed}")
    print("  r'  bound    min    max  empty  agreement      s")
    for bound in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        begin = time.perf_counter()
        sizes, agreement = epochs(features, k, bound, rate, options.batch, options.epochs, options.seed)
        took, empty = time.perf_counter() - begin, int((sizes == 0).sum())
        line = f"{bound:4.1f} {bound * images / k:6.0f} {int(sizes.min()):6} {int(sizes.max()):6} {empty:6} {agreement:10.2f} {took:6.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
