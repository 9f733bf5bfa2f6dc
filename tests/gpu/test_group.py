"""A process group over the GPUs there are, one is enough: synchronised batch norm, DDP and gathers beside one process with all rows."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from methods.parts.distributed import all_gather_rows, average_gradients
from methods.parts.norms import convert_sync_batchnorm
from pipeline.machine import set_precision

ROWS = 8  # of a worker


def network(device: torch.device, sync: bool) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    made = nn.Sequential(*layers).to(device)
    return convert_sync_batchnorm(made) if sync else made


def worker(rank: int, world: int, port: int, kind: str, torchs_own: bool, folder: str) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    set_precision(device)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"  # as in a run: tensors on the CPU go through gloo
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    rows = torch.randn(ROWS * world, 3, 16, 16).to(device)
    mine = rows[ROWS * rank : ROWS * (rank + 1)]
    whole, ours, wrapped = network(device, sync=False), network(device, sync=True), network(device, sync=True)
    if torchs_own:
        ours, wrapped = (nn.SyncBatchNorm.convert_sync_batchnorm(network(device, sync=False)) for _ in range(2))
    (whole(rows) ** 2).mean().backward()  # one process with all rows is the reference
    (ours(mine) ** 2).mean().backward()
    average_gradients(ours.parameters())
    ddp = nn.parallel.DistributedDataParallel(wrapped, [device] if kind == "cuda" else None)
    (ddp(mine) ** 2).mean().backward()
    gathered = all_gather_rows(torch.full((2, 1), float(rank), device=device)).flatten().tolist()

    def gap(other: nn.Module) -> float:
        return max(float((a.grad - b.grad).abs().max()) for a, b in zip(whole.parameters(), other.parameters(), strict=True))

    if rank == 0:
        statistics = float((whole[1].running_var - ours[1].running_var).abs().max())
        torch.save({"gaps": [gap(ours), gap(wrapped)], "gathered": gathered, "statistics": statistics}, Path(folder) / "found.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("torchs_own", [False, True], ids=["as a run has it", "torch's own"])
def test_workers_on_gpus_train_like_one_process(device: torch.device, torchs_own: bool, tmp_path: Path) -> None:
    if torchs_own and device.type == "cpu":
        pytest.skip("torch's batch norm over workers refuses CPU tensors")
    world = min(2, torch.cuda.device_count()) if device.type == "cuda" else 2
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port = it.getsockname()[1]
    mp.spawn(worker, (world, port, device.type, torchs_own, str(tmp_path)), nprocs=world)
    found = torch.load(tmp_path / "found.pt")
    assert found["gathered"] == [rank for rank in range(world) for _ in range(2)]
    assert max(found["gaps"]) < 1e-5 and found["statistics"] < 1e-6
