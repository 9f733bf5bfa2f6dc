"""Picture of the patches that a method hides in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from methods.parts.contract import Progress, registered
from pipeline.build import build_method
from pipeline.figures.context import MANY, FigureContext
from pipeline.figures.pictures import NothingToDraw, picture
from pipeline.figures.run_figures import training_views
from pipeline.figures.style import GRAY, cell, picture_at, show, write

VEIL = 0.85  # opacity of a hidden patch: what is hidden can just be made out


@picture("masks")
def masks(subject: FigureContext, path: Path) -> Path:
    """The patches that training hides in the crops of a few images (iBOT, DINOv2, MSN, MAE); a recipe has them too."""
    config = subject.config
    with torch.device("meta"):  # masks do not depend on weights
        method = build_method(config, subject.facts)
    if not method.hides_patches:
        names = ", ".join(name for name, entry in registered().items() if entry.method.hides_patches)
        raise NothingToDraw(f"model={subject.name}: its method hides no patches; give a run or a recipe of one of {names}")
    originals, views, _ = training_views(config, subject.dataset, 6)
    generator = torch.Generator().manual_seed(config.train.seed)
    progress = Progress(step=MANY, total_steps=MANY, steps_per_epoch=1, generator=generator)  # masks may begin late
    hidden = method.hidden_patches(views, method.draw_masks(views, progress) or [])
    crops = {place: views.crops[place].permute(0, 2, 3, 1).clamp(0, 1).numpy() for place in hidden}
    grids = {place: patches.unflatten(1, (round(patches.shape[1] ** 0.5), -1)).numpy() for place, patches in hidden.items()}
    if not crops:
        raise NothingToDraw(f"model={subject.name}: these settings hide no patches")
    return draw(originals, list(crops.values()), list(grids.values()), path, source=subject.images_of("training"))


def draw(originals: Sequence[np.ndarray], crops: Sequence[np.ndarray], hidden: Sequence[np.ndarray], path: Path, *, source: str) -> Path:
    """Draw each image beside its crops, whose hidden patches are greyed out.

    Args:
        originals: B images, uint8 `(H, W, 3)`, of any sizes.
        crops: V crops of each image, `(B, h, w, 3)` in [0, 1].
        hidden: which of their patches are hidden, `(B, rows, columns)` bool.
        path: the PNG to write.
        source: description of the images.
    """
    side, step, margin, line, head = 1.9, 2.0, 0.2, 0.26, 0.95  # inches
    share = float(np.mean([grid.mean() for grid in hidden]))
    with picture_at(path, max(2 * margin + (1 + len(crops)) * step, 5.2), head + len(originals) * (step + line) + margin) as figure:
        write(figure, margin, 0.36, "What the masks hide", size=13, weight="bold")
        sizes = " and ".join(sorted({f"{grid.shape[1]} × {grid.shape[2]}" for grid in hidden}))
        write(figure, margin, 0.58, f"{source}; {100 * share:.0f} % of {sizes} patches are hidden", size=8, color=GRAY)
        for column, title in enumerate(("image", *(f"crop {i + 1}" for i in range(len(crops))))):
            write(figure, margin + column * step, head - 0.1, title, size=9, weight="bold")
        for row, image in enumerate(originals):
            top = head + row * (step + line)
            show(cell(figure, margin, top, side, side), image, side)
            for column, (stack, grid) in enumerate(zip(crops, hidden, strict=True), start=1):
                crop, gone = stack[row], grid[row]
                axes = cell(figure, margin + column * step, top, side, side)
                show(axes, crop, side)
                extent = (-0.5, crop.shape[1] - 0.5, crop.shape[0] - 0.5, -0.5)
                axes.imshow(np.where(gone, 0.5, np.nan), cmap="gray", vmin=0, vmax=1, alpha=VEIL, extent=extent, interpolation="nearest")
                write(figure, margin + column * step, top + side + 0.15, f"{100 * gone.mean():.0f} % hidden", size=8, color=GRAY)
    return path
