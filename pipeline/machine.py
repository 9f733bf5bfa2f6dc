"""What this machine offers a run: Python, packages, cores, memory, devices, disk. Each finding is a `Check`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One row of the report."""

    name: str
    ok: Verdict
    found: str
    remedy: str = ""


# ---------------------------------------------------------------------------- Python and packages


def project() -> tuple[str, list[str]]:
    """Range of Python versions and the requirements: from the checkout if this is one, else as installed."""
    file = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if file.exists():
        project = tomllib.loads(file.read_text())["project"]
        if project["name"] == "manyviews":
            return project["requires-python"], project["dependencies"]
    meta = importlib.metadata.metadata("manyviews")
    return meta["Requires-Python"], [r for r in meta.get_all("Requires-Dist") or [] if "extra ==" not in r]


def python_version() -> Iterable[Check]:
    from packaging.specifiers import SpecifierSet

    wanted, found = project()[0], platform.python_version()
    good = SpecifierSet(wanted).contains(found, prereleases=True)
    yield Check("Python", "ok" if good else "fail", found, "" if good else f"use Python {wanted}")


def packages() -> Iterable[Check]:
    from packaging.requirements import Requirement

    missing, outside, good = [], [], 0
    for requirement in map(Requirement, project()[1]):
        plain = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(plain)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            good += 1
        else:
            outside.append(f"{requirement.name} {version} (tested: {requirement.specifier})")
    if missing:
        yield Check("packages", "fail", f"missing: {', '.join(missing)}", "pip install " + " ".join(f'"{m}"' for m in missing))
    if outside:
        yield Check("packages", "warn", "; ".join(outside), "pip install manyviews, or make install, brings tested versions")
    if not missing and not outside:
        yield Check("packages", "ok", f"all {good} in the tested ranges")


# ---------------------------------------------------------------------------- machine


def cores_and_memory() -> Iterable[Check]:
    import psutil

    cores = available_cores()
    load = os.getloadavg()[0]
    remedy = "use 2 or more: one cuts crops while one trains" if cores < 2 else ""
    if load > cores:
        remedy = "other programs keep them busy: training, and any estimate below, will be slow until they end"
    yield Check("cores", "warn" if remedy else "ok", f"{cores:g} core{'s' * (cores != 1)}, load {load:.1f}", remedy)
    memory = psutil.virtual_memory()
    used = _cgroup("memory.current", "memory/memory.usage_in_bytes")
    total = total_memory()
    free = min(memory.available, total - (used if used and total < memory.total else 0))
    good = free >= 3 * GIB
    yield Check("memory", "ok" if good else "warn", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", "" if good else "free 3 GiB or more")


def available_cores() -> float:
    """Cores that this process may use: its affinity mask and, in a container, its quota."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else min(cores, round(int(quota) / int(period), 1))
    except (OSError, ValueError):
        return cores


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or a container's limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, _cgroup("memory.max", "memory/memory.limit_in_bytes") or machine)


def _cgroup(*names: str) -> int | None:
    for name in names:
        try:
            return int(Path("/sys/fs/cgroup", name).read_text())
        except (OSError, ValueError):  # another version of cgroups, none, or the word "max"
            continue
    return None


def device() -> Iterable[Check]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            good = free > total / 2
            found = f"{torch.cuda.get_device_name(i)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
            yield Check(f"GPU {i}", "ok" if good else "warn", found, "" if good else "another process uses it: see nvidia-smi")
        bf16 = torch.cuda.is_bf16_supported()
        yield Check("bf16", "ok", "fast on this GPU" if bf16 else "not on this GPU: train.precision=auto uses float32")
        return
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        remedy = "install a torch build for your CUDA driver, or check CUDA_VISIBLE_DEVICES"
        yield Check("GPU", "fail", f"NVIDIA driver present, but torch {torch.__version__} sees no GPU", remedy)
    else:
        yield Check("GPU", "warn", "none", "the -small recipes are made for a CPU; for larger ones use a machine with a GPU")
    words = "fast on this CPU (AMX)" if cpu_has("amx_bf16") else "slow on this CPU, without AMX: train.precision=auto uses float32"
    yield Check("bf16", "ok", words)


def cpu_has(feature: str) -> bool:
    """Whether this CPU has an instruction set, e.g. `amx_bf16`."""
    import torch

    try:
        return bool(torch.cpu.get_capabilities().get(feature, False))
    except (AttributeError, RuntimeError):  # older torch
        try:
            return feature in Path("/proc/cpuinfo").read_text().split()
        except OSError:
            return False


def shared_memory() -> Iterable[Check]:
    if not os.path.ismount("/dev/shm"):
        return  # macOS and others: Ray keeps its objects elsewhere
    free = shutil.disk_usage("/dev/shm").free
    good = free >= 1 * GIB
    remedy = "" if good else "Ray keeps images here: give the container more, e.g. docker run --shm-size=4g"
    yield Check("shared memory", "ok" if good else "warn", f"{free / GIB:.1f} GiB free", remedy)


def disk(runs_dir: Path) -> Iterable[Check]:
    place = runs_dir.resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        yield Check("disk", "fail", f"{place} is a file", "give another folder with --runs-dir")
        return
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        yield Check("disk", "fail", f"{place}: {error.strerror}", "give a folder you may write to with --runs-dir")
        return
    free = shutil.disk_usage(place).free
    verdict: Verdict = "ok" if free >= 5 * GIB else "warn" if free >= GIB else "fail"
    remedy = "" if verdict == "ok" else "checkpoints of large backbones take gigabytes: free some space, or use another --runs-dir"
    yield Check("disk", verdict, f"{free / GIB:.1f} GiB free at {place}", remedy)
