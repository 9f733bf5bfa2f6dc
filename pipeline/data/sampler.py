"""Who sees which image when: a pure function of (seed, epoch), the same for any number of workers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.data.philox import ROW_ORDER, SPAN_ORDER, TASK_ORDER, permutation, words


class Sampler:
    """Deals the training images of every epoch to shards, shards to windows, windows to chunks.

    Spans (row groups, files) are shuffled, rows shuffled inside their span, and the sequence without its tail is cut
    into `num_shards` contiguous parts, so a global batch draws from `num_shards` distant places while a span is read about once.
    A window is what one task cuts: `m` chunks of `chunk = global_batch / num_shards` images of one shard, its rows shuffled
    once more. Batch `s` of an epoch is chunk `s % m` of window `s // m` of every shard, in the order of shards.
    """

    def __init__(self, spans: np.ndarray, ids: np.ndarray, *, seed: int, global_batch: int, num_shards: int, images_per_task: int) -> None:
        """
        Args:
            spans: `(G, 2)` int64, first id and number of rows of every natural unit of reading.
            ids: sorted training ids, int64; a subset of what the spans hold.
            global_batch: images per step.
            num_shards: parts of a global batch.
            window: images one task cuts, rounded down to whole chunks.

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
        # The order is 8 bytes an image; two epochs are kept, because the loader crosses from one to the next.
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
        """Chunks in every window of this group; only the last group of an epoch has fewer than the others."""
        return min(self.steps_per_group, self.steps_per_epoch - group * self.steps_per_group)

    def task_ids(self, epoch: int, group: int, shard: int) -> np.ndarray:
        """The image ids of one window in order of its chunks, `(chunks(group) * chunk,)` int64."""
        first = (shard * self.steps_per_epoch + group * self.steps_per_group) * self.shard_batch
        rows: np.ndarray = self._order(epoch)[first : first + self.steps_in(group) * self.shard_batch]
        rows = rows[permutation(self.seed, epoch, len(rows), TASK_ORDER, first=group * self.num_shards + shard)]
        return rows

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """The image ids of one global batch, `(global_batch,)` int64; `step` counts within the epoch."""
        group, i = divmod(step, self.steps_per_group)
        cut = slice(i * self.shard_batch, (i + 1) * self.shard_batch)
        return np.concatenate([self.task_ids(epoch, group, shard)[cut] for shard in range(self.num_shards)])

    # ---------------------------------------------------------------- steps of a whole run, epoch after epoch

    def groups_between(self, first: int, last: int) -> list[tuple[int, int]]:
        """Epoch and group of the windows that hold the steps `first` to `last - 1`, counted from the start of the run."""

        def number(step: int) -> int:
            epoch, within = divmod(step, self.steps_per_epoch)
            return epoch * self.groups_per_epoch + within // self.steps_per_group

        return [divmod(k, self.groups_per_epoch) for k in range(number(first), number(last - 1) + 1)] if last > first else []

    def first_step(self, epoch: int, group: int) -> int:
        """The step, counted from the start of the run, of a group's first chunk."""
        return epoch * self.steps_per_epoch + group * self.steps_per_group

    def first_slot(self, group: int, shard: int) -> int:
        """The place within its epoch of a window's first image."""
        return (group * self.num_shards + shard) * self.steps_per_group * self.shard_batch
