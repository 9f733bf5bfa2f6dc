"""Picture of the features of patches: three principal components as red, green and blue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from methods.parts.vit import ViT
from pipeline.evaluate.features import extract
from pipeline.figures.context import FigureContext
from pipeline.figures.pictures import picture
from pipeline.figures.style import GRAY, cell, picture_at, show, write

LEAST = 8  # patches on a side, if the network has such a map


@picture("patch_pca")
def patch_pca(subject: FigureContext, path: Path) -> Path:
    """Three principal components of the features of patches as colours: similar parts of all images get similar colours."""
    data = subject.config.data
    settings = {"mean": data.mean, "std": data.std, "device": subject.device}
    images, source = subject.a_few_images()
    maps = {}
    for name, network in (("untrained", subject.calibrated), ("trained", subject.backbone)):
        grid = extract(network, images, forward=lambda x, network=network: patch_features(network, x), **settings)  # type: ignore[arg-type,misc]
        maps[name] = grid.numpy()
    return draw(images.numpy(), maps, path, source=source)


def patch_features(network: nn.Module, images: Tensor) -> Tensor:
    """Return the patch tokens of a ViT, or the deepest map of at least 8 x 8 (else the finest): `(B, 3, H, W) -> (B, h, w, D)`."""
    if isinstance(network, ViT):
        size = network.patch_embed.patch_size
        return network.tokens(images).patches.unflatten(1, [side // patch for side, patch in zip(images.shape[-2:], size, strict=True)])
    if hasattr(network, "forward_intermediates"):
        maps: list[Tensor] = [m for m in network.forward_intermediates(images, intermediates_only=True) if m.ndim == 4]  # type: ignore[operator]
    else:
        maps = [network.forward_features(images)]  # type: ignore[operator]
    fine = [m for m in maps if min(m.shape[-2:]) >= LEAST]
    return (fine[-1] if fine else max(maps, key=lambda m: m.shape[-1])).permute(0, 2, 3, 1)


def draw(images: np.ndarray, maps: dict[str, np.ndarray], path: Path, *, source: str = "held-out images") -> Path:
    """Draw each image beside the components of each network, in two columns of images.

    Args:
        images: uint8 `(B, H, W, 3)`.
        maps: features `(B, h, w, D)` by name of the network.
        path: the PNG to write.
        source: description of the images.
    """
    side, step, margin, gap, head = 1.1, 1.16, 0.2, 0.3, 0.95  # inches
    blocks = 2 if len(images) > 1 else 1
    rows, across = -(-len(images) // blocks), 1 + len(maps)
    found = {name: components(grid) for name, grid in maps.items()}
    with picture_at(path, 2 * margin + blocks * across * step + (blocks - 1) * gap, head + rows * step + margin) as figure:
        write(figure, margin, 0.36, "What the patches' features tell apart", size=13, weight="bold")
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, (_, share) in found.items())
        text = f"{source}; three principal components of all patches as colours; they hold of the variance: {shares}"
        write(figure, margin, 0.58, text, size=8, color=GRAY)
        for block in range(blocks):
            left = margin + block * (across * step + gap)
            for column, title in enumerate(("image", *found)):
                write(figure, left + column * step, head - 0.1, title, size=8.5, weight="bold")
            for row, i in enumerate(range(block * rows, min(len(images), (block + 1) * rows))):
                for column, shown in enumerate((images[i], *(colours[i] for colours, _ in found.values()))):
                    show(cell(figure, left + column * step, head + row * step, side, side), shown, side)
    return path


def components(features: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the first three principal components over all patches, each in [0, 1], and their fraction of the variance.

    `(B, h, w, D) -> (B, h, w, 3)`. Each component is scaled from its 2nd to its 98th percentile. Its sign, which is arbitrary, is
    chosen so that most patches are dark.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    values, vectors = np.linalg.eigh(flat.T @ flat)
    best = flat @ vectors[:, ::-1][:, :3]
    best = np.pad(best, ((0, 0), (0, 3 - best.shape[1])))
    best = best * np.where(np.median(best, axis=0) > 0, -1, 1)
    low, high = np.percentile(best, (2, 98), axis=0)
    scaled = ((best - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return scaled.reshape(*features.shape[:3], 3), float(values[::-1][:3].sum() / max(values.sum(), 1e-30))
