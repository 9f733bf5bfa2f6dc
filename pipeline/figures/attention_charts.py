"""Picture of a ViT's attention from the CLS token of the last block to the patches, for each head. PNG, colour-blind-safe."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.figures.style import GRAY, cell, picture_at, show, write

COLOURS = "cividis"


def attention_maps(images: np.ndarray, attention: np.ndarray, path: Path, *, source: str = "held-out images", most_heads: int = 12) -> Path:
    """Draw a row for each image: the image, the mean over the heads, and every head.

    Each map is scaled from 0 (dark) to its own maximum (bright), because heads give different parts of their attention to CLS and
    registers.

    Args:
        images: uint8 `(B, H, W, 3)`.
        attention: from CLS to each patch, `(B, heads, h, w)`, at least 0.
        path: the PNG to write.
        source: description of the images.
        most_heads: largest number of heads.
    """
    if not len(images) or len(images) != len(attention):
        raise ConfigError(f"images={len(images)}: {len(attention)} attention maps; give one for each of at least one image")
    heads = attention.shape[1]
    drawn = min(heads, most_heads)
    side, step, margin, gap, head = 0.85, 0.91, 0.2, 0.14, 0.95  # inches
    lefts = [margin, margin + step + gap] + [margin + 2 * (step + gap) + i * step for i in range(drawn)]
    titles = ["image", "mean"] + [f"head {i + 1}" for i in range(drawn)]
    width, height = max(lefts[-1] + side + margin, 5.2), head + len(images) * step + margin
    with picture_at(path, width, height) as figure:
        write(figure, margin, 0.36, "Where the last CLS token looks", size=13, weight="bold")
        rows, columns = attention.shape[2:]
        text = f"{source}, {rows} × {columns} patches; each map from 0 (dark) to its largest (bright)"
        text += f"; {drawn} of {heads} heads" if drawn < heads else ""
        write(figure, margin, 0.58, text, size=8, color=GRAY)
        for left, title in zip(lefts, titles, strict=True):
            write(figure, left, head - 0.1, title, size=8.5, weight="bold")
        for i, image in enumerate(images):
            top = head + i * step
            show(cell(figure, lefts[0], top, side, side), image, side)
            maps = [attention[i].mean(axis=0), *attention[i, :drawn]]
            for left, weights in zip(lefts[1:], maps, strict=True):
                axes = cell(figure, left, top, side, side)
                axes.imshow(weights, cmap=COLOURS, vmin=0, vmax=max(float(weights.max()), 1e-12), interpolation="nearest", aspect="auto")
    return path
