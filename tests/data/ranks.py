"""Ranks of a stream as threads of one process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.data.loader import Batch, TrainLoader


class Shared:
    """Hands what rank 0 gives to all ranks, which wait for one another."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.value, self.times = threading.Barrier(ranks, timeout=300), None, 0

    def by(self, rank: int) -> Any:
        def broadcast(value: Any) -> Any:
            assert (value is not None) == (rank == 0)
            if rank == 0:
                self.value, self.times = value, self.times + 1
            self.barrier.wait()
            found = self.value
            self.barrier.wait()
            return found

        return broadcast


def collect_ranks(stream: TrainLoader, ranks: int, start: int = 0) -> tuple[list[list[Batch]], int]:
    """The batches of every rank, and how many executions there were."""
    shared = Shared(ranks)

    def one(rank: int) -> list[Batch]:
        return list(stream.batches(start, rank=rank, world_size=ranks, tasks=2, broadcast=shared.by(rank)))

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks))), shared.times
