"""Multi-crop on the CPU: draw every random number of every view, decode once, cut and resize every box. uint8 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from methods.parts.views import CropGroup, ViewsConfig
from pipeline.data.philox import uniforms

# One row of a table of views: the box, then the parameters of `augment.py`. float32 is exact enough for all of them.
COLUMNS = (
    *("top", "left", "height", "width", "flip"),
    *("brightness", "contrast", "saturation", "hue", "order", "jitter", "grayscale", "blur_sigma", "solarize"),
)
COLUMN = {name: place for place, name in enumerate(COLUMNS)}
TRIES = 10  # torchvision's RandomResizedCrop gives up after ten boxes that do not fit
DRAWS = 16 + 2 * TRIES  # random numbers of one view: photometric and position, then area and ratio of every try
SMALL = 64  # pixels; images up to this side are cut in batches by matrix products
SMALL_BATCH = 64  # small images cut at a time: their weights stay in the cache
UNIT = 2.0**15  # weights of the small path are whole numbers of 1/UNIT


def draw_views(
    seed: int, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, views: ViewsConfig
) -> dict[str, np.ndarray]:
    """Draw the parameters of every view of every image, keyed by (seed, epoch, id, position of the view).

    Args:
        ids, heights, widths: `(B,)`, pixels.

    Returns:
        For every group in use, `(B, V, len(COLUMNS))` float32. `order` is one of the 24 orders of the four jitter
        operations (see `augment.ORDERS`), `blur_sigma` 0 means no blur.
    """
    tables, position = {}, 0
    heights, widths = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    for name, group in views.items():
        if group.count:
            drawn = [uniforms(seed, epoch, ids, position + v, DRAWS) for v in range(group.count)]
            tables[name] = np.stack([_table(u, heights, widths, group) for u in drawn], axis=1)
        position += group.count
    return tables


def _table(u: np.ndarray, heights: np.ndarray, widths: np.ndarray, group: CropGroup) -> np.ndarray:
    """Map the uniforms of one view of every image, `(B, DRAWS)`, to its parameters, `(B, len(COLUMNS))` float32."""
    table = np.empty((len(u), len(COLUMNS)), np.float32)

    def put(name: str, values: np.ndarray | float) -> None:
        table[:, COLUMN[name]] = values

    height, width = _box(u[:, 16 : 16 + TRIES], u[:, 16 + TRIES :], heights, widths, group)
    fits = height > 0
    fallback_height, fallback_width = _fallback(heights, widths, group)
    height, width = np.where(fits, height, fallback_height), np.where(fits, width, fallback_width)
    put("height", height)
    put("width", width)
    put("top", np.where(fits, np.floor(u[:, 0] * (heights - height + 1)), (heights - height) // 2))
    put("left", np.where(fits, np.floor(u[:, 1] * (widths - width + 1)), (widths - width) // 2))
    put("flip", u[:, 2] < group.flip)
    for place, name in enumerate(("brightness", "contrast", "saturation"), start=3):
        low, high = max(0.0, 1 - group.jitter[place - 3]), 1 + group.jitter[place - 3]
        put(name, low + u[:, place] * (high - low))
    put("hue", (2 * u[:, 6] - 1) * group.jitter[3])
    put("order", np.floor(u[:, 7] * 24))
    put("jitter", u[:, 8] < group.jitter_probability if any(group.jitter) else 0)
    put("grayscale", u[:, 9] < group.grayscale)
    sigma = group.blur_sigma[0] + u[:, 11] * (group.blur_sigma[1] - group.blur_sigma[0])
    put("blur_sigma", np.where(u[:, 10] < group.blur, sigma, 0))
    put("solarize", u[:, 12] < group.solarize)
    return table


def _box(areas: np.ndarray, ratios: np.ndarray, heights: np.ndarray, widths: np.ndarray, group: CropGroup) -> tuple[np.ndarray, np.ndarray]:
    """Return height and width `(B,)` of the first try that fits; 0 if none does."""
    low, high = np.log(group.ratio)
    area = (heights * widths)[:, None] * (group.scale[0] + areas * (group.scale[1] - group.scale[0]))
    ratio = np.exp(low + ratios * (high - low))
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    first = fits.argmax(axis=1)[:, None]
    found = fits.any(axis=1)
    height, width = (np.where(found, np.take_along_axis(sides, first, axis=1)[:, 0], 0) for sides in (height, width))
    return height, width


def _fallback(heights: np.ndarray, widths: np.ndarray, group: CropGroup) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest central box whose ratio is allowed; the whole image if its ratio is."""
    low, high = group.ratio
    ratio = widths / heights
    height = np.where(ratio < low, np.minimum(np.rint(widths / low), heights), heights)
    width = np.where(ratio > high, np.minimum(np.rint(heights * high), widths), widths)
    return height, width


def shrink_factor(tables: Mapping[str, np.ndarray], views: ViewsConfig) -> int:
    """Return the greatest of 1, 2, 4, 8 by which one image may be shrunk so that every box stays twice as large as its view.

    Boxes are rounded to whole pixels of the shrunk image, so they move by a quarter of a pixel of the view at most.

    Args:
        tables: of this image, `(1, V, len(COLUMNS))` for every group.
    """
    sides = [COLUMN["height"], COLUMN["width"]]
    room = min(float(table[..., sides].min()) / views[name].size for name, table in tables.items())
    return 2 ** int(np.clip(np.floor(np.log2(max(room / 2, 1))), 0, 3))


def shrunk(table: np.ndarray, factors: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return a table with boxes in images shrunk by `factors` `(B,)` to `heights` and `widths` `(B,)`, to the nearest pixel."""
    table = table.copy()
    for start, extent, limit in (("top", "height", heights), ("left", "width", widths)):
        first, size = table[..., COLUMN[start]], table[..., COLUMN[extent]]
        begin = np.rint(first / factors[:, None])
        end = np.minimum(np.maximum(np.rint((first + size) / factors[:, None]), begin + 1), limit[:, None])
        table[..., COLUMN[start]], table[..., COLUMN[extent]] = np.minimum(begin, end - 1), end - np.minimum(begin, end - 1)
    return table


# ---------------------------------------------------------------------------- cutting


def cut_crops(images: Sequence[np.ndarray], tables: Mapping[str, np.ndarray], views: ViewsConfig) -> dict[str, np.ndarray]:
    """Cut, resize (antialiased) and flip every view of every image.

    The crops of an image do not depend on the other images.

    Args:
        images: `(H, W, 3)` uint8 each.
        tables: as from `draw_views`.

    Returns:
        For every group in use, `(B, V, size, size, 3)` uint8.
    """
    cut = {}
    for name, table in tables.items():
        size = views[name].size
        cut[name] = np.empty((*table.shape[:2], size, size, 3), np.uint8)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(images):
        small = max(image.shape[:2]) <= SMALL
        by_shape.setdefault(image.shape if small else (), []).append(place)
    for shape, places in by_shape.items():
        if shape:
            _cut_small(np.stack([images[p] for p in places]), places, tables, views, cut)
        else:
            for place in places:
                _cut_large(images[place], place, tables, views, cut)
    return cut


def _cut_large(image: np.ndarray, place: int, tables: Mapping[str, np.ndarray], views: ViewsConfig, cut: dict[str, np.ndarray]) -> None:
    scratch = np.empty(image.size, np.uint8)
    for name, table in tables.items():
        size, mode = views[name].size, views[name].interpolation
        out = torch.from_numpy(cut[name][place]).permute(0, 3, 1, 2)  # (V, 3, size, size), channels last: torch's fast kernel
        for view, (top, left, height, width, flip) in enumerate(table[place, :, :5].astype(int).tolist()):
            box = scratch[: height * width * 3].reshape(height, width, 3)
            np.copyto(box, image[top : top + height, left : left + width])
            crop = F.interpolate(torch.from_numpy(box).permute(2, 0, 1)[None], (size, size), mode=mode, antialias=True)
            out[view : view + 1].copy_(crop.flip(3) if flip else crop)


def _cut_small(
    images: np.ndarray, places: list[int], tables: Mapping[str, np.ndarray], views: ViewsConfig, cut: dict[str, np.ndarray]
) -> None:
    """Cut all views of small images of one size, `(n, H, W, 3)`, by two batched matrix products, columns first, as torch does.

    Weights and pixels are whole numbers whose sums stay below 2^24. So float32 is exact, and the result does not depend on
    the order in which a library adds.
    """
    count, rows, columns, _ = images.shape
    for first in range(0, count, SMALL_BATCH):
        part = slice(first, first + SMALL_BATCH)
        n = len(places[part])
        planes = torch.from_numpy(images[part]).permute(0, 3, 1, 2).reshape(n, 3 * rows, columns).float()
        for name, table in tables.items():
            group, number, size = views[name], table.shape[1], views[name].size
            top, left, height, width, flip = torch.from_numpy(table[places[part]])[..., :5].unbind(-1)
            across, down = _weights(left, width, columns, group), _weights(top, height, rows, group)
            across = torch.where(flip.bool()[..., None, None], across.flip(2), across)
            wide = _round(planes @ across.view(n, number * size, columns).mT)  # (n, 3H, V*s)
            wide = wide.view(n, 3, rows, number, size).permute(0, 3, 2, 4, 1).reshape(n, number, rows, size * 3)
            cut[name][places[part]] = _round(down @ wide).view(n, number, size, size, 3).byte().numpy()


def _round(sums: Tensor) -> Tensor:
    return sums.mul_(1 / UNIT).add_(0.5).clamp_(0, 255).floor_()


def _weights(start: Tensor, length: Tensor, pixels: int, group: CropGroup) -> Tensor:
    """Return the antialiased resampling of boxes to `group.size` as matrices of whole numbers `(n, V, size, pixels)`.

    Args:
        start, length: `(n, V)`, first pixel and extent of every box.
    """
    scale = length[..., None] / group.size
    stretch = scale.clamp(min=1)  # antialiasing widens the filter when shrinking
    pixel = torch.arange(pixels) - start[..., None]
    inside = (pixel >= 0) & (pixel < length[..., None])
    pixel = torch.where(inside, (pixel + 0.5) / stretch, 1e4)  # far from every center: weight 0
    center = scale * (torch.arange(group.size) + 0.5) / stretch
    distance = (pixel[..., None, :] - center[..., None]).abs_()
    if group.interpolation == "bilinear":
        weight = distance.neg_().add_(1).clamp_(min=0)
    else:  # Keys' cubic with a = -0.5, as Pillow and torch's antialiased kernel
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weight.mul_(2**17).round_()  # whole numbers, so their sum is exact too
    return weight.mul_(UNIT / weight.sum(-1, keepdim=True)).round_()
