"""Colour, blur and normalisation on the training device, one batched pass per group of crops; no random numbers here.

The arithmetic is torchvision's float semantics (`transforms.v2.functional`), with every sample's own factors and order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from methods.parts.views import CropGroup, Views, ViewsConfig
from pipeline.ingest.crops import COLUMN

ORDERS = np.array(list(itertools.permutations(range(4))))  # (24, 4): 0 brightness, 1 contrast, 2 saturation, 3 hue
HUE = 3
CHUNK_VALUES = 2**20  # float32 values worked on at a time on a CPU: fewer miss its cache, more pay less overhead (measured)


class CutBatch(Protocol):
    """What `finish_views` needs of a batch (see `stream.Batch`)."""

    @property
    def crops(self) -> Mapping[str, Tensor]: ...
    @property
    def tables(self) -> Mapping[str, np.ndarray]: ...
    @property
    def ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


def finish_views(
    batch: CutBatch,
    views: ViewsConfig,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Views:
    """Turn uint8 crops `(B, V, H, W, 3)` and their tables into finished views on `device`.

    Args:
        mean, std: normalisation in [0, 1].

    Returns:
        Stacks `(V * B, 3, H, W)`, view-major.
    """
    device = torch.device(device)
    stacks = {}
    for name, crops in batch.crops.items():
        table = np.swapaxes(batch.tables[name], 0, 1).reshape(-1, len(COLUMN))
        pixels = crops.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
        stacks[name] = finish_crops(pixels, table, views[name], mean, std, dtype, channels_last)
    counts = {name: crops.shape[1] for name, crops in batch.crops.items()}
    ids, labels = (x.to(device, non_blocking=True) for x in (batch.ids, batch.labels))
    return Views(stacks=stacks, counts=counts, image_ids=ids, labels=labels)


@torch.no_grad()
def finish_crops(
    pixels: Tensor,
    table: np.ndarray,
    group: CropGroup,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """Finish crops `(N, H, W, 3)` uint8 by their rows of the table `(N, len(COLUMNS))`: `(N, 3, H, W)` of `dtype`."""
    count, height, width, _ = pixels.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((count, 3, height, width), dtype=dtype, device=pixels.device, memory_format=layout)
    step = count if pixels.device.type != "cpu" else max(1, CHUNK_VALUES // (3 * height * width))
    for first in range(0, count, step):
        part = slice(first, first + step)
        x = _to_float(pixels[part])
        x = _jitter(x, table[part])
        x = _grayscale(x, table[part])
        x = _blur(x, table[part], group)
        x = _solarize(x, table[part], group)
        out[part].copy_(_normalise_(x, mean, std))
    return out


def normalise(
    images: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Plain images for evaluation: `(B, H, W, 3)` uint8 to `(B, 3, H, W)` of `dtype`, channels last in memory."""
    x = _normalise_(_to_float(images.to(device, non_blocking=True)), mean, std)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float().permute(0, 3, 1, 2).contiguous().mul_(1 / 255)


def _normalise_(x: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    for plane, (m, s) in enumerate(zip(mean, std, strict=True)):
        x[:, plane].sub_(m).mul_(1 / s)
    return x


def _gray(x: Tensor) -> Tensor:
    """`(n, 3, H, W)` to `(n, H, W)`, the luma of ITU-R 601."""
    return (x[:, 0] * 0.2989).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A small CPU array on the device without waiting for it. Its length is known here, so nothing synchronises."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _where(flags: np.ndarray, device: torch.device) -> Tensor | None:
    chosen = np.flatnonzero(flags)
    return _to_device(chosen, device) if len(chosen) else None


def _jitter(x: Tensor, table: np.ndarray) -> Tensor:
    """Brightness, contrast, saturation and hue in every sample's own order.

    The first three are one formula, clamp(f x + (1 - f) reference), with reference 0, the mean of gray, and gray: so
    three passes serve every order, with the hue of the samples whose turn it is before, between and after them.
    """
    on = table[:, COLUMN["jitter"]] > 0
    if not on.any():
        return x
    order = ORDERS[table[:, COLUMN["order"]].astype(int)]
    hue = np.where(on, table[:, COLUMN["hue"]], 0).astype(np.float32)
    hue_turn = (order == HUE).argmax(axis=1)
    blends = order[order != HUE].reshape(-1, 3)
    first = COLUMN["brightness"]
    factors = np.where(on[:, None], table[:, first : first + 3], 1).astype(np.float32)
    for turn in range(4):
        chosen = _where((hue != 0) & (hue_turn == turn), x.device)
        if chosen is not None:
            shift = _to_device(hue[(hue != 0) & (hue_turn == turn)], x.device)
            x.index_copy_(0, chosen, _adjust_hue(x.index_select(0, chosen), shift))
        if turn < 3:
            kind = blends[:, turn]
            factor = np.take_along_axis(factors, kind[:, None], axis=1)[:, 0]
            if (factor != 1).any():
                rows = np.stack([factor, (1 - factor) * (kind == 2), (1 - factor) * (kind == 1)])
                _blend_(x, *_to_device(rows, x.device))
    return x


def _blend_(x: Tensor, factor: Tensor, of_gray: Tensor, of_mean: Tensor) -> None:
    reference = _gray(x)
    mean = reference.mean((1, 2)).mul_(of_mean)
    reference.mul_(of_gray[:, None, None]).add_(mean[:, None, None])
    torch.addcmul(reference[:, None], x, factor[:, None, None, None], out=x)
    x.clamp_(0, 1)


def _adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` turns `(n,)` without branches: each channel is max - range * clamp(min(k, 4 - k), 0, 1)."""
    r, g, b = x.unbind(1)
    high = torch.maximum(torch.maximum(r, g), b)
    extent = high - torch.minimum(torch.minimum(r, g), b)
    red, green = high.clone().eq_(r), high.clone().eq_(g)  # masks as 0.0 and 1.0: torch.where takes ten times as long
    green.addcmul_(red, green, value=-1)
    blue = (1 - red).sub_(green)
    hue = ((g - b) * red).addcmul_(b - r, green).addcmul_(r - g, blue)
    hue.div_(extent.clamp(min=1e-12))  # gray: 0, whatever it is divided by
    hue.add_(green, alpha=2).add_(blue, alpha=4).add_(6 * shift[:, None, None])  # in sixths of a turn
    out = torch.empty_like(x)
    for channel, offset in enumerate((5.0, 3.0, 1.0)):
        k = hue + offset
        k.sub_((k * (1 / 6)).floor_(), alpha=6)  # modulo 6, without the slow torch.remainder
        k = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(high, extent, k, value=-1, out=out[:, channel])
    return out.clamp_(0, 1)


def _grayscale(x: Tensor, table: np.ndarray) -> Tensor:
    chosen = _where(table[:, COLUMN["grayscale"]] > 0, x.device)
    if chosen is not None:
        gray = _gray(x.index_select(0, chosen))
        x.index_copy_(0, chosen, gray[:, None].expand(-1, 3, -1, -1).contiguous())
    return x


def _solarize(x: Tensor, table: np.ndarray, group: CropGroup) -> Tensor:
    chosen = _where(table[:, COLUMN["solarize"]] > 0, x.device)
    if chosen is not None:
        part = x.index_select(0, chosen)
        x.index_copy_(0, chosen, part.addcmul(part.clone().ge_(group.solarize_threshold), 1 - 2 * part))
    return x


def blur_radius(group: CropGroup) -> int:
    """Taps on each side of the Gaussian, pixels: three of the group's largest standard deviations, less than the crop."""
    return min(math.ceil(3 * group.blur_sigma[1]), group.size - 1)


def _blur(x: Tensor, table: np.ndarray, group: CropGroup) -> Tensor:
    sigma = table[:, COLUMN["blur_sigma"]]
    chosen = _where(sigma > 0, x.device)
    if chosen is None:
        return x
    radius = blur_radius(group)
    offsets = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (offsets / sigma[sigma > 0, None].astype(np.float64)) ** 2)
    weights = _to_device((taps / taps.sum(axis=1, keepdims=True)).astype(np.float32), x.device)
    part = x.index_select(0, chosen)
    return x.index_copy_(0, chosen, _blur_by_matrix(part, weights))


@lru_cache(maxsize=16)
def _placement(size: int, radius: int, device: torch.device) -> Tensor:
    """Where a tap falls: `(2 * radius + 1, size * size)`, one at (output pixel, input pixel), mirrored at the border."""
    place = torch.zeros(2 * radius + 1, size, size)
    for tap in range(2 * radius + 1):
        source = torch.arange(size) + tap - radius
        source = source.abs()
        source = torch.where(source >= size, 2 * (size - 1) - source, source)
        place[tap, torch.arange(size), source] = 1
    return place.flatten(1).to(device)


def _blur_by_matrix(x: Tensor, weights: Tensor) -> Tensor:
    """Rows and columns by one banded matrix of every sample, the border inside it; faster than convolution up to 224 pixels."""
    count, _, size, _ = x.shape
    matrix = (weights @ _placement(size, weights.shape[1] // 2, x.device)).view(count, size, size)
    across = (x.reshape(count, 3 * size, size) @ matrix.mT).view(count, 3, size, size)
    return matrix[:, None] @ across
