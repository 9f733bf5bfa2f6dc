"""Contact sheet: images with their crops. PNG, colour-blind-safe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.figures.style import GRAY, GROUP_COLOURS, cell, frame, note, picture_at, show, write


def contact_sheet(
    originals: Sequence[np.ndarray],
    crops: Mapping[str, np.ndarray],
    boxes: Mapping[str, np.ndarray],
    path: Path,
    *,
    title: str = "What the method sees",
    row_inches: float = 1.9,
) -> Path:
    """Draw each image with the boxes of its crops, beside the augmented crops. Numbers match boxes and crops.

    Args:
        originals: B images, uint8 `(H, W, 3)`, of any sizes.
        crops: for each group `(B, V, h, w, 3)`, augmented but not normalised: uint8, or floats in [0, 1].
        boxes: for each group `(B, V, 4)`: top, left, height, width in pixels of the original.
        path: the PNG to write.
        title: headline.
        row_inches: height of a row.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    groups = {name: np.asarray(stack) for name, stack in crops.items() if np.asarray(stack).shape[1]}
    if not len(originals) or not groups:
        raise ConfigError(f"views={list(crops)}: no crops to draw; give at least one image and one group with a count of 1 or more")
    colours = {name: GROUP_COLOURS[i % len(GROUP_COLOURS)] for i, name in enumerate(groups)}
    largest = max(stack.shape[2] for stack in groups.values())
    gap, margin, between, head = 0.07, 0.2, 0.3, 0.95

    def shape(name: str) -> tuple[int, int]:  # rows and columns of a group's crops; small crops share the height of a large one
        count, size = groups[name].shape[1:3]
        rows = 1 if size == largest and count <= 4 else math.ceil(count / 4) if size == largest else max(2, math.ceil(count / 6))
        rows = min(rows, count)
        return rows, math.ceil(count / rows)

    # a single small crop is not enlarged to the height of a large one
    sides = {name: (row_inches - gap * (max(2, shape(name)[0]) - 1)) / max(2, shape(name)[0]) for name in groups}
    sides |= {name: (row_inches - gap * (shape(name)[0] - 1)) / shape(name)[0] for name in groups if groups[name].shape[2] == largest}
    widest = max(image.shape[1] / image.shape[0] for image in originals)
    original_width = row_inches * min(max(widest, 0.6), 1.6)
    lefts, left = {}, margin + original_width + between
    for name in groups:
        lefts[name] = left
        left += max(shape(name)[1] * (sides[name] + gap) - gap, 1.15) + between
    width = max(left - between + margin, 4.5)
    height = head + len(originals) * (row_inches + 0.14) + margin

    with picture_at(path, width, height) as figure:
        write(figure, margin, 0.36, title, size=13, weight="bold")
        write(figure, margin, head - 0.26, "original", size=10, weight="bold", color=GRAY)
        write(figure, margin, head - 0.09, _sizes(originals), size=8, color=GRAY)
        for name, stack in groups.items():
            write(figure, lefts[name], head - 0.26, name, size=10, weight="bold", color=colours[name])
            write(figure, lefts[name], head - 0.09, f"{stack.shape[1]} × {stack.shape[2]} px", size=8, color=GRAY)
        for i, image in enumerate(originals):
            top = head + i * (row_inches + 0.14)
            tall, wide = image.shape[:2]
            scale = min(original_width / wide, row_inches / tall)
            axes = cell(figure, margin, top, wide * scale, tall * scale)
            show(axes, image, max(wide, tall) * scale)
            axes.set(xlim=(-0.5, wide - 0.5), ylim=(tall - 0.5, -0.5))
            halo = [withStroke(linewidth=3.2, foreground="white", alpha=0.75)]
            for name, stack in groups.items():
                columns = shape(name)[1]
                for v in range(stack.shape[1]):
                    y, x, h, w = (float(n) for n in boxes[name][i, v])
                    box = Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=colours[name], linewidth=1.5, clip_on=False)
                    box.set_path_effects([*halo])
                    axes.add_patch(box)
                    digit = {"weight": "bold", "color": colours[name], "path_effects": halo, "va": "top"}
                    note(axes, str(v + 1), (x - 0.5, y - 0.5), "data", (2.5, -2.5), size=6.5, **digit)
                    row, column = divmod(v, columns)
                    side = sides[name]
                    thumb = cell(figure, lefts[name] + column * (side + gap), top + row * (side + gap), side, side)
                    show(thumb, stack[i, v], side)
                    frame(thumb, colours[name], 1.2)
                    note(thumb, str(v + 1), (0, 1), "axes fraction", (3, -3), size=7, **digit)
    return path


def _sizes(images: Sequence[np.ndarray]) -> str:
    """Return width × height of the images, or the range of both."""
    heights, widths = [i.shape[0] for i in images], [i.shape[1] for i in images]
    spans = [f"{min(s)}" if min(s) == max(s) else f"{min(s)}–{max(s)}" for s in (widths, heights)]
    return f"{spans[0]} × {spans[1]} px"
