"""The order of the training images: a pure function of (seed, epoch), independent of the number of workers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.data.philox import ROW_ORDER, SPAN_ORDER, TASK_ORDER, permutation, words


class Sampler:
    """Deals the training images of every epoch to shards, shards to tasks, and tasks to batches.

    Spans (row groups, files) are shuffled, and rows are shuffled inside their span. The sequence, without the images beyond the last
    whole batch, is cut into `num_shards` contiguous shards. So a global batch draws from distant places, and a span is read about once.
    A task has the images of one shard for `m = steps_per_group` steps, shuffled again: `shard_batch = global_batch / num_shards` for
    each step. The tasks of all shards for the same steps are a group. Batch `s` of an epoch is the part `s % m` of every task of group
    `s // m`, in the order of shards.
    """

    def __init__(self, spans: np.ndarray, ids: np.ndarray, *, seed: int, global_batch: int, num_shards: int, images_per_task: int) -> None:
        """
        Args:
            spans: `(G, 2)` int64, first id and number of rows of every row group, file or other unit of reading.
            ids: sorted training ids, int64; a subset of the ids in `spans`.
            global_batch: images per step.
            num_shards: parts of a global batch.
            images_per_task: rounded down to a multiple of `shard_batch`.

        Raises:
            ConfigError: the shards cannot share the batch, or there are fewer images than one batch.
        """
        if global_batch % num_shards:
            low = global_batch // num_shards * num_shards or num_shards
            raise ConfigError(
                f"train.global_batch_size={global_batch}: not a multiple of data.num_shards={num_shards}; use {low} or {low + num_shards}"
            )
        if len(ids) < global_batch:
            raise ConfigError(f"train.global_batch_size={global_batch}: larger than the {len(ids)} training images; use fewer")
        self.ids = np.ascontiguousarray(ids, dtype=np.int64)
        starts = np.sort(np.asarray(spans, dtype=np.int64)[:, 0])
        self.span_of = (np.searchsorted(starts, self.ids, side="right") - 1).astype(np.int32)
        self.num_spans = len(starts)
        self.seed = seed
        self._cut(global_batch, num_shards, images_per_task, len(self.ids) // global_batch)
        self._forget()

    def _cut(self, global_batch: int, num_shards: int, images_per_task: int, steps_per_epoch: int) -> None:
        self.global_batch, self.num_shards, self.shard_batch = global_batch, num_shards, global_batch // num_shards
        self.steps_per_epoch = steps_per_epoch
        self.steps_per_group = max(1, min(images_per_task // self.shard_batch, steps_per_epoch))
        self.groups_per_epoch = -(-steps_per_epoch // self.steps_per_group)

    def _forget(self) -> None:
        # two epochs, because the loader reads ahead into the next one; 8 bytes an image
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _shuffle(self, epoch: int) -> np.ndarray:
        place = np.empty(self.num_spans, np.uint64)
        place[permutation(self.seed, epoch, self.num_spans, SPAN_ORDER)] = np.arange(self.num_spans, dtype=np.uint64)
        count = len(self.ids)
        within = words(self.seed, epoch, np.arange(-(-count // 4)), ROW_ORDER, 4).reshape(-1)[:count]
        keys = (place[self.span_of] << np.uint64(32)) | within
        return self.ids[np.argsort(keys, kind="stable")][: self.steps_per_epoch * self.global_batch]

    def steps_in(self, group: int) -> int:
        """Return the number of steps of a group; only the last group of an epoch has fewer than `steps_per_group`."""
        return min(self.steps_per_group, self.steps_per_epoch - group * self.steps_per_group)

    def task_ids(self, epoch: int, group: int, shard: int) -> np.ndarray:
        """Return the image ids of one task in the order of its steps, `(steps_in(group) * shard_batch,)` int64."""
        first = (shard * self.steps_per_epoch + group * self.steps_per_group) * self.shard_batch
        rows: np.ndarray = self._order(epoch)[first : first + self.steps_in(group) * self.shard_batch]
        rows = rows[permutation(self.seed, epoch, len(rows), TASK_ORDER, first=group * self.num_shards + shard)]
        return rows

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Return the image ids of one global batch, `(global_batch,)` int64; `step` counts within the epoch."""
        group, i = divmod(step, self.steps_per_group)
        cut = slice(i * self.shard_batch, (i + 1) * self.shard_batch)
        return np.concatenate([self.task_ids(epoch, group, shard)[cut] for shard in range(self.num_shards)])

    # ---------------------------------------------------------------- steps of a whole run, epoch after epoch

    def groups_between(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return epoch and number of the groups that hold the steps `first` to `last - 1`, counted from the start of the run."""

        def number(step: int) -> int:
            epoch, within = divmod(step, self.steps_per_epoch)
            return epoch * self.groups_per_epoch + within // self.steps_per_group

        return [divmod(k, self.groups_per_epoch) for k in range(number(first), number(last - 1) + 1)] if last > first else []

    def first_step(self, epoch: int, group: int) -> int:
        """Return the first step of a group, counted from the start of the run."""
        return epoch * self.steps_per_epoch + group * self.steps_per_group

    def first_slot(self, group: int, shard: int) -> int:
        """Return the position of a task's first image within its epoch."""
        return (group * self.num_shards + shard) * self.steps_per_group * self.shard_batch
