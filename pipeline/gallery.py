"""Which pictures a run gets and what goes into them; `figures.py` draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from methods.parts.contract import Method
from methods.parts.errors import ConfigError
from methods.parts.vit import ViT
from pipeline import attention_figure, cluster_figures, figures, reconstruction_figure
from pipeline.config import RunConfig
from pipeline.evaluate.clusters import Clusters
from pipeline.evaluate.features import extract
from pipeline.evaluate.protocols import MEMORY_LIMIT, Scores
from pipeline.ingest.crops import COLUMN, cut_window, draw_views
from pipeline.ingest.decode import BadImage, decode
from pipeline.ingest.manifest import Manifest
from pipeline.ingest.photometric import finish_views
from pipeline.ingest.stream import Batch, evaluation_images
from pipeline.runs import RunFolder

if TYPE_CHECKING:
    from pipeline.train.prepare import Prepared


def views_sheet(config: RunConfig, manifest: Manifest, path: Path, *, images: int = 6) -> Path:
    """The crops that epoch 0 makes of a few training images, evenly spread over the source, exactly as training sees them.

    Raises:
        ConfigError: none of the images tried can be decoded.
    """
    ids = manifest.training_ids(config.data.held_out)
    tried = ids[np.linspace(0, len(ids) - 1, min(len(ids), 4 * images)).astype(int)]
    originals, chosen = [], []
    for row in manifest.read(tried[np.random.default_rng(0).permutation(len(tried))]):
        try:
            originals.append(np.asarray(decode(row.image)))
            chosen.append(row.id)
        except BadImage:
            continue
        if len(chosen) == images:
            break
    if not chosen:
        raise ConfigError(f"data.path={config.data.path}: none of {len(tried)} images tried can be decoded; see manyviews doctor")
    heights, widths = (np.array([image.shape[axis] for image in originals]) for axis in (0, 1))
    tables = draw_views(config.train.seed, 0, np.array(chosen), heights, widths, config.views)
    crops = {name: torch.from_numpy(cut) for name, cut in cut_window(originals, tables, config.views).items()}
    unknown = torch.full((len(chosen),), -1)
    batch = Batch(crops=crops, tables=tables, ids=torch.tensor(chosen), labels=unknown, epoch=0, step=0, bad=[])
    finished = finish_views(batch, config.views, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), torch.device("cpu"))
    shown = {
        name: stack.unflatten(0, (-1, len(chosen))).permute(1, 0, 3, 4, 2).clamp(0, 1).numpy() for name, stack in finished.stacks.items()
    }
    corners = [COLUMN[c] for c in ("top", "left", "height", "width")]
    boxes = {name: np.asarray(table)[..., corners] for name, table in tables.items()}
    return figures.contact_sheet(originals, shown, boxes, path)


def run_figures(
    ready: Prepared, folder: RunFolder, backbone: nn.Module, scores: Scores, clusters: Clusters | None, device: torch.device
) -> list[Path]:
    """Pictures of a finished run: views, curves, scores, neighbours; clusters, attention, reconstructions where it has them."""
    config, manifest = ready.config, ready.manifest
    drawers: list[Callable[[], Path]] = [
        lambda: views_sheet(config, manifest, folder.figures / "views.png"),
        lambda: figures.curves(folder.metrics, folder.figures / "curves.png", chance=ready.method.chance_loss(), title=folder.name),
        lambda: neighbours_picture(config, manifest, backbone, folder.figures / "neighbours.png", device),
    ]
    if scores.rows:
        rows = [(row.label, row.accuracy) for row in scores.rows]
        chance = 1 / max(1, len(manifest.class_names)) if manifest.class_names else None
        title = f"kNN accuracy, {scores.split} images"
        drawers.append(lambda: figures.score_bars(rows, folder.figures / "scores.png", title=title, chance=chance))
    if isinstance(backbone, ViT):
        vit = backbone
        drawers.append(lambda: attention_picture(config, manifest, vit, folder.figures / "attention.png", device))
    if ready.method.reconstructs:
        drawers.append(lambda: reconstruction_picture(config, manifest, ready.method, folder.figures / "reconstructions.png", device))
    if clusters is not None:
        drawers.append(lambda: cluster_figures.gallery(clusters, manifest.class_names, folder.figures / "clusters.png"))
        drawers.append(lambda: cluster_figures.size_histogram(clusters, folder.figures / "cluster_sizes.png"))
    return [draw() for draw in drawers]


def neighbours_picture(config: RunConfig, manifest: Manifest, backbone: nn.Module, path: Path, device: torch.device) -> Path:
    """A few training images beside their nearest ones by the backbone's features."""
    size = config.evaluation_size
    ids = manifest.training_ids(config.data.held_out)
    most = min(2000, max(64, MEMORY_LIMIT // (size * size * 3)))
    chosen = np.sort(np.random.default_rng(1).permutation(ids)[:most])
    found = evaluation_images(manifest, chosen, size)
    features = extract(backbone, found.images, mean=config.data.mean, std=config.data.std, device=device)
    labels = found.labels.numpy()
    queries = spread_over_classes(labels, 8)
    return figures.neighbours(found.images.numpy(), features.numpy(), labels, manifest.class_names, queries, path)


def attention_picture(config: RunConfig, manifest: Manifest, backbone: ViT, path: Path, device: torch.device) -> Path:
    """What the backbone's CLS token looks at in a few images."""
    images, source = a_few_images(config, manifest)
    mean, std = config.data.mean, config.data.std
    weights = extract(backbone, images, mean=mean, std=std, device=device, batch_size=8, forward=backbone.cls_attention)
    grid = [side // patch for side, patch in zip(images.shape[1:3], backbone.patch_embed.patch_size, strict=True)]
    return attention_figure.attention_maps(images.numpy(), weights.unflatten(-1, grid).numpy(), path, source=source)


def reconstruction_picture(config: RunConfig, manifest: Manifest, method: Method, path: Path, device: torch.device) -> Path:
    """What the method makes of a part of a few images."""
    images, source = a_few_images(config, manifest)
    mean, std = config.data.mean, config.data.std
    found = extract(method, images, mean=mean, std=std, device=device, batch_size=len(images), forward=method.reconstruct)
    seen, made = found.permute(1, 0, 3, 4, 2) * torch.tensor(std) + torch.tensor(mean)  # each (B, H, W, 3)
    return reconstruction_figure.reconstructions(images.numpy(), seen.numpy(), made.numpy(), path, source=source)


def a_few_images(config: RunConfig, manifest: Manifest, count: int = 8) -> tuple[torch.Tensor, str]:
    """Held-out images of as many classes as there are, uint8 `(count, H, W, 3)`, and what they are; without labels training images."""
    fraction = config.data.held_out
    ids, source = manifest.held_out_ids(fraction), "held-out images"
    if not len(ids):
        ids, source = manifest.training_ids(fraction), "training images"
    chosen = np.sort(np.random.default_rng(4).permutation(ids)[:64])
    found = evaluation_images(manifest, chosen, config.evaluation_size)
    return found.images[torch.from_numpy(np.sort(spread_over_classes(found.labels.numpy(), count)))], source


def spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Rows of at most `count` images, of as many classes as there are."""
    order = np.random.default_rng(2).permutation(len(labels))
    _, first = np.unique(labels[order], return_index=True)
    first = np.random.default_rng(3).permutation(first)
    rest = np.setdiff1d(np.arange(len(order)), first)
    chosen: np.ndarray = order[np.concatenate([first, rest])[:count]]
    return chosen
