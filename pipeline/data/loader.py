"""The stream of training batches: Ray Data tasks cut windows of images, a thread of each worker slices them ahead of the loop."""

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
from pipeline.data.crop_task import block_bytes, cut_images, decode_all, finish_columns
from pipeline.data.decode import evaluation_crop
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.prefetch import CLOSE_S, Ahead, DeviceCopies, in_background
from pipeline.data.ray_data import blocks, execution
from pipeline.data.ray_data import start_ray as start_ray  # callers of the stream find it here
from pipeline.data.sampler import Sampler

if TYPE_CHECKING:
    from ray.data import DataIterator

T = TypeVar("T")
EXECUTION_STEPS = 1000  # that one Ray Data execution serves at least
FIRST_STEPS = 100  # that the first one serves, where there are more windows than FIRST_WINDOWS: an execution takes 2 ms a window to build
FIRST_WINDOWS = 512
HAND_OVER_STEPS = 50  # before the end of an execution the next one begins: its first blocks take seconds
BUILD_STEPS = 150  # before the end of an execution the next one is built
READY = 2  # global batches that wait for the loop
EVALUATION_BYTES = 16 * 2**20  # pixels one evaluation task returns
ALONE_S = 3.0  # an evaluation that this process can decode in so many s is not worth the start of tasks
OWN_PART = 64  # images decoded here between two looks at the clock


@dataclass(frozen=True)
class DecodeFailure:
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
    of the run. The rows lie in order of shards, or as `TrainLoader.batches` says for micro-batches.
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
        """Return what a device needs: crops, ids and labels."""
        return [*self.crops.values(), self.ids, self.labels]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Batch:
        """Return this batch with others in their places."""
        *crops, ids, labels = tensors
        return replace(self, crops=dict(zip(self.crops, crops, strict=True)), ids=ids, labels=labels)

    def split(self, count: int) -> list[Batch]:
        """Return the micro-batches of a batch that was made for so many: equal contiguous parts, which share its memory."""
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


def alone(value: T) -> T:
    """Return what rank 0 has, in a run of one worker."""
    return value


def execution_bytes(buffer_bytes: int, group_bytes: int) -> int:
    """Return the blocks, in bytes, that one execution may hold in the object stores.

    One group of windows is with the workers. Half of the rest, because for a moment two executions run; two groups at the least.
    """
    return max(2 * group_bytes, (buffer_bytes - group_bytes) // 2)


@dataclass(frozen=True)
class TrainLoader:
    """What the batches of a run come from; it needs no network.

    Attributes:
        earlier: steps of a continued run's earlier phases, before the first one.
        finish: mean and standard deviation with which the tasks finish the views too; None = left to `finish_views`.
        buffer_bytes: views that are ready or in flight in Ray's object stores; None = what these hold. See `execution_bytes`.
        execution_steps: steps that one Ray Data execution serves at least.
    """

    dataset: ImageDataset
    plan: Sampler
    views: ViewsConfig
    seed: int
    total_steps: int
    earlier: int = 0
    finish: Normalisation | None = None
    buffer_bytes: int | None = None
    execution_steps: int = EXECUTION_STEPS

    def batches(
        self,
        start_step: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        tasks: int | None = None,
        share: Callable[[Any], Any] = alone,
        micro_batches: int = 1,
        device: torch.device | None = None,
    ) -> Generator[Batch]:
        """Yield one rank's batches of steps `start_step` to `total_steps - 1`, the same whether or not the run was interrupted.

        Rank 0 builds the executions that all ranks read. `READY` batches wait for the loop, on the device if it is a GPU.

        Args:
            tasks: windows cut at the same time, for all ranks together; None = as many as the resources allow.
            share: takes a small value, and returns on every rank what rank 0 gave. All ranks call it before the same steps.
            micro_batches: the rows lie so that `Batch.split` into so many makes contiguous parts, and part i holds the rows i, i +
                micro_batches, i + 2 * micro_batches ... of the order of shards: each shard gives to each part.
            device: where crops, ids and labels are wanted; None = the CPU.

        Raises:
            RuntimeError: Ray Data returned other windows than planned.
        """
        import ray

        if self.plan.num_shards % world_size:
            raise ValueError(f"{self.plan.num_shards} shards cannot be shared by {world_size} workers")
        if self.plan.chunk % micro_batches:
            raise ValueError(f"{micro_batches} micro-batches cannot share the {self.plan.chunk} images of a shard")
        parts = list(self.executions(start_step + self.earlier, self.total_steps + self.earlier))
        if not parts:
            return
        copies = DeviceCopies(device) if device is not None and device.type == "cuda" else None
        slices = partial(self._slices, shards=range(rank, self.plan.num_shards, world_size), micro_batches=micro_batches, copies=copies)
        build = self._builder(parts[0][0], world_size, tasks) if rank == 0 else None
        building = in_background(partial(build, parts[0])) if build else None
        with contextlib.ExitStack() as stack:
            # a thread that outlives the run would find Ray shut down, and `ray.put` would start it again
            stack.callback(lambda: wait([building] if building else [], timeout=CLOSE_S))
            kept: list[Any] = []  # with rank 0's the reference to the iterators would end

            def begin(part: tuple[int, int]) -> Ahead[Arriving]:
                kept[:] = share(building.result() if building else None)
                reading = Ahead(partial(slices, ray.get(kept[0])[rank], part), READY)
                stack.callback(reading.close)
                return reading

            following = begin(parts[0])
            for part, upcoming in itertools.zip_longest(parts, parts[1:]):
                reading = following
                for batch, arrived in reading:
                    if upcoming and build and batch.step == max(part[0], part[1] - BUILD_STEPS):
                        building = in_background(partial(build, upcoming))
                    if upcoming and batch.step == max(part[0], part[1] - HAND_OVER_STEPS):
                        following = begin(upcoming)
                    if copies and arrived:
                        copies.receive(batch.tensors(), arrived)
                    yield batch

    def executions(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the first step and the one after the last of every execution that serves the steps `first` to `last - 1`."""
        plan, length = self.plan, self.execution_steps
        if len(plan.groups_between(first, first + length)) * plan.num_shards > FIRST_WINDOWS:
            length = min(length, FIRST_STEPS)  # the first batch waits for it
        while first < last:
            epoch, group = plan.groups_between(first + length - 1, first + length)[0]
            end = min(plan.first_step(epoch, group) + plan.chunks(group), last)
            yield first, end
            first, length = end, self.execution_steps

    def _builder(self, first: int, world_size: int, tasks: int | None) -> Callable[[tuple[int, int]], list[Any]]:
        """What builds the execution of some steps, on rank 0: it gives one reference to the iterators of all ranks."""
        import ray

        plan = self.plan
        cut = self.task(ray.put((self.dataset.served(plan, first), plan)))
        group_bytes = plan.num_shards * block_bytes(self.views, plan.chunks_per_window * plan.chunk, finished=self.finish is not None)
        store = self.buffer_bytes or int(ray.cluster_resources().get("object_store_memory", 0))

        def build(part: tuple[int, int]) -> list[Any]:
            items = [{"epoch": e, "group": g, "shard": shard} for e, g in plan.groups_between(*part) for shard in range(plan.num_shards)]
            return [ray.put(execution(cut, items, world_size, tasks=tasks, buffer_bytes=execution_bytes(store, group_bytes)))]

        return build

    def task(self, shared: Any) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        """What cuts one window in a task; `shared` is a reference to the manifest and the plan."""
        return partial(_cut_item, shared=shared, views=self.views, seed=self.seed, finish=self.finish)

    def _slices(
        self, iterator: DataIterator, part: tuple[int, int], shards: range, micro_batches: int, copies: DeviceCopies | None
    ) -> Generator[Arriving]:
        with contextlib.closing(blocks(iterator, prefetch=len(shards))) as found:
            for batch in self.sliced(found, part, shards, micro_batches, pin=copies is not None):
                if copies is None:
                    yield batch, None
                else:
                    sent, arrived = copies.send(batch.tensors())
                    yield batch.with_tensors(sent), arrived

    def sliced(
        self, found: Iterator[dict[str, np.ndarray]], part: tuple[int, int], shards: range, micro_batches: int = 1, pin: bool = False
    ) -> Generator[Batch]:
        """Slice blocks, one for each of a rank's shards in turn, into the batches of some steps.

        Raises:
            RuntimeError: a block is not the planned one.
        """
        plan = self.plan
        names = [name for name, group in self.views.items() if group.count]
        for epoch, group in plan.groups_between(*part):
            held = [self._checked(next(found, None), epoch, group, shard) for shard in shards]
            for chunk in range(plan.chunks(group)):
                step = plan.first_step(epoch, group) + chunk
                if part[0] <= step < part[1]:
                    rows = slice(chunk * plan.chunk, (chunk + 1) * plan.chunk)
                    chunks = [{key: column[rows] for key, column in block.items()} for block in held]
                    yield _collated(chunks, names, self.dataset, epoch, step, micro_batches, pin)
            held = chunks = []  # frees the group's blocks before the next is waited for
        if next(found, None) is not None:  # only who asks for the end lets Ray's threads end too
            raise RuntimeError("the stream is out of order: it has more windows than planned; please report this")

    def _checked(self, block: dict[str, np.ndarray] | None, epoch: int, group: int, shard: int) -> dict[str, np.ndarray]:
        rows, first = self.plan.chunks(group) * self.plan.chunk, self.plan.first_slot(group, shard)
        if block and len(block["slot"]) == rows and block["epoch"][0] == epoch and block["slot"][0] == first:
            return block
        got = f"epoch {block['epoch'][:1]}, slot {block['slot'][:1]}, {len(block['slot'])} rows" if block else "no more"
        raise RuntimeError(f"the stream is out of order: planned epoch {epoch}, slot {first}, got {got}; please report this")


Arriving = tuple[Batch, "torch.cuda.Event | None"]


def _collated(
    parts: list[dict[str, np.ndarray]], names: list[str], dataset: ImageDataset, epoch: int, step: int, micro_batches: int, pin: bool
) -> Batch:
    """One batch from a chunk of every shard, copied out of shared memory, into pinned memory if a GPU is to fetch it from there."""

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
    """The rows of all shards so that each micro-batch is one piece: row j of a shard belongs to micro-batch j mod `micro_batches`."""
    rest = parts[0].shape[1:]
    by_micro_batch = [part.reshape(-1, micro_batches, *rest).swapaxes(0, 1) for part in parts]
    shape = (micro_batches, len(parts), len(parts[0]) // micro_batches, *rest)
    return np.stack(by_micro_batch, axis=1, out=None if out is None else out.reshape(shape)).reshape(-1, *rest)


# ---------------------------------------------------------------------------- inside a task


@lru_cache(maxsize=1)
def _get(reference: Any) -> Any:
    """A shared object, once per process."""
    import ray

    torch.set_num_threads(1)  # the tasks themselves are the parallelism
    return ray.get(reference)


def _cut_item(
    item: dict[str, np.ndarray], shared: Any, views: ViewsConfig, seed: int, finish: Normalisation | None = None
) -> dict[str, np.ndarray]:
    """Cut one window: one item in, one block of `chunks * chunk` rows out."""
    dataset, plan = _get(shared)
    epoch, group, shard = (int(item[key][0]) for key in ("epoch", "group", "shard"))
    ids = plan.window(epoch, group, shard)
    columns = cut_images(dataset.read(ids), epoch, views, seed, plan.chunk)
    if finish is not None:
        finish_columns(columns, views, finish)
    columns["epoch"] = np.full(len(ids), epoch)
    columns["slot"] = plan.first_slot(group, shard) + np.arange(len(ids))
    return columns


# ---------------------------------------------------------------------------- evaluation


def evaluation_images(dataset: ImageDataset, ids: np.ndarray, size: int, tasks: int | None = None) -> EvaluationImages:
    """Decode and centre-crop images through Ray Data, in the order of `ids`; bad ones are left out and reported.

    As many as take no longer than tasks take to start are decoded here, part by part; the tasks do the rest.
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
    """Blocks in the order of `ids`: decoded here while all of them would take `ALONE_S` at this rate, then by tasks."""
    begin, done = time.monotonic(), 0
    while done < len(ids):
        spent = time.monotonic() - begin
        if spent > ALONE_S / 6 and spent * len(ids) > ALONE_S * done:  # the first ones pay for imports and open files
            break
        yield _evaluation_block(dataset, ids[done : done + OWN_PART], size)
        done += OWN_PART
    rest = ids[done:]
    if len(rest):
        import ray

        start_ray()
        window = int(np.clip(EVALUATION_BYTES // (3 * size * size), 1, 512))
        crop = partial(_evaluate_item, shared=ray.put((dataset, rest)), size=size, window=window)
        items = [{"first": first} for first in range(0, len(rest), window)]
        yield from blocks(execution(crop, items, 1, tasks=tasks)[0], prefetch=1)


def _evaluate_item(item: dict[str, np.ndarray], shared: Any, size: int, window: int) -> dict[str, np.ndarray]:
    dataset, ids = _get(shared)
    first = int(item["first"][0])
    return _evaluation_block(dataset, ids[first : first + window], size)


def _evaluation_block(dataset: ImageDataset, ids: np.ndarray, size: int) -> dict[str, np.ndarray]:
    images, reasons = decode_all(dataset.read(ids))
    crops = np.stack([evaluation_crop(image, size) for image in images])
    return {"image": crops, "reason": np.array(reasons, dtype=object)}
