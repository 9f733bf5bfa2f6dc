"""A queue of features of earlier batches: replicated on every worker, in the state dict, valid for any number of workers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from methods.parts.distributed import all_gather_rows, rank, world_size
from methods.parts.numerics import l2_normalize


class FeatureQueue(nn.Module):
    """A first-in, first-out queue of `length` unit rows of width `dim`; a push overwrites the oldest rows in place.

    It begins with random unit rows, which are overwritten first. A batch may have any size: row i of it goes to place
    (pointer + i) mod length, and of a batch longer than the queue the last `length` rows stay. Push after the backward
    pass: the loss then sees the rows before its batch, without a copy.

    Args:
        length: K, rows over all workers.
        dim: D.
    """

    written: int  # as `filled`, known without asking the device
    rows: Tensor  # (K, D), float32 or better
    pointer: Tensor  # (), the next place to write
    filled: Tensor  # (), rows ever written, at most K
    pushes: Tensor  # (), batches so far
    born: Tensor  # (K,), which push wrote the row; -1 = never written

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.written = 0
        self.register_load_state_dict_post_hook(_count_rows)
        self.register_buffer("rows", l2_normalize(torch.randn(length, dim)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pushes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("born", torch.full((length,), -1, dtype=torch.int64))

    @property
    def full(self) -> bool:
        """Whether every row was written, without asking the device."""
        return self.written >= len(self.rows)

    @property
    def fill(self) -> Tensor:
        """Fraction of the rows that were written, in [0, 1]."""
        return self.filled / len(self.rows)

    @property
    def age(self) -> Tensor:
        """Mean age of the rows that were written, in pushes: 1 = from the last one; 0 while there are none."""
        written = self.born >= 0
        return torch.where(written, self.pushes - self.born, 0).sum() / written.sum().clamp(min=1)

    @property
    def share(self) -> Tensor:
        """This worker's part of the rows `(K / W, D)`: the parts of all workers, in rank order, are the queue."""
        return self.rows.tensor_split(world_size())[rank()]

    @torch.no_grad()
    def push(self, features: Tensor) -> Tensor:
        """Write one batch `(B, D)`: gathered from all workers in rank order, and normalised.

        Returns:
            The places written `(min(W * B, K),)`; they hold the last rows of the gathered batch.
        """
        length = len(self.rows)
        new = l2_normalize(all_gather_rows(features.detach().to(self.rows.dtype)))
        order = torch.arange(max(0, len(new) - length), len(new), device=self.rows.device)
        places = (self.pointer + order) % length
        self.rows.index_copy_(0, places, new[order])
        self.born.index_copy_(0, places, self.pushes.expand(len(places)))
        self.pointer.add_(len(new)).remainder_(length)
        self.filled.add_(len(new)).clamp_(max=length)
        self.pushes.add_(1)
        self.written = min(length, self.written + len(new))
        return places


def _count_rows(queue: FeatureQueue, _: Any) -> None:
    """Read `filled` from the device: after a state was loaded, and at no other time."""
    queue.written = int(queue.filled)
