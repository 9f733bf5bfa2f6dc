"""CoKe against the original's values and a literal transcription of its steps; over workers, restarts and its own options."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from methods.coke import CoKe, CoKeConfig, OnlineClusters
from methods.parts.contract import Progress, RunFacts, StepOutput
from methods.parts.distributed import average_gradients
from methods.parts.norms import convert_sync_batchnorm
from methods.parts.views import Views
from tests.parity.common import EXACT, SINGLE, Same, in_processes, pieces_of

# ---------------------------------------------------------------------------- a run without a loop


def coke(dim: int, images: int, batch: int, dtype: torch.dtype = torch.float64, **settings: Any) -> CoKe:
    """CoKe on rows of numbers: its projector hands them on, its predictor is one matrix."""
    torch.manual_seed(0)
    config = CoKeConfig(projection_dim=dim, **{"num_clusters": (5,), "dual_learning_rate": 0.5, "train_first_epoch": True, **settings})
    steps = images // batch
    facts = RunFacts(global_batch_size=batch, steps_per_epoch=steps, total_steps=9 * steps, num_images=images)
    method = CoKe(config, Same(dim), facts)
    method.projector = nn.Identity()
    if method.predictor is not None:
        method.predictor = nn.Linear(dim, dim, bias=False)
    return method.to(dtype)


def views_of(crops: Tensor, ids: Tensor, large: int) -> Views:
    """`crops`: `(V, B, D)`; the first ones are large."""
    stacks = {"global": crops[:large].flatten(0, 1), "local": crops[large:].flatten(0, 1)}
    counts = {"global": large, "local": len(crops) - large}
    return Views(stacks=stacks, counts=counts, roles={"local": "local"}, image_ids=ids, labels=torch.full_like(ids, -1))


def progress(step: int, per_epoch: int) -> Progress:
    return Progress(step=step, total_steps=9 * per_epoch, steps_per_epoch=per_epoch)


def advance(method: CoKe, views: Views | list[Views], step: int, per_epoch: int, forward: nn.Module | None = None) -> StepOutput:
    """One step as the loop makes it; several views are micro-batches."""
    parts, where = views if isinstance(views, list) else [views], progress(step, per_epoch)
    if step % per_epoch == 0:
        method.start_epoch(where)
    method.before_step(where)
    outs = [(forward or method)(part, where) for part in parts]
    for out in outs:
        if out.loss is not None:
            (out.loss / len(outs)).backward()
    method.after_step([out.outputs for out in outs], where)
    if (step + 1) % per_epoch == 0:
        method.end_epoch(where)
    return outs[-1]


# ---------------------------------------------------------------------------- the original's values


@pytest.mark.parametrize("case", ["r04", "r10", "r00", "r08_lr1"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
def test_one_update_equals_the_original(golden, case: str, dtype: torch.dtype, close: dict[str, float]) -> None:
    values = golden("coke_units")
    read = {n: torch.from_numpy(values[f"{case}_{n}"]) for n in ("feats", "centers", "duals", "counters", "labels", "labels_no_dual")}
    bound, rate = values[f"{case}_cfg"]
    clusters = OnlineClusters(16, 12, float(bound), float(rate)).to(dtype)
    clusters.current.copy_(read["centers"].T)
    features = read["feats"].to(dtype)
    assert torch.equal(clusters.assign(features), read["labels_no_dual"])
    clusters.duals.copy_(read["duals"])
    clusters.counts.copy_(read["counters"])
    labels = clusters.assign(features)
    assert torch.equal(labels, read["labels"]) and not torch.equal(labels, read["labels_no_dual"])
    clusters.update(features, labels)
    np.testing.assert_allclose(clusters.duals, values[f"{case}_duals_after"], **close)
    np.testing.assert_allclose(clusters.current.T, values[f"{case}_centers_after"], **close)
    np.testing.assert_array_equal(clusters.counts, values[f"{case}_counters_after"])


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
def test_three_epochs_equal_the_original(golden, dtype: torch.dtype, close: dict[str, float]) -> None:
    values = golden("coke_trace_single_r04")
    bound, rate, temperature, beta, _, _, images, batch, _ = (float(v) for v in values["cfg"])
    images, batch = int(images), int(batch)
    settings = {"constraint_ratio": bound, "dual_learning_rate": rate, "temperature": temperature, "predictor_weight": beta}
    method = coke(8, images, batch, dtype, num_clusters=(int(values["K"][0]),), **settings)
    (clusters,) = method.heads()
    clusters.previous.copy_(torch.from_numpy(values["center_init0"].T))
    clusters.current.copy_(clusters.previous)
    with torch.no_grad():
        method.predictor.weight.copy_(torch.from_numpy(values["W_pred"]))
    per_epoch = images // batch
    for epoch, order in enumerate(torch.from_numpy(values["order"])):
        for s, ids in enumerate(order.split(batch)):
            z, step = torch.from_numpy(values["z_raw"][epoch])[ids].to(dtype).requires_grad_(), epoch * per_epoch + s
            if s == per_epoch - 1:
                before_end = clusters.counts.clone()
            out = advance(method, views_of(z[None], ids, 1), step, per_epoch)
            np.testing.assert_allclose(out.loss.item(), values["loss"][epoch, s], **close)
            np.testing.assert_allclose(z.grad, values["grad_z"][epoch, s], **close)
            np.testing.assert_allclose(clusters.duals, values["step_duals0"][step], **close)
            np.testing.assert_allclose(clusters.current.T, values["step_cur0"][step], **close)
            if s < per_epoch - 1:
                np.testing.assert_array_equal(clusters.counts, values["step_cnt0"][step])
        assert bool((values["step_cnt0"][step] >= before_end.numpy()).all())
        np.testing.assert_array_equal(clusters.sizes, values["epoch_counts0"][epoch])
        np.testing.assert_allclose(clusters.previous.T, values["epoch_pre0"][epoch], **close)
        np.testing.assert_array_equal(method.labels.rows, values["epoch_table0"][epoch])
        assert int(clusters.counts.sum()) == 0


# ---------------------------------------------------------------------------- a literal transcription


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.sqrt((v * v).sum())


def softmax(v: np.ndarray) -> np.ndarray:
    return np.exp(v - v.max()) / np.exp(v - v.max()).sum()


class Literal:
    """The page's steps, image by image and cluster by cluster, with state."""

    def __init__(self, centers: list[np.ndarray], w: np.ndarray, images: int, c: CoKeConfig) -> None:
        self.pre, self.cur = [x.copy() for x in centers], [x.copy() for x in centers]
        self.rho = [np.zeros(len(x)) for x in centers]
        self.n = [np.zeros(len(x)) for x in centers]
        self.table = [[-1] * images for _ in centers]
        self.lists: list[list[list[tuple[int, float]]]] = [[[] for _ in range(images)] for _ in centers]
        self.w, self.c = w, c

    def step(self, crops: np.ndarray, ids: list[int], large: int, epoch: int) -> float:
        c, (views, batch, _) = self.c, crops.shape
        x = [[unit(crops[v, i]) for i in range(batch)] for v in range(views)]
        y = [[unit(self.w @ crops[v, i]) for i in range(batch)] for v in range(views)]
        f = [sum(x[v][i] for v in range(large)) / large for i in range(batch)]
        stage2 = c.averaging_start_epoch is not None and epoch >= c.averaging_start_epoch
        total = 0.0
        for h in range(len(self.pre)):
            pre, cur, rho, k = self.pre[h].copy(), self.cur[h].copy(), self.rho[h].copy(), len(self.rho[h])
            new = [int(np.argmax([f_i @ (pre if stage2 else cur)[j] + rho[j] for j in range(k)])) for f_i in f]
            old = [self.table[h][i] for i in ids] if epoch else new
            old = new if c.labels_from == "current" else old
            centers = cur if c.centers_from == "current" else pre
            for i in range(batch):
                q = np.zeros(k)
                if stage2 and epoch > c.averaging_start_epoch:
                    for label, weight in self.lists[h][ids[i]]:
                        q[label] = np.exp(weight / 0.5)
                    q = q / q.sum()
                elif old[i] >= 0:
                    q[old[i]] = 1
                else:
                    continue
                p = [softmax(centers @ x[v][i] / c.temperature) for v in range(large)]
                for v in range(views):
                    if v < large:
                        others = [p[u] for u in range(large) if u != v]
                    else:
                        others = p
                    target = c.label_weight * q + (1 - c.label_weight) * sum(others) / len(others) if others else q
                    share = 1 / large if v < large else 1 / (views - large)
                    share = share if views == large else share / 2
                    for beta, e in ((c.predictor_weight, y[v][i]), (1 - c.predictor_weight, x[v][i])):
                        log_p = np.log(softmax(centers @ e / c.temperature))
                        total -= beta * share * (target * log_p).sum() / batch / len(self.pre)
            for j in range(k):
                count = sum(label == j for label in new)
                self.rho[h][j] = rho[j] - c.dual_learning_rate * (count / batch - c.constraint_ratio / k)
                if c.constraint_ratio < 1:
                    self.rho[h][j] = max(self.rho[h][j], 0)
                if count:
                    mean = (self.n[h][j] * cur[j] + sum(f[i] for i in range(batch) if new[i] == j)) / (self.n[h][j] + count)
                    self.cur[h][j] = mean if stage2 else unit(mean)
                    self.n[h][j] += count
            for i, image in enumerate(ids):
                self.table[h][image] = new[i]
                if stage2:
                    self.remember(self.lists[h][image], new[i], 1 / (epoch - c.averaging_start_epoch + 1))
        return total

    def remember(self, pairs: list[tuple[int, float]], new: int, f: float) -> None:
        if new in [label for label, _ in pairs]:
            pairs[:] = [(label, weight * (1 - f) + (f if label == new else 0)) for label, weight in pairs]
            return
        least = 0.0
        if len(pairs) == self.c.averaging_labels:
            least = min(weight for _, weight in pairs)
            del pairs[[weight for _, weight in pairs].index(least)]
        pairs[:] = [(label, weight * (1 - f) / (1 - least)) for label, weight in pairs]
        pairs.append((new, f))

    def end_epoch(self, epoch: int) -> None:
        start = self.c.averaging_start_epoch
        for h in range(len(self.pre)):
            if start is not None and epoch >= start:
                f = 1 / (epoch - start + 1)
                self.cur[h] = np.array([unit((1 - f) * p + f * unit(c)) for p, c in zip(self.pre[h], self.cur[h], strict=True)])
            self.pre[h], self.n[h] = self.cur[h].copy(), np.zeros(len(self.n[h]))


@pytest.mark.parametrize(
    ("large", "small", "settings"),
    [
        (1, 0, {}),
        (1, 0, {"num_clusters": (4, 6, 9), "predictor_weight": 0.3}),
        (1, 0, {"constraint_ratio": 0.0}),
        (1, 0, {"constraint_ratio": 1.0}),
        (2, 0, {"predictor_weight": 0.5, "temperature": 0.05}),
        (2, 3, {"predictor_weight": 0.5, "temperature": 0.05, "num_clusters": (4, 7)}),
        (1, 0, {"predictor_weight": 0.0}),
        (1, 0, {"averaging_start_epoch": 2, "averaging_labels": 2}),
        (1, 0, {"averaging_start_epoch": 1, "averaging_labels": 3, "num_clusters": (4, 7), "constraint_ratio": 1.0}),
        (2, 1, {"averaging_start_epoch": 2, "averaging_labels": 5, "predictor_weight": 0.5}),
        (1, 0, {"labels_from": "current"}),
        (1, 0, {"centers_from": "current"}),
        (1, 0, {"train_first_epoch": False}),
    ],
)
def test_epochs_equal_the_steps_of_the_page(large: int, small: int, settings: dict[str, Any]) -> None:
    images, batch, dim, epochs = 24, 8, 4, 6
    rng = np.random.default_rng(5)
    method = coke(dim, images, batch, **settings)
    w = np.eye(dim) if method.predictor is None else method.predictor.weight.detach().numpy()
    literal = Literal([clusters.current.numpy() for clusters in method.heads()], w, images, method.config)
    groups, differ = rng.normal(size=(images, dim)), 0
    for epoch in range(epochs):
        for s, ids in enumerate(rng.permutation(images).reshape(-1, batch)):
            crops = groups[ids] + rng.normal(size=(large + small, batch, dim))
            want = literal.step(crops, ids.tolist(), large, epoch)
            seen = views_of(torch.from_numpy(crops).requires_grad_(), torch.from_numpy(ids), large)
            out = advance(method, seen, epoch * 3 + s, 3)
            if epoch == 0 and not method.config.train_first_epoch:
                assert out.loss is None
            else:
                assert out.loss.item() == pytest.approx(want, abs=1e-9)
            for h, clusters in enumerate(method.heads()):
                np.testing.assert_allclose(clusters.duals, literal.rho[h], **EXACT)
                if s < 2:
                    np.testing.assert_allclose(clusters.current, literal.cur[h], **EXACT)
        literal.end_epoch(epoch)
        for h, clusters in enumerate(method.heads()):
            np.testing.assert_allclose(clusters.previous, literal.pre[h], **EXACT)
            np.testing.assert_array_equal(method.labels.rows[:, h], literal.table[h])
        differ += epoch > 0 and out.metrics["label_agreement"] < 1
    assert differ > 0  # labels moved


# ---------------------------------------------------------------------------- several workers, restarts


HALF = 10  # steps, amid the third of four epochs and in stage 2


def trained(rank: int, world: int, sharded: bool, begin: int = 0, state: dict[str, Any] | None = None, ddp: bool = False) -> dict[str, Any]:
    """Real heads over synchronised batch norm and stage 2 from epoch 2; a plain gradient step after each of 4 steps an epoch."""
    torch.manual_seed(1)
    config = CoKeConfig(
        num_clusters=(4, 6), dual_learning_rate=0.5, projection_dim=6, projector_layers=2, projector_hidden=8, predictor_hidden=8,
        averaging_start_epoch=2, averaging_labels=2, predictor_weight=0.5, shard_tables=sharded,
    )  # fmt: skip
    facts = RunFacts(global_batch_size=12, steps_per_epoch=4, total_steps=20, num_images=48, num_ids=53)
    backbone = nn.Sequential(nn.Linear(5, 7))
    backbone.num_features = 7
    method = convert_sync_batchnorm(CoKe(config, backbone, facts).double())
    if state is not None:
        method.load_state_dict(state["method"])
        for name, table in method.memory_banks().items():
            table.load(state["tables"][name])
    forward = DistributedDataParallel(method, broadcast_buffers=False) if ddp else method
    rng, losses, gradients = np.random.default_rng(3), [], []
    groups, ids = rng.normal(size=(53, 5)), np.arange(53)
    for step in range(14):
        if step % 4 == 0:
            ids = rng.permutation(53)[:48]
        batch = ids.reshape(4, 12)[step % 4].copy()
        crops = torch.from_numpy(groups[batch] + rng.normal(size=(2, 12, 5)))
        if step % 3 == 1:
            batch[7], crops[:, 7] = batch[2], crops[:, 2]  # an image in the place of one that cannot be decoded
        if step < begin:
            continue
        if step == HALF:
            half = copy.deepcopy(state_of(method))
        own = slice(rank * 12 // world, (rank + 1) * 12 // world)
        out = advance(method, views_of(crops[:, own], torch.from_numpy(batch[own]), 2), step, 4, forward)
        if out.loss is None:
            continue
        losses.append(out.loss.detach())
        if not ddp:
            average_gradients(method.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters()]))
        with torch.no_grad():
            for p in method.parameters():
                p -= 0.1 * p.grad
        method.zero_grad()
    return state_of(method) | {"losses": torch.stack(losses), "gradients": torch.stack(gradients), "half": half}


def state_of(method: CoKe) -> dict[str, Any]:
    return {"method": method.state_dict(), "tables": {name: pieces_of(table) for name, table in method.memory_banks().items()}}


def every_way(rank: int, world: int) -> dict[str, Any]:
    runs = {"whole": (False, False), "sharded": (True, False), "ddp": (False, True)}
    return {name: trained(rank, world, sharded, ddp=ddp) for name, (sharded, ddp) in runs.items()}


def second_half(rank: int, world: int, file: Path) -> dict[str, Any]:
    halves = torch.load(file)
    return {name: trained(rank, world, name == "sharded", begin=HALF, state=halves[name]["half"]) for name in ("whole", "sharded")}


def same_clusters(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name, value in a["method"].items():
        torch.testing.assert_close(b["method"][name], value, rtol=0, atol=1e-11, msg=name)
    for name, pieces in a["tables"].items():
        torch.testing.assert_close(torch.cat(b["tables"][name]), torch.cat(pieces), rtol=0, atol=1e-12, msg=name)


def test_two_workers_do_what_one_does_and_any_number_goes_on(tmp_path: Path) -> None:
    """Tables whole or sharded, gradients ours or DDP's; an image twice in a batch, in both workers; ids above the number of images."""
    for folder in ("two", "four"):
        (tmp_path / folder).mkdir()
    one, workers = trained(0, 1, False), in_processes(2, tmp_path / "two", every_way)
    assert len(one["losses"]) == 10  # none in the first pass
    seen = (torch.cat(one["tables"]["labels"]) >= 0).all(dim=1)
    assert int(seen.sum()) > 48 and bool(seen[48:].any())
    for name in ("whole", "sharded", "ddp"):
        for worker in workers:
            same_clusters(one, worker[name])
            torch.testing.assert_close(worker[name]["gradients"], one["gradients"], rtol=0, atol=1e-12)
            for key, value in worker[name]["method"].items():
                assert torch.equal(value, workers[0][name]["method"][key]), key
        mean = (workers[0][name]["losses"] + workers[1][name]["losses"]) / 2
        torch.testing.assert_close(mean, one["losses"], rtol=0, atol=1e-12)
    torch.save(workers[0], tmp_path / "halves.pt")
    for name in ("whole", "sharded"):
        same_clusters(one, trained(0, 1, False, begin=HALF, state=workers[0][name]["half"]))
    for worker in in_processes(4, tmp_path / "four", partial(second_half, file=tmp_path / "halves.pt")):
        for half in worker.values():
            same_clusters(one, half)
