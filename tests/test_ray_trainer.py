"""Workers and their driver: messages, what a failure means, and how attempts follow each other."""

from __future__ import annotations

import io
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from methods.parts.errors import ConfigError
from pipeline.checkpoint import DiskFull
from pipeline.run_folder import RunFolder, create_run
from pipeline.tracking.run_tracker import read_points
from pipeline.train.health import TrainingAborted
from pipeline.train.placement import CPU_WORKER
from pipeline.train.progress import Display, NullReporter
from pipeline.train.ray_trainer import WorkersLost, failure_of, run_workers
from pipeline.train.reporting import RemoteReporter, deliver, open_channel


@pytest.fixture
def run(ray_local: None, tmp_path: Path) -> tuple[Any, RunFolder, Display, io.StringIO]:
    out = io.StringIO()
    screen = Display(Console(file=out, width=120), total_steps=10, start_step=0, batch=4, chance=None)
    return open_channel(), create_run(tmp_path, "a", "a"), screen, out


def until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_rank_0_reports_to_the_screen_and_the_folder_and_hears_the_stop(run: tuple[Any, RunFolder, Display, io.StringIO]) -> None:
    import ray

    channel, folder, screen, out = run
    first = RemoteReporter(channel, folder, rank=0, batch=4, start_step=0)
    second = RemoteReporter(channel, folder, rank=1, batch=4, start_step=0)
    for reporter, loss in ((first, 1.5), (second, 9.5)):
        reporter.update(5, loss=loss)
        reporter.info(f"evaluating after {loss}")
        reporter.report(5, {"loss": loss})
    until(lambda: deliver(ray.get(channel.collect.remote(False)), screen, folder) or "evaluating after 1.5" in out.getvalue())
    assert "step 5/10" in out.getvalue() and "loss 1.500" in out.getvalue() and "9.5" not in out.getvalue()
    assert [point["metrics"] for point in read_points(folder.path)] == [{"loss": 1.5}]
    assert not first.stopping.is_set() and not second.stopping.is_set()
    ray.get(channel.collect.remote(True))
    until(lambda: first.stopping.is_set() and second.stopping.is_set())
    first.close()
    second.close()


def test_a_worker_whose_attempt_was_given_up_exits(ray_local: None, tmp_path: Path) -> None:
    """Also one that hangs: it is a thread that notices."""
    import ray

    folder, channel = create_run(tmp_path, "a", "a"), open_channel()

    @ray.remote(num_cpus=0, max_retries=0)
    def hang(channel: Any, folder: RunFolder) -> None:
        RemoteReporter(channel, folder, rank=1, batch=1, start_step=0)
        (folder.path / "hangs").touch()
        time.sleep(600)

    task = hang.remote(channel, folder)
    until((folder.path / "hangs").exists, 60)
    ray.kill(channel)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(task, timeout=30)


def died() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


ASSERTED = RuntimeError("CUDA error: device-side assert triggered")
PEER_GONE = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")


@pytest.mark.parametrize(
    ("failures", "kind", "words"),
    [
        ({"r0": PEER_GONE, "r1": ConfigError("data.path=x: gone")}, ConfigError, "data.path=x"),
        ({"r0": TrainingAborted("loss is nan")}, TrainingAborted, "loss is nan"),
        ({"r1": DiskFull("no space left")}, DiskFull, "no space"),
        ({"r1": ModuleNotFoundError("No module named 'pipeline'")}, TrainingAborted, "cannot import this project .*install"),
        ({"r0": ASSERTED, "r1": PEER_GONE}, TrainingAborted, "assertion failed on the device"),
        ({"r0": ASSERTED, "r1": died()}, WorkersLost, "lost worker 1"),
        ({"r0": PEER_GONE, "r1": died()}, WorkersLost, "lost worker 1"),
        ({"r0": PEER_GONE, "r1": ValueError("shape mismatch")}, WorkersLost, "worker 0 failed"),
        ({}, WorkersLost, "Ray Train failed"),
        ({"r1": OSError("libtorch.so: cannot open shared object file")}, WorkersLost, "libtorch"),
    ],
)
def test_what_a_failure_means(failures: dict[str, Exception], kind: type[Exception], words: str) -> None:
    from ray.train import ControllerError, WorkerGroupError

    workers = {int(rank[1:]): failure for rank, failure in failures.items()}
    error = WorkerGroupError("Training failed", workers) if workers else ControllerError(RuntimeError("no node"))
    with pytest.raises(kind, match=words):
        raise failure_of(error)


def test_a_worker_that_cannot_load_our_code_ends_the_run(ray_local: None, tmp_path: Path) -> None:
    """As on a node without the project: Ray Train tells of it as a failure of its controller."""
    import sys
    import types

    nowhere = types.ModuleType("nowhere")
    exec("def work(settings): return 1", vars(nowhere))
    sys.modules["nowhere"] = nowhere
    try:
        with pytest.raises(TrainingAborted, match=r"cannot import this project .*nowhere.*install"):
            run_workers(vars(nowhere)["work"], {}, RunFolder(tmp_path), 1, CPU_WORKER, reporter=NullReporter(1), timeout_s=300)
    finally:
        del sys.modules["nowhere"]


def test_our_errors_travel_between_processes() -> None:
    for error in (ConfigError("a=1: no"), TrainingAborted("loss is nan"), DiskFull("full")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)
