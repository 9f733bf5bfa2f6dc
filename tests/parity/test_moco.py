"""MoCo against the original's trace, worked values, and a literal float64 transcription with shuffled batch norm in parts."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.moco import MoCo, MoCoConfig
from methods.parts import ema, mlp
from methods.parts.contract import Progress, RunFacts
from methods.parts.contrast import contrast_meters, info_nce, info_nce_with_queue
from methods.parts.distributed import all_gather_rows, average_gradients
from methods.parts.errors import ConfigError
from methods.parts.norms import average_statistics, convert_split_batchnorm
from tests.parity.common import EXACT, Same, in_processes, progress, two_views


class Body(nn.Module):
    """A small backbone, `(B, 6) -> (B, 10)`, with batch norm or without."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.num_features = 10
        self.linear = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu()


def moco(backbone: nn.Module, batch: int, **settings: Any) -> MoCo:
    config = MoCoConfig(**{"bn_groups": 2, "projection_dim": 4, **settings})
    return MoCo(config, backbone, RunFacts(global_batch_size=batch, steps_per_epoch=10, total_steps=100)).double()


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


# ---------------------------------------------------------------------------- loss


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_info_nce_equals_the_original(golden, temperature: float) -> None:
    values = golden("contrastive_infonce")
    raw, k, queue = (torch.from_numpy(values[name]) for name in ("q_raw", "k", "queue_rows"))
    raw.requires_grad_()
    q = unit(raw)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
    loss = info_nce(logits, torch.zeros(6, dtype=torch.int64))
    loss.backward()
    np.testing.assert_allclose(loss.item(), values[f"loss_t{temperature}"], **EXACT)
    np.testing.assert_allclose(raw.grad.numpy(), values[f"grad_q_t{temperature}"], **EXACT)
    # and as MoCo makes it, with the key network left out
    method = moco(Same(8), 6, projection_dim=8, queue_length=20, temperature=temperature)
    method.query, method.key = nn.Sequential(OrderedDict(backbone=Same(8), projector=nn.Identity())), nn.Identity()
    method.queue.rows.copy_(queue)
    again = raw.detach().clone().requires_grad_()
    out = method(two_views(again, k), progress())
    out.loss.backward()
    np.testing.assert_allclose(out.loss.item(), values[f"loss_t{temperature}"], **EXACT)
    np.testing.assert_allclose(again.grad.numpy(), values[f"grad_q_t{temperature}"], **EXACT)
    each = nn.functional.cross_entropy(
        torch.from_numpy(values[f"logits_t{temperature}"]), torch.zeros(6, dtype=torch.int64), reduction="none"
    )
    np.testing.assert_allclose(each.numpy(), values[f"per_sample_t{temperature}"], **EXACT)


@pytest.mark.parametrize("temperature", [0.002, 0.2])  # exp(1 / 0.002) is no number
def test_a_queue_in_parts_is_a_cross_entropy_over_all_of_it(temperature: float) -> None:
    make = torch.Generator().manual_seed(0)
    rows = unit(torch.randn(3000, 5, generator=make).double())  # six parts of 512 anchors
    anchors, others = (torch.randn(512, 5, generator=make).double().requires_grad_() for _ in range(2))
    positives = torch.randint(0, 512, (512,), generator=make)
    losses, gradients, meters = [], [], []
    for parts in (False, True):
        a = unit(anchors)
        logits = (a @ unit(others).T / temperature).scatter(1, (positives[:, None] + 1) % 512, -math.inf)
        if parts:
            loss, found = info_nce_with_queue(logits, positives, a, rows, temperature)
        else:
            logits = torch.cat([logits, a @ rows.T / temperature], dim=1)
            loss, found = info_nce(logits, positives), contrast_meters(logits, positives, temperature)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, (anchors, others)))
        meters.append({name: float(value) for name, value in found.items()})
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 / temperature)
    assert meters[0] == pytest.approx(meters[1], rel=1e-9, abs=1e-12)


def test_worked_value() -> None:
    method = moco(Same(2), 2, projection_dim=2, queue_length=3, temperature=0.2, bn_groups=1)
    method.query, method.key = nn.Identity(), nn.Identity()
    method.queue.rows.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
    q, k = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    out = method(two_views(q, k), progress())
    assert out.loss.item() == pytest.approx(0.4078291, abs=1e-7)
    assert out.loss.item() == pytest.approx(-math.log(math.exp(5) / sum(math.exp(x) for x in (5, 3, 4, -3))), abs=1e-9)
    assert float(out.metrics["contrastive_top1"]) == 1 and float(out.metrics["positive_cosine"]) == pytest.approx(1)
    assert float(out.metrics["negative_cosine"]) == pytest.approx((0.6 + 0.8 - 0.6) / 3)


def test_uninformative_keys_give_the_loss_of_chance() -> None:
    method = moco(Same(4), 4, queue_length=9)
    method.query, method.key = nn.Identity(), nn.Identity()
    method.queue.rows.fill_(0.5)
    out = method(two_views(*torch.ones(2, 4, 4, dtype=torch.float64)), progress())
    facts = RunFacts(global_batch_size=4, steps_per_epoch=1, total_steps=1)
    assert out.loss.item() == pytest.approx(math.log(10), abs=1e-12) == pytest.approx(method.config.hints(facts).chance_loss[0])
    assert float(out.metrics["contrastive_top1"]) == 0


# ---------------------------------------------------------------------------- steps


def test_six_steps_equal_the_original(golden) -> None:
    """v2's head, one worker, no batch norm: logits, queue, pointer and key network after each step; the pointer wraps."""
    values = golden("contrastive_moco_v2_w1")
    backbone = nn.Sequential(nn.Linear(12, 10), nn.ReLU())
    backbone.num_features = 10
    method = moco(backbone, 4, projection_dim=8, queue_length=int(values["K"]), temperature=float(values["temperature"]), momentum=0.9)
    names = {"body.weight": "backbone.0.weight", "body.bias": "backbone.0.bias"}
    names |= {f"fc.{i}.{kind}": f"projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    for original, own in names.items():
        for network in (method.query, method.key):
            network.get_parameter(own).data.copy_(torch.from_numpy(values[f"init/{original}"]))
    method.queue.rows.copy_(torch.from_numpy(values["queue0_rows"]))
    optimizer = torch.optim.SGD(
        method.param_groups()[0].params,
        lr=float(values["lr"]),
        momentum=float(values["sgd_momentum"]),
        weight_decay=float(values["weight_decay"]),
    )
    for step in range(6):
        x_q, x_k = (torch.from_numpy(values[name][step, 0]) for name in ("x_q", "x_k"))
        method.before_step(progress(step))
        out = method(two_views(x_q, x_k), progress(step))
        np.testing.assert_allclose(out.loss.item(), values["loss"][step, 0], **EXACT)
        q = unit(method.query(x_q))
        logits = torch.cat([(q * out.outputs["k"]).sum(1, keepdim=True), q @ method.queue.rows.T], 1) / float(values["temperature"])
        np.testing.assert_allclose(logits.detach().numpy(), values["logits"][step, 0], **EXACT)
        optimizer.zero_grad()
        out.loss.backward()
        if step == 0:
            for original, own in names.items():
                np.testing.assert_allclose(method.query.get_parameter(own).grad.numpy(), values[f"grad0/{original}"], **EXACT)
        optimizer.step()
        method.after_step([out.outputs], progress(step))
        np.testing.assert_allclose(method.queue.rows.numpy(), values["queue_rows"][step], **EXACT)
        assert int(method.queue.pointer) == values["queue_ptr"][step]
        for original, own in names.items():
            np.testing.assert_allclose(method.key.get_parameter(own).numpy(), values[f"encoder_k/{original}"][step], **EXACT)
    for original, own in names.items():
        np.testing.assert_allclose(method.query.get_parameter(own).detach().numpy(), values[f"final_q/{original}"], **EXACT)
    assert all(p.grad is None for p in method.key.parameters())


def literal_norm(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


def literal_network(w: list[Tensor], x: Tensor, parts: list[list[int]]) -> Tensor:
    """Linear, batch norm in the given parts, ReLU, the two layers of the head; unit rows in the order of `x`."""
    rows = [torch.empty(0)] * len(x)
    for part in parts:
        h = literal_norm(x[part] @ w[0].T + w[1]).relu()
        h = (h @ w[2].T + w[3]).relu() @ w[4].T + w[5]
        for i, row in zip(part, h / h.norm(dim=1, keepdim=True), strict=True):
            rows[i] = row
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [2, 4])
def test_steps_with_shuffled_parts_equal_the_equations(groups: int) -> None:
    """Five steps on one device; the queue of eleven rows wraps inside a batch of eight; keys in parts of the shared permutation."""
    torch.manual_seed(0)
    method = moco(Body(norm=True), 8, queue_length=11, temperature=0.3, momentum=0.8, bn_groups=groups)
    trained = [p for name, p in method.query.named_parameters() if ".norm." not in name]
    w = [p.detach().clone() for p in trained]
    slow, queue, pointer = [p.clone() for p in w], method.queue.rows.clone(), 0
    optimizer = torch.optim.SGD(trained, lr=0.3)
    for step in range(5):
        x1, x2 = torch.randn(2, 8, 6, dtype=torch.float64)
        method.before_step(progress(step))
        out = method(two_views(x1, x2), progress(step))
        method.zero_grad()
        out.loss.backward()
        optimizer.step()
        method.after_step([out.outputs], progress(step))

        slow = [0.8 * s + 0.2 * p for s, p in zip(slow, w, strict=True)]
        w = [p.requires_grad_() for p in w]
        order = torch.randperm(8, generator=torch.Generator().manual_seed(step)).tolist()
        size = 8 // groups
        q = literal_network(w, x1, [list(range(i, i + size)) for i in range(0, 8, size)])
        k = literal_network(slow, x2, [order[i : i + size] for i in range(0, 8, size)])
        terms = []
        for i in range(8):
            positive = torch.exp(q[i] @ k[i] / 0.3)
            terms.append(-torch.log(positive / (positive + sum(torch.exp(q[i] @ row / 0.3) for row in queue))))
        loss = sum(terms) / 8
        w = [(p - 0.3 * g).detach() for p, g in zip(w, torch.autograd.grad(loss, w), strict=True)]
        for row in k:
            queue[pointer] = row
            pointer = (pointer + 1) % 11
        np.testing.assert_allclose(out.loss.item(), loss.item(), rtol=1e-8)
        torch.testing.assert_close(out.outputs["k"], k, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(method.queue.rows, queue, rtol=1e-6, atol=1e-7)  # the first rows were drawn in float32
        for p, want in zip(trained, w, strict=True):
            torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-8)


def test_shuffling_changes_the_keys_company_and_nothing_else() -> None:
    """Without batch norm keys are those of the plain network; with it and one part only, too; with parts they are not."""
    x = torch.randn(8, 6, dtype=torch.float64)
    for norm, groups, same in ((False, 4, True), (True, 1, True), (True, 4, False)):
        torch.manual_seed(0)
        method = moco(Body(norm), 8, queue_length=8, bn_groups=groups)
        k, plain = method.keys(x, progress(3)), unit(convert_split_batchnorm(copy.deepcopy(method.key), groups)(x))
        assert torch.allclose(k, plain, rtol=1e-9, atol=1e-10) == same
        assert torch.equal(k, method.keys(x, progress(3)))  # the permutation is that of the step
        assert torch.allclose(k, method.keys(x, progress(4)), rtol=1e-9, atol=1e-10) == same


def test_micro_batches_make_the_step_of_the_whole_batch() -> None:
    """Without batch norm: gradients and the queue are those of the whole batch."""
    torch.manual_seed(0)
    whole = moco(Body(norm=False), 8, queue_length=11)
    parted = copy.deepcopy(whole)
    x1, x2 = torch.randn(2, 8, 6, dtype=torch.float64)
    out = whole(two_views(x1, x2), progress())
    out.loss.backward()
    whole.after_step([out.outputs], progress())
    outputs = []
    for i in range(2):
        one = Progress(step=0, total_steps=100, steps_per_epoch=10, micro_step=i, micro_steps=2)
        part = parted(two_views(x1[4 * i : 4 * i + 4], x2[4 * i : 4 * i + 4]), one)
        (part.loss / 2).backward()
        outputs.append(part.outputs)
    parted.after_step(outputs, progress())
    for a, b in zip(whole.query.parameters(), parted.query.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole.queue.rows, parted.queue.rows, rtol=1e-12, atol=1e-12)
    assert not MoCo.whole_batch_remedy


def test_the_loss_sees_the_queue_as_it_was_and_the_key_network_as_it_becomes() -> None:
    method = moco(Body(norm=False), 8, queue_length=8, momentum=0.5)
    x1, x2 = torch.randn(2, 8, 6, dtype=torch.float64)
    before = method.queue.rows.clone()
    out = method(two_views(x1, x2), progress())
    assert torch.equal(method.queue.rows, before) and float(out.metrics["queue_fill"]) == 0
    method.after_step([out.outputs], progress())
    torch.testing.assert_close(method.queue.rows, out.outputs["k"])
    old = copy.deepcopy(method.key)
    with torch.no_grad():
        for p in method.query.parameters():
            p.add_(1)
    method.before_step(progress(1))
    want = ema.frozen_copy(old)
    ema.update(want, method.query, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(method.key.parameters(), want.parameters(), strict=True))


def test_heads_of_both_versions() -> None:
    assert [type(m).__name__ for m in mlp(9, 9, 4, 1, norm=False)] == ["Linear"]
    second = mlp(9, 7, 4, 2, norm=False)
    assert [type(m).__name__ for m in second] == ["Linear", "ReLU", "Linear"]
    assert (second[0].out_features, second[2].in_features, second[2].bias is not None) == (7, 7, True)


def test_parts_must_share_the_batch() -> None:
    with pytest.raises(ConfigError, match=r"method\.bn_groups=3: .*train\.global_batch_size=8 evenly.*; use 2"):
        moco(Body(norm=True), 8, bn_groups=3)
    with pytest.raises(ConfigError, match=r"method\.bn_groups=8: .*; use 4"):
        moco(Body(norm=True), 8, bn_groups=8)
    moco(Body(norm=False), 8, bn_groups=3)  # nothing to share


def test_advice_on_a_queue_longer_than_the_data() -> None:
    facts = RunFacts(global_batch_size=8, steps_per_epoch=10, total_steps=10, num_images=50)
    texts = moco(Body(norm=True), 8, queue_length=64).config.hints(facts).warnings
    assert any("several copies" in text for text in texts) and any("filled after 8 steps of 10" in text for text in texts)


# ---------------------------------------------------------------------------- workers


def _steps(rank: int, world: int) -> dict[str, Any]:
    """Four steps over eight images in `world` workers, each with its own batch norm; one worker in two parts."""
    torch.manual_seed(0)
    method = moco(Body(norm=True), 8, queue_length=11, momentum=0.9)
    optimizer = torch.optim.SGD(method.query.parameters(), lr=0.2, momentum=0.9)
    losses, gradients = [], {}
    for step in range(4):
        x1, x2 = torch.randn(2, 8, 6, dtype=torch.float64).chunk(world, dim=1)[rank]
        method.before_step(progress(step))
        out = method(two_views(x1, x2), progress(step))
        optimizer.zero_grad()
        out.loss.backward()
        average_gradients(method.query.parameters())
        gradients = {name: p.grad.clone() for name, p in method.query.named_parameters()}
        optimizer.step()
        method.after_step([out.outputs], progress(step))
        losses.append(float(all_gather_rows(out.loss.detach()[None]).mean()))
    own = {name: value.clone() for name, value in method.state_dict().items()}
    average_statistics(method)
    return {"losses": losses, "gradients": gradients, "own": own, "state": method.state_dict()}


def test_two_workers_with_their_own_norms_equal_two_parts_of_one(tmp_path: Path) -> None:
    one, two = _steps(0, 1), in_processes(2, tmp_path, _steps)
    for worker in two:
        np.testing.assert_allclose(worker["losses"], one["losses"], rtol=1e-10)
        for kind in ("gradients", "state"):
            assert worker[kind].keys() == one[kind].keys()
            for name, value in one[kind].items():
                torch.testing.assert_close(worker[kind][name], value, rtol=1e-9, atol=1e-11, msg=name)
    a, b = (worker["own"] for worker in two)
    assert {name for name in a if not torch.equal(a[name], b[name])} == {
        f"{network}.backbone.norm.running_{kind}" for network in ("query", "key") for kind in ("mean", "var")
    }
    assert not moco(Body(norm=True), 8, bn_groups=2).sync_batchnorm and moco(Body(norm=True), 8, bn_groups=1).sync_batchnorm
