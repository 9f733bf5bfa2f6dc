"""A group of workers of real Ray Train: what holds them, how they exchange, and how they end. What they do is small here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from pipeline.train.attend import WorkersLost, attend
from pipeline.train.group import CPU_WORKER, Group, Shape
from pipeline.train.relay import Mute

from pipeline.ingest.ray_data import start_ray
from pipeline.runs import RunFolder
from pipeline.train import relay_actor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def room() -> Iterator[None]:
    """A Ray with a CPU more than tasks need, as a run with workers starts it."""
    ray.shutdown()
    start_ray(extra_cpus=1)
    yield
    ray.shutdown()


@pytest.fixture
def begin(room: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Group]]:
    """Starts a group of two workers which do what they are given."""
    groups: list[Group] = []

    def begin(do: Callable[[dict[str, Any]], Any], again: bool = True) -> Group:
        monkeypatch.setattr(relay_actor, "enter", do)
        groups.append(Group(tmp_path, Shape(2, CPU_WORKER, again=again, timeout_s=60.0, wait_s=60.0, max_restarts=3)))
        return groups[-1]

    here = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(here)  # workers cannot import it
    yield begin
    ray.cloudpickle.unregister_pickle_by_value(here)
    for group in groups:
        group.end()


def exchange(settings: dict[str, Any]) -> bytes:
    import os

    import psutil
    import ray
    from ray.train import get_context
    from ray.train.collective import barrier, broadcast_from_rank_zero

    rank = get_context().get_world_rank()
    heard = [broadcast_from_rank_zero((k, rank)) for k in range(3)]
    kinds = {" ".join(process.cmdline()).split(".")[0].strip() for process in psutil.Process(os.getppid()).children()}
    barrier()  # both have looked
    quiet = {key: os.environ.get(key) for key in ("RAY_TRAIN_ENABLE_PRINT_PATCH", "OMP_NUM_THREADS")}
    return ray.cloudpickle.dumps({"heard": heard, "kinds": kinds, "quiet": quiet, "tasks": settings["tasks"]})  # type: ignore[no-any-return]


@pytest.mark.parametrize("known", [True, False])
def test_workers_hear_rank_0_and_no_process_has_nothing_to_do(
    known: bool, begin: Callable[..., Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where another Ray has other inner names: Ray Train's own helpers would run again, of some 4 CPU seconds each."""
    if not known:
        monkeypatch.setattr(relay_actor, "KNOWN", "another Ray")
    group = begin(exchange)
    done: Any = group.result()[0]
    assert done["heard"] == [(0, 0), (1, 0), (2, 0)]
    found = {kind for kind in done["kinds"] if kind.startswith("ray::")} - {"ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    if known:
        assert found == {"ray::Relay", "ray::Exchange", "ray::RayTrainWorker"}
    else:
        assert found >= {"ray::Relay", "ray::TrainController", "ray::RayTrainWorker"}
    assert done["quiet"] == {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "OMP_NUM_THREADS": "1"} and done["tasks"] >= 1
    group.end()
    assert not list(tmp_path.glob(".ray-*")) and ray.is_initialized()


def die_once(settings: dict[str, Any]) -> bytes:
    import os
    import pathlib
    import signal

    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    mark = pathlib.Path(settings["run"]) / "died"
    heard = broadcast_from_rank_zero(mark.exists())
    if not heard:
        if get_context().get_world_rank() == 1:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        broadcast_from_rank_zero(None)  # nobody answers
    return ray.cloudpickle.dumps("second life")  # type: ignore[no-any-return]


@pytest.mark.parametrize(("again", "result"), [(True, ("second life", "")), (False, (None, "lost worker 1"))])
def test_lost_workers_start_again_or_are_told_of(again: bool, result: tuple[Any, str], begin: Callable[..., Group]) -> None:
    done, loss = begin(die_once, again).result()
    assert done == result[0] and loss.startswith(result[1])


def hang(settings: dict[str, Any]) -> bytes:
    import os
    import pathlib
    import time

    from ray.train import get_context

    (pathlib.Path(settings["run"]) / f"pid-{get_context().get_world_rank()}").write_text(str(os.getpid()))
    time.sleep(600)
    raise AssertionError


@pytest.mark.parametrize("dies", [False, True])
def test_workers_end_with_what_holds_them(dies: bool, begin: Callable[..., Group], tmp_path: Path) -> None:
    group = begin(hang)
    workers = [int(wait_for(tmp_path / f"pid-{rank}")) for rank in range(2)]
    assert group.alive
    if dies:
        [relay] = [p for p in psutil.Process(os.getpid()).children(recursive=True) if "ray::Relay" in " ".join(p.cmdline())]
        relay.kill()
        with pytest.raises(WorkersLost, match="the process that held the workers died"):
            attend(group, RunFolder(tmp_path), screen=Mute(), stop=lambda: False, news=lambda: None, before=lambda step: None)
    else:
        group.end()
    deadline = time.monotonic() + 60
    while any(map(psutil.pid_exists, workers)):
        assert time.monotonic() < deadline, "a worker outlived its group"
        time.sleep(0.1)
    assert ray.is_initialized(), "a driver that goes on needs no other Ray"


def wait_for(path: Path, seconds: float = 120.0) -> str:
    """What a worker has written."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.1)
    return path.read_text()


def test_a_worker_comes_forward_with_all_its_threads_where_that_is_allowed() -> None:
    code = (
        "import os, threading\n"
        "own = os.getpriority(os.PRIO_PROCESS, 0)\n"
        "os.nice(3)\n"
        "try: os.setpriority(os.PRIO_PROCESS, 0, own)\n"
        "except PermissionError: own += 3\n"
        "else: os.nice(3)\n"
        "from pipeline.train.relay_actor import come_forward\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "come_forward()\n"
        "print(own, *{os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir('/proc/self/task')})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted, *found = done.stdout.split()
    assert found == [wanted], "all threads alike: as this process if that is allowed, else as before"
