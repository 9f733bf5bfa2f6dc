"""Several gloo processes give what one process gives on the joined batch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from methods.parts.assignment import sinkhorn
from methods.parts.queue import FeatureQueue


def _work(rank: int, world: int, folder: str, scores: np.ndarray, epsilons: list[float]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    own = torch.from_numpy(scores).chunk(world)[rank]
    codes = {str(e): sinkhorn(own, e, 3).numpy() for e in epsilons}
    queue = FeatureQueue(crops=1, length=len(scores), dim=scores.shape[1]).double()
    queue.push([own])
    np.savez(f"{folder}/{rank}.npz", queue=queue.rows[0].numpy(), share=queue.share(0).numpy(), **codes)
    dist.destroy_process_group()


def in_processes(world: int, folder: Path, scores: np.ndarray, epsilons: list[float]) -> list[dict[str, np.ndarray]]:
    mp.spawn(_work, (world, str(folder), scores, epsilons), nprocs=world)
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 4])
def test_codes_and_queue_over_workers(world: int, tmp_path: Path) -> None:
    """Both branches of Sinkhorn, with maxima that differ between workers; the queue is whole on every worker, its shares join to it."""
    rng = np.random.default_rng(world)
    scores = rng.uniform(-1, 1, (16, 6)) * np.repeat(np.linspace(0.2, 1, world), 16 // world)[:, None]
    results = in_processes(world, tmp_path, scores, [0.05, 0.01])
    for epsilon in (0.05, 0.01):
        joined = np.concatenate([r[str(epsilon)] for r in results])
        np.testing.assert_allclose(joined, sinkhorn(torch.from_numpy(scores), epsilon, 3).numpy(), atol=1e-12)
    for r in results:
        np.testing.assert_array_equal(r["queue"], scores)
    np.testing.assert_array_equal(np.concatenate([r["share"] for r in results]), scores)


@pytest.mark.parametrize("world", [2, 4])
def test_codes_over_workers_equal_the_original(golden, world: int, tmp_path: Path) -> None:
    values = golden("swav_sinkhorn_ranks")
    results = in_processes(world, tmp_path, values[f"w{world}_scores"], [0.05])
    joined = np.concatenate([r["0.05"] for r in results])
    np.testing.assert_allclose(joined, values[f"w{world}_q"], atol=1e-9)
    for wrong in ("local_only", "perrank_max"):
        assert np.abs(joined - values[f"w{world}_q_wrong_{wrong}"]).max() > 0.01
