"""What parity tests share: a backbone that hands its input on, two views, several gloo processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from methods.parts.contract import Progress
from methods.parts.distributed import all_gather_objects
from methods.parts.memory_bank import MemoryBank
from methods.parts.views import Views

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64
SINGLE = {"rtol": 2e-4, "atol": 2e-5}  # float32


class Same(nn.Module):
    """A backbone that hands its input on."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, x: Tensor) -> Tensor:
        return x


def two_views(x1: Tensor, x2: Tensor, labels: Tensor | None = None) -> Views:
    ids = torch.arange(len(x1))
    labels = torch.full_like(ids, -1) if labels is None else labels
    return Views(stacks={"first": x1, "second": x2}, counts={"first": 1, "second": 1}, image_ids=ids, labels=labels)


def progress(step: int = 0) -> Progress:
    return Progress(step=step, total_steps=100, steps_per_epoch=10, generator=torch.Generator().manual_seed(step))


def pieces_of(table: MemoryBank) -> list[Tensor]:
    """All rows of a table, as a checkpoint holds them, on every rank."""
    pieces: list[Tensor] = all_gather_objects(table.pieces())[0]
    return pieces


def _work(rank: int, world: int, folder: str, what: Callable[[int, int], Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(what(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def in_processes(world: int, folder: Path, what: Callable[[int, int], Any]) -> list[Any]:
    """What `what(rank, world)` gives in each of `world` gloo processes, forked from one that has imported what most of them need."""
    common = ["torch", "timm", "torch._dynamo", "pytest", "pipeline.recipes", "pipeline.train.ray_trainer", "tests.test_methods"]
    mp.get_context("forkserver").set_forkserver_preload(common)
    mp.start_processes(_work, (world, str(folder), what), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
