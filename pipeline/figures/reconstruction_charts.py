"""Picture of a masked autoencoder: a few images, their visible patches, and the reconstructions. PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.figures.style import GRAY, cell, picture_at, show, write

MASKED = 0.75  # gray


def reconstructions(images: np.ndarray, seen: np.ndarray, made: np.ndarray, path: Path, *, source: str = "held-out images") -> Path:
    """Draw each image, its visible patches and its reconstruction, in two columns of images.

    Args:
        images: uint8 `(B, H, W, 3)`.
        seen: the images in [0, 1], NaN in masked patches.
        made: the reconstructions, clipped to [0, 1].
        path: the PNG to write.
        source: description of the images.
    """
    if not len(images) or not len(images) == len(seen) == len(made):
        raise ConfigError(f"images={len(images)}: {len(seen)} and {len(made)} reconstructions; give one for each of at least one image")
    side, step, margin, gap, head = 1.1, 1.16, 0.2, 0.3, 0.95  # inches
    blocks = 2 if len(images) > 1 else 1
    rows = -(-len(images) // blocks)
    width = max(2 * margin + blocks * 3 * step + (blocks - 1) * gap, 4.2)
    share = float(np.isnan(seen).mean())
    with picture_at(path, width, head + rows * step + margin) as figure:
        write(figure, margin, 0.36, "What is made of the patches that were seen", size=13, weight="bold")
        write(figure, margin, 0.58, f"{source}; {100 * share:.0f} % of the pixels are masked", size=8, color=GRAY)
        for block in range(blocks):
            left = margin + block * (3 * step + gap)
            for column, title in enumerate(("image", "seen", "made of it")):
                write(figure, left + column * step, head - 0.1, title, size=8.5, weight="bold")
            for row, i in enumerate(range(block * rows, min(len(images), (block + 1) * rows))):
                for column, picture in enumerate((images[i], np.nan_to_num(seen[i], nan=MASKED), made[i].clip(0, 1))):
                    show(cell(figure, left + column * step, head + row * step, side, side), picture, side)
    return path
