"""Training batches: Ray Data tasks decode images and make their crops, and a thread of each worker forms batches ahead of the loop."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from methods.parts.views import ViewsConfig
from pipeline.data.augment import Normalisation
from pipeline.data.crop_task import augment_columns, block_bytes, decode_all, make_crops
from pipeline.data.decode import evaluation_crop
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.prefetch import CLOSE_S, DeviceCopies, Prefetcher, in_background
from pipeline.data.ray_data import blocks, execution, start_ray
from pipeline.data.sampler import Sampler

if TYPE_CHECKING:
    from ray.data import DataIterator

T = TypeVar("T")
EXECUTION_STEPS = 1000  # least steps of one Ray Data execution
FIRST_STEPS = 100  # least steps of the first one if it would have more than FIRST_TASKS tasks: the first batch waits until it is built
FIRST_TASKS = 512
HAND_OVER_STEPS = 50  # an execution starts this many steps before the last one ends: its first blocks take seconds
BUILD_STEPS = 150  # an execution is built this many steps before the last one ends
PREFETCH_BATCHES = 2  # batches that wait for the loop
EVALUATION_BYTES = 16 * 2**20  # pixels that one evaluation task returns
LOCAL_DECODE_S = 3.0  # images that this process decodes within this time are not sent to tasks, which take as long to start
LOCAL_BLOCK = 64  # images decoded in this process before the time is checked


@dataclass(frozen=True)
class DecodeFailure:
    """An image that could not be decoded; another image of its task is shown instead."""

    id: int
    path: str
    reason: str


@dataclass
class Batch:
    """One rank's part of a global batch.

    `crops[group]` is `(B, V, size, size, 3)` uint8, or `(B, V, 3, size, size)` float32 if the tasks augment.
    `tables[group]` is `(B, V, len(COLUMNS))` float32. `ids` and `labels` `(B,)` int64 are those of the images shown. A bad
    image is replaced by another one of its task; if all are bad, its pixels are zeros and its id is kept. `step` counts
    from the start of the run. Rows are in order of shards, unless `TrainLoader.batches` makes micro-batches.
    """

    crops: dict[str, Tensor]
    tables: dict[str, np.ndarray]
    ids: Tensor
    labels: Tensor
    epoch: int
    step: int
    bad: list[DecodeFailure]
    host_ids: Tensor = None  # type: ignore[assignment]  # `ids` on the CPU, where `ids` are on a GPU

    def __post_init__(self) -> None:
        self.host_ids = self.ids if self.host_ids is None else self.host_ids

    def tensors(self) -> list[Tensor]:
        """Return the tensors that a device needs: crops, ids and labels."""
        return [*self.crops.values(), self.ids, self.labels]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Batch:
        """Return this batch with other tensors, in the order of `tensors`."""
        *crops, ids, labels = tensors
        return replace(self, crops=dict(zip(self.crops, crops, strict=True)), ids=ids, labels=labels)

    def split(self, count: int) -> list[Batch]:
        """Return `count` micro-batches, which are views of this batch. It must have been made for as many."""
        size = len(self.ids) // count
        pieces = [slice(i * size, (i + 1) * size) for i in range(count)]
        tables = [{name: table[piece] for name, table in self.tables.items()} for piece in pieces]
        parts = [self.with_tensors([x[p] for x in self.tensors()]) for p in pieces]
        return [replace(x, tables=t, host_ids=self.host_ids[p]) for x, t, p in zip(parts, tables, pieces, strict=True)]


@dataclass
class EvaluationImages:
    """Centre crops `(N, size, size, 3)` uint8, `labels` and `ids` `(N,)` int64, without the `bad` ones."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    bad: list[DecodeFailure]


# ---------------------------------------------------------------------------- training


def identity(value: T) -> T:
    """Return the value: the broadcast of a single worker."""
    return value


def execution_bytes(buffer_bytes: int, group_bytes: int) -> int:
    """Return the bytes of blocks that one execution may hold in the object stores.

    The workers hold one group of tasks. The rest is halved, because two executions overlap for a moment. The least is two groups.
    """
    return max(2 * group_bytes, (buffer_bytes - group_bytes) // 2)


@dataclass(frozen=True)
class TrainLoader:
    """The training batches of a run.

    Attributes:
        step_offset: steps of the earlier phases of a continued run.
        normalisation: mean and standard deviation if the tasks augment the views; None = `augment_views` does it on the device.
        buffer_bytes: bytes of views in Ray's object stores; None = as many as these hold. See `execution_bytes`.
        execution_steps: least steps of one Ray Data execution.
    """

    dataset: ImageDataset
    sampler: Sampler
    views: ViewsConfig
    seed: int
    total_steps: int
    step_offset: int = 0
    normalisation: Normalisation | None = None
    buffer_bytes: int | None = None
    execution_steps: int = EXECUTION_STEPS

    def batches(
        self,
        start_step: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        tasks: int | None = None,
        broadcast: Callable[[Any], Any] = identity,
        micro_batches: int = 1,
        device: torch.device | None = None,
    ) -> Generator[Batch]:
        """Yield one rank's batches of steps `start_step` to `total_steps - 1`. They do not depend on interruptions of the run.

        Rank 0 builds the executions that all ranks read. `PREFETCH_BATCHES` batches wait for the loop, on the device if it is a GPU.

        Args:
            tasks: tasks that run at the same time, for all ranks together; None = as many as the resources allow.
            broadcast: collective function that takes a small value and returns rank 0's. All ranks call it before the same steps.
            micro_batches: number of micro-batches for `Batch.split`. Micro-batch i gets the rows i, i + micro_batches,
                i + 2 * micro_batches ... of the order of shards, so that each holds images of every shard.
            device: where crops, ids and labels are copied; None = the CPU.

        Raises:
            RuntimeError: Ray Data returned a block of another task than expected.
        """
        import ray

        if self.sampler.num_shards % world_size:
            raise ValueError(f"{self.sampler.num_shards} shards cannot be shared by {world_size} workers")
        if self.sampler.shard_batch % micro_batches:
            raise ValueError(f"{micro_batches} micro-batches cannot share the {self.sampler.shard_batch} images of a shard")
        parts = list(self.executions(start_step + self.step_offset, self.total_steps + self.step_offset))
        if not parts:
            return
        copies = DeviceCopies(device) if device is not None and device.type == "cuda" else None
        slices = partial(self._slices, shards=range(rank, self.sampler.num_shards, world_size), micro_batches=micro_batches, copies=copies)
        build = self._builder(parts[0][0], world_size, tasks) if rank == 0 else None
        building = in_background(partial(build, parts[0])) if build else None
        with contextlib.ExitStack() as stack:
            # if the thread outlived the run, its `ray.put` would start Ray again
            stack.callback(lambda: wait([building] if building else [], timeout=CLOSE_S))
            references: list[Any] = []  # the iterators are deleted with rank 0's last reference to them

            def start(part: tuple[int, int]) -> Prefetcher[CopiedBatch]:
                references[:] = broadcast(building.result() if building else None)
                prefetcher = Prefetcher(partial(slices, ray.get(references[0])[rank], part), PREFETCH_BATCHES)
                stack.callback(prefetcher.close)
                return prefetcher

            next_prefetcher = start(parts[0])
            for part, next_part in itertools.zip_longest(parts, parts[1:]):
                prefetcher = next_prefetcher
                for batch, arrived in prefetcher:
                    if next_part and build and batch.step == max(part[0], part[1] - BUILD_STEPS):
                        building = in_background(partial(build, next_part))
                    if next_part and batch.step == max(part[0], part[1] - HAND_OVER_STEPS):
                        next_prefetcher = start(next_part)
                    if copies and arrived:
                        copies.receive(batch.tensors(), arrived)
                    yield batch

    def executions(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the first step of every execution, and the step after its last, for the steps `first` to `last - 1`."""
        sampler, length = self.sampler, self.execution_steps
        if len(sampler.groups_between(first, first + length)) * sampler.num_shards > FIRST_TASKS:
            length = min(length, FIRST_STEPS)
        while first < last:
            epoch, group = sampler.groups_between(first + length - 1, first + length)[0]
            end = min(sampler.first_step(epoch, group) + sampler.steps_in(group), last)
            yield first, end
            first, length = end, self.execution_steps

    def _builder(self, first: int, world_size: int, tasks: int | None) -> Callable[[tuple[int, int]], list[Any]]:
        """Return a function that builds the execution of some steps, on rank 0, and returns a reference to the iterators of all ranks."""
        import ray

        sampler = self.sampler
        cut = self.task(ray.put((self.dataset.bind_to_run(sampler, first), sampler)))
        group_bytes = sampler.num_shards * block_bytes(
            self.views, sampler.steps_per_group * sampler.shard_batch, augmented=self.normalisation is not None
        )
        store = self.buffer_bytes or int(ray.cluster_resources().get("object_store_memory", 0))

        def build(part: tuple[int, int]) -> list[Any]:
            items = [
                {"epoch": e, "group": g, "shard": shard} for e, g in sampler.groups_between(*part) for shard in range(sampler.num_shards)
            ]
            return [ray.put(execution(cut, items, world_size, tasks=tasks, buffer_bytes=execution_bytes(store, group_bytes)))]

        return build

    def task(self, shared: Any) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        """Return the function that a Ray Data task runs; `shared` is a reference to the dataset and the sampler."""
        return partial(_crop_item, shared=shared, views=self.views, seed=self.seed, normalisation=self.normalisation)

    def _slices(
        self, iterator: DataIterator, part: tuple[int, int], shards: range, micro_batches: int, copies: DeviceCopies | None
    ) -> Generator[CopiedBatch]:
        with contextlib.closing(blocks(iterator, prefetch=len(shards))) as own_blocks:
            for batch in self.sliced(own_blocks, part, shards, micro_batches, pin=copies is not None):
                if copies is None:
                    yield batch, None
                else:
                    sent, arrived = copies.send(batch.tensors())
                    yield batch.with_tensors(sent), arrived

    def sliced(
        self, blocks: Iterator[dict[str, np.ndarray]], part: tuple[int, int], shards: range, micro_batches: int = 1, pin: bool = False
    ) -> Generator[Batch]:
        """Slice blocks, one of each of a rank's shards in turn, into the batches of the steps `part[0]` to `part[1] - 1`.

        Raises:
            RuntimeError: a block is not the expected one.
        """
        sampler = self.sampler
        names = [name for name, group in self.views.items() if group.count]
        for epoch, group in sampler.groups_between(*part):
            group_blocks = [self._checked(next(blocks, None), epoch, group, shard) for shard in shards]
            for i in range(sampler.steps_in(group)):
                step = sampler.first_step(epoch, group) + i
                if part[0] <= step < part[1]:
                    rows = slice(i * sampler.shard_batch, (i + 1) * sampler.shard_batch)
                    parts = [{key: column[rows] for key, column in block.items()} for block in group_blocks]
                    yield _collated(parts, names, self.dataset, epoch, step, micro_batches, pin)
            group_blocks = parts = []  # frees the blocks before the next ones are awaited
        if next(blocks, None) is not None:  # Ray's threads end when the end of the iterator has been asked for
            raise RuntimeError("the loader is out of order: it has more blocks than expected; please report this")

    def _checked(self, block: dict[str, np.ndarray] | None, epoch: int, group: int, shard: int) -> dict[str, np.ndarray]:
        rows, first = self.sampler.steps_in(group) * self.sampler.shard_batch, self.sampler.first_slot(group, shard)
        if block and len(block["slot"]) == rows and block["epoch"][0] == epoch and block["slot"][0] == first:
            return block
        got = f"epoch {block['epoch'][:1]}, slot {block['slot'][:1]}, {len(block['slot'])} rows" if block else "no more"
        raise RuntimeError(f"the loader is out of order: expected epoch {epoch}, slot {first}, got {got}; please report this")


CopiedBatch = tuple[Batch, "torch.cuda.Event | None"]


def _collated(
    parts: list[dict[str, np.ndarray]], names: list[str], dataset: ImageDataset, epoch: int, step: int, micro_batches: int, pin: bool
) -> Batch:
    """Return one batch from the images of every shard, copied out of shared memory, into pinned memory if `pin`."""

    def column(key: str) -> np.ndarray:
        return _ordered([part[key] for part in parts], micro_batches)

    def tensor(key: str) -> Tensor:
        columns = [part[key] for part in parts]
        shape = (sum(map(len, columns)), *columns[0].shape[1:])
        out = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, columns[0].dtype)).dtype, pin_memory=pin)
        _ordered(columns, micro_batches, out.numpy())
        return out

    reasons, planned = column("reason"), column("planned")
    bad = [DecodeFailure(int(planned[i]), dataset.path(int(planned[i])), str(reasons[i])) for i in np.flatnonzero(reasons != "")]
    return Batch(
        crops={name: tensor(f"crops/{name}") for name in names},
        tables={name: column(f"table/{name}") for name in names},
        ids=tensor("id"),
        labels=tensor("label"),
        epoch=epoch,
        step=step,
        bad=bad,
    )


def _ordered(parts: list[np.ndarray], micro_batches: int, out: np.ndarray | None = None) -> np.ndarray:
    """Return the rows of all shards in order of micro-batches: row j of a shard belongs to micro-batch j mod `micro_batches`."""
    rest = parts[0].shape[1:]
    by_micro_batch = [part.reshape(-1, micro_batches, *rest).swapaxes(0, 1) for part in parts]
    shape = (micro_batches, len(parts), len(parts[0]) // micro_batches, *rest)
    return np.stack(by_micro_batch, axis=1, out=None if out is None else out.reshape(shape)).reshape(-1, *rest)


# ---------------------------------------------------------------------------- inside a task


@lru_cache(maxsize=1)
def _get(reference: Any) -> Any:
    """Return a shared object, which is fetched once per process."""
    import ray

    torch.set_num_threads(1)  # tasks run in parallel, one on each core
    return ray.get(reference)


def _crop_item(
    item: dict[str, np.ndarray], shared: Any, views: ViewsConfig, seed: int, normalisation: Normalisation | None = None
) -> dict[str, np.ndarray]:
    """Make the crops of one task: one item in, one block of `steps_in(group) * shard_batch` rows out."""
    dataset, sampler = _get(shared)
    epoch, group, shard = (int(item[key][0]) for key in ("epoch", "group", "shard"))
    ids = sampler.task_ids(epoch, group, shard)
    columns = make_crops(dataset.read(ids), epoch, views, seed, sampler.shard_batch)
    if normalisation is not None:
        augment_columns(columns, views, normalisation)
    columns["epoch"] = np.full(len(ids), epoch)
    columns["slot"] = sampler.first_slot(group, shard) + np.arange(len(ids))
    return columns


# ---------------------------------------------------------------------------- evaluation


def evaluation_images(dataset: ImageDataset, ids: np.ndarray, size: int, tasks: int | None = None) -> EvaluationImages:
    """Decode and centre-crop images, in the order of `ids`. Bad images are left out and reported.

    This process decodes what takes no longer than tasks take to start; Ray Data tasks decode the rest.
    """
    ids = np.asarray(ids, dtype=np.int64)
    images = np.empty((len(ids), size, size, 3), np.uint8)
    reasons = np.empty(len(ids), object)
    first = 0
    for block in _evaluation_blocks(dataset, ids, size, tasks):
        last = first + len(block["reason"])
        images[first:last], reasons[first:last] = block["image"], block["reason"]
        first = last
    good = reasons == ""
    return EvaluationImages(
        images=torch.from_numpy(images if good.all() else images[good]),
        labels=torch.from_numpy(dataset.labels[ids[good]]),
        ids=torch.from_numpy(ids[good]),
        bad=[DecodeFailure(int(i), dataset.path(int(i)), str(reason)) for i, reason in zip(ids[~good], reasons[~good], strict=True)],
    )


def _evaluation_blocks(dataset: ImageDataset, ids: np.ndarray, size: int, tasks: int | None) -> Iterator[dict[str, np.ndarray]]:
    """Yield blocks in the order of `ids`, decoded in this process if all take less than `LOCAL_DECODE_S` at this rate, else by tasks."""
    begin, done = time.monotonic(), 0
    while done < len(ids):
        spent = time.monotonic() - begin
        if spent > LOCAL_DECODE_S / 6 and spent * len(ids) > LOCAL_DECODE_S * done:  # the first ones pay for imports and open files
            break
        yield _evaluation_block(dataset, ids[done : done + LOCAL_BLOCK], size)
        done += LOCAL_BLOCK
    rest = ids[done:]
    if len(rest):
        import ray

        start_ray()
        images_per_task = int(np.clip(EVALUATION_BYTES // (3 * size * size), 1, 512))
        crop = partial(_evaluate_item, shared=ray.put((dataset, rest)), size=size, images_per_task=images_per_task)
        items = [{"first": first} for first in range(0, len(rest), images_per_task)]
        yield from blocks(execution(crop, items, 1, tasks=tasks)[0], prefetch=1)


def _evaluate_item(item: dict[str, np.ndarray], shared: Any, size: int, images_per_task: int) -> dict[str, np.ndarray]:
    dataset, ids = _get(shared)
    first = int(item["first"][0])
    return _evaluation_block(dataset, ids[first : first + images_per_task], size)


def _evaluation_block(dataset: ImageDataset, ids: np.ndarray, size: int) -> dict[str, np.ndarray]:
    images, reasons = decode_all(dataset.read(ids))
    crops = np.stack([evaluation_crop(image, size) for image in images])
    return {"image": crops, "reason": np.array(reasons, dtype=object)}
