"""Picture of a ViT's attention from the CLS token of the last block to the patches, for each head. PNG, colour-blind-safe."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.figures.style import GRAY, cell, picture_at, show, write

COLOURS = "cividis"
LEAST_TOP = 2.5  # of the scale, in multiples of the mean: a map that hardly differs from it stays dark


def attention_maps(images: np.ndarray, attention: np.ndarray, path: Path, *, source: str = "held-out images", most_heads: int = 12) -> Path:
    """Draw a row for each image: the image, the mean over the heads, and every head, all on one scale.

    A value is the attention to a patch in multiples of the mean over the patches of its map, because heads give different parts of
    their attention to CLS and registers: 1 everywhere if a head looks at all patches alike. The scale goes from 0 to the
    99th percentile of all values, at least to `LEAST_TOP`.

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
    maps = np.concatenate([attention.mean(axis=1, keepdims=True), attention[:, :drawn]], axis=1)
    maps = maps / np.maximum(maps.mean(axis=(2, 3), keepdims=True), 1e-12)
    top_value = max(LEAST_TOP, float(np.percentile(maps, 99)))
    side, step, margin, gap, head = 0.85, 0.91, 0.2, 0.14, 0.95  # inches
    lefts = [margin, margin + step + gap] + [margin + 2 * (step + gap) + i * step for i in range(drawn)]
    titles = ["image", "mean"] + [f"head {i + 1}" for i in range(drawn)]
    width, height = max(lefts[-1] + side + margin, 5.2), head + len(images) * step + 0.6
    with picture_at(path, width, height) as figure:
        write(figure, margin, 0.36, "Where the last CLS token looks", size=13, weight="bold")
        rows, columns = attention.shape[2:]
        text = f"{source}, {rows} × {columns} patches" + (f"; {drawn} of {heads} heads" if drawn < heads else "")
        write(figure, margin, 0.58, text, size=8, color=GRAY)
        for left, title in zip(lefts, titles, strict=True):
            write(figure, left, head - 0.1, title, size=8.5, weight="bold")
        for i, image in enumerate(images):
            top = head + i * step
            show(cell(figure, lefts[0], top, side, side), image, side)
            for left, values in zip(lefts[1:], maps[i], strict=True):
                axes = cell(figure, left, top, side, side)
                drawing = axes.imshow(values, cmap=COLOURS, vmin=0, vmax=top_value, interpolation="nearest", aspect="auto")
        bar = figure.colorbar(drawing, cax=cell(figure, margin, head + len(images) * step + 0.05, 2.4, 0.12), orientation="horizontal")
        bar.set_ticks([0, 1, *range(2, int(top_value) + 1, max(1, int(top_value) // 4))])
        bar.ax.tick_params(labelsize=7.5, length=2)
        write(figure, margin + 2.55, head + len(images) * step + 0.15, "times the mean of its map", size=7.5, color=GRAY)
    return path
