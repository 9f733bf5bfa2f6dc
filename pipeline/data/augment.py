"""Augmentation of crops on the training device: colour, blur and normalisation, one batched pass for each size of crops.

The operations are those of torchvision for floats (`transforms.v2.functional`), with factors and an order for every sample. The random
numbers are drawn before (`crops.py`).

The host makes the index lists and factors of all operations and sends them in one copy. Nothing is read back, so no step waits for
the device. The number of kernel launches hardly depends on the number of crops (`benchmarks/launches.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from methods.parts.views import CropGroup, Views, ViewsConfig
from pipeline.data.crops import COLUMN
from pipeline.data.normalise import normalise_into, send, to_float

ORDERS = np.array(list(itertools.permutations(range(4))))  # (24, 4): 0 brightness, 1 contrast, 2 saturation, 3 hue
CONTRAST, SATURATION, HUE = 1, 2, 3
HUE_PLACE = np.argmax(ORDERS == HUE, axis=1)  # (24,): position of the hue in each order
RANK = np.argsort(np.argsort(HUE_PLACE, kind="stable"))  # (24,): rank of each order if sorted by the position of the hue
HUE_OFFSETS = np.array([0, 4, 2])  # sixths of a turn, see `_hue_`
CHUNK_VALUES = 2**20  # float32 values of one pass on a CPU: fewer fit its cache, more have less overhead
BLUR_BLOCK = 56  # pixels of a row or column blurred at a time: smaller blocks multiply fewer zeros, larger ones need fewer calls

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and standard deviation, in [0, 1]
Recipes = dict[str, np.ndarray]  # parameters of N crops by name, each (N,)


class CutBatch(Protocol):
    """The attributes of a batch that `augment_views` reads (see `loader.Batch`)."""

    @property
    def crops(self) -> Mapping[str, Tensor]: ...
    @property
    def tables(self) -> Mapping[str, np.ndarray]: ...
    @property
    def ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def host_ids(self) -> Tensor: ...


def augment_views(
    batch: CutBatch,
    views: ViewsConfig,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device | str,
    channels_last: bool = True,
) -> Views:
    """Augment and normalise uint8 crops `(B, V, H, W, 3)` on `device`. Crops that the tasks have augmented are only copied.

    Groups of one size are processed together.

    Args:
        mean, std: normalisation in [0, 1].

    Returns:
        Stacks `(V * B, 3, H, W)`, view-major.
    """
    device = torch.device(device)
    stacks: dict[str, Tensor] = {}
    sizes: dict[tuple[int, ...], list[str]] = {}
    for name, crops in batch.crops.items():
        if crops.is_floating_point():
            pixels = crops.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
            stacks[name] = pixels.to(torch.float32, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        else:
            sizes.setdefault(tuple(crops.shape[2:]), []).append(name)
    for names in sizes.values():
        parts = [batch.crops[name].to(device, non_blocking=True).flatten(0, 1) for name in names]
        recipes = [_recipes(batch.tables[name].reshape(-1, len(COLUMN)), views[name]) for name in names]
        places = [np.arange(len(part)).reshape(batch.crops[name].shape[:2]).T.ravel() for name, part in zip(names, parts, strict=True)]
        stacks |= zip(names, _finish(parts, recipes, places, mean, std, channels_last), strict=True)
    stacks = {name: stacks[name] for name in batch.crops}  # in the declared order
    counts = {name: crops.shape[1] for name, crops in batch.crops.items()}
    ids, labels = (x.to(device, non_blocking=True) for x in (batch.ids, batch.labels))
    roles = {name: views[name].role for name in stacks}
    return Views(stacks=stacks, counts=counts, image_ids=ids, labels=labels, roles=roles, host_ids=batch.host_ids)


def augment_crops(
    pixels: Tensor,
    table: np.ndarray,
    group: CropGroup,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    channels_last: bool = True,
) -> Tensor:
    """Augment and normalise crops `(N, H, W, 3)` uint8 by their rows of the table `(N, len(COLUMNS))`: `(N, 3, H, W)` float32."""
    return _finish([pixels], [_recipes(table, group)], [np.arange(len(pixels))], mean, std, channels_last)[0]


def _recipes(table: np.ndarray, group: CropGroup) -> Recipes:
    """Return the columns of a table `(N, len(COLUMNS))` by name, and the settings of the group."""
    columns = {name: table[:, place] for name, place in COLUMN.items()}
    settings = {"grayscale_first": group.grayscale_first, "radius": blur_radius(group), "threshold": np.float32(group.solarize_threshold)}
    return columns | {name: np.full(len(table), value) for name, value in settings.items()}


@torch.no_grad()
def _finish(
    parts: Sequence[Tensor],
    recipes: Sequence[Recipes],
    places: Sequence[np.ndarray],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    channels_last: bool,
) -> list[Tensor]:
    """Augment and normalise groups of crops of one size, each `(N_g, H, W, 3)` uint8. Output row i of a group is its crop `places[i]`."""
    counts, device = [len(part) for part in parts], parts[0].device
    height, width = parts[0].shape[1:3]
    total = sum(counts)
    recipe = {name: np.concatenate([one[name][place] for one, place in zip(recipes, places, strict=True)]) for name in recipes[0]}
    source = np.concatenate([first + place for first, place in zip(np.cumsum([0, *counts]), places, strict=False)])
    pixels = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    # sorted by the position of the hue, samples without jitter at the end
    sorted_rows = np.argsort(np.where(recipe["jitter"] > 0, RANK[recipe["order"].astype(int)], len(ORDERS)), kind="stable")
    step = total if device.type != "cpu" else max(1, CHUNK_VALUES // (3 * height * width))
    # allocated once: allocating for every operation costs as much as the operation
    work = torch.empty((min(step, total), 3, height, width), device=device)
    planes = torch.empty((5, min(step, total), height, width), device=device)
    # images in their final memory layout: `index_copy_` is faster on contiguous rows
    shape = (height, width, 3) if channels_last else (3, height, width)
    done, out = planes.view(-1)[: work.numel()].view(-1, *shape), torch.empty((total, *shape), device=device)
    for first in range(0, total, step):
        rows = sorted_rows[first : first + step]
        part = {name: values[rows] for name, values in recipe.items()}
        host = _arrays(part)
        sent = send(host | {"source": source[rows], "target": rows}, device)
        x = to_float(pixels.index_select(0, sent["source"]), work[: len(rows)])
        _grayscale_(x, sent["gray_before"])
        _jitter_(x, part, host, sent, planes[:, : len(rows)])
        _grayscale_(x, sent["gray_after"])
        _blur_(x, sent)
        _solarize_(x, sent)
        normalise_into(x, mean, std, done[: len(rows)].movedim(-1, 1) if channels_last else done[: len(rows)])
        out.index_copy_(0, sent["target"], done[: len(rows)])
    return list((out.movedim(-1, 1) if channels_last else out).split(counts))


# ---------------------------------------------------------------------------- host arrays


def _arrays(recipe: Recipes) -> dict[str, np.ndarray]:
    """Return the factors and index lists of n crops for the operations below."""
    kinds = ORDERS[recipe["order"].astype(int)].T  # (4, n): the operation at each place of a sample's order
    factors = np.stack([recipe[name] for name in ("brightness", "contrast", "saturation", "hue")])
    factors = np.take_along_axis(factors, kinds, axis=0)
    gray, sigma = recipe["grayscale"] > 0, recipe["blur_sigma"]
    arrays = {
        "factor": factors,
        "gray_share": (1 - factors) * (kinds == SATURATION),
        "mean_share": (1 - factors) * (kinds == CONTRAST),
        "hue": (np.mod(6 * recipe["hue"][:, None] + HUE_OFFSETS + 3, 6) - 3).astype(np.float32),
        "gray_before": np.flatnonzero(gray & recipe["grayscale_first"]),
        "gray_after": np.flatnonzero(gray & ~recipe["grayscale_first"]),
        "solarized": np.flatnonzero(recipe["solarize"] > 0),
    }
    arrays["threshold"] = recipe["threshold"][arrays["solarized"]]
    for radius in set(recipe["radius"][sigma > 0].tolist()):
        blurred = np.flatnonzero((sigma > 0) & (recipe["radius"] == radius))
        arrays |= {f"blurred {radius}": blurred, f"taps {radius}": _taps(sigma[blurred], radius)}
    return arrays


# ---------------------------------------------------------------------------- operations


def _gray(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the luma of ITU-R 601: `(n, 3, H, W)` to `(n, H, W)`."""
    return torch.mul(x[:, 0], 0.2989, out=out).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)


def _jitter_(x: Tensor, recipe: Recipes, host: dict[str, np.ndarray], sent: dict[str, Tensor], planes: Tensor) -> None:
    """Apply brightness, contrast, saturation and hue to every sample in its order: the operations before its hue, the hue, the others.

    Samples are sorted by the position of their hue, so those that have an operation at a position before or after it are contiguous.

    Args:
        host, sent: the result of `_arrays` on the host and on the device.
        planes: `(5, n, H, W)`, scratch memory.
    """
    count = int((recipe["jitter"] > 0).sum())
    hue_place = HUE_PLACE[recipe["order"][:count].astype(int)]
    for place in range(HUE):
        _blend_(x, place, slice(int(np.searchsorted(hue_place, place, "right")), count), host, sent, planes[0])
    if recipe["hue"][:count].any():
        _hue_(x[:count], sent["hue"][:count], planes[:, :count])
    for place in range(1, HUE + 1):
        _blend_(x, place, slice(0, int(np.searchsorted(hue_place, place, "left"))), host, sent, planes[0])


def _blend_(x: Tensor, place: int, at: slice, host: dict[str, np.ndarray], sent: dict[str, Tensor], plane: Tensor) -> None:
    """Apply brightness, contrast or saturation to the samples `at`: x factor + gray gray_share + mean(gray) mean_share."""
    factor, gray_share, mean_share = (sent[name][place, at, None, None, None] for name in ("factor", "gray_share", "mean_share"))
    if (host["factor"][place, at] == 1).all():  # also if there is no sample
        return
    x, gray = x[at], plane[at, None]
    if not host["gray_share"][place, at].any():  # no saturation, as happens in the small chunks of a CPU
        gray = _gray(x.mean((2, 3), keepdim=True))[:, None].mul_(mean_share)
    elif host["mean_share"][place, at].any():
        _gray(x, out=plane[at])
        torch.addcmul(gray.mean((2, 3), keepdim=True).mul_(mean_share), gray, gray_share, out=gray)
    else:
        _gray(x, out=plane[at]).unsqueeze(1).mul_(gray_share)
    torch.addcmul(gray, x, factor, out=x)
    if host["factor"][place, at].max() > 1:  # else it darkens, or is a convex combination, and stays in [0, 1]
        x.clamp_(0, 1)


def _hue_(x: Tensor, offsets: Tensor, planes: Tensor) -> None:
    """Shift the hue, without branches.

    With low, high and e the least, the greatest and their difference, and the hue h in sixths of a turn, 0 at red:
    w = h - 3 = +-(2 - (g + b - r - low) / e), minus where g > b. Back to a channel: low + e clamp(2 - y, 0, 1), where
    y = ||w + o| - 3| and its offset o in [-3, 3] is the shift plus 0 for red, 4 for green and 2 for blue, modulo 6.

    Args:
        offsets: `(n, 3)`.
    """
    (r, g, b), (low, high, extent, w, sign) = x.unbind(1), planes.unbind(0)
    torch.minimum(torch.minimum(g, b, out=low), r, out=low)
    torch.maximum(torch.maximum(g, b, out=high), r, out=high)
    torch.sub(high, low, out=extent).clamp_(min=1e-12)  # gray has no extent: any hue will do
    torch.add(high, extent, out=high)  # low + 2 e
    torch.sub(b, g, out=sign)
    torch.sub(r, g, out=w).sub_(b).add_(high).div_(extent).copysign_(sign)
    torch.add(w[:, None], offsets[:, :, None, None], out=x)
    x.abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(high[:, None], extent[:, None], x, value=-1, out=x)


def _grayscale_(x: Tensor, chosen: Tensor) -> None:
    if len(chosen):
        gray = _gray(x.index_select(0, chosen))
        x.index_copy_(0, chosen, gray[:, None].expand(-1, 3, -1, -1))


def _solarize_(x: Tensor, sent: dict[str, Tensor]) -> None:
    chosen = sent["solarized"]
    if len(chosen):
        part = x.index_select(0, chosen)
        x.index_copy_(0, chosen, torch.where(part < sent["threshold"][:, None, None, None], part, 1 - part))


def blur_radius(group: CropGroup) -> int:
    """Return the taps on each side of the Gaussian, pixels: as declared, else four of the largest standard deviations, less than the crop.

    6e-5 of a Gaussian lie beyond four, which is a sixtieth of a level of 255.
    """
    return group.blur_taps // 2 if group.blur_taps else min(math.ceil(4 * group.blur_sigma[1]), group.size - 1)


def _taps(sigma: np.ndarray, radius: int) -> np.ndarray:
    """Return Gaussians of standard deviations `(n,)`, pixels: `(n, 2 * radius + 1)` float32, rows sum to 1."""
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma[:, None].astype(np.float64)) ** 2)
    taps = np.where(taps > 1e-12, taps, 0)  # subnormal numbers slow the products down
    return (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)


def _blur_(x: Tensor, sent: dict[str, Tensor]) -> None:
    for name, chosen in sent.items():
        if name.startswith("blurred "):
            x.index_copy_(0, chosen, _blur_by_matrix(x.index_select(0, chosen), sent[name.replace("blurred", "taps")]))


@lru_cache(maxsize=16)
def _placement(size: int, radius: int, device: torch.device) -> Tensor:
    """Return the position of every tap as `(2 * radius + 1, size * size)`: 1 at (output pixel, input pixel), mirrored at the border."""
    place = torch.zeros(2 * radius + 1, size, size)
    for tap in range(2 * radius + 1):
        source = torch.arange(size) + tap - radius
        source = source.abs()
        source = torch.where(source >= size, 2 * (size - 1) - source, source)
        place[tap, torch.arange(size), source] = 1
    return send({"place": place.flatten(1).numpy()}, device)["place"]


def _blur_by_matrix(x: Tensor, weights: Tensor) -> Tensor:
    """Blur rows and columns by a banded matrix of every sample, which includes the border, one block of the band at a time."""
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
