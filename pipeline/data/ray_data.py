"""Ray and Ray Data as this project starts them: with few log lines, blocks in order, one block for each task."""

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
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a thread of Ray Data that outlives `ray.shutdown` joins the cluster again
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # for Ray's workers: each task has one core
# A local Ray has no dashboard. Ray Train asks the dashboard for the state of its controller. It would ask that of another Ray on this
# machine, miss the controller there and end the workers. At an address where nothing listens the request fails, and it goes on.
NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
STORE_PART = 0.3  # of the memory, for Ray's object store
LEAST_STORE = 512 * 2**20  # bytes; where /dev/shm is smaller, Ray takes a file
ROOT = Path(__file__).resolve().parents[2]  # the checkout, or site-packages


def start_ray(num_cpus: int | None = None, extra_cpus: int = 0, resources: dict[str, float] | None = None) -> None:
    """Start a local Ray, or join the cluster that RAY_ADDRESS names. Do nothing if Ray runs.

    Args:
        num_cpus: logical CPUs of a local Ray; None = those of the machine, at least 2.
        extra_cpus: logical CPUs in addition, for training workers.
        resources: custom resources of a local Ray.

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
    os.environ.update(workers)  # the workers of a local Ray inherit it
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
            except Exception as error:  # Ray's agents have 15 s to start, which is too little on a busy machine
                if last or "timed out during startup" not in str(error):
                    raise
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def object_store_bytes() -> int:
    """Return the size of a local Ray's object store: 30 % of the memory of this process, at most what /dev/shm holds."""
    wanted = STORE_PART * total_memory()
    if os.path.ismount("/dev/shm"):
        wanted = min(wanted, 0.9 * shutil.disk_usage("/dev/shm").total)
    return int(max(LEAST_STORE, wanted))


def joins_cluster() -> bool:
    """Return whether RAY_ADDRESS names a cluster. Ray sets it in submitted jobs."""
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
    """Return Ray's runtime environment for workers on other machines: the code of this process, and one thread each.

    The code is sent as `working_dir`, by the submitted job or from this checkout. An installed package must be on every
    node. No path of this machine is sent. Keys of the submitted job are left out, because Ray refuses a key that is
    given twice.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    given = job.get("env_vars") or {}
    environment: dict[str, Any] = {"env_vars": {k: v for k, v in (QUIET | THREADS).items() if k not in given}}
    if "working_dir" not in job and (ROOT / "manyviews.py").is_file() and (ROOT / "pyproject.toml").is_file():
        environment["working_dir"] = str(ROOT)
    return environment


def default_tasks() -> int | None:
    """Return how many tasks may run at the same time: one per core on one machine, None (as many as the resources allow) in a cluster.

    Only the driver may call it: in other processes the environment does not say whether Ray was joined.
    """
    return None if joins_cluster() else max(1, int(available_cores()))


def raise_priority() -> None:
    """Set this thread, and the threads that it starts, to niceness 0 if the system allows it. Ray starts workers and tasks at 15."""
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
    """Prepare one Ray Data execution: one task for each item, which runs `function` and gives one block to one consumer.

    Block k goes to consumer k mod `consumers` if the blocks of every round have equally many rows. Each consumer gets its blocks in order.
    The executor runs in an actor on this machine. It starts when all consumers iterate, and ends when all have ended or the iterators are
    deleted. `function` is sent to the tasks by reference, so that the executor does not import its modules.

    Args:
        items: rows, as one value for each column.
        tasks: tasks that run at the same time; None = as many as the resources allow.
        buffer_bytes: no task starts while this many bytes of blocks are in the object store; None = Ray's default part of the store.

    Returns:
        An iterator for every consumer, which can be sent to another process.
    """
    import ray
    from ray.data import DataContext, ExecutionResources

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = None  # one task gives one block, however large
    context.execution_no_progress_timeout_s = -1  # consumers may pause
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(cpu=tasks, object_store_memory=buffer_bytes)
    if buffer_bytes is not None:
        context.override_object_store_memory_limit_fraction = 0.9  # else half of the store would be the limit
    with DataContext.current(context):
        rows = ray.data.from_items(list(items), override_num_blocks=len(items))
        # not a task pool of fixed size: Ray Data would not fuse it with the operator before it
        apply = partial(_apply, references=[ray.put(function)])
        splits: list[DataIterator] = rows.map_batches(apply, batch_size=None).streaming_split(consumers, equal=True)
    return splits


def _apply(item: dict[str, np.ndarray], references: list[ObjectRef]) -> dict[str, np.ndarray]:
    return _function(references[0])(item)


@lru_cache(maxsize=2)  # the functions of this execution and of the next one
def _function(reference: ObjectRef) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    import ray

    function: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = ray.get(reference)
    return function


def blocks(iterator: DataIterator, prefetch: int) -> Generator[dict[str, np.ndarray]]:
    """Yield a consumer's blocks in order, and fetch `prefetch` of them ahead. Close the generator to end early."""
    found: Generator[dict[str, np.ndarray]] = iter(  # type: ignore[assignment]
        iterator.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=prefetch)
    )
    with contextlib.closing(found):
        yield from found
