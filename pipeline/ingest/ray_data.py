"""How this project uses Ray and Ray Data: quietly, in order, one block for each task."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


def start_ray(num_cpus: int | None = None, extra_cpus: int = 0) -> None:
    """Start Ray in this process, quietly, or join the cluster that RAY_ADDRESS names. Does nothing if Ray runs.

    Args:
        num_cpus: logical CPUs of a local Ray; None = the machine's, at least 2.
        extra_cpus: more of them, for training workers, which take a part of one each.
    """
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    workers = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    os.environ.update({k: v for k, v in quiet.items() if k not in os.environ})
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address, runtime_env={"env_vars": quiet | workers}, log_to_driver=False, logging_level="ERROR")
        return
    long = len(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "") > 40  # Unix sockets allow 107 bytes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    before = {key: os.environ.get(key) for key in workers}
    os.environ.update(workers)  # a local Ray hands its environment to its workers, at no cost
    try:
        ray.init(
            "local",
            num_cpus=(num_cpus or max(2, os.cpu_count() or 2)) + extra_cpus,
            object_store_memory=int(min(2e9, 0.3 * memory)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir="/tmp/ray" if long else None,
        )
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def run(
    function: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], first: int, last: int, tasks: int
) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of `function({"id": [k]})` for k in first .. last-1, in order, from one Ray Data execution.

    Args:
        tasks: how many run at the same time.
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
    with DataContext.current(context):
        items = ray.data.range(last - first, override_num_blocks=last - first)
        blocks = items.map_batches(
            partial(_shifted, function, first), batch_size=None, compute=TaskPoolStrategy(size=min(tasks, last - first))
        )
    yield from blocks.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)


def _shifted(function: Callable[[dict[str, np.ndarray]], Any], first: int, item: dict[str, np.ndarray]) -> Any:
    return function({"id": item["id"] + first})
