"""Picture of the features of patches: foreground by the first principal component, three components of it as red, green and blue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from methods.parts.vit import ViT
from pipeline.evaluate.features import extract
from pipeline.figures.context import LEAST, FigureContext
from pipeline.figures.pictures import picture
from pipeline.figures.style import GRAY, cell, picture_at, show, write

BORDER = 0.25  # of a side: how far images are mirrored at their borders for networks whose convolutions fill up with zeros


@picture("patch_pca")
def patch_pca(subject: FigureContext, path: Path) -> Path:
    """Principal components of the features of patches as colours, as in DINOv2: similar parts of all images have similar colours."""
    data = subject.config.data
    settings = {"mean": data.mean, "std": data.std, "device": subject.device, "batch_size": 8}
    images, source = subject.a_few_images(size=subject.map_size)
    maps = {}
    for name, network in (("untrained", subject.calibrated), ("trained", subject.backbone)):
        grid = extract(network, images, forward=lambda x, network=network: patch_features(network, x), **settings)  # type: ignore[arg-type,misc]
        subject.require_fine(*grid.shape[1:3])
        maps[name] = grid.numpy()
    return draw(images.numpy(), maps, path, source=source)


def patch_features(network: nn.Module, images: Tensor) -> Tensor:
    """Return the patch tokens of a ViT, or the deepest map of at least 8 x 8 (else the finest): `(B, 3, H, W) -> (B, h, w, D)`.

    For other networks than ViTs, images are continued by their mirror image, so that the zeros at the borders of convolutions
    stay outside.
    """
    if isinstance(network, ViT):
        size = network.patch_embed.patch_size
        return network.tokens(images).patches.unflatten(1, [side // patch for side, patch in zip(images.shape[-2:], size, strict=True)])
    border = int(BORDER * min(images.shape[-2:]))
    whole = F.pad(images, (border,) * 4, mode="reflect")
    if hasattr(network, "forward_intermediates"):
        maps: list[Tensor] = [m for m in network.forward_intermediates(whole, intermediates_only=True) if m.ndim == 4]  # type: ignore[operator]
    else:
        maps = [network.forward_features(whole)]  # type: ignore[operator]
    inner = [_inside(m, border / whole.shape[-1]) for m in maps]
    fine = [m for m in inner if min(m.shape[-2:]) >= LEAST]
    return (fine[-1] if fine else max(inner, key=lambda m: m.shape[-1])).permute(0, 2, 3, 1)


def _inside(features: Tensor, share: float) -> Tensor:
    """Cut a share of the rows and columns from each side of a map `(B, D, h, w)`."""
    top, left = (round(share * side) for side in features.shape[-2:])
    return features[..., top : features.shape[-2] - top, left : features.shape[-1] - left]


def draw(images: np.ndarray, maps: dict[str, np.ndarray], path: Path, *, source: str = "held-out images") -> Path:
    """Draw each image beside the components of each network, in two columns of images.

    Args:
        images: uint8 `(B, H, W, 3)`.
        maps: features `(B, h, w, D)` by name of the network.
        path: the PNG to write.
        source: description of the images.
    """
    side, step, margin, gap, head = 1.6, 1.66, 0.2, 0.3, 1.0  # inches
    blocks = 2 if len(images) > 1 else 1
    rows, across = -(-len(images) // blocks), 1 + len(maps)
    found = {name: components(grid) for name, grid in maps.items()}
    with picture_at(path, 2 * margin + blocks * across * step + (blocks - 1) * gap, head + rows * step + margin) as figure:
        write(figure, margin, 0.36, "What the patches' features tell apart", size=14, weight="bold")
        grid = next(iter(maps.values())).shape
        text = (
            f"{source}, {grid[1]} × {grid[2]} patches; black: background, by the first component; "
            "colours: three components of the rest, one basis for all"
        )
        write(figure, margin, 0.6, text, size=8.5, color=GRAY)
        for block in range(blocks):
            left = margin + block * (across * step + gap)
            for column, title in enumerate(("image", *found)):
                write(figure, left + column * step, head - 0.1, title, size=10, weight="bold")
            for row, i in enumerate(range(block * rows, min(len(images), (block + 1) * rows))):
                for column, name in enumerate((None, *found)):
                    axes = cell(figure, left + column * step, head + row * step, side, side)
                    if name is None:
                        show(axes, images[i], side)
                    else:
                        axes.imshow(found[name][i], interpolation="bilinear", aspect="auto")
    return path


def components(features: np.ndarray) -> np.ndarray:
    """Return colours of patches, joint over all images: `(B, h, w, D) -> (B, h, w, 3)` in [0, 1].

    First the foreground: the patches with a positive first principal component, whose sign is chosen so that patches at the
    borders of images have lower values than those inside. Then three components of the foreground, each with the sign of its
    largest loading and scaled from its 1st to its 99th percentile (Oquab et al. 2023, arXiv:2304.07193). The background
    is black. If hardly anything is in the foreground, all patches are.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    first = (flat - flat.mean(axis=0)) @ principal_axes(flat, 1)[:, 0]
    at_border = np.ones(features.shape[:3], bool)
    at_border[:, 1:-1, 1:-1] = False
    border = at_border.ravel()
    first = first if first[border].mean() <= first[~border].mean() else -first
    foreground = first > 0 if (first > 0).mean() > 0.02 else np.ones(len(first), bool)
    chosen = flat[foreground]
    values = (chosen - chosen.mean(axis=0)) @ principal_axes(chosen, 3)
    low, high = np.percentile(values, (1, 99), axis=0)
    colours = np.zeros((len(flat), 3))
    colours[foreground] = ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colours.reshape(*features.shape[:3], 3)


def principal_axes(rows: np.ndarray, count: int) -> np.ndarray:
    """Return the first principal axes of `(n, D)` as columns `(D, count)`, the largest loading of each positive; zeros if D is smaller."""
    centred = rows - rows.mean(axis=0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :count]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    return np.pad(axes, ((0, 0), (0, count - axes.shape[1])))
