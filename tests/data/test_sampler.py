"""Shards, tasks and batches: every image once an epoch, and batches that depend on (seed, epoch, step) only."""

import pickle

import numpy as np
import pytest

from methods.parts.errors import ConfigError
from pipeline.data.sampler import Sampler

SPANS = np.array([[0, 300], [300, 100], [400, 250], [650, 363]])  # 1013 rows
IDS = np.setdiff1d(np.arange(1013), np.arange(5, 1013, 17))


def sampler(images_per_task: int = 64, seed: int = 0, num_shards: int = 4, batch: int = 32) -> Sampler:
    return Sampler(SPANS, IDS, seed=seed, global_batch=batch, num_shards=num_shards, images_per_task=images_per_task)


def epoch_batches(p: Sampler, epoch: int) -> np.ndarray:
    return np.stack([p.batch(epoch, step) for step in range(p.steps_per_epoch)])


@pytest.mark.parametrize("images_per_task", [8, 24, 64, 100, 5000])
def test_every_training_image_once_but_the_tail(images_per_task: int) -> None:
    p = sampler(images_per_task)
    seen = epoch_batches(p, 3).ravel()
    assert len(seen) == len(IDS) // 32 * 32 == p.steps_per_epoch * 32
    assert len(set(seen)) == len(seen) and set(seen) <= set(IDS)


def test_tasks_are_the_batches() -> None:
    p = sampler(64)
    assert [p.steps_in(g) for g in range(p.groups_per_epoch)] == [8, 8, 8, 5]
    rows = [[p.task_ids(1, g, shard) for shard in range(4)] for g in range(p.groups_per_epoch)]
    for step in range(p.steps_per_epoch):
        group, chunk = divmod(step, 8)
        expected = np.concatenate([rows[group][shard][chunk * 8 : chunk * 8 + 8] for shard in range(4)])
        assert (p.batch(1, step) == expected).all()


def test_depends_on_seed_and_epoch_only() -> None:
    fresh, used = sampler(), pickle.loads(pickle.dumps(sampler()))
    epoch_batches(used, 0), epoch_batches(used, 5)
    assert (epoch_batches(fresh, 2) == epoch_batches(used, 2)).all()
    assert (epoch_batches(fresh, 2) != epoch_batches(fresh, 3)).mean() > 0.9
    assert (epoch_batches(fresh, 2) != epoch_batches(sampler(seed=1), 2)).mean() > 0.9


def test_the_images_of_a_shard_do_not_depend_on_the_size_of_tasks() -> None:
    by_shard = [epoch_batches(sampler(w), 1).reshape(-1, 4, 8).transpose(1, 0, 2).reshape(4, -1) for w in (8, 40, 500)]
    for other in by_shard[1:]:
        assert (np.sort(by_shard[0], axis=1) == np.sort(other, axis=1)).all()
        assert (by_shard[0] != other).any()


def test_a_span_is_read_by_few_tasks() -> None:
    spans = np.stack([np.arange(0, 100_000, 1000), np.full(100, 1000)], axis=1)
    p = Sampler(spans, np.arange(100_000), seed=0, global_batch=400, num_shards=4, images_per_task=500)
    touched = [len(set(p.task_ids(0, g, shard) // 1000)) for g in range(p.groups_per_epoch) for shard in range(4)]
    assert np.mean(touched) < 2


def test_single_row_spans_shuffle_perfectly() -> None:
    count = 20_000
    spans = np.stack([np.arange(count), np.ones(count, int)], axis=1)
    p = Sampler(spans, np.arange(count), seed=0, global_batch=100, num_shards=4, images_per_task=500)
    assert abs(np.corrcoef(epoch_batches(p, 0).ravel(), np.arange(count))[0, 1]) < 0.03
    assert epoch_batches(p, 0).mean(axis=1).std() < 1.3 * count / 12**0.5 / 10  # batches are well mixed


def test_large_and_quick() -> None:
    import time

    count = 1_300_000
    p = Sampler(
        np.stack([np.arange(count), np.ones(count, int)], axis=1),
        np.arange(count),
        seed=0,
        global_batch=1024,
        num_shards=8,
        images_per_task=128,
    )
    p.task_ids(0, 0, 0)
    start = time.process_time()
    for group in range(50):
        p.task_ids(0, group, 3)
    assert time.process_time() - start < 0.5  # the order of the epoch is computed once


def test_refuses_what_cannot_be_dealt() -> None:
    with pytest.raises(ConfigError, match="use 28 or 32"):
        sampler(batch=30)
    with pytest.raises(ConfigError, match=f"{len(IDS)} training images"):
        sampler(batch=4000)
