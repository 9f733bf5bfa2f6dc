"""What Ray is given of the machine, and the threads that work ahead of the loop."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import machine
from pipeline.data import ray_data
from pipeline.data.prefetch import Prefetcher, in_background

GIB = 2**30


@pytest.mark.parametrize(("memory", "shared", "store"), [(100, 90, 30), (100, 10, 9), (100, 0.1, 0.5)])
def test_the_object_store_fits_memory_and_dev_shm(memory: float, shared: float, store: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_data, "total_memory", lambda: memory * GIB)
    monkeypatch.setattr(ray_data.os.path, "ismount", lambda _: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=shared * GIB))
    assert ray_data.object_store_bytes() == pytest.approx(store * GIB)


def test_a_container_limits_memory_and_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cgroup", lambda *_: 3 * GIB)
    assert machine.total_memory() == 3 * GIB
    monkeypatch.setattr(ray_data, "available_cores", lambda: 7.5)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_data.default_tasks() == 7
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert ray_data.default_tasks() is None


def test_ray_starts_once_and_tasks_find_the_package(ray_local: None) -> None:
    import ray

    before = ray.get_runtime_context().get_job_id()
    ray_data.start_ray()
    assert ray.get_runtime_context().get_job_id() == before

    @ray.remote
    def inside() -> tuple[str, str]:
        import os

        import pipeline.data.ray_data as there

        return there.__file__, os.environ["OMP_NUM_THREADS"]

    assert ray.get(inside.remote()) == (ray_data.__file__, "1")


def test_tasks_do_not_load_timm() -> None:
    """It would cost every worker seconds. In a process of its own: a used Ray worker may hold it for something else."""
    code = "import pipeline.data.loader, sys; sys.exit('timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_values_are_ready_ahead_and_errors_arrive_behind_them() -> None:
    made, closed, third = [], threading.Event(), threading.Event()

    def values() -> Generator[int]:
        try:
            for number in range(3):
                if number == 2:
                    third.set()
                made.append(number)
                yield number
            raise KeyError("broken")
        finally:
            closed.set()

    ahead = Prefetcher(values, size=2)
    while len(ahead) < 2:
        pass
    assert made == [0, 1] and not third.wait(0.1), "no more than two"
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="broken"):
        next(ahead)
    assert closed.is_set() and list(ahead) == []
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0).result()


def test_closing_ends_the_generator_in_its_thread() -> None:
    ended: list[str] = []

    def values() -> Generator[int]:
        try:
            while True:
                yield 0
        finally:
            ended.append(threading.current_thread().name)

    ahead = Prefetcher(values, size=2)
    assert next(ahead) == 0
    ahead.close()
    assert ended == ["manyviews-prefetch"] and list(ahead) == []
