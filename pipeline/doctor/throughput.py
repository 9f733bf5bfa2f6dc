"""Timed dry run: the time of one image on this machine, from its bytes to its gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.data.image_dataset import Sample
from pipeline.machine import Check, available_cores, choose_device, set_precision, thread_count
from pipeline.resolve import resolve

BUDGET_S = 2.0  # for the timed steps, without the first one, which builds kernels


@dataclass(frozen=True)
class Cost:
    """Measured times, both wall times in s per image."""

    train_s: float  # augmentation on the device, forward, backward
    cut_s: float  # decoding and cropping on one core
    threads: int  # of the training process
    device: str  # "cpu" or "cuda"
    machine: str  # name of the GPU, or "CPU"
    steps: int  # timed steps
    batch: int  # images of each step


def measure(config: RunConfig, samples: Sequence[Sample], num_images: int | None) -> Cost:
    """Make crops of real images, and measure steps of the method on them.

    Args:
        samples: some images that can be decoded.
        num_images: number of training images; None = a source without end.

    Raises:
        ConfigError: the batch does not fit the data or the method.
    """
    import numpy as np
    import torch

    from methods.parts.contract import Progress
    from pipeline.build import build_method
    from pipeline.data.augment import augment_views
    from pipeline.data.crop_task import augment_columns, make_crops
    from pipeline.data.loader import Batch

    facts = resolve(config, num_images).facts
    device, precision = choose_device(config)
    set_precision(device)  # as in the run
    method = build_method(config, facts).to(device).train()
    pixels = sum(group.count * group.size**2 for group in config.views.values())
    most = (256, 3e7) if device.type == "cuda" else (32, 6e5)  # images and pixels of a step, which takes a second or two
    size = max(4, min(most[0], int(most[1] / pixels), facts.global_batch_size // config.train.accumulation_steps))
    before, threads = torch.get_num_threads(), thread_count(config)  # as in the run
    try:
        torch.set_num_threads(1)  # as in a Ray Data task
        some = [samples[i % len(samples)] for i in range(size)]
        make_crops(some[:1], 0, config.views, 0, 1)  # warm-up: imports
        begin = time.thread_time()  # CPU time, which does not depend on other processes
        columns = make_crops(some, 0, config.views, 0, 1)
        if config.data.augment_on == "tasks":
            augment_columns(columns, config.views, (config.data.mean, config.data.std))
        cut_s = (time.thread_time() - begin) / size
        torch.set_num_threads(threads)
        names = [name for name, group in config.views.items() if group.count]
        batch = Batch(
            crops={name: torch.from_numpy(columns[f"crops/{name}"]) for name in names},
            tables={name: columns[f"table/{name}"] for name in names},
            ids=torch.from_numpy(np.arange(size)),
            labels=torch.full((size,), -1),
            epoch=0,
            step=0,
            bad=[],
        )
        # in the second epoch, because some methods have no loss in the first
        progress = Progress(step=facts.steps_per_epoch, total_steps=facts.total_steps, steps_per_epoch=facts.steps_per_epoch)

        def step() -> float:
            begin = time.perf_counter()
            views = augment_views(batch, config.views, config.data.mean, config.data.std, device)
            with torch.autocast(device.type, dtype=precision, enabled=precision is not torch.float32):
                loss = method(views, progress, method.draw_masks(views, progress)).loss
            if loss is not None:
                loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        step()
        end, times = time.perf_counter() + BUDGET_S, [step()]
        while time.perf_counter() + min(times) < end:
            times.append(step())
    finally:
        torch.set_num_threads(before)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return Cost(min(times) / size, cut_s, threads, device.type, machine, len(times), size)


def image_seconds(cost: Cost, cores: float, workers: int = 1) -> float:
    """Return the wall time of one image in a run, s: the slower of training and cropping; on a CPU both share the cores."""
    train, cut = cost.train_s / workers, cost.cut_s / max(cores, 1)
    if cost.device == "cuda":
        return max(train, cut)
    return max(train, (cost.threads * cost.train_s + cost.cut_s) / max(cores, 1))


def report(config: RunConfig, dataset: Any, ids: Sequence[int]) -> Iterable[Check]:
    """Yield a row with the images/s and the hours of the whole run.

    Args:
        ids: images that can be decoded.
    """
    from pipeline.data.ray_data import joins_cluster
    from pipeline.doctor import cluster

    num_images = dataset.num_training(config.data.held_out)
    facts = resolve(config, num_images).facts
    samples = dataset.read(list(ids)[:32])
    cost, cores = cluster.run_on_gpu(measure, config, samples, num_images) if joins_cluster() else (None, available_cores())
    place = "on a GPU node" if cost else "on this machine"
    cost = cost or measure(config, samples, num_images)
    workers = max(1, config.train.worker_range[1])
    seconds = image_seconds(cost, cores, workers)
    hours = duration(facts.total_steps * facts.global_batch_size * seconds)
    many = f" with {workers} workers" if workers > 1 else ""
    found = (
        f"{cost.steps} steps of {cost.batch} images {place} ({cost.machine}): about {1 / seconds:,.0f} images/s{many}; "
        f"{facts.total_steps:,} steps of {facts.global_batch_size:,} in about {hours}, optimizer and evaluation aside"
    )
    remedy = ""
    if cost.device == "cuda" and cost.cut_s / max(cores, 1) > cost.train_s / workers:
        remedy = "cutting views is slower than the GPUs: use more cores"
    elif cost.device == "cpu" and joins_cluster():
        remedy = "no GPU of the cluster is up and free: ask again while a job has brought some up, if the run is to use them"
    yield Check("timed dry run", "warn" if remedy else "ok", found, remedy)


def loader(config: RunConfig, num_images: int | None) -> Check:
    """Return a row about the images of a task and the object store."""
    from pipeline.data.crop_task import block_bytes
    from pipeline.data.ray_data import object_store_bytes

    images = resolve(config, num_images).window
    block = block_bytes(config.views, images, augmented=config.data.augment_on == "tasks")
    group, buffer = config.data.num_shards * block, config.data.buffer_bytes or object_store_bytes()
    workers = max(1, config.train.worker_range[1])
    why = "data.images_per_task" if config.data.images_per_task else "so that the cost of a task hardly counts"
    found = (
        f"{images:,} images a task ({why}), {block / 1e6:.1f} MB; one task per CPU, each with one thread; {buffer / 1e6:,.0f} MB are for "
        f"views cut ahead (data.buffer_bytes); threads of training: {thread_count(config, workers)}"
    )
    few = 3 * group > buffer  # one group with the workers, two in flight
    remedy = (
        f"a task of each shard is {group / 1e6:,.0f} MB: use a smaller data.images_per_task, or a larger data.buffer_bytes" if few else ""
    )
    return Check("loader", "warn" if few else "ok", found, remedy)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    if seconds < 90 * 60:
        return f"{math.ceil(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"
