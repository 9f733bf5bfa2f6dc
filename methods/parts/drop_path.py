"""Stochastic depth whose decisions follow the image: the same on any number of workers. Huang et al. 2016, arXiv:1603.09382.

`Method.forward` states the images of a batch (`images_of_step`). A network that is given whole crops of them, `(V B, ...)`,
crop by crop, drops paths by (seed of the step, pass, layer, crop, image id). Other inputs are drawn for as in timm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import timm.layers
import torch
from torch import Tensor, nn

from methods.parts.counter_random import draw_seed, random_words
from methods.parts.numerics import to_device


@dataclass
class Images:
    """The images of a micro-batch, ids `(B,)`, and the generator that is the same on every worker."""

    ids: Tensor
    generator: torch.Generator | None


N = TypeVar("N", bound=nn.Module)
_images: ContextVar[Images | None] = ContextVar("images", default=None)


@contextlib.contextmanager
def images_of_step(ids: Tensor, generator: torch.Generator | None) -> Iterator[None]:
    """Tell the networks that are called inside which images their rows belong to."""
    token = _images.set(Images(ids, generator))
    try:
        yield
    finally:
        _images.reset(token)


def draw_keep(rows: int, rates: Sequence[float]) -> Tensor | None:
    """Return the factors of one pass through all paths, `(paths, rows)`: 0 where dropped, else 1 / (1 - rate).

    Return None where the images of the rows are not known.

    Args:
        rows: rows of the pass, V * B for whole crops.
        rates: probability of each path to be dropped.
    """
    images = _images.get()
    if images is None or rows % len(images.ids):
        return None
    words = random_words(images.ids, rows // len(images.ids), len(rates), draw_seed(images.generator)).T
    rate = to_device(torch.tensor(rates, dtype=torch.float32), words.device)[:, None]
    return (words >= rate * 2.0**32) / (1 - rate)


class DropPath(timm.layers.DropPath):  # type: ignore[misc]
    """timm's drop path; where `keep` `(rows,)` is set, it multiplies by it and draws nothing."""

    keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = self.keep
        if keep is None:
            drawn = draw_keep(len(x), [self.drop_prob])
            if drawn is None:
                return super().forward(x)  # type: ignore[no-any-return]
            keep = drawn[0]
        return x * keep.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class DropPathSubsets(nn.Module):
    """Stochastic depth by parts of the batch (DINOv2): each path works on n rows of B only, and its result counts B / n times.

    n = max(1, floor(B (1 - rate))), drawn for every path without repetition, so that shapes do not depend on chance and the dropped
    rows cost nothing. The rows are drawn on the device, by torch's own generator: they differ between workers.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_prob = rate

    def draw(self, paths: int, rows: int, device: torch.device) -> Tensor | None:
        """Return the rows that each path works on, `(paths, n)` int64; None: all."""
        if not self.training or self.drop_prob == 0:
            return None
        kept = max(1, int(rows * (1 - self.drop_prob)))
        return torch.rand(paths, rows, device=device).argsort(dim=1)[:, :kept]


def follow_images(network: nn.Module) -> None:
    """Replace timm's drop path by the one of this file, in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is timm.layers.DropPath:
                setattr(module, name, DropPath(child.drop_prob, child.scale_by_keep))


def without_drop_path(network: N) -> N:
    """Set every rate of drop path to 0, in place, e.g. in a teacher that was copied from the student."""
    for module in network.modules():
        if isinstance(module, DropPath | DropPathSubsets):
            module.drop_prob = 0.0
    return network
