"""Normalisation of pixels on a device. The served model includes this file, so it imports torch and numpy only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def normalise(
    images: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalise images for evaluation: `(B, H, W, 3)` uint8 to `(B, 3, H, W)` of `dtype`, channels last in memory."""
    pixels = images.to(device, non_blocking=True)
    x = torch.empty((len(pixels), 3, *pixels.shape[1:3]), device=pixels.device)
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    return normalise_into(to_float(pixels, x), mean, std, out)


def to_float(pixels: Tensor, out: Tensor) -> Tensor:
    """Write uint8 pixels `(n, H, W, 3)` as values in [0, 1], `(n, 3, H, W)`, to `out`."""
    for plane in range(3):
        out[:, plane].copy_(pixels[..., plane])  # by planes, which is faster than one permuted copy
    return out.mul_(1 / 255)


def normalise_into(x: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float], out: Tensor) -> Tensor:
    """Write (x - mean) / std to `out`, for x `(n, 3, H, W)` in [0, 1]."""
    shifts = send({"shift": np.array([-m / s for m, s in zip(mean, std, strict=True)], np.float32)}, x.device)["shift"]
    for plane, shift, s, place in zip(x.unbind(1), shifts, std, out.unbind(1), strict=True):
        torch.add(shift, plane, alpha=1 / s, out=place)  # (plane - m) / s in one pass
    return out


def send(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Copy small host arrays to the device in one asynchronous copy."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    ends = np.cumsum([-(-array.nbytes // 8) * 8 for array in arrays.values()]).tolist()  # aligned to 8 bytes
    packed = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    places = {name: slice(end - -(-a.nbytes // 8) * 8, None) for end, (name, a) in zip(ends, arrays.items(), strict=True)}
    for name, array in arrays.items():
        packed[places[name]][: array.nbytes].numpy()[:] = np.frombuffer(array.tobytes(), np.uint8)
    received = packed.to(device, non_blocking=True)
    return {name: received[places[name]][: a.nbytes].view(torch.from_numpy(a).dtype).view(a.shape) for name, a in arrays.items()}
