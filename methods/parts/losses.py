"""Losses that several methods may add to their own: spreading embeddings out (KoLeo, SIGReg), keeping similarities of patches (Gram)."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.parts.counter_random import draw_seed
from methods.parts.distributed import gather_with_gradient, world_size
from methods.parts.numerics import autocast_disabled, l2_normalize, to_device, upcast_half

SAME_IMAGE = 1e-4  # unit rows that are nearer than this are taken for the same image


def koleo(x: Tensor) -> Tensor:
    """Return the Kozachenko-Leonenko regulariser of this worker's rows, `(B, D) -> ()`: rows move away from their nearest neighbours.

    With unit rows x_i, and j(i) the nearest other row by cosine (Sablayrolles et al. 2019, arXiv:1806.03198):

        - 1/B sum_i ln(||x_i - x_j(i) + 1e-8|| + 1e-8)

    The gradient flows into both rows of a pair, but not where they are nearer than `SAME_IMAGE`: it grows as 1 / distance, and a
    duplicate would leave nothing of a clipped gradient for the other rows. One row has no neighbour: the loss is 0.
    """
    x = upcast_half(x)
    if len(x) < 2:
        return 0.0 * x.sum()
    with autocast_disabled(x):
        x = l2_normalize(x)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1.0).argmax(dim=1)
        distances = torch.linalg.vector_norm(x - x[nearest] + 1e-8, dim=1)
        distances = torch.where(distances < SAME_IMAGE, distances.detach(), distances)
        return -(distances + 1e-8).log().mean()


def sigreg(z: Tensor, generator: torch.Generator | None, *, directions: int = 256, points: int = 17, limit: float = 5.0) -> Tensor:
    """Return the sketched isotropic Gaussian regulariser, `(B, D) -> ()`: the embeddings of all workers become normal (arXiv:2511.08544).

    Along each of M random unit directions a, the Epps-Pulley statistic of the projections s_i = a . z_i compares their empirical
    characteristic function with that of a standard normal; the loss is its mean over the directions:

        n int |1/n sum_i exp(i t s_i) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt

    with n the rows of all workers, by the trapezoid rule. About 1 to 2 for normal embeddings of any n, and of the order of n for
    collapsed ones: a meter of collapse too.

    Args:
        generator: the same on every worker; draws the directions.
        directions: M.
        points: values of t, from -limit to limit.
    """
    z = upcast_half(z)
    with autocast_disabled(z):
        draw = torch.Generator().manual_seed(draw_seed(generator))
        a = to_device(torch.randn(z.shape[1], directions, generator=draw, dtype=z.dtype), z.device)
        t = torch.linspace(-limit, limit, points, dtype=z.dtype, device=z.device)
        angles = (z @ (a / a.norm(dim=0)))[..., None] * t  # (B, M, T)
        means = torch.stack([angles.cos().mean(dim=0), angles.sin().mean(dim=0)])  # (2, M, T)
        real, imaginary = gather_with_gradient(means[None]).mean(dim=0)
        normal = torch.exp(-t.square() / 2)
        errors = ((real - normal).square() + imaginary.square()) * normal
        return len(z) * world_size() * torch.trapezoid(errors, t, dim=-1).mean()


def gram_loss(patches: Tensor, anchors: Tensor) -> Tensor:
    """Return the mean squared difference of cosines between patches, `(B, N, D)` and `(B, N, D') -> ()` (arXiv:2508.10104).

    The cosines of `patches` are drawn to those of `anchors`, which get no gradient.
    """
    patches, anchors = l2_normalize(patches), l2_normalize(anchors.detach())
    with autocast_disabled(patches):
        return (patches @ patches.transpose(1, 2) - anchors @ anchors.transpose(1, 2)).square().mean()
