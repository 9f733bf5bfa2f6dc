"""The whole stream through Ray Data: the planned images, the same after a resume, and bad images replaced and reported."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from methods.parts.views import CropGroup
from pipeline.config import DataConfig
from pipeline.ingest import ray_data, stream
from pipeline.ingest.manifest import Manifest
from pipeline.ingest.photometric import Normalisation, finish_views
from pipeline.ingest.plan import Plan
from pipeline.ingest.sources import open_source
from pipeline.ingest.stream import Batch, Stream, evaluation_images
from pipeline.ingest.window import cut_images, substitutes

VIEWS = {"global": CropGroup(count=2, size=16), "local": CropGroup(count=1, size=8, scale=(0.1, 0.3))}


def write(path: Path, count: int, bad: tuple[int, ...] = (), size: int = 12) -> Manifest:
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


def make_plan(manifest: Manifest, window: int = 32, lanes: int = 4, batch: int = 32) -> Plan:
    return Plan(manifest.spans, manifest.training_ids(0), seed=3, global_batch=batch, lanes=lanes, window=window)


def collect(manifest: Manifest, plan: Plan, total: int, start: int = 0, finish: Normalisation | None = None, **place: int) -> list[Batch]:
    return list(Stream(manifest, plan, VIEWS, 3, total, finish=finish).batches(start, tasks=2, **place))


def same(a: Batch, b: Batch) -> bool:
    tensors = all((a.crops[name] == b.crops[name]).all() and (a.tables[name] == b.tables[name]).all() for name in a.crops)
    return bool(tensors and (a.ids == b.ids).all() and (a.labels == b.labels).all() and (a.epoch, a.step) == (b.epoch, b.step))


def test_batches_are_the_planned_ones(ray_local: None, tmp_path: Path) -> None:
    manifest = write(tmp_path, 500)
    plan = make_plan(manifest)
    batches = collect(manifest, plan, 2 * plan.steps_per_epoch + 3)
    assert [batch.step for batch in batches] == list(range(2 * plan.steps_per_epoch + 3))
    for batch in batches:
        epoch, step = divmod(batch.step, plan.steps_per_epoch)
        assert batch.epoch == epoch and (batch.ids.numpy() == plan.batch(epoch, step)).all()
        assert (batch.labels.numpy() == batch.ids.numpy() % 7).all() and not batch.bad
        assert batch.crops["global"].shape == (32, 2, 16, 16, 3) and batch.crops["local"].dtype == torch.uint8
    first = batches[0]  # the pixels belong to the ids, and the views to the epoch
    expected = cut_images(manifest.read(first.ids.numpy()), 0, VIEWS, 3, chunk=8)
    assert (first.crops["global"].numpy() == expected["crops/global"]).all()
    assert (first.tables["local"] == expected["table/local"]).all()


def test_views_finished_by_the_tasks_are_those_finished_on_the_device(ray_local: None, tmp_path: Path) -> None:
    manifest = write(tmp_path, 100)
    plan, size = make_plan(manifest), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
    cut, finished = collect(manifest, plan, 3), collect(manifest, plan, 3, finish=size)
    for one, other in zip(cut, finished, strict=True):
        assert other.crops["global"].shape == (32, 2, 3, 16, 16) and other.crops["global"].dtype == torch.float32
        ours, theirs = finish_views(one, VIEWS, *size, "cpu"), finish_views(other, VIEWS, *size, "cpu")
        for name in VIEWS:
            assert theirs.stacks[name].is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(ours.stacks[name], theirs.stacks[name], rtol=0, atol=5e-6)


def test_batches_cut_here_are_those_of_the_tasks(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write(tmp_path, 500, bad=(3, 250))
    plan = make_plan(manifest, window=64)  # eight chunks
    here: list[int] = []

    def noted(*arguments: Any) -> Any:
        here.append(len(arguments[0]))
        return cut_images(*arguments)

    monkeypatch.setattr(stream, "cut_images", noted)  # the tasks' own is another
    monkeypatch.setattr(stream, "OWN_PART", 16)
    monkeypatch.setattr(stream, "OWN_IMAGES", 200)
    monkeypatch.setattr(stream, "announced", lambda execution, count, delivered: execution)  # as if they were slow
    mixed = [collect(manifest, plan, 20, start) for start in (0, 5)]
    assert 2 <= len(here) <= 32 and set(here) == {16}, "of each stream one window at most"
    here.clear()
    small = collect(manifest, make_plan(manifest, window=8), 20, 5)
    assert 2 < len(here) <= 2 * 200 // 32, "windows of one chunk: as many images as are allowed, or up to the first bad one"
    assert all(same(a, b) for a, b in zip(collect(manifest, make_plan(manifest, window=8), 20)[5:], small, strict=True))
    monkeypatch.setattr(Manifest, "rereadable", False)
    count = len(here)
    by_tasks = collect(manifest, plan, 20)
    assert len(here) == count
    assert all(same(a, b) for a, b in zip(by_tasks, mixed[0], strict=True))
    assert all(same(a, b) for a, b in zip(by_tasks[5:], mixed[1], strict=True))
    assert any(batch.bad for batch in mixed[0])


def test_resume_gives_the_remaining_batches(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write(tmp_path, 500)
    plan = make_plan(manifest)
    whole = collect(manifest, plan, 40)
    monkeypatch.setattr(stream, "PASS_BYTES", 1)  # many Ray Data executions
    for start in (0, 14, 15, 39, 40):
        rest = collect(manifest, plan, 40, start=start)
        assert len(rest) == 40 - start and all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_views_do_not_depend_on_the_window(ray_local: None, tmp_path: Path) -> None:
    manifest = write(tmp_path, 200)
    by_id = []
    for window in (8, 1000):
        batches = collect(manifest, make_plan(manifest, window), 6)
        by_id.append({int(i): batch.crops["global"][k] for batch in batches for k, i in enumerate(batch.ids)})
    shared = by_id[0].keys() & by_id[1].keys()
    assert len(shared) > 100 and all((by_id[0][i] == by_id[1][i]).all() for i in shared)


def test_ranks_share_the_global_batch(ray_local: None, tmp_path: Path) -> None:
    manifest = write(tmp_path, 300)
    plan = make_plan(manifest)
    whole = collect(manifest, plan, 12)
    parts = [collect(manifest, plan, 12, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        lanes = batch.crops["global"].unflatten(0, (4, 8))
        for rank in range(2):
            assert (parts[rank][step].crops["global"] == lanes[rank::2].flatten(0, 1)).all()


def test_bad_images_are_replaced_and_reported(ray_local: None, tmp_path: Path) -> None:
    bad = (3, 50, 51, 199)
    manifest = write(tmp_path, 200, bad)
    plan = make_plan(manifest)
    batches = collect(manifest, plan, plan.steps_per_epoch)
    again = collect(manifest, plan, plan.steps_per_epoch)
    planned = np.concatenate([plan.batch(0, step) for step in range(plan.steps_per_epoch)])
    reported = [slot.id for batch in batches for slot in batch.bad]
    assert sorted(reported) == sorted(set(bad) & set(planned)) and reported
    assert all(f"a.parquet#{slot.id}" in slot.path and slot.reason for batch in batches for slot in batch.bad)
    for step, batch in enumerate(batches):
        replaced = batch.ids.numpy() != plan.batch(0, step)
        assert set(plan.batch(0, step)[replaced]) == {slot.id for slot in batch.bad}
        assert not set(batch.ids.tolist()) & set(bad) and len(batch.ids) == 32
        assert same(batch, again[step])


def test_only_bad_images_still_make_batches(ray_local: None, tmp_path: Path) -> None:
    manifest = write(tmp_path, 64, tuple(range(64)))
    batches = collect(manifest, make_plan(manifest), 2)
    assert sum(len(batch.bad) for batch in batches) == 64
    assert all((batch.crops["global"] == 0).all() for batch in batches)


def test_substitutes_come_from_another_chunk() -> None:
    assert substitutes([True, False, True, True, True, True], 2).tolist() == [0, 3, 2, 3, 4, 5]
    assert substitutes([True, False, True, False, True, True], 2).tolist() == [0, 5, 2, 5, 4, 5]
    assert substitutes([True, False, True, True], 4).tolist() == [0, 2, 2, 3]
    assert substitutes([False, True], 1).tolist() == [1, 1]
    assert substitutes([False, False], 1).tolist() == [0, 1]


def test_a_wrong_block_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path, 200)
    plan = make_plan(manifest)
    items = stream._Items(plan, 0, 4, 0, 1)
    blocks = []
    for number in range(items.first, items.last):
        epoch, group, lane = items.at(number)
        block = cut_images(manifest.read(plan.window(epoch, group, lane)), epoch, VIEWS, 3, plan.chunk)
        slots = stream._first_slot(plan, group, lane) + np.arange(len(block["id"]))
        blocks.append(block | {"epoch": np.full(len(slots), epoch), "slot": slots})
    assert len(list(stream.batches_of(blocks, manifest, plan, VIEWS, items, 0))) == 4
    for wrong in (blocks[1:], [blocks[0] | {"epoch": blocks[0]["epoch"] + 1}], [{k: v[:-1] for k, v in blocks[0].items()}]):
        with pytest.raises(RuntimeError, match="out of order"):
            list(stream.batches_of(wrong, manifest, plan, VIEWS, items, 0))


def test_leaving_early_ends_the_stream(ray_local: None, tmp_path: Path) -> None:
    import threading

    manifest = write(tmp_path, 200)
    batches = Stream(manifest, make_plan(manifest), VIEWS, 3, 10_000).batches(tasks=2)
    assert next(batches).step == 0
    batches.close()
    assert not any(thread.name == "manyviews-stream" for thread in threading.enumerate())


def test_a_failing_task_reaches_the_trainer(ray_local: None, tmp_path: Path) -> None:
    manifest = write(tmp_path, 200)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(Exception, match=r"a\.parquet"):
        collect(manifest, make_plan(manifest), 2)


@pytest.mark.parametrize("alone_s", [0.0, 60.0])
def test_evaluation_images(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone_s: float) -> None:
    manifest = write(tmp_path, 150, (7, 80))
    monkeypatch.setattr(stream, "EVALUATION_BYTES", 3 * 16 * 16 * 20)  # several tasks
    monkeypatch.setattr(stream, "OWN_PART", 50)
    monkeypatch.setattr(stream, "ALONE_S", alone_s)
    by_tasks: list[int] = []
    monkeypatch.setattr(stream, "run", lambda *arguments: by_tasks.append(arguments[2]) or ray_data.run(*arguments))
    ids = np.random.default_rng(0).permutation(150)[:120]
    result = evaluation_images(manifest, ids, 16, tasks=2)
    good = ids[~np.isin(ids, (7, 80))]
    assert by_tasks == ([] if alone_s else [6])
    assert (result.ids.numpy() == good).all() and (result.labels.numpy() == good % 7).all()
    assert {slot.id for slot in result.bad} == {7, 80} & set(ids.tolist())
    assert result.images.shape == (len(good), 16, 16, 3)
    assert (result.images[:, 0, 8, 0].numpy() == good % 256).all()  # the first rows hold the id


def test_long_streams_hold_little_memory(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    manifest = write(tmp_path, 400, size=40)
    views = {"global": CropGroup(count=2, size=96)}
    plan = make_plan(manifest, window=64)
    block = 64 * 2 * 96 * 96 * 3
    monkeypatch.setattr(stream, "PASS_BYTES", 8 * block)
    used = []
    for batch in Stream(manifest, plan, views, 3, 120).batches(tasks=2):
        free, whole = (resources.get("object_store_memory") for resources in (ray.available_resources(), ray.cluster_resources()))
        if batch.step % 5 == 0 and free is not None and whole is not None:  # a busy node may not have told
            used.append(whole - free)
    assert len(used) > 5 and max(used) < 24 * block  # this pass, the next, and what is being cut; 120 steps make 100 blocks or more


def test_ray_starts_once_and_tasks_find_the_package(ray_local: None) -> None:
    import ray

    before = ray.get_runtime_context().get_job_id()
    stream.start_ray()
    assert ray.get_runtime_context().get_job_id() == before

    @ray.remote
    def inside() -> tuple[str, str]:
        import os

        import pipeline.ingest.stream as there

        return there.__file__, os.environ["OMP_NUM_THREADS"]

    assert ray.get(inside.remote()) == (stream.__file__, "1")


def test_tasks_do_not_load_timm() -> None:
    """It would cost every worker seconds. In a process of its own: a used Ray worker may hold it for something else."""
    code = "import pipeline.ingest.stream, sys; sys.exit('timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
