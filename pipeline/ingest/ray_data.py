"""How this project uses Ray and Ray Data: quietly, in order, one block for each task."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from methods.parts.errors import ConfigError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # of workers: each task has one core
# Ray starts all workers at niceness 15, trainers and tasks alike; a trainer that waits for its turn keeps all others waiting
PRIORITY = {"RAY_worker_niceness": "0"}  # of a local Ray's workers; tasks step back by themselves
TASK_NICENESS = 10
# A local Ray has no dashboard. Asked for the state of its controller, Ray Train would take that of any other Ray on this machine, not
# find the controller there and end the workers. An address where nothing listens makes the question fail, which it takes as no answer.
NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
ROOT = Path(__file__).resolve().parents[2]  # the checkout, or site-packages


def start_ray(num_cpus: int | None = None, extra_cpus: int = 0, resources: dict[str, float] | None = None) -> None:
    """Start Ray in this process, quietly, or join the cluster that RAY_ADDRESS names. Does nothing if Ray runs.

    Args:
        num_cpus: logical CPUs of a local Ray; None = the machine's, at least 2.
        extra_cpus: more of them, for training workers, which take a part of one each.
        resources: others by name that a local Ray shall have.

    Raises:
        ConfigError: no cluster can be joined at RAY_ADDRESS.
    """
    os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
    import ray

    if ray.is_initialized():
        return
    if joins_cluster():
        _join(os.environ["RAY_ADDRESS"])
        return
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    workers = THREADS | PRIORITY | NO_DASHBOARD | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    long = len(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "") > 40  # Unix sockets allow 107 bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    before = {key: os.environ.get(key) for key in workers}
    os.environ.update(workers)  # a local Ray hands its environment to its workers, at no cost
    try:
        for last in (False, False, True):
            try:
                ray.init(
                    "local",
                    num_cpus=(num_cpus or max(2, os.cpu_count() or 2)) + extra_cpus,
                    resources=resources,
                    object_store_memory=int(min(2e9, 0.3 * memory)),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _temp_dir="/tmp/ray" if long else None,
                )
                break
            except Exception as error:  # Ray gives its own agents 15 s to start, too little where other programs keep the cores
                if last or "timed out during startup" not in str(error):
                    raise
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def joins_cluster() -> bool:
    """Does RAY_ADDRESS name a cluster? In a submitted job Ray sets it."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def _join(address: str) -> None:
    import ray

    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address}: is the address of a dashboard, to which jobs are sent; put `ray job submit --working-dir . -- ` "
            "before the command, or unset RAY_ADDRESS to work on this machine"
        )
    try:
        ray.init(address, runtime_env=cluster_environment(), log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"RAY_ADDRESS={address}: no cluster could be joined there ({words}); start one (`ray up cluster.yaml`), "
            "set RAY_AUTH_MODE as it has it, or unset RAY_ADDRESS to work on this machine"
        ) from None


def cluster_environment() -> dict[str, Any]:
    """Ray's runtime environment for workers on other machines: this process's code, quiet processes of one thread.

    The code travels as `working_dir`: with the job, or uploaded here from a checkout; an installed package is expected
    on every node. No path of this machine is sent along. What a job was submitted with stands, because Ray refuses a
    key that is given twice.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    given = job.get("env_vars") or {}
    environment: dict[str, Any] = {"env_vars": {k: v for k, v in (QUIET | THREADS).items() if k not in given}}
    if "working_dir" not in job and (ROOT / "manyviews.py").is_file() and (ROOT / "pyproject.toml").is_file():
        environment["working_dir"] = str(ROOT)
    return environment


def default_tasks() -> int | None:
    """Tasks at the same time: one per CPU on one machine; no limit in a cluster, whose pool grows with the tasks that wait."""
    import ray

    return None if joins_cluster() else max(1, int(ray.cluster_resources().get("CPU", 1)))


def run(
    function: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], first: int, last: int, tasks: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of `function({"id": [k]})` for k in first .. last-1, in order, from one Ray Data execution.

    Args:
        tasks: how many run at the same time; None = as many as the resources allow.
    """
    import ray
    from ray.data import DataContext, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = None  # one task gives one block, however large
    context.execution_options.preserve_order = True
    if last <= first:
        return
    tasks = tasks and min(tasks, last - first)  # Ray warns of a limit that cannot be reached
    with DataContext.current(context):
        items = ray.data.range(last - first, override_num_blocks=last - first)
        blocks = items.map_batches(partial(_shifted, function, first), batch_size=None, compute=TaskPoolStrategy(size=tasks))
    yield from blocks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)


def _shifted(function: Callable[[dict[str, np.ndarray]], Any], first: int, item: dict[str, np.ndarray]) -> Any:
    return function({"id": item["id"] + first})


def ahead(passes: Iterator[tuple[int, Iterator[Any]]], waiting: int, overlap: int) -> Generator[Any]:
    """What successive Ray Data executions yield, in order, each drained in a thread of its own as fast as it delivers.

    The first one starts at once, before a block is asked for. The next one starts when `overlap` or fewer blocks of the last are
    outstanding, so that no core idles while one ends and the other starts, and `waiting` or fewer blocks wait for the trainer.
    An execution whose output waits for its consumer
    would spin on a whole core (seen with Ray 2.60), in the trainer's process and under its interpreter lock, which slows
    training several times.

    Args:
        passes: how many blocks an execution yields, and the execution; it starts with its first `next`.
    """
    queues: deque[deque[Any]] = deque()  # blocks of every execution that is not yet used up, None behind its last
    outstanding, change, stopped = 0, threading.Condition(), False

    def drain(execution: Iterator[Any], queue: deque[Any]) -> None:
        nonlocal outstanding
        try:
            for block in execution:
                with change:
                    queue.append(block)
                    outstanding -= 1
                    change.notify_all()
                    if stopped:
                        return
            end: BaseException | None = None
        except BaseException as error:  # raised again in the trainer
            end = error
        with change:
            queue.append(end)
            change.notify_all()

    def may_start() -> bool:
        return stopped or (outstanding <= overlap and sum(map(len, queues)) <= waiting)

    threads: list[threading.Thread] = []

    def work() -> None:
        nonlocal outstanding
        try:
            for count, execution in passes:
                with change:
                    change.wait_for(may_start)
                    if stopped:
                        return
                    outstanding += count
                    queue: deque[Any] = deque()
                    queues.append(queue)
                threads.append(threading.Thread(target=drain, args=(execution, queue), name="manyviews-drain", daemon=True))
                threads[-1].start()
                del threads[:-2]  # those before have ended
            end: BaseException | None = None
        except BaseException as error:
            end = error
        with change:
            queues.append(deque([StopIteration() if end is None else end]))
            change.notify_all()

    threads.append(threading.Thread(target=work, name="manyviews-stream", daemon=True))
    first = threads[0]

    def blocks() -> Generator[Any]:
        nonlocal stopped
        first.start()
        try:
            yield None  # that it has begun: only what has begun is ended when nobody wants it any more
            while True:
                with change:
                    change.wait_for(lambda: bool(queues) and bool(queues[0]))
                    value = queues[0].popleft()
                    if value is None:
                        queues.popleft()
                    change.notify_all()
                if isinstance(value, StopIteration):
                    return
                if isinstance(value, BaseException):
                    raise value
                if value is not None:
                    yield value
        finally:
            with change:
                stopped = True
                queues.clear()
                change.notify_all()
            for thread in {first, *threads}:
                thread.join(timeout=30)

    begun = blocks()
    next(begun)
    return begun
