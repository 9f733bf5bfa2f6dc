"""Several gloo processes give what one process gives on the joined batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.parts.assignment import sinkhorn
from methods.parts.queue import FeatureQueue
from tests.parity.common import in_processes


def codes_and_queue(rank: int, world: int, scores: np.ndarray, epsilons: list[float]) -> dict[str, Tensor]:
    """Codes of this worker's rows for each epsilon, the whole queue after one push, and this worker's share of it."""
    own = torch.from_numpy(scores).chunk(world)[rank]
    queue = FeatureQueue(length=len(scores), dim=scores.shape[1]).double()
    queue.push(own)
    return {str(e): sinkhorn(own, e, 3, span=2.0) for e in epsilons} | {"queue": queue.rows, "share": queue.share}


@pytest.mark.parametrize("world", [2, 4])
def test_codes_and_queue_over_workers(world: int, tmp_path: Path) -> None:
    """Both branches of Sinkhorn, with maxima that differ between workers; the queue is whole on every worker, its shares join to it."""
    rng = np.random.default_rng(world)
    scores = rng.uniform(-1, 1, (16, 6)) * np.repeat(np.linspace(0.2, 1, world), 16 // world)[:, None]
    results = in_processes(world, tmp_path, partial(codes_and_queue, scores=scores, epsilons=[0.05, 0.01]))
    for epsilon in (0.05, 0.01):
        joined = np.concatenate([r[str(epsilon)] for r in results])
        np.testing.assert_allclose(joined, sinkhorn(torch.from_numpy(scores), epsilon, 3, span=2.0).numpy(), atol=1e-12)
    unit = scores / np.linalg.norm(scores, axis=1, keepdims=True)
    for r in results:
        np.testing.assert_allclose(r["queue"], unit, rtol=1e-14)
    np.testing.assert_allclose(np.concatenate([r["share"] for r in results]), unit, rtol=1e-14)


@pytest.mark.parametrize("world", [2, 4])
def test_codes_over_workers_equal_the_original(golden, world: int, tmp_path: Path) -> None:
    values = golden("swav_sinkhorn_ranks")
    results = in_processes(world, tmp_path, partial(codes_and_queue, scores=values[f"w{world}_scores"], epsilons=[0.05]))
    joined = np.concatenate([r["0.05"] for r in results])
    np.testing.assert_allclose(joined, values[f"w{world}_q"], atol=1e-9)
    for wrong in ("local_only", "perrank_max"):
        assert np.abs(joined - values[f"w{world}_q_wrong_{wrong}"]).max() > 0.01
