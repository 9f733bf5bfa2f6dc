"""How fast one Ray Data execution feeds eight training workers, one shard each, against one worker with all shards.

The workers are plain actors whose step only sleeps; the tasks return ready pixels of SwAV's size (2 x 224 and 6 x 96, 467 kB an image),
so that what is measured is the way from a task to the collated batch. First without sleep, for the rate; then eight workers at a part of
that rate, for the share of steps that found no batch ready.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import ray
from views import LARGE

from pipeline.data.crop_task import block_bytes
from pipeline.data.crops import COLUMNS
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import TrainLoader
from pipeline.data.ray_data import raise_priority, start_ray
from pipeline.data.sampler import Sampler

SHARDS, CHUNK, IMAGES_PER_TASK = 8, 64, 128
IMAGES = 100_000
WAITED_S = 0.005  # a batch that is ready takes microseconds


def _ready(item: dict[str, np.ndarray], sampler: Sampler) -> dict[str, np.ndarray]:
    """What a task would cut, without cutting."""
    epoch, group, shard = (int(item[key][0]) for key in ("epoch", "group", "shard"))
    rows = sampler.steps_in(group) * sampler.shard_batch
    slot = sampler.first_slot(group, shard) + np.arange(rows)
    columns = {"id": slot, "planned": slot, "slot": slot, "epoch": np.full(rows, epoch), "label": np.full(rows, -1)}
    columns["reason"] = np.full(rows, "", object)
    for name, views in LARGE.items():
        columns[f"crops/{name}"] = np.zeros((rows, views.count, views.size, views.size, 3), np.uint8)
        columns[f"table/{name}"] = np.zeros((rows, views.count, len(COLUMNS)), np.float32)
    return columns


class ReadyPixels(TrainLoader):
    """A loader whose tasks decode nothing."""

    def task(self, shared: Any) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        return partial(_ready, sampler=self.sampler)


class Board:
    """Hands on what rank 0 gives."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    async def exchange(self, number: int, value: Any) -> Any:
        if value is not None:
            self.given.append(value)
        while len(self.given) <= number:
            await asyncio.sleep(0.05)
        return self.given[number]


class Worker:
    """Takes its batches as a trainer does."""

    def consume(self, loader: TrainLoader, rank: int, workers: int, board: Any, step_s: float, warm: int) -> tuple[float, float]:
        """Return images/s and the share of steps that waited, behind the first `warm` steps."""
        raise_priority()
        exchanged = iter(range(10**6))

        def broadcast(value: Any) -> Any:
            return ray.get(board.exchange.remote(next(exchanged), value))

        images = waited = steps = 0
        with contextlib.closing(loader.batches(rank=rank, world_size=workers, broadcast=broadcast)) as batches:
            begin = asked = time.perf_counter()
            for number, batch in enumerate(batches):
                if number >= warm:
                    steps, images, waited = steps + 1, images + len(batch.ids), waited + (time.perf_counter() - asked > WAITED_S)
                time.sleep(step_s)
                asked = time.perf_counter()
                if number == warm - 1:
                    begin = asked
            return images / (time.perf_counter() - begin), waited / steps


def fed(workers: int, steps: int, step_s: float, warm: int = 8) -> tuple[float, float]:
    """Images/s of all workers together, and the share of steps that waited."""
    sampler = Sampler(
        np.array([[0, IMAGES]]), np.arange(IMAGES), seed=0, global_batch=SHARDS * CHUNK, num_shards=SHARDS, images_per_task=IMAGES_PER_TASK
    )
    labels = np.full(IMAGES, -1)
    dataset = ImageDataset(labels=labels, class_names=[], fingerprint="", spans=np.array([[0, IMAGES]]))
    loader = ReadyPixels(dataset, sampler, LARGE, 0, steps + warm)
    board = ray.remote(num_cpus=0)(Board).remote()
    actors = [ray.remote(num_cpus=0)(Worker).remote() for _ in range(workers)]
    found = ray.get([actor.consume.remote(loader, rank, workers, board, step_s, warm) for rank, actor in enumerate(actors)])
    return sum(rate for rate, _ in found), float(np.mean([waited for _, waited in found]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--load", type=float, default=0.5, help="what the sleeping workers ask for, as a part of the rate without sleep")
    options = parser.parse_args()
    start_ray()
    image = block_bytes(LARGE, 1, augmented=False)
    one, many = fed(1, options.steps, 0.0)[0], fed(options.workers, options.steps, 0.0)[0]
    for workers, rate in ((1, one), (options.workers, many)):
        print(f"{workers} worker{'s' * (workers > 1)}: {rate:,.0f} images/s, {rate * image / 1e6:,.0f} MB/s", flush=True)
    step_s = SHARDS * CHUNK / (options.load * many)
    rate, waited = fed(options.workers, options.steps, step_s)
    print(f"{options.workers} workers against one: {many / one:.2f}")
    print(f"steps of {step_s:.2f} s: {rate:,.0f} images/s, {100 * waited:.0f} % of the steps waited")


if __name__ == "__main__":
    main()
