"""Frozen features of finished images, and the batch-norm statistics that a backbone is evaluated with."""

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
    """Features of uint8 images `(N, H, W, 3)`: `(N, D)`, float32, on the CPU.

    The backbone runs in evaluation mode and is left as it was found: the mode of every module, batch-norm statistics
    and the random state do not change. It must already be on `device`; only one batch of floats exists at a time.

    Args:
        forward: what to ask instead of the backbone's own forward, `(B, 3, H, W) -> (B, D)`; it uses the backbone's modules.
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
    """A copy, in evaluation mode, whose batch-norm statistics are the plain average over the batches of `images`.

    The running statistics of training are an exponential average over augmented crops, of all sizes; this replaces them
    by those of the images as they are evaluated. Everything else stays in evaluation mode. The last batch is left out
    when it is not full, since every batch counts the same.

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
    """RankMe: exp of the entropy of the singular values of features `(N, D)`, between 1 and min(N, D).

    Garrido et al. 2022, arXiv:2210.02885. Large where no direction is wasted, which a good representation needs but which
    does not make it one; comparable between runs on the same images with backbones of the same width only.
    """
    rows = features.double()
    gram = rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(1e-300) + 1e-7  # epsilon of the paper
    return float(torch.exp(-(shares * shares.log()).sum()))


def raw_pixels(images: Tensor) -> Tensor:
    """The images as plain vectors in [0, 1]: `(N, H * W * 3)`, float32. A backbone must beat them."""
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
    """Evaluation mode inside; afterwards every submodule has the mode that it had."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
