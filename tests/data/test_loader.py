"""The whole stream through Ray Data: the planned images, the same after a resume, and bad images replaced and reported."""

import gc
import io
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from methods.parts.views import CropGroup
from pipeline.config import DataConfig
from pipeline.data import loader, ray_data
from pipeline.data.augment import Normalisation, augment_views
from pipeline.data.crop_task import make_crops, substitutes
from pipeline.data.image_dataset import ImageDataset
from pipeline.data.loader import Batch, TrainLoader, evaluation_images
from pipeline.data.prefetch import Prefetcher
from pipeline.data.sampler import Sampler
from pipeline.data.sources.base import open_source
from tests.data.ranks import Shared, collect_ranks

VIEWS = {"global": CropGroup(count=2, size=16), "local": CropGroup(count=1, size=8, scale=(0.1, 0.3))}


def write(path: Path, count: int, bad: tuple[int, ...] = (), size: int = 12) -> ImageDataset:
    random = np.random.default_rng(0)
    images = []
    for i in range(count):
        out = io.BytesIO()
        pixels = random.integers(0, 256, (size, size, 3), np.uint8)
        pixels[:4] = i % 256  # tells the image apart
        Image.fromarray(pixels).save(out, "PNG")
        images.append(b"broken" if i in bad else out.getvalue())
    pq.write_table(pa.table({"image": images, "label": np.arange(count) % 7}), path / "a.parquet", row_group_size=50)
    return open_source(DataConfig(path=str(path)))


def make_sampler(dataset: ImageDataset, images_per_task: int = 32, num_shards: int = 4, batch: int = 32) -> Sampler:
    return Sampler(
        dataset.spans, dataset.training_ids(0), seed=3, global_batch=batch, num_shards=num_shards, images_per_task=images_per_task
    )


def collect(
    dataset: ImageDataset,
    sampler: Sampler,
    total: int,
    start: int = 0,
    finish: Normalisation | None = None,
    steps: int = 1000,
    micro_batches: int = 1,
) -> list[Batch]:
    stream = TrainLoader(dataset, sampler, VIEWS, 3, total, normalisation=finish, execution_steps=steps)
    return list(stream.batches(start, tasks=2, micro_batches=micro_batches))


def coordinators() -> int:
    """Executors' processes that this process's Ray runs."""
    count = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            count += "SplitCoordinator" in "".join(process.cmdline())
    return count


def prefetchers() -> list[Prefetcher[Any]]:
    return [found for found in gc.get_objects() if type(found) is Prefetcher]


def wait_until(holds: Any, seconds: float = 60) -> bool:
    """Whether it comes to hold."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(holds())


def same(a: Batch, b: Batch) -> bool:
    tensors = all((a.crops[name] == b.crops[name]).all() and (a.tables[name] == b.tables[name]).all() for name in a.crops)
    return bool(tensors and (a.ids == b.ids).all() and (a.labels == b.labels).all() and (a.epoch, a.step) == (b.epoch, b.step))


@dataclass(frozen=True)
class Whole:
    """A run of one worker: what others of the same sampler must see."""

    dataset: ImageDataset
    sampler: Sampler
    batches: list[Batch]


@pytest.fixture(scope="module")
def good(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """500 images for 34 steps. A task serves two steps; the last of an epoch one."""
    dataset = write(tmp_path_factory.mktemp("good"), 500)
    sampler = make_sampler(dataset, images_per_task=16)
    assert sampler.steps_per_epoch == 15
    return Whole(dataset, sampler, collect(dataset, sampler, 34))


BAD = (3, 50, 51, 199, 250)


@pytest.fixture(scope="module")
def partly_bad(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """300 images, five of them bad, for 20 steps, of which 9 are an epoch."""
    dataset = write(tmp_path_factory.mktemp("bad"), 300, BAD)
    sampler = make_sampler(dataset, images_per_task=16)
    return Whole(dataset, sampler, collect(dataset, sampler, 20))


def test_batches_are_the_planned_ones(good: Whole) -> None:
    dataset, sampler, batches = good.dataset, good.sampler, good.batches
    assert [batch.step for batch in batches] == list(range(34))
    for batch in batches:
        epoch, step = divmod(batch.step, sampler.steps_per_epoch)
        assert batch.epoch == epoch and (batch.ids.numpy() == sampler.batch(epoch, step)).all()
        assert (batch.labels.numpy() == batch.ids.numpy() % 7).all() and not batch.bad
        assert batch.crops["global"].shape == (32, 2, 16, 16, 3) and batch.crops["local"].dtype == torch.uint8
    first = batches[0]  # the pixels belong to the ids, and the views to the epoch
    expected = make_crops(dataset.read(first.ids.numpy()), 0, VIEWS, 3, shard_batch=8)
    assert (first.crops["global"].numpy() == expected["crops/global"]).all()
    assert (first.tables["local"] == expected["table/local"]).all()


def test_views_finished_by_the_tasks_are_those_finished_on_the_device(good: Whole) -> None:
    size = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    finished = collect(good.dataset, good.sampler, 3, finish=size)
    for one, other in zip(good.batches[:3], finished, strict=True):
        assert other.crops["global"].shape == (32, 2, 3, 16, 16) and other.crops["global"].dtype == torch.float32
        ours, theirs = augment_views(one, VIEWS, *size, "cpu"), augment_views(other, VIEWS, *size, "cpu")
        for name in VIEWS:
            assert theirs.stacks[name].is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(ours.stacks[name], theirs.stacks[name], rtol=0, atol=5e-6)


@pytest.mark.parametrize(("start", "steps"), [(0, 16), (14, 1000), (34, 1000)])  # an epoch ends inside an execution, or with it
def test_resume_and_many_executions_give_the_same_batches(good: Whole, start: int, steps: int) -> None:
    rest = collect(good.dataset, good.sampler, 34, start, steps=steps)
    assert len(rest) == 34 - start and all(same(a, b) for a, b in zip(good.batches[start:], rest, strict=True))


@pytest.mark.parametrize(("ranks", "start", "steps", "executions"), [(2, 3, 7, 3), (4, 0, 1000, 1)])
def test_any_number_of_ranks_shares_the_global_batch(partly_bad: Whole, ranks: int, start: int, steps: int, executions: int) -> None:
    source = TrainLoader(partly_bad.dataset, partly_bad.sampler, VIEWS, 3, 20, execution_steps=steps)
    parts, times = collect_ranks(source, ranks, start)
    assert times == executions
    for batch, *of_ranks in zip(partly_bad.batches[start:], *parts, strict=True):
        num_shards = batch.crops["global"].unflatten(0, (4, 8))
        ids = batch.ids.unflatten(0, (4, 8))
        for rank, part in enumerate(of_ranks):
            assert (part.crops["global"] == num_shards[rank::ranks].flatten(0, 1)).all()
            assert (part.ids == ids[rank::ranks].flatten()).all()
        assert {slot.id for slot in batch.bad} == {slot.id for part in of_ranks for slot in part.bad}


def test_executions_are_few_and_end_with_groups() -> None:
    # 4 steps a group, 39 groups of 156 steps
    sampler = Sampler(np.array([[0, 10_000]]), np.arange(10_000), seed=0, global_batch=64, num_shards=8, images_per_task=32)
    parts = list(TrainLoader(None, sampler, VIEWS, 0, 0).executions(101, 5_000))  # type: ignore[arg-type]
    assert parts[0][0] == 101 and parts[-1][1] == 5_000 and all(one[1] == next[0] for one, next in itertools.pairwise(parts))
    assert all(end % 156 % 4 == 0 for _, end in parts[:-1])
    lengths = [end - first for first, end in parts]
    assert 100 <= lengths[0] < 104 and all(1000 <= length < 1004 for length in lengths[1:-1]), "the first batch waits for the first one"
    few = Sampler(np.array([[0, 10_000]]), np.arange(10_000), seed=0, global_batch=64, num_shards=8, images_per_task=512)
    assert len(list(TrainLoader(None, few, VIEWS, 0, 0).executions(0, 1_000))) == 1  # type: ignore[arg-type]


def test_the_budget_of_bytes() -> None:
    assert loader.execution_bytes(9_000, 1_000) == 4_000, "two executions and what the workers hold"
    assert loader.execution_bytes(1_000, 1_000) == 2_000, "never less than two groups"


def test_micro_batches_lie_in_one_piece(partly_bad: Whole) -> None:
    dataset, sampler = partly_bad.dataset, partly_bad.sampler
    for plain, batch in zip(partly_bad.batches[:9], collect(dataset, sampler, 9, micro_batches=2), strict=True):
        for i, part in enumerate(batch.split(2)):
            assert (part.ids == plain.ids[i::2]).all() and (part.labels == plain.labels[i::2]).all()
            for name in VIEWS:
                assert (part.crops[name] == plain.crops[name][i::2]).all() and part.crops[name].is_contiguous()
                assert (part.tables[name] == plain.tables[name][i::2]).all()
        assert sorted(slot.id for slot in batch.bad) == sorted(slot.id for slot in plain.bad)
    with pytest.raises(ValueError, match="3 micro-batches cannot share the 8 images"):
        collect(dataset, sampler, 3, micro_batches=3)


def test_views_do_not_depend_on_the_size_of_tasks(good: Whole) -> None:
    by_id = []
    for batches in (good.batches[:15], collect(good.dataset, make_sampler(good.dataset, 1000), 8)):
        by_id.append({int(i): batch.crops["global"][k] for batch in batches for k, i in enumerate(batch.ids)})
    shared = by_id[0].keys() & by_id[1].keys()
    assert len(shared) > 100 and all((by_id[0][i] == by_id[1][i]).all() for i in shared)


def test_bad_images_are_replaced_and_reported(partly_bad: Whole) -> None:
    sampler, batches = partly_bad.sampler, partly_bad.batches[: partly_bad.sampler.steps_per_epoch]
    planned = np.concatenate([sampler.batch(0, step) for step in range(sampler.steps_per_epoch)])
    reported = [slot.id for batch in batches for slot in batch.bad]
    assert sorted(reported) == sorted(set(BAD) & set(planned)) and reported
    assert all(f"a.parquet#{slot.id}" in slot.path and slot.reason for batch in batches for slot in batch.bad)
    for step, batch in enumerate(batches):
        replaced = batch.ids.numpy() != sampler.batch(0, step)
        assert set(sampler.batch(0, step)[replaced]) == {slot.id for slot in batch.bad}
        assert not set(batch.ids.tolist()) & set(BAD) and len(batch.ids) == 32


def test_only_bad_images_still_make_batches(ray_local: None, tmp_path: Path) -> None:
    dataset = write(tmp_path, 64, tuple(range(64)))
    batches = collect(dataset, make_sampler(dataset), 2)
    assert sum(len(batch.bad) for batch in batches) == 64
    assert all((batch.crops["global"] == 0).all() for batch in batches)


def test_substitutes_come_from_another_step() -> None:
    assert substitutes([True, False, True, True, True, True], 2).tolist() == [0, 3, 2, 3, 4, 5]
    assert substitutes([True, False, True, False, True, True], 2).tolist() == [0, 5, 2, 5, 4, 5]
    assert substitutes([True, False, True, True], 4).tolist() == [0, 2, 2, 3]
    assert substitutes([False, True], 1).tolist() == [1, 1]
    assert substitutes([False, False], 1).tolist() == [0, 1]


def test_a_wrong_block_is_refused(tmp_path: Path) -> None:
    dataset = write(tmp_path, 200)
    sampler = make_sampler(dataset)
    blocks = []
    for (epoch, group), shard in itertools.product(sampler.groups_between(0, 4), range(sampler.num_shards)):
        block = make_crops(dataset.read(sampler.task_ids(epoch, group, shard)), epoch, VIEWS, 3, sampler.shard_batch)
        slots = sampler.first_slot(group, shard) + np.arange(len(block["id"]))
        blocks.append(block | {"epoch": np.full(len(slots), epoch), "slot": slots})
    sliced = TrainLoader(dataset, sampler, VIEWS, 3, 4).sliced
    assert len(list(sliced(iter(blocks), (0, 4), range(4)))) == 4
    wrong = (blocks[1:], blocks[:-1], [blocks[0] | {"epoch": blocks[0]["epoch"] + 1}], [{k: v[:-1] for k, v in blocks[0].items()}])
    for found in wrong:
        with pytest.raises(RuntimeError, match="out of order"):
            list(sliced(iter(found), (0, 4), range(4)))


def test_the_trainer_only_waits_while_two_batches_are_ready(ray_local: None, tmp_path: Path) -> None:
    """One shard for each of two workers: no executor in this process, next to no time of it, and the loop does not wait."""
    dataset = write(tmp_path, 200)
    sampler = make_sampler(dataset, images_per_task=16, num_shards=2)  # a task serves one step
    shared, source = Shared(2), TrainLoader(dataset, sampler, VIEWS, 3, 100)  # one execution
    streams = [source.batches(rank=rank, world_size=2, tasks=1, broadcast=shared.by(rank)) for rank in range(2)]
    others = prefetchers()
    with ThreadPoolExecutor(2) as pool:

        def step() -> None:
            list(pool.map(next, streams))

        try:
            for _ in range(5):
                step()
            ahead = [found for found in prefetchers() if found not in others]
            process, seconds, waits = psutil.Process(), 8, [found.waits for found in ahead]
            before = process.cpu_times()
            for _ in range(seconds):
                time.sleep(1)
                assert wait_until(lambda: all(len(found) == loader.PREFETCH_BATCHES for found in ahead)), "batches are made ahead"
                step()
            after = process.cpu_times()
            names = [thread.name for thread in threading.enumerate()]
        finally:
            list(pool.map(lambda one: one.close(), streams))
    used = (after.user + after.system - before.user - before.system) / seconds
    assert not any("StreamingExecutor" in name for name in names)
    assert used < 0.05 * 2, f"{used:.3f} of a core for two workers"
    assert len(ahead) == 2 and [found.waits for found in ahead] == waits, "both batches were ready"


def test_leaving_early_ends_the_stream(ray_local: None, tmp_path: Path) -> None:
    assert wait_until(lambda: not coordinators()), "those of other tests"
    dataset = write(tmp_path, 200)
    with closing(TrainLoader(dataset, make_sampler(dataset), VIEWS, 3, 10_000, execution_steps=20).batches(tasks=2)) as batches:
        assert next(batches).step == 0 and coordinators() >= 1
        assert [batch.step for batch in itertools.islice(batches, 10)] == list(range(1, 11)), "the next execution has begun"
    assert wait_until(lambda: not any(thread.name == "manyviews-prefetch" for thread in threading.enumerate()))
    assert wait_until(lambda: not coordinators()), "executors end with their stream"


def test_leaving_waits_for_an_execution_that_is_being_built(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread calls Ray, which may be shut down next."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1)
        return execution(*args, **kwargs)

    execution = loader.execution
    monkeypatch.setattr(loader, "HAND_OVER_STEPS", 1)
    monkeypatch.setattr(loader, "execution", slow)
    dataset = write(tmp_path, 200)
    with closing(TrainLoader(dataset, make_sampler(dataset), VIEWS, 3, 10_000, execution_steps=20).batches(tasks=2)) as batches:
        assert [batch.step for batch in itertools.islice(batches, 2)] == [0, 1]
        assert sum(thread.name == "manyviews-prefetch" for thread in threading.enumerate()) == 2, "the stream and the next execution"
    assert not any(thread.name == "manyviews-prefetch" for thread in threading.enumerate())


def test_a_failing_task_reaches_the_trainer(ray_local: None, tmp_path: Path) -> None:
    dataset = write(tmp_path, 200)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(Exception, match=r"a\.parquet"):
        collect(dataset, make_sampler(dataset), 2)
    assert wait_until(lambda: gc.collect() >= 0 and not coordinators()), "executors end with their stream"


@pytest.mark.parametrize("alone_s", [0.0, 60.0])
def test_evaluation_images(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone_s: float) -> None:
    dataset = write(tmp_path, 150, (7, 80))
    monkeypatch.setattr(loader, "EVALUATION_BYTES", 3 * 16 * 16 * 20)  # several tasks
    monkeypatch.setattr(loader, "LOCAL_BLOCK", 50)
    monkeypatch.setattr(loader, "LOCAL_DECODE_S", alone_s)
    by_tasks: list[int] = []
    execution = ray_data.execution
    monkeypatch.setattr(loader, "execution", lambda *one, **others: by_tasks.append(len(one[1])) or execution(*one, **others))
    ids = np.random.default_rng(0).permutation(150)[:120]
    result = evaluation_images(dataset, ids, 16, tasks=2)
    good = ids[~np.isin(ids, (7, 80))]
    assert by_tasks == ([] if alone_s else [6])
    assert (result.ids.numpy() == good).all() and (result.labels.numpy() == good % 7).all()
    assert {slot.id for slot in result.bad} == {7, 80} & set(ids.tolist())
    assert result.images.shape == (len(good), 16, 16, 3)
    assert (result.images[:, 0, 8, 0].numpy() == good % 256).all()  # the first rows hold the id


def test_long_streams_hold_little_memory(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    dataset = write(tmp_path, 400, size=40)
    views = {"global": CropGroup(count=2, size=96)}
    sampler = make_sampler(dataset, images_per_task=64)
    block = 64 * 2 * 96 * 96 * 3
    used = []
    for batch in TrainLoader(dataset, sampler, views, 3, 120, buffer_bytes=16 * block).batches(tasks=2):
        free, whole = (resources.get("object_store_memory") for resources in (ray.available_resources(), ray.cluster_resources()))
        if batch.step % 5 == 0 and free is not None and whole is not None:  # a busy node may not have told
            used.append(whole - free)
            time.sleep(0.05)
    assert len(used) > 5 and max(used) < 16 * block, f"{max(used) / block:.1f} blocks; 120 steps make 60"
