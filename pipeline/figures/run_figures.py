"""The contact sheet of a run's crops, and the pictures of a finished run. `pictures.py` finds all by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from methods.parts.errors import ConfigError
from methods.parts.views import Views
from pipeline.config import RunConfig
from pipeline.data.augment import augment_views
from pipeline.data.crops import COLUMN, cut_crops, draw_views
from pipeline.data.decode import BadImage, decode
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import Batch
from pipeline.evaluate.clusters import Clusters
from pipeline.evaluate.final import Scores
from pipeline.figures import contact_sheet
from pipeline.run_folder import RunFolder
from pipeline.shell import program

if TYPE_CHECKING:
    from pipeline.build import RunContext


def views_sheet(config: RunConfig, dataset: ImageDataset, path: Path, *, images: int = 6) -> Path:
    """Draw a few training images with their crops; see `training_views`."""
    originals, views, tables = training_views(config, dataset, images)
    shown = {
        name: stack.unflatten(0, (-1, len(originals))).permute(1, 0, 3, 4, 2).clamp(0, 1).numpy() for name, stack in views.stacks.items()
    }
    corners = [COLUMN[c] for c in ("top", "left", "height", "width")]
    boxes = {name: np.asarray(table)[..., corners] for name, table in tables.items()}
    return contact_sheet.contact_sheet(originals, shown, boxes, path)


def training_views(config: RunConfig, dataset: ImageDataset, images: int) -> tuple[list[np.ndarray], Views, dict[str, np.ndarray]]:
    """Return a few training images, evenly spread over the source; their crops of epoch 0, exactly as in training; and how these are cut.

    The images are uint8 `(H, W, 3)`. The crops have values in [0, 1].

    Raises:
        ConfigError: none of the images tried can be decoded.
    """
    ids = dataset.training_ids(config.data.held_out)
    tried = ids[np.linspace(0, len(ids) - 1, min(len(ids), 4 * images)).astype(int)]
    originals, chosen = [], []
    for row in dataset.read(tried[np.random.default_rng(0).permutation(len(tried))]):
        try:
            originals.append(np.asarray(decode(row.image)))
            chosen.append(row.id)
        except BadImage:
            continue
        if len(chosen) == images:
            break
    if not chosen:
        raise ConfigError(f"data.path={config.data.path}: none of {len(tried)} images tried can be decoded; see {program()} doctor")
    heights, widths = (np.array([image.shape[axis] for image in originals]) for axis in (0, 1))
    tables = draw_views(config.train.seed, 0, np.array(chosen), heights, widths, config.views)
    crops = {name: torch.from_numpy(cut) for name, cut in cut_crops(originals, tables, config.views).items()}
    unknown = torch.full((len(chosen),), -1)
    batch = Batch(crops=crops, tables=tables, ids=torch.tensor(chosen), labels=unknown, epoch=0, step=0, bad=[])
    return originals, augment_views(batch, config.views, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), torch.device("cpu")), tables


def run_figures(
    context: RunContext, folder: RunFolder, backbone: nn.Module, scores: Scores, clusters: Clusters | None, device: torch.device
) -> list[Path]:
    """Draw the pictures of a run that has just finished, from the objects in memory."""
    from pipeline.figures.context import FigureContext
    from pipeline.figures.pictures import draw_for_run

    subject = FigureContext(context.config, device, folder)
    parts = {"dataset": context.dataset, "method": context.method, "backbone": backbone, "scores": scores, "clusters": clusters}
    vars(subject).update({name: part for name, part in parts.items() if part is not None})  # instead of reading them again
    return draw_for_run(subject, folder.figures)
