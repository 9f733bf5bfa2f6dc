"""State by image id: a row for every image of the data set, whichever worker meets the image."""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from methods.parts.distributed import all_gather_rows, all_reduce_sum, rank, world_size
from methods.parts.errors import ConfigError

PIECE_BYTES = 1 << 26  # of a piece of a checkpoint: 16 million labels


class MemoryBank:
    """Values by image id, `(N, *shape)`, for `Method.memory_banks()`.

    A bank is whole on every worker, or, beyond some 100 million images, cut into ranges of ids, one to a worker. It is neither a
    module nor a buffer: DDP would broadcast it, and every checkpoint of weights would hold it. It moves to the device of
    the ids that it is asked for. Rows are allocated at their first use, so a method can be built before its worker joins the
    others, and is sent to it without rows.

    Args:
        num_images: N; ids are dense, 0 to N - 1.
        shape: shape of the value of an image; () = a number.
        fill: value of an image that was never written, e.g. -1 for a label.
        sharded: each worker holds N / W rows. All workers must make every call together.
    """

    def __init__(self, num_images: int, shape: tuple[int, ...] = (), *, dtype: torch.dtype, fill: float, sharded: bool = False) -> None:
        self.num_images, self.shape, self.dtype, self.fill, self.sharded = num_images, shape, dtype, fill, sharded

    @cached_property
    def first(self) -> int:
        """The id of this worker's first row."""
        return own_range(self.num_images)[0] if self.sharded else 0

    @cached_property
    def stop(self) -> int:
        """The id after this worker's last row."""
        return own_range(self.num_images)[1] if self.sharded else self.num_images

    @cached_property
    def held(self) -> Tensor:
        """The rows of this worker, and a last one for the images of others: `(stop - first + 1, *shape)`."""
        return torch.full((self.stop - self.first + 1, *self.shape), self.fill, dtype=self.dtype)

    @property
    def rows(self) -> Tensor:
        """The rows of this worker, `(stop - first, *shape)`, as a view: changing them changes the bank."""
        return self.held[:-1]

    def rows_on(self, device: torch.device) -> Tensor:
        """Move the rows of this worker to a device and return them."""
        self.held = self.held.to(device)
        return self.rows

    def places(self, ids: Tensor) -> Tensor:
        """Return the rows of `held` that belong to images `(G,)`; the last one belongs to all images of other workers."""
        if not self.sharded or world_size() == 1:
            return ids
        return torch.where((ids >= self.first) & (ids < self.stop), ids - self.first, self.stop - self.first)

    def read(self, ids: Tensor) -> Tensor:
        """Return the values `(B, *shape)` of this worker's images `(B,)`. Every worker must bring B ids."""
        self.rows_on(ids.device)
        if not self.sharded or world_size() == 1:
            return self.rows[ids]
        self.held[-1] = 0
        values = all_reduce_sum(self.held[self.places(all_gather_rows(ids))])
        return values[rank() * len(ids) : (rank() + 1) * len(ids)]

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Set the values `(G, *shape)` of images `(G,)`: the whole global batch, the same on every worker.

        An id that comes again must bring the same values.
        """
        self.rows_on(ids.device)
        rows = self.held if self.sharded else self.rows
        rows[self.places(ids)] = values.to(rows.dtype)

    def fill_(self, value: float) -> None:
        """Set the same value for every image."""
        self.rows.fill_(value)

    def pieces(self) -> list[Tensor]:
        """Return copies of all rows on the CPU, at most `PIECE_BYTES` each, on rank 0; other ranks send their rows and get none.

        Rank 0 receives the rows of one worker and one piece at a time. Where tables are whole on every worker, nothing is sent.
        """
        step = max(1, PIECE_BYTES // (self.rows[:0].element_size() * math.prod(self.shape)))
        starts = range(0, max(1, self.num_images), step)
        gathered = (self._piece(start, min(start + step, self.num_images)) for start in starts)
        return [piece for piece in gathered if piece is not None]

    def _piece(self, start: int, stop: int) -> Tensor | None:
        if not self.sharded or world_size() == 1:
            return self.rows[start:stop].to("cpu", copy=True) if rank() == 0 else None
        piece = torch.empty((stop - start, *self.shape), dtype=self.rows.dtype) if rank() == 0 else None
        for owner in range(world_size()):
            first, end = range_of(owner, self.num_images)
            low, high = max(start, first), min(stop, end)
            if low >= high:
                continue
            if piece is not None:
                part = piece[low - start : high - start]
                if owner == 0:
                    part.copy_(self.rows[low:high])
                else:
                    dist.recv(part, src=owner)
            elif owner == rank():
                dist.send(self.rows[low - first : high - first].to("cpu").contiguous(), dst=0)
        return piece

    def load(self, pieces: list[Tensor]) -> None:
        """Load what `pieces` returned, with any number of workers.

        Raises:
            ConfigError: the pieces hold another number of images, or other values.
        """
        start, count = 0, sum(map(len, pieces))
        if count != self.num_images or pieces[0].shape[1:] != self.rows.shape[1:]:
            held, want = (count, *pieces[0].shape[1:]), (self.num_images, *self.rows.shape[1:])
            raise ConfigError(f"checkpoint: a table by image of shape {held} where this run needs {want}; use the same data and heads")
        for piece in pieces:
            low, high = max(start, self.first), min(start + len(piece), self.stop)
            if low < high:
                self.rows[low - self.first : high - self.first] = piece[low - start : high - start].to(self.rows)
            start += len(piece)


def own_range(num_images: int) -> tuple[int, int]:
    """Return the first id of this worker, and of the next one."""
    return range_of(rank(), num_images)


def range_of(owner: int, num_images: int) -> tuple[int, int]:
    """Return the first id of a worker, and of the next one."""
    return owner * num_images // world_size(), (owner + 1) * num_images // world_size()


def first_places(ids: Tensor) -> Tensor:
    """Return for each id of `(G,)` the place at which it comes first, `(G,)`: its own, unless the image is repeated."""
    values, order = ids.sort(stable=True)  # equal ids keep their order, so a run of them begins at the first
    begins = torch.cat([torch.ones_like(values[:1], dtype=torch.bool), values[1:] != values[:-1]])
    run = torch.where(begins, torch.arange(len(ids), device=ids.device), 0).cummax(dim=0).values  # where the run of each began
    return torch.empty_like(ids).scatter_(0, order, order[run])
