"""Pictures of features and predictions of a network."""

from __future__ import annotations

from pathlib import Path

import torch

from methods.parts.vit import ViT
from pipeline.evaluate.features import extract
from pipeline.figures import attention_charts, neighbour_charts, reconstruction_charts
from pipeline.figures.context import FigureContext, spread_over_classes
from pipeline.figures.pictures import NothingToDraw, picture


@picture("neighbours")
def neighbours(subject: FigureContext, path: Path) -> Path:
    """A few images beside the images nearest to them by the features."""
    found, data = subject.training_images(2000), subject.config.data
    features = extract(subject.backbone, found.images, mean=data.mean, std=data.std, device=subject.device)
    labels = found.labels.numpy()
    queries = spread_over_classes(labels, 8)
    title = f"Nearest of {len(labels):,} {subject.images_of('training')}"
    return neighbour_charts.neighbours(
        found.images.numpy(), features.numpy(), labels, subject.dataset.class_names, queries, path, title=title
    )


@picture("attention")
def attention(subject: FigureContext, path: Path) -> Path:
    """Which patches the last CLS token of a ViT looks at, head by head."""
    vit, data = subject.backbone, subject.config.data
    if not isinstance(vit, ViT):
        raise NothingToDraw(f"model={subject.name}: a {type(vit).__name__} has no CLS token that looks at patches; give a ViT")
    grid = [subject.map_size // patch for patch in vit.patch_embed.patch_size]
    subject.require_fine(*grid)
    images, source = subject.a_few_images(size=subject.map_size)
    weights = extract(vit, images, mean=data.mean, std=data.std, device=subject.device, batch_size=8, forward=vit.cls_attention)
    return attention_charts.attention_maps(images.numpy(), weights.unflatten(-1, grid).numpy(), path, source=source)


@picture("reconstructions")
def reconstructions(subject: FigureContext, path: Path) -> Path:
    """What a masked autoencoder makes of a part of an image."""
    method, data = subject.method, subject.config.data
    if not method.reconstructs:
        raise NothingToDraw(f"run={subject.name}: its method paints no masked patches; give a run of MAE, or draw keeps")
    images, source = subject.a_few_images()
    settings = {"mean": data.mean, "std": data.std, "device": subject.device, "batch_size": len(images)}
    found = extract(method, images, forward=method.reconstruct, **settings)  # type: ignore[arg-type]
    seen, made = found.permute(1, 0, 3, 4, 2) * torch.tensor(data.std) + torch.tensor(data.mean)  # each (B, H, W, 3)
    return reconstruction_charts.reconstructions(images.numpy(), seen.numpy(), made.numpy(), path, source=source)
