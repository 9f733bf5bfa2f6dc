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
BLUR_BLOCK = 56  # pixels of a row or column blurred at a time: smaller blocks multiply fewer zeros, larger ones are fewer calls


Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and standard deviation, in [0, 1]


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
    """Turn uint8 crops `(B, V, H, W, 3)` and their tables into finished views on `device`; finished crops are only taken there.

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
        if pixels.is_floating_point():
            layout = torch.channels_last if channels_last else torch.contiguous_format
            stacks[name] = pixels.to(dtype, memory_format=layout)
            continue
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
    device = pixels.device
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((count, 3, height, width), dtype=dtype, device=device, memory_format=layout)
    order = np.where(_jitters(table), table[:, COLUMN["order"]], -1)
    sorted_rows = np.argsort(order, kind="stable")  # samples with the same order of operations lie together
    step = count if device.type != "cpu" else max(1, CHUNK_VALUES // (3 * height * width))
    # allocated once: new memory for every operation would cost as much as the operation
    work = torch.empty((min(step, count), 3, height, width), device=device)
    planes = torch.empty((6, min(step, count), height, width), device=device)
    for first in range(0, count, step):
        rows = sorted_rows[first : first + step]
        places, part = _to_device(rows, device), table[rows]
        x = _to_float(pixels.index_select(0, places), work[: len(rows)])
        if group.grayscale_first:
            _grayscale_(x, part)
        _jitter_(x, part, order[rows], planes)
        if not group.grayscale_first:
            _grayscale_(x, part)
        _blur_(x, part, group)
        _solarize_(x, part, group)
        _normalise_(x, mean, std)
        if device.type == "cpu":
            for place, sample in zip(rows.tolist(), x, strict=True):  # index_copy_ takes thrice as long to channels last
                out[place].copy_(sample)
        else:
            out.index_copy_(0, places, x.to(dtype))
    return out


def normalise(
    images: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Plain images for evaluation: `(B, H, W, 3)` uint8 to `(B, 3, H, W)` of `dtype`, channels last in memory."""
    pixels = images.to(device, non_blocking=True)
    x = torch.empty((len(pixels), 3, *pixels.shape[1:3]), device=pixels.device)
    x = _normalise_(_to_float(pixels, x), mean, std)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _to_float(pixels: Tensor, out: Tensor) -> Tensor:
    for plane in range(3):
        out[:, plane].copy_(pixels[..., plane])  # by planes: a quarter faster than one permuted copy
    return out.mul_(1 / 255)


def _normalise_(x: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    for plane, m, s in zip(x.unbind(1), mean, std, strict=True):
        torch.add(torch.tensor(-m / s), plane, alpha=1 / s, out=plane)  # (plane - m) / s in one pass
    return x


def _gray(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`(n, 3, H, W)` to `(n, H, W)`, the luma of ITU-R 601."""
    return torch.mul(x[:, 0], 0.2989, out=out).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A small CPU array on the device without waiting for it. Its length is known here, so nothing synchronises."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _where(flags: np.ndarray, device: torch.device) -> Tensor | None:
    chosen = np.flatnonzero(flags)
    return _to_device(chosen, device) if len(chosen) else None


def _jitters(table: np.ndarray) -> np.ndarray:
    flags: np.ndarray = table[:, COLUMN["jitter"]] > 0
    return flags


def _jitter_(x: Tensor, table: np.ndarray, order: np.ndarray, planes: Tensor) -> None:
    """Brightness, contrast, saturation and hue, in one pass for each run of samples that have them in the same order.

    Args:
        order: `(n,)`, index into `ORDERS`, sorted; -1 = no jitter.
        planes: `(6, n or more, H, W)`, scratch memory.
    """
    first = COLUMN["brightness"]
    factors = _to_device(np.ascontiguousarray(table[:, first : first + 4].T), x.device)[:, :, None, None, None]  # (4, n, 1, 1, 1)
    # at most 1: a convex combination, or darker; it stays in [0, 1] without a clamp
    tame = table[:, first : first + HUE] <= 1
    idle = [(table[:, first + kind] == (0 if kind == HUE else 1)).all() for kind in range(4)]
    bounds = [0, *(np.flatnonzero(np.diff(order)) + 1).tolist(), len(order)]
    for low, high in itertools.pairwise(bounds):
        if order[low] < 0:
            continue
        for kind in ORDERS[int(order[low])]:
            if not idle[kind]:
                OPERATIONS[kind](x[low:high], factors[kind, low:high], planes[:, : high - low])
                if kind != HUE and not tame[low:high, kind].all():
                    x[low:high].clamp_(0, 1)


def _brightness_(x: Tensor, factor: Tensor, planes: Tensor) -> None:
    x.mul_(factor)


def _contrast_(x: Tensor, factor: Tensor, planes: Tensor) -> None:
    mean = _gray(x.mean((2, 3), keepdim=True))[:, None]
    x.mul_(factor).add_(mean.mul_(1 - factor))


def _saturation_(x: Tensor, factor: Tensor, planes: Tensor) -> None:
    gray = _gray(x, out=planes[0])[:, None].mul_(1 - factor)
    x.mul_(factor).add_(gray)


def _hue_(x: Tensor, shift: Tensor, planes: Tensor) -> None:
    """Turn the hue by `shift` turns, without branches.

    With low, high and e the least, the greatest and their difference, and the hue h in sixths of a turn, 0 at red:
    h - 3 = +-(2 - (g + b - r - low) / e), minus where g > b. Back from h - 3 = w in [-3, 3]:
    r = low + e clamp(|w| - 1, 0, 1), g = high - e clamp(|w + 1| - 1, 0, 1), b = high - e clamp(|w - 1| - 1, 0, 1).
    """
    (r, g, b), (low, high, extent, w, sign, k) = x.unbind(1), planes.unbind(0)
    torch.minimum(torch.minimum(g, b, out=low), r, out=low)
    torch.maximum(torch.maximum(g, b, out=high), r, out=high)
    torch.sub(high, low, out=extent)
    torch.sub(b, g, out=sign)
    torch.add(g, b, out=w).sub_(r).sub_(low).div_(torch.clamp(extent, min=1e-12, out=k))  # gray has no extent: any hue will do
    w.neg_().add_(2).copysign_(sign).add_(shift[:, 0], alpha=6)
    w.sub_(torch.mul(w, 1 / 6, out=k).round_(), alpha=6)  # to [-3, 3]
    torch.addcmul(low, extent, torch.abs(w, out=k).sub_(1).clamp_(0, 1), out=r)
    torch.addcmul(high, extent, torch.add(w, 1, out=k).abs_().sub_(1).clamp_(0, 1), value=-1, out=g)
    torch.addcmul(high, extent, w.sub_(1).abs_().sub_(1).clamp_(0, 1), value=-1, out=b)


OPERATIONS = (_brightness_, _contrast_, _saturation_, _hue_)


def _grayscale_(x: Tensor, table: np.ndarray) -> None:
    chosen = _where(table[:, COLUMN["grayscale"]] > 0, x.device)
    if chosen is not None:
        gray = _gray(x.index_select(0, chosen))
        x.index_copy_(0, chosen, gray[:, None].expand(-1, 3, -1, -1))


def _solarize_(x: Tensor, table: np.ndarray, group: CropGroup) -> None:
    chosen = _where(table[:, COLUMN["solarize"]] > 0, x.device)
    if chosen is not None:
        part = x.index_select(0, chosen)
        x.index_copy_(0, chosen, part.addcmul(part.clone().ge_(group.solarize_threshold), 1 - 2 * part))


def blur_radius(group: CropGroup) -> int:
    """Taps on each side of the Gaussian, pixels: as declared, else four of the largest standard deviations, less than the crop.

    Beyond four lie 6e-5 of a Gaussian, a sixtieth of a level of 255.
    """
    return group.blur_taps // 2 if group.blur_taps else min(math.ceil(4 * group.blur_sigma[1]), group.size - 1)


def _blur_(x: Tensor, table: np.ndarray, group: CropGroup) -> None:
    sigma = table[:, COLUMN["blur_sigma"]]
    chosen = _where(sigma > 0, x.device)
    if chosen is None:
        return
    radius = blur_radius(group)
    offsets = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (offsets / sigma[sigma > 0, None].astype(np.float64)) ** 2)
    taps = np.where(taps > 1e-12, taps, 0)  # float32's subnormal numbers make the products many times slower
    weights = _to_device((taps / taps.sum(axis=1, keepdims=True)).astype(np.float32), x.device)
    x.index_copy_(0, chosen, _blur_by_matrix(x.index_select(0, chosen), weights))


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
    """Rows and columns by one banded matrix of every sample, the border inside it, a block of the band at a time."""
    count, _, size, _ = x.shape
    radius = weights.shape[1] // 2
    matrix = (weights @ _placement(size, radius, x.device)).view(count, size, size)
    across, down = torch.empty_like(x), torch.empty_like(x)
    wide = across.view(count, 3 * size, size)
    blocks = [(i, min(i + BLUR_BLOCK, size)) for i in range(0, size, BLUR_BLOCK)]
    for first, last in blocks:
        near = slice(max(0, first - radius), min(size, last + radius))  # all that the band of these pixels reaches
        torch.bmm(x.view(count, 3 * size, size)[..., near], matrix[:, first:last, near].mT, out=wide[..., first:last])
    for first, last in blocks:
        near = slice(max(0, first - radius), min(size, last + radius))
        torch.matmul(matrix[:, None, first:last, near], across[:, :, near], out=down[:, :, first:last])
    return down
