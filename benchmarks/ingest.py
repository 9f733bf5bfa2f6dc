"""The whole path from encoded images to the training loop, 2 x 224 + 6 x 96, on all cores, in images per second.

Anchors in the same run: torch's DataLoader with the original SwAV transform and as many workers, and our engine in a bare
loop of as many processes, which sends nothing anywhere. Then the time to the first batch, from nothing and with warm workers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset
from views import LARGE, original, photographs

from pipeline.config import DataConfig
from pipeline.data.crop_task import make_crops
from pipeline.data.image_dataset import ImageDataset, Sample
from pipeline.data.loader import TrainLoader
from pipeline.data.ray_data import start_ray
from pipeline.data.sampler import Sampler
from pipeline.data.sources.base import open_source

BATCH, IMAGES_PER_TASK = 64, 128


def ours(dataset: ImageDataset, images: int, tasks: int) -> float:
    """Through Ray Data to this process, which copies every batch out.

    The clock starts with the first batch: just then the first task of every shard is cut, and those images are not counted.
    """
    sampler = Sampler(dataset.spans, dataset.training_ids(0), seed=0, global_batch=BATCH, num_shards=4, images_per_task=IMAGES_PER_TASK)
    batches = TrainLoader(dataset, sampler, LARGE, 0, images // BATCH + sampler.steps_per_group).batches(tasks=tasks)
    next(batches)
    begin = time.perf_counter()
    steps = 1 + sum(1 for _ in batches)
    return (steps - sampler.steps_per_group) * BATCH / (time.perf_counter() - begin)


def first_batch(dataset: ImageDataset, tasks: int, times: int = 5) -> list[float]:
    """Seconds from the call to the first batch, the workers of the tasks warm."""
    sampler = Sampler(dataset.spans, dataset.training_ids(0), seed=0, global_batch=BATCH, num_shards=4, images_per_task=IMAGES_PER_TASK)
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        batches: Any = TrainLoader(dataset, sampler, LARGE, 0, 2).batches(tasks=tasks)
        next(batches)
        found.append(time.perf_counter() - begin)
        batches.close()
    return found


class Images(Dataset[Any]):
    """What the DataLoader's workers do for one image: decode it and make its eight views."""

    def __init__(self, images: list[bytes]) -> None:
        self.images, self.engine = images, original(LARGE)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Any:
        views: Any = self.engine([self.images[place]])
        return views[0]


def data_loader(images: list[bytes], count: int, workers: int) -> float:
    """torch's DataLoader with the original transform; the first batch starts the clock."""
    many = [images[i % len(images)] for i in range(count + BATCH)]
    loader = DataLoader(Images(many), BATCH, num_workers=workers, worker_init_fn=lambda _: torch.set_num_threads(1))
    batches = iter(loader)
    next(batches)
    begin, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch[0])
    return seen / (time.perf_counter() - begin)


def _bare(images: list[bytes], count: int, barrier: Any, done: Any) -> None:
    torch.set_num_threads(1)
    rows = [Sample(i, images[i % len(images)], -1, "") for i in range(IMAGES_PER_TASK)]
    make_crops(rows[:8], 0, LARGE, 0, 8)
    barrier.wait()
    begin = time.perf_counter()
    for epoch in range(max(1, count // IMAGES_PER_TASK)):
        make_crops(rows, epoch, LARGE, 0, IMAGES_PER_TASK)
    done.put(max(1, count // IMAGES_PER_TASK) * IMAGES_PER_TASK / (time.perf_counter() - begin))


def bare_loop(images: list[bytes], count: int, processes: int) -> float:
    """The engine alone in several processes at once."""
    context = multiprocessing.get_context("spawn")
    barrier, done = context.Barrier(processes), context.Queue()
    running = [context.Process(target=_bare, args=(images, count // processes, barrier, done)) for _ in range(processes)]
    for process in running:
        process.start()
    rate = sum(done.get() for _ in running)
    for process in running:
        process.join()
    return float(rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096, help="images per measurement; the DataLoader gets an eighth")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    images = photographs(None, 19)
    with tempfile.TemporaryDirectory() as folder:
        many = [images[i % len(images)] for i in range(options.images)]
        pq.write_table(pa.table({"image": many}), Path(folder) / "a.parquet", row_group_size=IMAGES_PER_TASK)
        dataset = open_source(DataConfig(path=folder))
        begin = time.perf_counter()
        start_ray()
        started = time.perf_counter() - begin
        (cold,) = first_batch(dataset, cores, 1)
        print(f"first batch {started + cold:.1f} s after Ray's start began, {cold:.1f} s after its end", flush=True)
        ours(dataset, IMAGES_PER_TASK * cores * 2, cores)  # warm
        rounds = []
        for _ in range(options.rounds):
            ray_data, bare = ours(dataset, options.images, cores), bare_loop(images, options.images, cores)
            loader = data_loader(images, options.images // 8, cores)
            rounds.append((ray_data, bare, loader))
            print(
                f"{cores} cores: Ray Data to the loop {ray_data:.0f} images/s, bare loop {bare:.0f}, DataLoader {loader:.0f}: "
                f"{ray_data / loader:.2f} of the DataLoader, {ray_data / bare:.2f} of the bare loop",
                flush=True,
            )
        of_loader, of_bare = (statistics.median(r[0] / r[i] for r in rounds) for i in (2, 1))
        print(f"medians: {of_loader:.2f} of the DataLoader, {of_bare:.2f} of the bare loop")
        times = first_batch(dataset, cores)
        print(f"first batch, workers warm: median {np.median(times):.2f} s of {', '.join(f'{t:.2f}' for t in times)}")


if __name__ == "__main__":
    main()
