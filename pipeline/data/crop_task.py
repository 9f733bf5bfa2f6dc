"""The work of one Ray Data task: decode images, cut their crops, and augment these if `data.augment_on=tasks`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from methods.parts.views import ViewsConfig
from pipeline.data.augment import Normalisation, augment_crops
from pipeline.data.crops import COLUMNS, cut_crops, draw_views, shrink_factor, shrunk
from pipeline.data.decode import BadImage, decode, large_size
from pipeline.data.image_dataset import Sample


def make_crops(samples: list[Sample], epoch: int, views: ViewsConfig, seed: int, shard_batch: int) -> dict[str, np.ndarray]:
    """Decode images and cut their views. A bad image is replaced by a good one of another batch.

    Large JPEGs are decoded at the smallest size in which every box is twice as large as its view. Their tables hold the boxes
    in the whole image.

    Args:
        shard_batch: images of each batch.

    Returns:
        Columns of `len(samples)` entries: `crops/GROUP` and `table/GROUP`, `id` and `label` of the image shown, `planned` id,
        and `reason`, which is empty unless the planned image is bad.
    """
    sizes = [large_size(sample.image) for sample in samples]
    factors = [
        1 if size is None else shrink_factor(_draw([sample], [size], seed, epoch, views), views)
        for sample, size in zip(samples, sizes, strict=True)
    ]
    images, reasons = decode_all(samples, factors)
    whole = [image.shape[:2] if reason or size is None else size for image, reason, size in zip(images, reasons, sizes, strict=True)]
    shown = substitutes([not reason for reason in reasons], shard_batch)
    pictures = [images[s] for s in shown]
    ids = np.array([samples[s].id for s in shown])
    tables = _draw([samples[s] for s in shown], [whole[s] for s in shown], seed, epoch, views)
    in_picture = tables
    if max(factors) > 1:
        heights, widths = (np.array([picture.shape[axis] for picture in pictures]) for axis in (0, 1))
        in_picture = {name: shrunk(table, np.array(factors)[shown], heights, widths) for name, table in tables.items()}
    columns = {f"crops/{name}": crops for name, crops in cut_crops(pictures, in_picture, views).items()}
    columns |= {f"table/{name}": table for name, table in tables.items()}
    columns["id"], columns["planned"] = ids, np.array([sample.id for sample in samples])
    columns["label"] = np.array([samples[s].label for s in shown])
    columns["reason"] = np.array(reasons, dtype=object)
    return columns


def augment_columns(columns: dict[str, np.ndarray], views: ViewsConfig, normalisation: Normalisation) -> None:
    """Replace uint8 crops by augmented and normalised ones, `(n, V, 3, size, size)` float32."""
    for name, group in views.items():
        if group.count:
            crops, table = torch.from_numpy(columns[f"crops/{name}"]), columns[f"table/{name}"]
            done = augment_crops(crops.flatten(0, 1), table.reshape(-1, len(COLUMNS)), group, *normalisation, channels_last=False)
            columns[f"crops/{name}"] = done.unflatten(0, crops.shape[:2]).numpy()


def substitutes(good: list[bool], shard_batch: int) -> np.ndarray:
    """Return the index of the image that each slot shows, `(n,)`.

    A good image shows itself. A bad one is replaced by a good one at the same place of the nearest later batch (cyclic), else
    by the next good one. If none is good, each shows itself.
    """
    count = len(good)
    shown = np.arange(count)
    for slot in np.flatnonzero(~np.array(good, bool)):
        other_batches = range(slot + shard_batch, slot + count, shard_batch)
        candidates = (place % count for place in (*other_batches, *range(slot + 1, slot + count)))
        shown[slot] = next((place for place in candidates if good[place]), slot)
    return shown


def decode_all(samples: list[Sample], factors: Sequence[int] | None = None) -> tuple[list[np.ndarray], list[str]]:
    """Return the pixels of every sample and an empty string, or for a bad one a black pixel and the reason."""
    images, reasons = [], []
    for sample, factor in zip(samples, factors or [1] * len(samples), strict=True):
        try:
            images.append(decode(sample.image, factor))
            reasons.append("")
        except BadImage as error:
            images.append(np.zeros((1, 1, 3), np.uint8))
            reasons.append(str(error) or "unknown")
    return images, reasons


def _draw(samples: list[Sample], sizes: list[tuple[int, ...]], seed: int, epoch: int, views: ViewsConfig) -> dict[str, np.ndarray]:
    heights, widths = np.array(sizes).T
    return draw_views(seed, epoch, np.array([sample.id for sample in samples]), heights, widths, views)


def block_bytes(views: ViewsConfig, images: int, augmented: bool) -> int:
    """Return the bytes of a block of `images` rows."""
    pixels = sum(g.count * (3 * g.size * g.size * (4 if augmented else 1) + 4 * len(COLUMNS)) for g in views.values())
    return images * (pixels + 64)
