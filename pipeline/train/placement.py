"""Placement of workers: how many fit on the cluster, their resources, and advice about both."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from typing import Any

from methods.parts.errors import ConfigError
from pipeline.config import RunConfig, TrainConfig
from pipeline.data.ray_data import joins_cluster
from pipeline.resolve import divisors

Resources = dict[str, float]
# less than one logical CPU for a worker without a GPU: Ray Data needs a whole free one somewhere
CPU_WORKER: Resources = {"CPU": 0.25}
GPU_WORKER: Resources = {"CPU": 1.0, "GPU": 1.0}
CROPS_AT_ONCE = 2048  # crops of 224 x 224 pixels in one forward and backward pass that a ResNet-50 in bf16 fits into 80 GB (estimated)


def worker_resources(config: TrainConfig) -> Resources:
    """Return the resources of each worker: a GPU by `train.accelerator`; with `auto`, if the cluster has one now."""
    import ray

    gpu = config.accelerator == "gpu" or (config.accelerator == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    return dict(GPU_WORKER if gpu else CPU_WORKER)


def place_workers(
    config: TrainConfig,
    num_shards: int,
    *,
    info: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
    probe: bool = False,
    without: Collection[str] = (),
) -> tuple[int, Resources] | None:
    """Choose the largest number of workers in `train.workers` that divides the shards and fits; wait for a cluster that grows.

    Args:
        stop: True ends the wait.
        probe: run a task on every node first, because Ray lists a dead node for some time.
        without: ids of preempted nodes.

    Returns:
        The number of workers, and the resources of each; None if `stop` ended the wait.

    Raises:
        ConfigError: not even the smallest number fits: on a cluster after `train.resource_timeout_s`, on one machine at once.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    low, high = config.worker_range
    choices = [w for w in divisors(num_shards) if low <= w <= high]
    deadline = time.monotonic() + (config.resource_timeout_s if joins_cluster() else 0.0)
    waiting = False
    while True:
        alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without]
        nodes = [node["Resources"] for node in (responsive_nodes(alive) if probe else alive)]
        resources = worker_resources(config)
        fitting = [w for w in choices if fits(w, resources, nodes)]
        if fitting or time.monotonic() >= deadline or stop():
            break
        if not waiting:
            waiting = True
            room = f"{choices[0]} workers with {_describe(resources)} each"
            info(f"waiting up to {config.resource_timeout_s:.0f} s until the cluster has room for {room}")
            request_resources(bundles=[*[resources] * choices[-1], {"CPU": 1}])  # for an autoscaler
        time.sleep(2.0)
    if waiting:
        request_resources(bundles=[])
    if fitting:
        if joins_cluster() and config.accelerator == "auto" and "GPU" not in resources:
            info("the cluster has no GPU now: training on CPUs; --train.accelerator gpu waits for GPUs")
        return max(fitting), resources
    if stop():
        return None
    there = "; ".join(_describe({k: n.get(k, 0) for k in ("CPU", "GPU") if n.get(k)}) or "none" for n in nodes)
    raise ConfigError(
        f"train.workers={config.workers}: {choices[0]} workers with {_describe(resources)} each, beside one whole free CPU for cutting "
        f"images, do not fit on the nodes there are ({there}); use fewer workers or add nodes"
    )


def fits(workers: int, resources: Resources, nodes: list[Resources]) -> bool:
    """Return whether the workers fit so that one whole logical CPU stays free on some node, for Ray Data tasks."""
    room = [min(int(node.get(key, 0) / amount + 1e-9) for key, amount in resources.items()) for node in nodes]
    for spare, node in enumerate(nodes):  # the node that keeps a whole CPU free
        kept = int(max(0.0, node.get("CPU", 0) - 1) / resources["CPU"] + 1e-9) if node.get("CPU", 0) >= 1 else -1
        if kept >= 0 and sum(room) - room[spare] + min(room[spare], kept) >= workers:
            return True
    return False


def responsive_nodes(nodes: list[dict[str, Any]], timeout_s: float = 10.0) -> list[dict[str, Any]]:
    """Return the nodes that run a task without resources within `timeout_s`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def ping(node: dict[str, Any]) -> Any:
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return ray.remote(lambda: True).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned).remote()

    asked = {ping(node): node for node in nodes}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    found = []
    for reference in answered:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(reference)
            found.append(asked[reference])
    return found


def _describe(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {key}" for key, amount in resources.items())


# ---------------------------------------------------------------------------- advice


def placement_advice(config: RunConfig, gpus: int | None = None) -> list[str]:
    """Return a sentence if the run leaves GPUs idle, and one if the part of the batch in each process is too large for a GPU.

    Args:
        gpus: number of GPUs; None = those of the Ray that this process has joined, or of this machine.
    """
    idle = idle_gpus(config, count_gpus() if gpus is None else gpus) if config.train.worker_range[1] == 0 else ""
    return [sentence for sentence in (idle, large_share(config)) if sentence]


def count_gpus() -> int:
    """Return the number of GPUs of the Ray that this process has joined, or of this machine."""
    import ray
    import torch

    return int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else torch.cuda.device_count()


def idle_gpus(config: RunConfig, gpus: int) -> str:
    """Return a remedy if training in this process leaves GPUs idle, else an empty string."""
    import torch

    own = int(torch.cuda.is_available())
    if gpus <= own:
        return ""
    workers = max(n for n in range(1, gpus + 1) if config.data.num_shards % n == 0)
    remedy = f"--train.workers {workers} trains on {workers}"
    if workers <= own:
        remedy = (
            f"data.num_shards={config.data.num_shards} is for one worker; with a multiple of {gpus} --train.workers {gpus} trains on all"
        )
    return f"train.workers=0 uses {'one' if own else 'none'} of {gpus} GPU{'s' * (gpus != 1)}; {remedy}"


def large_share(config: RunConfig) -> str:
    """Return a remedy if the part of the batch in one process is too large for a GPU, else an empty string."""
    from methods.parts.contract import find

    train, num_shards = config.train, config.data.num_shards
    workers = max(1, train.worker_range[1])
    crops = sum(group.count * group.size**2 for group in config.views.values()) / 224**2  # of an image
    images = train.global_batch_size / train.accumulation_steps
    if images / workers * crops <= CROPS_AT_ONCE:
        return ""
    enough = min((n for n in range(1, num_shards + 1) if num_shards % n == 0 and images / n * crops <= CROPS_AT_ONCE), default=num_shards)
    parts = ", more train.accumulation_steps," if not find(config.method).method.whole_batch_remedy else ""
    return (
        f"each process gets {images / workers:,.0f} images at once, {images / workers * crops:,.0f} crops of 224 x 224 pixels, more than "
        f"one GPU's memory is likely to hold: use --train.workers {enough}{parts} or a smaller train.global_batch_size"
    )
