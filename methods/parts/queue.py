"""A queue of features of earlier batches: replicated on every worker, in the state dict, valid for any number of workers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.parts.distributed import all_gather_rows, rank, world_size


class FeatureQueue(nn.Module):
    """`crops` queues of `length` rows of width `dim`, newest first.

    Args:
        crops: how many parallel queues (SwAV: one per global crop).
        length: rows of each queue, over all workers; 0 = no queue.
        dim: D.
    """

    rows: Tensor
    filled: Tensor

    def __init__(self, crops: int, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(crops, length, dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @property
    def full(self) -> bool:
        length = self.rows.shape[1]
        return length > 0 and int(self.filled) >= length

    def share(self, crop: int) -> Tensor:
        """This worker's part `(L / W, D)` of one queue: the parts of all workers, in rank order, are the queue."""
        return self.rows[crop].tensor_split(world_size())[rank()]

    @torch.no_grad()
    def push(self, features: list[Tensor]) -> None:
        """Put one batch `(B, D)` per crop, gathered from all workers in rank order, in front; the oldest rows fall out."""
        length = self.rows.shape[1]
        for crop, batch in enumerate(features):
            new = all_gather_rows(batch.detach().to(self.rows.dtype))
            self.rows[crop] = torch.cat([new, self.rows[crop]])[:length]
        self.filled.fill_(min(length, int(self.filled) + len(new)))
