"""What a GPU does for a run: pinned copies, views finished on the device, precisions, compiled steps, and NCCL between GPUs.

Every figure stands beside its anchor from the same process. Without a GPU it says so and ends; `--device cpu` runs the
same code there (two gloo processes), which checks it and measures nothing of use.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from methods.parts.contract import Progress
from methods.parts.distributed import all_gather_rows, average_gradients
from methods.parts.norms import SyncBatchNorm
from methods.parts.views import ViewsConfig
from pipeline.config import RunConfig, override, resolve
from pipeline.ingest.crops import draw_views
from pipeline.ingest.photometric import finish_views
from pipeline.ingest.stream import Batch
from pipeline.settings import configured
from pipeline.train.prepare import build_method


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median wall time of a call, the device's work included."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return float(np.median(times[2:]))


def random_batch(views: ViewsConfig, images: int, pinned: bool) -> Batch:
    """A batch of noise with real tables."""
    sizes = np.full(images, 400)
    tables = draw_views(0, 0, np.arange(images), sizes, sizes, views)
    crops = {name: torch.randint(0, 256, (images, g.count, g.size, g.size, 3), dtype=torch.uint8) for name, g in views.items() if g.count}
    if pinned:
        crops = {name: stack.pin_memory() for name, stack in crops.items()}
    ids = torch.arange(images)
    return Batch(crops=crops, tables=tables, ids=ids, labels=torch.full((images,), -1), epoch=0, step=0, bad=[])


def transfer(batch: Batch, pinned: Batch, device: torch.device) -> None:
    """Copies of a batch of uint8 crops to the device."""
    size = sum(stack.numel() for stack in batch.crops.values()) / 1e9
    for name, one in (("pageable", batch), ("pinned", pinned)):
        rate = size / seconds(lambda one=one: [s.to(device, non_blocking=True) for s in one.crops.values()], device)  # type: ignore[misc]
        print(f"copy of a batch, {name} memory: {rate:.1f} GB/s", flush=True)


def colour(config: RunConfig, batch: Batch, device: torch.device) -> None:
    """The same views finished on the CPU and on the device."""
    data, images = config.data, len(batch.ids)

    def finish(where: torch.device, some: Batch) -> dict[str, torch.Tensor]:
        return finish_views(some, config.views, data.mean, data.std, where).stacks

    few = random_batch(config.views, 16, pinned=False)
    host, there = finish(torch.device("cpu"), few), finish(device, few)
    # a pixel within rounding of the solarisation's threshold may fall on either side, so one in a million may differ
    gap = max(float(torch.quantile((host[n] - there[n].cpu()).abs().flatten()[: 2**23], 1 - 1e-6)) for n in host) * min(data.std)
    cpu_rate = 16 / seconds(lambda: finish(torch.device("cpu"), few), torch.device("cpu"), 3)
    rate = images / seconds(lambda: finish(device, batch), device)
    print(
        f"views finished: {rate:,.0f} images/s on {device.type}, {cpu_rate:,.0f} on one CPU core; largest difference {gap:.1e}", flush=True
    )


def steps(config: RunConfig, batch: Batch, device: torch.device, compiled: bool) -> None:
    """Whole training steps without the optimizer, in every precision."""
    facts = resolve(config, 10**7).facts
    images = len(batch.ids)
    views = finish_views(batch, config.views, config.data.mean, config.data.std, device)
    progress = Progress(step=0, total_steps=facts.total_steps, steps_per_epoch=facts.steps_per_epoch)
    anchor = None
    kinds = [("float32", torch.float32, False, False), ("tf32", torch.float32, True, False), ("bf16", torch.bfloat16, True, False)]
    for name, dtype, tf32, compile_it in [*kinds, *([("bf16, compiled", torch.bfloat16, True, True)] if compiled else [])]:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        method = build_method(config, facts).to(device).train()
        forward = torch.compile(method) if compile_it else method

        def step(method: nn.Module = method, forward: Callable[..., object] = forward, dtype: torch.dtype = dtype) -> float:
            method.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                output = forward(views, progress, method.draw_masks(views, progress))
            output.loss.backward()  # type: ignore[attr-defined]
            return float(output.loss.detach())  # type: ignore[attr-defined]

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = step()
        rate = images / seconds(step, device)
        anchor = anchor or rate
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
        print(f"step in {name}: {rate:,.0f} images/s ({rate / anchor:.2f} of float32{memory}), first loss {loss:.5f}", flush=True)


def group(rank: int, world: int, port: int, device_type: str) -> None:
    """One process of a group: reductions, synchronised batch norm and DDP beside what one process makes of all rows."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    # as a run has it: tensors on the CPU go through gloo, those on a GPU through NCCL
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    rows = torch.randn(8 * world, 3, 16, 16)
    mine = rows[8 * rank : 8 * (rank + 1)].to(device)

    def network(norm: type[nn.Module]) -> nn.Module:
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
        return nn.Sequential(*layers).to(device)

    whole, ours, ddp = network(nn.BatchNorm2d), network(SyncBatchNorm), network(SyncBatchNorm)
    # one process of all rows is the reference; it must not synchronise
    (whole(rows.to(device)) ** 2).mean().backward()
    (ours(mine) ** 2).mean().backward()
    average_gradients(ours.parameters())
    wrapped = nn.parallel.DistributedDataParallel(ddp, [device] if device.type == "cuda" else None)
    (wrapped(mine) ** 2).mean().backward()

    def gap(network: nn.Module) -> float:
        pairs = zip(whole.parameters(), network.parameters(), strict=True)
        return max(float((a.grad - b.grad).abs().max()) for a, b in pairs if a.grad is not None and b.grad is not None)

    big = torch.ones(2**24, device=device)  # 64 MiB, about a ResNet-50's gradients

    def reduce() -> None:
        dist.all_reduce(big)

    rate = big.numel() * 4 / 1e9 / seconds(reduce, device, 5)
    gathered = all_gather_rows(torch.full((2, 1), float(rank), device=device)).flatten().tolist()
    gaps = gap(ours), gap(ddp)
    if rank == 0:
        assert gathered == [r for r in range(world) for _ in range(2)], gathered
        kind = "NCCL" if device.type == "cuda" else "gloo"
        print(
            f"{kind}, {world} {'process' if world == 1 else 'processes'}: all-reduce {rate:.2f} GB/s; gradients beside one process "
            f"with all rows: {gaps[0]:.1e} averaged by us, {gaps[1]:.1e} by DDP",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="swav", help="the recipe whose views and network are timed")
    parser.add_argument("--images", type=int, default=64, help="images in a batch")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--compile", action="store_true", help="time a compiled step too; compiling takes minutes")
    options, settings = parser.parse_known_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No GPU that this torch can use: nothing to measure. `manyviews doctor` says what it sees; --device cpu checks the code.")
        return
    device = torch.device(options.device)
    config = override(configured(options.recipe, settings), {"train.global_batch_size": options.images, "data.lanes": 1})
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{options.recipe}, {options.images} images of {' and '.join(g.describe() for g in config.views.values() if g.count)}; {name}")
    if device.type == "cpu":
        torch.set_num_threads(1)
    batch = random_batch(config.views, options.images, pinned=device.type == "cuda")
    if device.type == "cuda":
        transfer(random_batch(config.views, options.images, pinned=False), batch, device)
    colour(config, batch, device)
    steps(config, batch, device, options.compile)
    world = torch.cuda.device_count() if device.type == "cuda" else 2
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port = it.getsockname()[1]
    mp.spawn(group, (world, port, device.type), nprocs=world)


if __name__ == "__main__":
    main()
