"""Features of a frozen backbone, and its batch-norm statistics for evaluation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from methods.parts.norms import BATCH_NORMS
from pipeline.data.normalise import normalise

Triple = tuple[float, float, float]
Precision = Literal["float32", "bf16"]


def extract(
    backbone: nn.Module,
    images: Tensor,
    *,
    mean: Triple,
    std: Triple,
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
    batch_size: int = 256,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the features of uint8 images `(N, H, W, 3)`: `(N, D)`, float32, on the CPU.

    The backbone must be on `device` and runs in evaluation mode. The mode of every module, batch-norm statistics and the
    random state do not change.

    Args:
        forward: replaces the forward pass of the backbone, `(B, 3, H, W) -> (B, D)`; it uses the backbone's modules.
    """
    with _evaluating(backbone), torch.no_grad():
        batches = images.split(batch_size)
        parts = [_forward(backbone, batch, mean, std, device, precision, forward).float().cpu() for batch in batches]
    return torch.cat(parts) if parts else torch.empty(0, int(getattr(backbone, "num_features", 0)))


def calibrate_batchnorm(
    backbone: nn.Module,
    images: Tensor,
    *,
    mean: Triple,
    std: Triple,
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
    batch_size: int = 256,
) -> nn.Module:
    """Return a copy, in evaluation mode, whose batch-norm statistics are the mean over the batches of `images`.

    The running statistics of training are an exponential average over augmented crops of all sizes. An incomplete last
    batch is left out, because every batch has the same weight.

    Args:
        images: uint8, `(N, H, W, 3)`, training images.
    """
    calibrated = copy.deepcopy(backbone).eval()
    norms = [m for m in calibrated.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    if not norms:
        return calibrated
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.train()
    whole = len(images) // batch_size * batch_size
    with torch.no_grad():
        for batch in images[: whole or len(images)].split(batch_size):
            _forward(calibrated, batch, mean, std, device, precision)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return calibrated.eval()


def effective_rank(features: Tensor) -> float:
    """Return RankMe: exp of the entropy of the singular values of features `(N, D)`, between 1 and min(N, D).

    Garrido et al. 2022, arXiv:2210.02885. A high rank is necessary for good features, but not sufficient. Values are comparable
    only between runs on the same images with backbones of the same width.
    """
    rows = features.double()
    gram = rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(1e-300) + 1e-7  # epsilon of the paper
    return float(torch.exp(-(shares * shares.log()).sum()))


def raw_pixels(images: Tensor) -> Tensor:
    """Return the images as vectors in [0, 1], `(N, H * W * 3)` float32: a baseline."""
    return images.flatten(1).float() / 255


def _forward(
    backbone: nn.Module,
    batch: Tensor,
    mean: Triple,
    std: Triple,
    device: str | torch.device,
    precision: Precision,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
        features: Tensor = (forward or backbone)(normalise(batch, mean, std, device, dtype))
    return features


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside, and restore the mode of every submodule afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
