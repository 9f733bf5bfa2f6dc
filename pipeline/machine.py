"""The machine of this process: checks of its hardware and packages, and the set-up of a training process."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shlex
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from methods.parts.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pipeline.config import RunConfig

Verdict = Literal["ok", "warn", "fail"]
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One row of the doctor's report."""

    name: str
    ok: Verdict
    found: str
    remedy: str = ""


# ---------------------------------------------------------------------------- Python and packages


def project() -> tuple[str, list[str]]:
    """Return the range of Python versions and the requirements, from the checkout or from the installed package."""
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
        remedy = shlex.join([sys.executable, "-m", "pip", "install", *missing])
        yield Check("packages", "fail", f"missing: {', '.join(missing)}", remedy)
    if outside:
        yield Check("packages", "warn", "; ".join(outside), "make install, or pip install -e ., brings tested versions")
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
    """Return the cores that this process may use, by its affinity mask and the quota of its container."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else min(cores, round(int(quota) / int(period), 1))
    except (OSError, ValueError):
        return cores


def total_memory() -> int:
    """Return the bytes of memory that this process may use: those of the machine, or the limit of its container."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, _cgroup("memory.max", "memory/memory.limit_in_bytes") or machine)


def _cgroup(*names: str) -> int | None:
    for name in names:
        try:
            return int(Path("/sys/fs/cgroup", name).read_text())
        except (OSError, ValueError):  # no such file in this version of cgroups, or its content is "max"
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
        bf16 = native_bf16(torch.device("cuda"))
        yield Check("bf16", "ok", "fast on this GPU" if bf16 else "only emulated on this GPU: train.precision=auto uses float32")
        return
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        remedy = "install a torch build for your CUDA driver, or check CUDA_VISIBLE_DEVICES"
        yield Check("GPU", "fail", f"NVIDIA driver present, but torch {torch.__version__} sees no GPU", remedy)
    else:
        yield Check("GPU", "warn", "none", "the -small recipes are made for a CPU; for larger ones use a machine with a GPU")
    bf16 = native_bf16(torch.device("cpu"))
    text = "fast on this CPU (AMX)" if bf16 else "slow on this CPU, without AMX: train.precision=auto uses float32"
    yield Check("bf16", "ok", text)


def cpu_has(feature: str) -> bool:
    """Return whether this CPU has an instruction set, e.g. `amx_bf16`."""
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
        return  # e.g. macOS: Ray does not use /dev/shm there
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


# ---------------------------------------------------------------------------- a training process


def choose_device(config: RunConfig) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of autocast; `auto` is bf16 on hardware that multiplies it natively."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = config.train.precision
    return device, torch.bfloat16 if asked == "bf16" or (asked == "auto" and native_bf16(device)) else torch.float32


def native_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bf16 natively: NVIDIA from Ampere on, CPUs with AMX. Emulation is slower than float32."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has("amx_bf16")


def set_precision(device: torch.device, deterministic: bool = False) -> None:
    """Set the precision of float32 and the choice of cuDNN algorithms in this process.

    TF32, which has 10 bits of mantissa, is off. So float32 is IEEE in every matrix product and convolution, also in the parts of a
    bf16 run outside autocast (losses, prototypes, momentum updates). cuDNN measures its algorithms once for each shape and uses the
    fastest; shapes do not change from step to step.

    Raises:
        ConfigError: `deterministic` on a GPU.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = device.type == "cuda"
    if deterministic:
        if device.type == "cuda":
            # some kernels have no deterministic version, e.g. the backward pass of bicubic interpolation (positions of ViTs)
            raise ConfigError(
                "train.deterministic=True: is for CPUs, since some CUDA kernels have no deterministic form; leave it out "
                "(a resumed run still sees the same batches and views), or hide the GPU with CUDA_VISIBLE_DEVICES="
            )
        torch.use_deterministic_algorithms(True)


def thread_count(config: RunConfig, local_workers: int = 1) -> int:
    """Return the torch threads of a worker: its share of the cores; a single worker leaves one core to Ray Data tasks."""
    cores = int(available_cores())
    return config.train.threads or max(1, cores // local_workers if local_workers > 1 else cores - 1)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step instead of returning large blocks to the system.

    This saves the page faults of every step. The process keeps its peak size.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX in malloc.h
    library = ctypes.CDLL(None)
    library.mallopt(trim_threshold, 2**31 - 1)
    library.mallopt(mmap_max, 0)


def set_threads(config: RunConfig, state: Mapping[str, Any] | None, local_workers: int = 1) -> None:
    """Set the number of torch threads. In deterministic mode a resumed run must have the same number, because sums depend on it.

    Raises:
        ConfigError: a deterministic run began with another number.
    """
    import torch

    wanted = thread_count(config, local_workers)
    if config.train.deterministic and state and state["threads"] != wanted:
        raise ConfigError(f"train.threads={wanted}: the run began with {state['threads']} and is deterministic; give it as many cores")
    torch.set_num_threads(wanted)


def memory_advice(error: BaseException, config: RunConfig) -> str:
    """Return a message for `torch.OutOfMemoryError`: the request that failed, and settings that need less memory."""
    import torch
    from timm.models import is_model_in_modules

    from methods.parts.contract import find

    train = config.train
    settings = [f"lower train.global_batch_size={train.global_batch_size}"]
    if not find(config.method).method.whole_batch_remedy:
        settings.append(f"raise train.accumulation_steps={train.accumulation_steps}")
    if is_model_in_modules(config.backbone.name, ["vision_transformer", "deit"]) and not train.gradient_checkpointing:
        settings.append("give --train.gradient-checkpointing")
    if choose_device(config)[1] is torch.float32:
        settings.append("use train.precision=bf16")
    settings.append(f"share the batch among more GPUs than train.workers={train.workers} has")
    text = ". ".join(str(error).split(". ")[:3]).rstrip(".")
    return f"{text}. To need less memory, {', '.join(settings[:-1])}, or {settings[-1]}"
