"""How this project uses Ray and Ray Data: quietly, in order, one block for each task."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from methods.parts.errors import ConfigError
from pipeline.machine import available_cores, total_memory

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.data import DataIterator

QUIET = {
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread of Ray Data's that outlives `ray.shutdown` would join the cluster again, and say so
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # of workers: each task has one core
# A local Ray has no dashboard. Asked for the state of its controller, Ray Train would take that of any other Ray on this machine, not
# find the controller there and end the workers. An address where nothing listens makes the question fail, which it takes as no answer.
NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
STORE_PART = 0.3  # of the memory, for Ray's object store
LEAST_STORE = 512 * 2**20  # bytes; where /dev/shm is smaller, Ray takes a file
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
    workers = THREADS | NO_DASHBOARD | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    if len(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "") > 40:  # Unix sockets allow 107 bytes
        workers["RAY_TMPDIR"] = "/tmp"
    before = {key: os.environ.get(key) for key in workers}
    os.environ.update(workers)  # a local Ray hands its environment to its workers, at no cost
    try:
        for last in (False, False, True):
            try:
                ray.init(
                    "local",
                    num_cpus=(num_cpus or max(2, int(available_cores()))) + extra_cpus,
                    resources=resources,
                    object_store_memory=object_store_bytes(),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
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


def object_store_bytes() -> int:
    """Return the size of a local Ray's object store: 30 % of the memory that this process may use, and never more than /dev/shm holds."""
    wanted = STORE_PART * total_memory()
    if os.path.ismount("/dev/shm"):
        wanted = min(wanted, 0.9 * shutil.disk_usage("/dev/shm").total)
    return int(max(LEAST_STORE, wanted))


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
    """Return how many tasks may run at the same time: one per core of this machine, or None, without a limit, in a cluster that may grow.

    Only the driver asks: elsewhere the environment does not tell whether Ray was joined. Everywhere None means no limit but the resources.
    """
    return None if joins_cluster() else max(1, int(available_cores()))


def raise_priority() -> None:
    """Run this thread, and those it starts, at niceness 0 where the system allows it: Ray starts trainers and tasks alike at 15."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)


# ---------------------------------------------------------------------------- executions


def execution(
    function: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    items: Sequence[Mapping[str, int]],
    consumers: int,
    *,
    tasks: int | None = None,
    buffer_bytes: int | None = None,
) -> list[DataIterator]:
    """Prepare one Ray Data execution: `function` on every item, each in a task of its own, whose block goes to one of the consumers.

    Block k is for consumer k mod `consumers`, if the blocks of every round have equally many rows; each consumer gets its own in order.
    The executor lives in an actor of Ray's, on this machine. It begins when all consumers iterate, and ends when they have ended or
    nobody holds the iterators any more. `function` reaches the tasks by reference, so that the executor does not load what it imports.

    Args:
        items: columns of one row each.
        tasks: how many run at the same time; None = as many as the resources allow.
        buffer_bytes: blocks in the object store at which no task begins any more; None = a part of the store, as Ray has it.

    Returns:
        An iterator for every consumer, which may be sent to another process.
    """
    import ray
    from ray.data import DataContext, ExecutionResources

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = None  # one task gives one block, however large
    context.execution_no_progress_timeout_s = -1  # a consumer may take its time
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(cpu=tasks, object_store_memory=buffer_bytes)
    if buffer_bytes is not None:
        context.override_object_store_memory_limit_fraction = 0.9  # else half of the store would be the limit
    with DataContext.current(context):
        rows = ray.data.from_items(list(items), override_num_blocks=len(items))
        # no task pool of fixed size: it would not be fused with what comes before
        apply = partial(_apply, references=[ray.put(function)])
        splits: list[DataIterator] = rows.map_batches(apply, batch_size=None).streaming_split(consumers, equal=True)
    return splits


def _apply(item: dict[str, np.ndarray], references: list[ObjectRef]) -> dict[str, np.ndarray]:
    return _function(references[0])(item)


@lru_cache(maxsize=2)  # of this execution, and of the next one
def _function(reference: ObjectRef) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    import ray

    function: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = ray.get(reference)
    return function


def blocks(iterator: DataIterator, prefetch: int) -> Generator[dict[str, np.ndarray]]:
    """Yield a consumer's blocks in order, with as many as `prefetch` on their way to this machine; close it to end early."""
    found: Generator[dict[str, np.ndarray]] = iter(  # type: ignore[assignment]
        iterator.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=prefetch)
    )
    with contextlib.closing(found):
        yield from found
