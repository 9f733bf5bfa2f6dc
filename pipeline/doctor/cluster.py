"""Checks of a cluster: storage, code and packages on every node, and resources for the workers of a run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods.parts.errors import ConfigError
from pipeline.config import RunConfig, absolute
from pipeline.machine import Check

PACKAGES = ("ray", "torch", "torchvision", "timm", "numpy", "pyarrow", "mlflow")
TIMEOUT_S = 120.0  # a new node first unpacks the code


@dataclass(frozen=True)
class Node:
    """The answer of one node."""

    versions: dict[str, str] = field(default_factory=dict)
    storage: str = ""  # reason why the runs folder cannot be read or written; empty = it can
    data: str = ""  # reason why the images cannot be read
    error: str = ""  # reason why the node does not answer


def checks(runs_dir: Path, config: RunConfig | None = None, uri: str | None = None) -> Iterable[Check]:
    """Join the cluster that RAY_ADDRESS names and check every node. Leave the cluster if it was joined here.

    Args:
        runs_dir: folder for runs, which every node must see.
        config: a run whose workers and images are checked.
        uri: tracking server; None = the SQLite file in `runs_dir`.
    """
    import ray

    from pipeline.data.ray_data import start_ray

    started, begin = ray.is_initialized(), time.perf_counter()
    try:
        start_ray()
        seconds = time.perf_counter() - begin
        alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"])
        have = ray.cluster_resources()
        text = f"{_count(len(alive), 'node')}, {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs; joined in {seconds:.1f} s"
        yield Check("cluster", "ok", text)
        nodes = inspect_nodes(alive, runs_dir, config)
        yield from check_nodes(nodes, runs_dir, config)
        yield from check_workers(config, have, [node["Resources"] for node in alive])
        if len(nodes) > 1 and (uri is None or uri.startswith("sqlite:")):
            remedy = "start `mlflow server` on the head and give its address: --track.uri http://HEAD:5000"
            yield Check("tracking", "warn", "a SQLite file, and more than one machine: locks of network file systems are unsure", remedy)
    finally:
        if not started and ray.is_initialized():
            ray.shutdown()


# ---------------------------------------------------------------------------- every node


def inspect_nodes(alive: list[Mapping[str, Any]], runs_dir: Path, config: RunConfig | None) -> dict[str, Node]:
    """Run one small task on each node and return the answers by name of the node. Tasks take no CPU, so they run on busy nodes too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = existing(runs_dir)
    key = uuid.uuid4().hex
    probe = place / f".doctor-{key}"
    try:
        probe.write_text(key)
    except OSError as error:
        raise ConfigError(f"runs_dir={place}: {error.strerror}; give a folder you may write to with --runs-dir") from None
    address_counts = Counter(node["NodeManagerAddress"] for node in alive)
    data = local_images(config)
    answered: dict[str, Node] = {}
    try:
        tasks = {}
        for node in alive:
            address = node["NodeManagerAddress"]
            name = address if address_counts[address] == 1 else f"{address} ({node['NodeID'][:6]})"
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(inspect).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
            tasks[name] = task.remote(str(probe), key, node["NodeID"], data)
        end = time.monotonic() + TIMEOUT_S
        for (name, task), node in zip(tasks.items(), alive, strict=True):
            try:
                found = ray.get(task, timeout=max(1.0, end - time.monotonic()))
            except Exception as error:  # a failing node does not end the checks of others
                lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
                answered[name] = Node(error=lines[-1].strip()[:200])
                continue
            reply = probe.with_name(f"{probe.name}-{node['NodeID']}")
            if not found.storage and not reply.exists():
                found = Node(versions=found.versions, storage="what it writes is not seen here", data=found.data)
            answered[name] = found
    finally:
        for file in place.glob(f"{probe.name}*"):
            file.unlink(missing_ok=True)
    return answered


def inspect(probe: str, key: str, node: str, data: str | None) -> Node:
    """Return the versions of this node, and whether it sees the driver's folders."""
    storage = _trouble(lambda: _answer(Path(probe), key, node))
    images = _trouble(lambda: os.stat(data)) if data else ""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    return Node(versions=versions | {"Manyviews": code_hash()}, storage=storage, data=images)


def code_hash() -> str:
    """Return a short hash of the code of `methods` and `pipeline` in this process, because two checkouts may have the same version."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for file in sorted(file for room in ("methods", "pipeline") for file in (root / room).rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def _answer(probe: Path, key: str, node: str) -> None:
    if probe.read_text() != key:
        raise OSError(0, "another file lies there")
    probe.with_name(f"{probe.name}-{node}").write_text(key)


def _trouble(act: Callable[[], object]) -> str:
    try:
        act()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    place = folder.expanduser().resolve()
    while not place.is_dir():
        place = place.parent
    return place


def local_images(config: RunConfig | None) -> str | None:
    """Return the absolute path of the images; None for built-in datasets and object stores."""
    from pipeline.data.sources.base import is_local_path

    return absolute(config.data.path) if config is not None and is_local_path(config.data.path) else None


def run_on_gpu(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return the result of a function in a task with a GPU, None if no GPU is free now; and the CPUs of the cluster."""
    import ray

    from pipeline.data.ray_data import start_ray

    started = ray.is_initialized()
    try:
        start_ray()
        have = ray.cluster_resources()
        cpus = have.get("CPU", 0.0)
        if not ray.available_resources().get("GPU", 0):
            return None, cpus
        task = ray.remote(function).options(num_gpus=1, num_cpus=1, max_retries=0).remote(*arguments)
        try:
            return ray.get(task, timeout=TIMEOUT_S), cpus
        except ray.exceptions.GetTimeoutError:
            ray.cancel(task, force=True)
            return None, cpus
    finally:
        if not started and ray.is_initialized():
            ray.shutdown()


# ---------------------------------------------------------------------------- findings


def check_nodes(nodes: Mapping[str, Node], runs_dir: Path, config: RunConfig | None) -> Iterable[Check]:
    """Yield rows about the answers of the nodes."""
    unreachable = {name: node.error for name, node in nodes.items() if node.error}
    if unreachable:
        remedy = "see the node's logs in the dashboard; where a module is missing: pip install '.[cluster]' on that node"
        yield Check("nodes", "fail", _listed(unreachable), remedy)
    answering = {name: node for name, node in nodes.items() if not node.error}
    if not answering:
        return
    place = existing(runs_dir)
    failing = {name: node.storage for name, node in answering.items() if node.storage}
    remedy = "give a folder that every node mounts at the same path: --runs-dir /shared/runs" if failing else ""
    seen = f"{_count(len(answering), 'node')} write and read {place}"
    yield Check("shared runs", "fail" if failing else "ok", f"{place}\n{_listed(failing)}" if failing else seen, remedy)
    images = local_images(config)
    if images:
        failing = {name: node.data for name, node in answering.items() if node.data}
        remedy = "put the images where every node sees them at the same path, such as /shared/data" if failing else ""
        found = f"{images}\n{_listed(failing)}" if failing else f"{_count(len(answering), 'node')} see {images}"
        yield Check("shared images", "fail" if failing else "ok", found, remedy)
    yield check_versions({name: node.versions for name, node in answering.items()})


def check_versions(found: Mapping[str, Mapping[str, str]]) -> Check:
    """Compare packages and code of all nodes. Patch versions of Python may differ."""
    lines, common = [], []
    for package in next(iter(found.values())):
        by_version: dict[str, list[str]] = {}
        for name, of in found.items():
            version = of.get(package, "missing")
            by_version.setdefault(version.rpartition(".")[0] if package == "Python" else version, []).append(name)
        if len(by_version) > 1:
            lines.append(f"{package}: " + "; ".join(f"{version} on {', '.join(names)}" for version, names in by_version.items()))
        else:
            common.append(f"{package} {next(iter(by_version))}")
    if lines:
        remedy = "install the same versions everywhere (cluster.yaml keeps them in /shared/constraints.txt); submit with --working-dir ."
        return Check("versions", "fail", "\n".join(lines), remedy)
    return Check("versions", "ok", f"alike on {_count(len(found), 'node')}: {', '.join(common)}")


def check_workers(config: RunConfig | None, have: Mapping[str, float], nodes: list[Mapping[str, float]]) -> Iterable[Check]:
    """Compare the workers of `train.workers` with the CPUs and GPUs of the cluster.

    Args:
        have: resources of the cluster.
        nodes: resources of each node.
    """
    from pipeline.train.placement import CPU_WORKER, GPU_WORKER, fits

    if config is not None:
        yield from check_placement(config, int(have.get("GPU", 0)), len(nodes))
    low, high = config.train.worker_range if config else (0, 0)
    if high == 0:
        return
    share, device = (GPU_WORKER, "GPU") if have.get("GPU", 0) else (CPU_WORKER, "CPU")
    each = " and ".join(f"{amount:g} {key}" for key, amount in share.items())
    found = f"train.workers={config.train.workers if config else 0}, {each} each; {have.get(device, 0):g} {device}s are here"
    if fits(low, share, [dict(node) for node in nodes]):
        yield Check("workers", "ok", found)
        return
    remedy = (
        "beside the workers one whole CPU must be free on some node, to cut the views; an autoscaling cluster adds machines when the "
        "run asks for them (see `ray status`), on a fixed one use fewer workers"
    )
    yield Check("workers", "warn", found, remedy)


def check_placement(config: RunConfig, gpus: int | None = None, nodes: int = 1) -> Iterable[Check]:
    """Yield a row if a run leaves GPUs or nodes idle, and one if the part of the batch in one process is too large for a GPU."""
    from pipeline.train.placement import count_gpus, idle_gpus, large_share

    if config.train.worker_range[1] == 0:
        remedy = idle_gpus(config, count_gpus() if gpus is None else gpus)
        if not remedy and nodes > 1:
            remedy = "give --train.workers N to train on the cluster's GPUs, or submit with --entrypoint-num-gpus 1"
        if remedy:
            yield Check("workers", "warn", "train.workers=0: training runs in one process, on one node", remedy)
    if remedy := large_share(config):
        yield Check("batch", "warn", f"train.global_batch_size={config.train.global_batch_size}", remedy)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _listed(found: Mapping[str, str], most: int = 8) -> str:
    lines = [f"{name}: {reason}" for name, reason in list(found.items())[:most]]
    return "\n".join(lines + ([f"and {len(found) - most} more"] if len(found) > most else []))
