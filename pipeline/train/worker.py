"""One worker's part of a run, in its own process under Ray Train."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.runs import RunFolder
from pipeline.train import checkpoint
from pipeline.train.done import Done
from pipeline.train.introduction import introduction
from pipeline.train.prepare import prepare_again
from pipeline.train.relay import Mute, Remote
from pipeline.train.work import work


def run(settings: dict[str, Any]) -> Done | None:
    """Train as one of the workers.

    Args:
        settings: `run`, the run's folder, and `remote`, the URI of the one whose copy that is; `tasks` at a time that cut for
            this worker; `timeout_s` of a collective call; `prepares`, whether rank 0 prepares the run; the `relay` to the
            driver, which else gives the rest: see `handed`.

    Returns:
        How it ended; None from other ranks than 0.
    """
    import ray
    from ray.train import get_context

    context = get_context()
    try:
        folder = RunFolder(settings["remote"] or Path(settings["run"]))
        given = handed(settings, folder)
        ready, state = ray.get(given["prepared"][0])
        common = {"local_workers": context.get_local_world_size(), "tasks": settings["tasks"], "evaluate": given["evaluate"]}
        with process_group(settings["timeout_s"]) as common["device"]:
            if context.get_world_rank() > 0:
                work(ready, folder, state, screen=Mute(), report=lambda step, metrics: None, stop=lambda: False, **common)
                return None
            start = checkpoint.last_step(folder.checkpoints)
            remote = Remote(settings["relay"], folder, ready.resolved.facts.global_batch_size, start)
            if settings["prepares"] and remote.first:
                for line in introduction(ready, folder, start):
                    remote.say(line)
            try:
                return work(ready, folder, state, screen=remote, report=remote.report, stop=remote.stopping.is_set, **common)
            finally:
                remote.close()
    except ImportError:
        raise
    except Exception as error:
        if not from_a_peer(error):  # starting again would not help: the driver ends the run
            ray.get(settings["relay"].send.remote([("failed", {"error": error})]))
        raise


def handed(settings: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """What all workers of a group begin with: `prepared`, a list with one reference, to the run's `Prepared` and what it starts
    from where it has no checkpoint; and `evaluate`, as in `work`. Keep it: with rank 0's the reference would end."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    if settings["prepares"]:
        first = get_context().get_world_rank() == 0
        given: dict[str, Any] | None = {"prepared": [ray.put((prepare_again(folder), None))], "evaluate": True} if first else None
        heard: dict[str, Any] = broadcast_from_rank_zero(given)
        return given or heard
    while (given := ray.get(settings["relay"].given.remote(settings["run"]))) is None:
        time.sleep(0.1)
    return given


@contextlib.contextmanager
def process_group(timeout_s: float) -> Iterator[torch.device]:
    """Join all workers of this group; gives the device of this one. Rank 0 chooses a free port, of which the others hear."""
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero
    from ray.train.torch import get_device

    context, device, timeout = get_context(), get_device(), timedelta(seconds=timeout_s)
    rank, world = context.get_world_rank(), context.get_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    host = ray.util.get_node_ip_address()
    connect = partial(dist.TCPStore, world_size=world, is_master=rank == 0, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
    own = connect(host, 0) if rank == 0 else None
    host, port = broadcast_from_rank_zero((host, own.port) if own else None)
    store = own or connect(host, port)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    yield device
    dist.destroy_process_group()  # not after an error: where a peer is lost it would wait for it


def from_a_peer(error: BaseException) -> bool:
    """Whether a worker failed only because another one did: its collective call broke, or its device did."""
    import ray

    if isinstance(error, dist.DistError | ray.exceptions.RayActorError):
        return True
    marks = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL", "gloo", "CUDA error")
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
