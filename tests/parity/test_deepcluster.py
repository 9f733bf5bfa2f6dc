"""DeepCluster-v2 against a literal float64 transcription of its equations over three epochs, and over workers and restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.deepcluster import DeepCluster, DeepClusterConfig, random_rows, spherical_kmeans
from methods.parts.contract import Progress, RunFacts
from methods.parts.errors import ConfigError
from methods.parts.views import Views
from tests.parity.common import EXACT, Same, in_processes, pieces_of

N, BATCH, DIM, K, HEADS = 26, 6, 5, 4, 3
STEPS = N // BATCH  # of an epoch: two images are left out of each
SMALL_CROPS = 1


def deepcluster(**settings: Any) -> DeepCluster:
    config = DeepClusterConfig(**{"num_prototypes": K, "heads": HEADS, "projection_dim": DIM, **settings})
    facts = RunFacts(global_batch_size=BATCH, steps_per_epoch=STEPS, total_steps=3 * STEPS, num_images=N - 2, num_ids=N)
    torch.manual_seed(0)
    method = DeepCluster(config, Same(DIM), facts)
    method.projector = nn.Linear(DIM, DIM, bias=False)
    method.memory.held = method.memory.held.double()
    return method.double()


def progress(step: int) -> Progress:
    return Progress(step=step, total_steps=3 * STEPS, steps_per_epoch=STEPS, generator=torch.Generator().manual_seed(step))


def batch_of(step: int, rank: int = 0, world: int = 1) -> Views:
    """Crops of the images of a step, of which one comes twice; each epoch has an order of its own."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(step // STEPS))
    ids = order[step % STEPS * BATCH :][:BATCH].clone()
    ids[4] = ids[1]
    crops = torch.randn(2 + SMALL_CROPS, BATCH, DIM, generator=torch.Generator().manual_seed(100 + step)).double()
    own = crops.view(2 + SMALL_CROPS, world, -1, DIM)[:, rank]
    stacks = {"global": own[:2].reshape(-1, DIM), "local": own[2:].reshape(-1, DIM)}
    ids = ids.view(world, -1)[rank]
    counts: dict[str, int] = {"global": 2, "local": SMALL_CROPS}
    return Views(stacks=stacks, counts=counts, roles={"local": "local"}, image_ids=ids, labels=torch.full_like(ids, -1))


def train(method: DeepCluster, steps: range, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    """Gradient descent as the loop does it; what each step leaves behind."""
    trace = []
    for step in steps:
        if step % STEPS == 0:
            method.start_epoch(progress(step))
        out = method(batch_of(step, rank, world), progress(step))
        if out.loss is not None:
            out.loss.backward()
            weight = method.projector.weight
            gradient = weight.grad.clone()
            if world > 1:
                torch.distributed.all_reduce(gradient)
            weight.grad = None
            with torch.no_grad():
                weight -= 0.5 * gradient / world
        method.after_step([out.outputs], progress(step))
        trace.append({"loss": None if out.loss is None else out.loss.detach(), "prototypes": method.prototypes.clone()})
        trace[-1] |= {name: torch.cat(pieces_of(table)).clone() for name, table in method.memory_banks().items()}
    return trace


# ---------------------------------------------------------------------------- the equations


def literal(weight: np.ndarray, starts: dict[int, list[np.ndarray]]) -> list[tuple[float | None, np.ndarray, np.ndarray]]:
    """Loss, memory and labels after every step, image by image. `starts[epoch][head]`: ids of the first centroids."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x)

    memory, seen = np.zeros((N, 2, DIM)), set()
    labels = np.full((N, HEADS), -1)
    centroids = np.zeros((HEADS, K, DIM))
    trace = []
    for step in range(3 * STEPS):
        epoch = step // STEPS
        if step % STEPS == 0 and epoch > 0:
            for h in range(HEADS):
                c = memory[starts[epoch][h], h % 2].copy()
                for _ in range(10):
                    members: list[list[np.ndarray]] = [[] for _ in range(K)]
                    for n in seen:
                        members[int(np.argmax(c @ memory[n, h % 2]))].append(memory[n, h % 2])
                    for k in range(K):
                        if members[k]:
                            c[k] = unit(np.mean(members[k], axis=0))
                for n in seen:
                    labels[n, h] = np.argmax(c @ memory[n, h % 2])
                centroids[h] = c
        views = batch_of(step)
        ids, x = views.image_ids.tolist(), torch.stack(views.crops).numpy()  # (V, B, D)
        loss, gradient, terms = 0.0, np.zeros_like(weight), 0
        for h in range(HEADS):
            for v in range(len(x)):
                for i, n in enumerate(ids):
                    if epoch == 0 or labels[n, h] < 0:
                        continue
                    raw = weight @ x[v, i]
                    z = unit(raw)
                    e = np.exp(centroids[h] @ z / 0.1)
                    p = e / e.sum()
                    loss -= np.log(p[labels[n, h]])
                    p[labels[n, h]] -= 1
                    dz = centroids[h].T @ p / 0.1
                    gradient += np.outer((dz - z * (z @ dz)) / np.linalg.norm(raw), x[v, i])
                    terms += 1
        for i, n in enumerate(ids):
            if n in ids[:i]:
                continue
            memory[n] = [unit(weight @ x[v, i]) for v in range(2)]
            seen.add(n)
        if epoch > 0:
            weight = weight - 0.5 * gradient / terms
        trace.append((loss / terms if terms else None, memory.copy(), labels.copy()))
    return trace


def first_centroids(epoch: int, seen: list[int]) -> list[np.ndarray]:
    """Ids of the first centroids of every head: a permutation of the images seen, in the order of their ids."""
    generator = progress(epoch * STEPS).generator
    return [np.array(seen)[torch.randperm(len(seen), generator=generator)[:K].numpy()] for _ in range(HEADS)]


def test_three_epochs_equal_the_equations() -> None:
    method = deepcluster()
    weight = method.projector.weight.detach().numpy().copy()
    seen: set[int] = set()
    starts = {}
    for epoch in range(3):
        starts[epoch] = first_centroids(epoch, sorted(seen)) if seen else []
        seen |= {int(n) for step in range(epoch * STEPS, (epoch + 1) * STEPS) for n in batch_of(step).image_ids}
    want = literal(weight, starts)
    got = train(method, range(3 * STEPS))
    for step, ((loss, memory, labels), ours) in enumerate(zip(want, got, strict=True)):
        assert (ours["loss"] is None) == (loss is None) == (step < STEPS)
        if loss is not None:
            assert ours["loss"].item() == pytest.approx(loss, abs=1e-9)
        np.testing.assert_allclose(ours["memory"].numpy(), memory, atol=1e-9)
        np.testing.assert_array_equal(ours["labels"].numpy(), labels)
    second_epoch = {int(n) for step in range(STEPS, 2 * STEPS) for n in batch_of(step).image_ids}
    assert any((want[STEPS][2][n] < 0).all() for n in second_epoch)  # the mask was in use


# ---------------------------------------------------------------------------- workers and restarts


def in_worker(rank: int, world: int) -> list[dict[str, Any]]:
    return train(deepcluster(), range(3 * STEPS), rank, world)


def test_two_workers_equal_one(tmp_path: Path) -> None:
    one, two = in_worker(0, 1), in_processes(2, tmp_path, in_worker)
    for alone, a, b in zip(one, *two, strict=True):
        for name in ("memory", "labels", "prototypes"):
            torch.testing.assert_close(a[name], alone[name], **EXACT)
            assert torch.equal(a[name], b[name])
        if alone["loss"] is not None:
            torch.testing.assert_close((a["loss"] + b["loss"]) / 2, alone["loss"], **EXACT)


@pytest.mark.parametrize("killed", [2, STEPS, STEPS + 2, 2 * STEPS])
def test_a_restart_changes_nothing(killed: int) -> None:
    """In the first epoch, at its end, in the middle of the second, and between the second and the third."""
    whole = deepcluster()
    want = train(whole, range(3 * STEPS))
    before = deepcluster()
    train(before, range(killed))
    after = deepcluster()
    after.load_state_dict(before.state_dict())
    for name, table in after.memory_banks().items():
        table.load([piece.clone() for piece in pieces_of(before.memory_banks()[name])])
    for ours, theirs in zip(train(after, range(killed, 3 * STEPS)), want[killed:], strict=True):
        for name in ("loss", "memory", "labels", "prototypes"):
            assert (ours[name] is None and theirs[name] is None) or torch.equal(ours[name], theirs[name]), name


# ---------------------------------------------------------------------------- k-means


def clouds() -> Tensor:
    """Three tight clouds of ten unit rows."""
    torch.manual_seed(0)
    rows = torch.eye(3, 8).repeat_interleave(10, dim=0) + 0.1 * torch.randn(30, 8)
    return nn.functional.normalize(rows).double()


def test_kmeans_finds_clouds_and_keeps_empty_clusters() -> None:
    far = torch.zeros(1, 8, dtype=torch.float64)
    far[0, -1] = -1
    first = torch.cat([clouds()[[0, 12, 25]], far])
    centroids, nearest, sizes = spherical_kmeans(clouds(), first, 10)
    assert nearest.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert sizes.tolist() == [10, 10, 10, 0]
    assert torch.equal(centroids[3], far[0])
    means = torch.stack([part.mean(dim=0) for part in clouds().split(10)])
    torch.testing.assert_close(centroids[:3], nn.functional.normalize(means), **EXACT)


def test_first_centroids_are_distinct_rows_until_there_are_too_few() -> None:
    drawn = random_rows(clouds(), 30, torch.Generator().manual_seed(1))
    assert sorted(drawn[:, 0].tolist()) == sorted(clouds()[:, 0].tolist())
    assert not torch.equal(drawn, clouds())
    again = random_rows(clouds()[:4], 10, torch.Generator().manual_seed(1))
    assert torch.equal(again[:4], again[4:8]) and torch.equal(again[8:], again[:2])


def test_more_clusters_than_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.num_prototypes=25: more than the 24 images; use 2 or fewer"):
        deepcluster(num_prototypes=25)


def test_a_run_that_ends_in_its_first_epoch_is_warned_of() -> None:
    facts = RunFacts(global_batch_size=BATCH, steps_per_epoch=STEPS, total_steps=STEPS, num_images=1000)
    (warning,) = deepcluster().config.hints(facts).warnings
    assert warning.startswith(f"train.steps={STEPS} end before the second epoch")
