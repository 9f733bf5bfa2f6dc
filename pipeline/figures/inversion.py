"""Inversion of features: a small decoder learns to sample images that have given features.

Images x are written in their principal components, x = mean + sum_i c_i u_i. The decoder g maps frozen features h `(D,)` and
noise e to coefficients. It learns the distribution of c given h, not their mean, by the energy score (Gneiting and Raftery
2007, sec. 4.3), which is lowest where g's samples have the distribution of c:

    loss = sum_k mean_b  |c - g(h, e)|_k - 1/2 |g(h, e) - g(h, e')|_k        e, e' independent

with |.|_k the Euclidean norm of the first k components divided by its mean in the data, so coarse and fine shapes have equal weight.
The features h keep what samples of the same h have in common; the differences between samples are lost.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NOISE = 32  # dimensions of e
COMPONENTS = 256  # of an image
LEADING = (4, 16, 64, COMPONENTS)  # k
WIDTH = 512
LR = 2e-3


class Decoder(nn.Module):
    """Maps features and noise to an image: `(B, D), (B, NOISE) -> (B, 3, size, size)`, in [0, 1] up to small overshoot.

    Args:
        features: training features, `(N, D)`, for standardisation.
        images: training images, `(N, 3, size, size)` in [0, 1], for the components.
    """

    center: Tensor
    scale: Tensor
    mean: Tensor  # of the images, (P,)
    basis: Tensor  # (C, P), orthonormal rows
    spread: Tensor  # (C,), standard deviation of each coefficient

    def __init__(self, features: Tensor, images: Tensor) -> None:
        super().__init__()
        self.shape = images.shape[1:]
        flat = images.flatten(1)
        mean = flat.mean(dim=0)
        count = min(COMPONENTS, *flat.shape)
        _, singular, basis = torch.svd_lowrank(flat - mean, q=count, niter=2)
        parts = {"center": features.mean(dim=0), "scale": 1 / features.std(dim=0).clamp(min=1e-6)}
        parts |= {"mean": mean, "basis": basis.T, "spread": singular / math.sqrt(len(flat))}
        for name, value in parts.items():
            self.register_buffer(name, value.contiguous())
        inner: list[nn.Module] = []
        for width in (features.shape[1] + NOISE, WIDTH, WIDTH):
            inner += [nn.Linear(width, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()]
        self.inner = nn.Sequential(*inner, nn.Linear(WIDTH, count))

    def coefficients(self, features: Tensor, noise: Tensor) -> Tensor:
        """Return the coefficients `(B, C)`."""
        return self.inner(torch.cat([(features - self.center) * self.scale, noise], dim=1)) * self.spread

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        return (self.mean + self.coefficients(features, noise) @ self.basis).unflatten(1, self.shape)

    @torch.no_grad()
    def sample(self, features: Tensor, each: int, seed: int = 0) -> Tensor:
        """Sample images of features, on the CPU, in [0, 1]: `(S, B, D) -> (S, each, B, 3, size, size)`. All features get the same noise."""
        noise = torch.randn(len(features), each, features.shape[1], NOISE, generator=torch.Generator().manual_seed(seed))
        h = features[:, None].expand(-1, each, -1, -1)
        made = self(h.flatten(0, 2).to(self.mean.device), noise.flatten(0, 2).to(self.mean.device))
        return made.clamp(0, 1).cpu().unflatten(0, h.shape[:3])


def energy_score(c: Tensor, first: Tensor, second: Tensor, spread: Tensor) -> Tensor:
    """Return the loss of the module's docstring from two samples of the same features; all `(B, C)`."""
    total = c.new_zeros(())
    for k in LEADING:
        x, a, b = (part[:, :k] for part in (c, first, second))
        distances = (x - a).norm(dim=1) + (x - b).norm(dim=1) - (a - b).norm(dim=1)
        total = total + distances.mean() / (2 * spread[:k].norm())
    return total / len(LEADING)


@dataclass(frozen=True)
class Fitted:
    """A trained decoder, with the steps and the loss of its training."""

    decoder: Decoder
    steps: int
    loss: float  # mean of the last tenth of the steps


def fit(
    features: Tensor,
    images: Tensor,
    *,
    steps: int,
    seconds: float,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    batch: int = 128,
    seed: int = 0,
) -> Fitted:
    """Train a decoder with AdamW, the learning rate on a cosine to 0.

    Args:
        features: `(V, N, D)`, of V looks at each of N images.
        images: the images, `(N, 3, size, size)` in [0, 1].
        steps: largest number of steps.
        seconds: CPU time after which training ends early, also with learning rate 0.
        precision: of matrix products.
    """
    looks, count, _ = features.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(features.flatten(0, 1), images).to(device)
        wanted = ((images.flatten(1).to(device) - decoder.mean) @ decoder.basis.T).cpu()  # (N, C)
        optimizer = torch.optim.AdamW(decoder.parameters(), weight_decay=0.05)
        losses: list[float] = []
        began, progress = time.process_time(), 0.0
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1, (len(losses) + 1) / 50) * (1 + math.cos(math.pi * progress)) / 2
            rows = torch.randint(count, (batch,))
            h = features[torch.randint(looks, (batch,)), rows].to(device)
            with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
                first, second = decoder.coefficients(h.repeat(2, 1), torch.randn(2 * batch, NOISE).to(device)).chunk(2)
            loss = energy_score(wanted[rows].to(device), first, second, decoder.spread)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            progress = max(len(losses) / steps, (time.process_time() - began) / seconds)
    last = losses[-max(1, len(losses) // 10) :]
    return Fitted(decoder.eval(), len(losses), sum(last) / len(last))
