"""The stream of training batches: Ray Data tasks cut windows of images, this process slices them into batches."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.parts.views import ViewsConfig
from pipeline.ingest.decode import evaluation_crop
from pipeline.ingest.manifest import Manifest
from pipeline.ingest.photometric import Normalisation
from pipeline.ingest.plan import Plan
from pipeline.ingest.ray_data import TASK_NICENESS, ahead, default_tasks, run
from pipeline.ingest.ray_data import start_ray as start_ray  # callers of the stream find it here
from pipeline.ingest.window import block_bytes, cut_images, decode_all, finish_columns

PASS_BYTES = 128 * 2**20  # views of one Ray Data execution, or one group of windows if that is more; starting one costs 0.1 to 0.5 s
EVALUATION_BYTES = 16 * 2**20  # pixels one evaluation task returns
ALONE_S = 3.0  # an evaluation that this process can decode in so many s is not worth the start of tasks
HEAD_START_S = 5.0  # of the trainer's own first batch and step over the tasks, at most
OWN_IMAGES = 256  # the trainer cuts itself where they are more than a window's: of small windows one is over before the tasks deliver
OWN_PART = 64  # images the trainer cuts itself before it looks whether the tasks have delivered; twelve megapixels each: 4 s


@dataclass(frozen=True)
class BadSlot:
    """An image that could not be decoded; another image of its window took its place."""

    id: int
    path: str
    reason: str


@dataclass
class Batch:
    """One rank's part of a global batch.

    `crops[group]` is `(B, V, size, size, 3)` uint8, or `(B, V, 3, size, size)` float32 where the tasks have finished it,
    and `tables[group]` `(B, V, len(COLUMNS))` float32. `ids` and `labels` `(B,)` int64 are those of the images shown: in a
    bad slot, those of its substitute (if its whole window is bad, zeros with the planned id). `step` counts from the start
    of the run.
    """

    crops: dict[str, Tensor]
    tables: dict[str, np.ndarray]
    ids: Tensor
    labels: Tensor
    epoch: int
    step: int
    bad: list[BadSlot]


@dataclass
class EvaluationImages:
    """Centre crops `(N, size, size, 3)` uint8, `labels` and `ids` `(N,)` int64, without the `bad` ones."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    bad: list[BadSlot]


# ---------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Stream:
    """What the batches of a run come from; it needs no network.

    `earlier` steps, those of a continued run's earlier phases, come before the first one. With `finish` the tasks finish the
    views too, with this mean and standard deviation; None = left to `finish_views`.
    """

    manifest: Manifest
    plan: Plan
    views: ViewsConfig
    seed: int
    total_steps: int
    earlier: int = 0
    finish: Normalisation | None = None

    def batches(self, start_step: int = 0, *, rank: int = 0, world_size: int = 1, tasks: int | None = None) -> Generator[Batch]:
        """One rank's batches of steps `start_step` to `total_steps - 1`, the same whether or not the run was interrupted.

        The tasks need seconds, and all lanes of a window, until they deliver; meanwhile this process cuts the first batches itself,
        the same as theirs. They begin behind the first step, so that where cores are short a run steps before they take some, or
        `HEAD_START_S` after it was asked for.

        Args:
            tasks: windows cut at the same time; None = one per CPU, in a cluster as many as it has room for.

        Raises:
            RuntimeError: Ray Data returned other windows than planned.
        """
        import ray

        items = _Items(self.plan, start_step + self.earlier, self.total_steps + self.earlier, rank, world_size)
        if items.last == items.first:
            return
        shared = ray.put((self.manifest.served(self.plan, items.start_step), self.plan))
        cut = partial(_cut_item, shared=shared, items=items, views=self.views, seed=self.seed, finish=self.finish)
        workers = tasks or default_tasks()
        block = block_bytes(self.views, self.plan.chunks_per_window * self.plan.chunk, finished=self.finish is not None)
        per_pass = items.lanes * max(1, PASS_BYTES // (items.lanes * block))
        stepped, delivered = threading.Event(), threading.Event()

        def passes() -> Iterator[tuple[int, Iterator[dict[str, np.ndarray]]]]:
            stepped.wait(HEAD_START_S)
            for first in range(items.first, items.last, per_pass):
                last = min(first + per_pass, items.last)
                yield last - first, announced(run(cut, first, last, workers), items.lanes, delivered)

        # the next pass begins when the trainer has begun the last group of this one, and so early that its first tasks run before
        # this one's last are done: an execution takes as long to start as a core takes to cut one or two windows
        overlap = 3 * (workers or items.lanes)
        step = items.start_step
        with contextlib.closing(ahead(passes(), waiting=items.lanes - 1, overlap=overlap)) as blocks:
            try:
                for batch in self._first_batches(items, delivered):
                    yield batch
                    step += 1
                    stepped.set()
            finally:
                stepped.set()
            yield from batches_of(blocks, self.manifest, self.plan, self.views, items, step)

    def _first_batches(self, items: _Items, delivered: threading.Event) -> Iterator[Batch]:
        """Batches cut in this process, until the tasks have `delivered`, and at most those of one window or `OWN_IMAGES`."""
        if self.finish is not None or not self.manifest.rereadable:
            return
        plan = copy.copy(self.plan)  # its order of the images goes with it
        names = [name for name, group in self.views.items() if group.count]
        steps = max(plan.chunks_per_window, OWN_IMAGES // (items.lanes * plan.chunk))
        for step in range(items.start_step, min(items.start_step + steps, items.total_steps)):
            epoch, within = divmod(step, plan.steps_per_epoch)
            ids = plan.batch(epoch, within).reshape(plan.lanes, plan.chunk)[items.rank :: items.world_size].reshape(-1)
            parts = []
            for some in np.split(ids, range(OWN_PART, len(ids), OWN_PART)):
                if delivered.is_set():
                    return
                parts.append(cut_images(self.manifest.read(some), epoch, self.views, self.seed, len(some)))
            batch = _batch(parts, names, self.manifest, epoch, step)
            if batch.bad:
                return  # what takes their places comes from the whole window
            yield batch


def announced(execution: Iterator[Any], count: int, delivered: threading.Event) -> Iterator[Any]:
    """Tells when so many blocks have come, or when no more will."""
    try:
        for number, block in enumerate(execution, start=1):
            if number == count:
                delivered.set()
            yield block
    finally:
        delivered.set()


class _Items:
    """Number k of the windows of one rank: epoch by epoch, group by group, lane by lane."""

    def __init__(self, plan: Plan, start_step: int, total_steps: int, rank: int, world_size: int) -> None:
        if plan.lanes % world_size:
            raise ValueError(f"{plan.lanes} lanes cannot be shared by {world_size} workers")
        self.rank, self.world_size = rank, world_size
        self.lanes = plan.lanes // world_size
        self.groups = plan.groups
        self.start_step, self.total_steps = start_step, total_steps

        def place(step: int) -> int:
            epoch, within = divmod(step, plan.steps_per_epoch)
            return epoch * plan.groups + within // plan.chunks_per_window

        self.first = place(start_step) * self.lanes
        self.last = (place(total_steps - 1) + 1) * self.lanes if total_steps > start_step else self.first

    def at(self, number: int) -> tuple[int, int, int]:
        """Epoch, group within the epoch, lane."""
        place, lane = divmod(number, self.lanes)
        return *divmod(place, self.groups), self.rank + self.world_size * lane


def batches_of(
    blocks: Iterable[dict[str, np.ndarray]], manifest: Manifest, plan: Plan, views: ViewsConfig, items: _Items, first_step: int
) -> Generator[Batch]:
    """Slice blocks, one for each lane of a rank in turn, into the batches from `first_step` on; refuses blocks that are not planned."""
    names = [name for name, group in views.items() if group.count]
    held: list[dict[str, np.ndarray]] = []
    for number, block in enumerate(blocks, start=items.first):
        epoch, group, lane = items.at(number)
        first = _first_slot(plan, group, lane)
        if len(block["slot"]) != plan.chunks(group) * plan.chunk or block["epoch"][0] != epoch or block["slot"][0] != first:
            got = f"epoch {block['epoch'][:1]}, slot {block['slot'][:1]}, {len(block['slot'])} rows"
            raise RuntimeError(f"the stream is out of order: planned epoch {epoch}, slot {first}, got {got}; please report this")
        held.append(block)
        if len(held) < items.lanes:
            continue
        for chunk in range(plan.chunks(group)):
            step = epoch * plan.steps_per_epoch + group * plan.chunks_per_window + chunk
            if first_step <= step < items.total_steps:
                rows = slice(chunk * plan.chunk, (chunk + 1) * plan.chunk)
                yield _batch([{key: column[rows] for key, column in b.items()} for b in held], names, manifest, epoch, step)
        held = []  # frees the group's blocks before the next is waited for


def _first_slot(plan: Plan, group: int, lane: int) -> int:
    return (group * plan.lanes + lane) * plan.chunks_per_window * plan.chunk


def _batch(parts: list[dict[str, np.ndarray]], names: list[str], manifest: Manifest, epoch: int, step: int) -> Batch:
    def column(key: str) -> np.ndarray:
        return np.concatenate([part[key] for part in parts])  # copies out of shared memory

    reasons, planned = column("reason"), column("planned")
    bad = [BadSlot(int(planned[i]), manifest.path(int(planned[i])), str(reasons[i])) for i in np.flatnonzero(reasons != "")]
    return Batch(
        crops={name: _joined([part[f"crops/{name}"] for part in parts]) for name in names},
        tables={name: column(f"table/{name}") for name in names},
        ids=torch.from_numpy(column("id")),
        labels=torch.from_numpy(column("label")),
        epoch=epoch,
        step=step,
        bad=bad,
    )


def _joined(parts: list[np.ndarray]) -> Tensor:
    """Copied out of shared memory, and where there is a GPU into pinned memory, from which it is fetched without waiting."""
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    stack = torch.empty(shape, dtype=torch.uint8 if parts[0].dtype == np.uint8 else torch.float32, pin_memory=torch.cuda.is_available())
    np.concatenate(parts, out=stack.numpy())
    return stack


# ---------------------------------------------------------------------------- inside a task


@lru_cache(maxsize=1)
def _get(reference: Any) -> Any:
    """A shared object, once per process."""
    import ray

    torch.set_num_threads(1)  # the tasks themselves are the parallelism
    os.nice(max(0, TASK_NICENESS - os.nice(0)))  # where cores are short, trainers go first
    return ray.get(reference)


def _cut_item(
    item: dict[str, np.ndarray], shared: Any, items: _Items, views: ViewsConfig, seed: int, finish: Normalisation | None = None
) -> dict[str, np.ndarray]:
    """Cut one window: one item in, one block of `chunks * chunk` rows out."""
    manifest, plan = _get(shared)
    epoch, group, lane = items.at(int(item["id"][0]))
    ids = plan.window(epoch, group, lane)
    columns = cut_images(manifest.read(ids), epoch, views, seed, plan.chunk)
    if finish is not None:
        finish_columns(columns, views, finish)
    columns["epoch"] = np.full(len(ids), epoch)
    columns["slot"] = _first_slot(plan, group, lane) + np.arange(len(ids))
    return columns


# ---------------------------------------------------------------------------- evaluation


def evaluation_images(manifest: Manifest, ids: np.ndarray, size: int, tasks: int | None = None) -> EvaluationImages:
    """Decode and centre-crop images through Ray Data, in the order of `ids`; bad ones are left out and reported.

    As many as take no longer than tasks take to start are decoded here, part by part; the tasks do the rest.
    """
    ids = np.asarray(ids, dtype=np.int64)
    images = np.empty((len(ids), size, size, 3), np.uint8)
    reasons = np.empty(len(ids), object)
    first = 0
    for block in _evaluation_blocks(manifest, ids, size, tasks):
        last = first + len(block["reason"])
        images[first:last], reasons[first:last] = block["image"], block["reason"]
        first = last
    good = reasons == ""
    return EvaluationImages(
        images=torch.from_numpy(images if good.all() else images[good]),
        labels=torch.from_numpy(manifest.labels[ids[good]]),
        ids=torch.from_numpy(ids[good]),
        bad=[BadSlot(int(i), manifest.path(int(i)), str(reason)) for i, reason in zip(ids[~good], reasons[~good], strict=True)],
    )


def _evaluation_blocks(manifest: Manifest, ids: np.ndarray, size: int, tasks: int | None) -> Iterator[dict[str, np.ndarray]]:
    """Blocks in the order of `ids`: decoded here while all of them would take `ALONE_S` at this rate, then by tasks."""
    begin, done = time.monotonic(), 0
    while done < len(ids):
        spent = time.monotonic() - begin
        if spent > ALONE_S / 6 and spent * len(ids) > ALONE_S * done:  # the first ones pay for imports and open files
            break
        yield _evaluation_block(manifest, ids[done : done + OWN_PART], size)
        done += OWN_PART
    rest = ids[done:]
    if len(rest):
        import ray

        start_ray()
        window = int(np.clip(EVALUATION_BYTES // (3 * size * size), 1, 512))
        crop = partial(_evaluate_item, shared=ray.put((manifest, rest)), size=size, window=window)
        yield from run(crop, 0, -(-len(rest) // window), tasks or default_tasks())


def _evaluate_item(item: dict[str, np.ndarray], shared: Any, size: int, window: int) -> dict[str, np.ndarray]:
    manifest, ids = _get(shared)
    first = int(item["id"][0]) * window
    return _evaluation_block(manifest, ids[first : first + window], size)


def _evaluation_block(manifest: Manifest, ids: np.ndarray, size: int) -> dict[str, np.ndarray]:
    images, reasons = decode_all(manifest.read(ids))
    crops = np.stack([evaluation_crop(image, size) for image in images])
    return {"image": crops, "reason": np.array(reasons, dtype=object)}
