"""SimCLR against the original's values, worked values, and a literal float64 transcription over steps with the memory."""

from __future__ import annotations

import copy
import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods.parts import ema
from methods.parts.backbones import BackboneConfig, build_backbone
from methods.parts.contract import RunFacts
from methods.parts.distributed import all_gather_rows, average_gradients
from methods.parts.errors import ConfigError
from methods.parts.norms import BATCH_NORMS, average_statistics, convert_sync_batchnorm
from methods.simclr import SimCLR, SimCLRConfig, head
from tests.parity.common import EXACT, SINGLE, Same, in_processes, progress, two_views


def simclr(dim: int, batch: int, projector: nn.Module | None = None, features: int | None = None, **settings: Any) -> SimCLR:
    """On features handed on as they are, in float64."""
    torch.manual_seed(0)
    config = SimCLRConfig(projection_dim=dim, **settings)
    method = SimCLR(config, Same(features or dim), RunFacts(global_batch_size=batch, steps_per_epoch=10, total_steps=100))
    method.network = nn.Sequential(OrderedDict(backbone=Same(features or dim), projector=projector or nn.Identity()))
    if config.memory_size:
        method.slow_network = ema.frozen_copy(method.network)
    return method.double()


def literal_anchor(z: Tensor, i: int, temperature: float, memory: Tensor | None = None) -> Tensor:
    """Algorithm 1 for one anchor: z stacks first views and then second ones."""
    half = len(z) // 2
    partner = (i + half) % len(z)
    total = sum(torch.exp(z[i] @ z[j] / temperature) for j in range(len(z)) if j != i)
    if memory is not None:
        total = total + sum(torch.exp(z[i] @ m / temperature) for m in memory)
    return -z[i] @ z[partner] / temperature + torch.log(total)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


# ---------------------------------------------------------------------------- loss


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
def test_loss_and_gradients_equal_the_original(golden, temperature: float, dtype: torch.dtype, tolerance: dict) -> None:
    values = golden("contrastive_simclr")
    h1, h2 = (torch.from_numpy(values[name]).to(dtype).requires_grad_() for name in ("h1", "h2"))
    method = simclr(16, 8, temperature=temperature).to(dtype)
    loss = method(two_views(h1, h2), progress()).loss
    loss.backward()
    np.testing.assert_allclose(loss.item(), values[f"loss_mean_t{temperature}"], **tolerance)
    np.testing.assert_allclose(loss.item(), values[f"loss_official_t{temperature}"] / 2, **tolerance)
    np.testing.assert_allclose(h1.grad.numpy(), values[f"grad_h1_t{temperature}"], **tolerance)
    np.testing.assert_allclose(h2.grad.numpy(), values[f"grad_h2_t{temperature}"], **tolerance)
    with torch.no_grad():
        logits, partners = method.logits(unit(torch.cat([h1, h2])))
    each = nn.functional.cross_entropy(logits, partners, reduction="none")
    np.testing.assert_allclose(each.numpy(), values[f"per_anchor_t{temperature}"], **tolerance)


def test_small_temperature_one_image_and_no_normalisation_equal_the_original(golden) -> None:
    values = golden("contrastive_simclr")
    h1, h2 = (torch.from_numpy(values[name]).requires_grad_() for name in ("h1", "h2"))
    loss = simclr(16, 8, temperature=0.01)(two_views(h1, h2), progress()).loss
    loss.backward()
    np.testing.assert_allclose(loss.item(), values["loss_mean_t001"], **EXACT)
    np.testing.assert_allclose(h1.grad.numpy(), values["grad_h1_t001"], **EXACT)
    one1, one2 = h1[:1].detach().requires_grad_(), h2[:1].detach()
    loss = simclr(16, 1, temperature=0.1)(two_views(one1, one2), progress()).loss
    loss.backward()
    np.testing.assert_allclose(loss.item(), values["loss_mean_n1"], **EXACT)
    np.testing.assert_allclose(one1.grad.numpy(), values["grad_h1_n1"], **EXACT)
    raw1, raw2 = (torch.from_numpy(values[f"nonorm_{name}"]).requires_grad_() for name in ("h1", "h2"))
    loss = nn.functional.cross_entropy(*simclr(16, 8, temperature=1.0).logits(torch.cat([raw1, raw2])))
    loss.backward()
    np.testing.assert_allclose(loss.item(), values["nonorm_loss_mean"], **EXACT)
    np.testing.assert_allclose(raw2.grad.numpy(), values["nonorm_grad_h2"], **EXACT)


def test_worked_values() -> None:
    same = torch.eye(2, dtype=torch.float64)
    loss = simclr(2, 2, temperature=0.5)(two_views(same, same), progress()).loss
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), abs=1e-12) == pytest.approx(0.2395447662, abs=1e-10)
    h1 = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    h2 = torch.tensor([[1, 1], [-1, 1], [2, 0]], dtype=torch.float64)
    logits, partners = simclr(2, 3, temperature=0.5).logits(unit(torch.cat([h1, h2])))
    each = nn.functional.cross_entropy(logits, partners, reduction="none")
    want = [1.41065172, 1.24882192, 1.61731082, 1.61731082, 0.47277788, 1.41065172]
    np.testing.assert_allclose(each.numpy(), want, atol=5e-9)


def test_equal_projections_give_the_loss_of_chance_and_say_so() -> None:
    method = simclr(4, 6, temperature=0.5, memory_size=5)
    with torch.no_grad():
        method.memory.rows.copy_(unit(torch.ones(5, 4)))
    ones = torch.ones(6, 4, dtype=torch.float64)
    out = method(two_views(ones, ones), progress())
    facts = RunFacts(global_batch_size=6, steps_per_epoch=1, total_steps=1)
    level, _ = method.config.hints(facts).chance_loss
    assert out.loss.item() == pytest.approx(level, abs=1e-12) == pytest.approx(math.log(11 + 5))
    assert float(out.metrics["contrastive_top1"]) == 0
    assert float(out.metrics["embedding_std"]) == pytest.approx(0, abs=1e-9)


def test_meters_equal_their_definitions() -> None:
    torch.manual_seed(1)
    x1, x2 = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    metrics = simclr(3, 5, temperature=0.3)(two_views(x1, x2), progress()).metrics
    z = unit(torch.cat([x1, x2]))
    first, positive, negative = [], [], []
    for i in range(10):
        cosines = {j: float(z[i] @ z[j]) for j in range(10) if j != i}
        first.append(max(cosines, key=cosines.get) == (i + 5) % 10)
        positive.append(cosines.pop((i + 5) % 10))
        negative += cosines.values()
    assert float(metrics["contrastive_top1"]) == pytest.approx(np.mean(first))
    assert float(metrics["positive_cosine"]) == pytest.approx(np.mean(positive))
    assert float(metrics["negative_cosine"]) == pytest.approx(np.mean(negative))


def test_half_precision_stays_finite() -> None:
    x = torch.randn(6, 4).half()
    x[0] *= 1e-3
    for dtype in (torch.float16, torch.bfloat16):
        h = x.to(dtype).clone().requires_grad_()
        loss = simclr(4, 6, temperature=0.05).float()(two_views(h, h), progress()).loss
        loss.backward()
        assert loss.dtype == torch.float32 and bool(loss.isfinite()) and bool(h.grad.isfinite().all())


# ---------------------------------------------------------------------------- memory


def test_steps_with_memory_equal_the_equations() -> None:
    """Six steps of SGD: rows enter after use, from the second views, by the slow network; seven rows, four to a batch."""
    torch.manual_seed(3)
    layer = nn.Linear(5, 3, bias=False).double()
    method = simclr(3, 4, layer, features=5, temperature=0.4, memory_size=7, memory_momentum=0.8)
    w, slow, memory, pointer = layer.weight.detach().clone(), layer.weight.detach().clone(), method.memory.rows.clone(), 0
    memory = unit(memory)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5)
    for step in range(6):
        x1, x2 = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
        method.before_step(progress(step))
        out = method(two_views(x1, x2), progress(step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        method.after_step([out.outputs], progress(step))

        slow = 0.8 * slow + 0.2 * w
        w = w.requires_grad_()
        z = unit(torch.cat([x1, x2]) @ w.T)
        loss = sum(literal_anchor(z, i, 0.4, memory) for i in range(8)) / 8
        (gradient,) = torch.autograd.grad(loss, w)
        w = (w - 0.5 * gradient).detach()
        for row in unit(x2 @ slow.T):
            memory[pointer] = row
            pointer = (pointer + 1) % 7
        np.testing.assert_allclose(out.loss.item(), loss.item(), rtol=1e-7)  # the first rows were drawn in float32
        torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(method.slow_network.projector.weight, slow, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(method.memory.rows, memory, rtol=1e-6, atol=1e-7)
    assert all(p.grad is None and not p.requires_grad for p in method.slow_network.parameters())


def test_without_a_memory_nothing_of_it_exists() -> None:
    names = simclr(4, 4, nn.Linear(4, 4)).state_dict()
    assert list(names) == ["network.projector.weight", "network.projector.bias"]


# ---------------------------------------------------------------------------- networks


def test_projector_and_the_part_that_is_fine_tuned() -> None:
    """hiddens[0] = features; hiddens[j + 1] = layer j with norm and, inside, ReLU."""
    backbone = build_backbone(BackboneConfig(name="resnet18", width=0.125, stem="strided"))
    facts = RunFacts(global_batch_size=4, steps_per_epoch=1, total_steps=1)
    method = SimCLR(SimCLRConfig(projector_layers=3, projection_dim=7), backbone, facts).eval()
    projector = method.network.projector
    width = backbone.num_features
    assert [(layer[0].in_features, layer[0].out_features) for layer in projector] == [(width, width), (width, width), (width, 7)]
    assert [len(layer) for layer in projector] == [3, 3, 2] and projector[2][1].bias is None
    assert all(layer[0].bias is None for layer in projector)
    x = torch.randn(3, 3, 32, 32)
    h = backbone(x)
    torch.testing.assert_close(method.network_up_to(0)(x), h)
    torch.testing.assert_close(method.network_up_to(1)(x), projector[0][1](projector[0][0](h)).relu())
    torch.testing.assert_close(method.network_up_to(3)(x), method.network(x))
    with pytest.raises(ConfigError, match="layer=4"):
        method.network_up_to(4)
    excluded = {id(p) for p in method.param_groups()[1].params}
    names = {name for name, p in method.named_parameters() if id(p) in excluded}
    norms = {f"{name}.weight" for name, m in method.named_modules() if isinstance(m, BATCH_NORMS)}
    assert names == norms | {name for name, _ in method.named_parameters() if name.endswith("bias")}
    assert len(head(8, 9, 4, 1)) == 1


def test_more_than_two_crops_are_refused() -> None:
    views = two_views(torch.randn(4, 3), torch.randn(4, 3))
    views.stacks["third"], views.counts = torch.randn(4, 3), {"first": 1, "second": 1, "third": 1}
    with pytest.raises(ConfigError, match="3 crops, but this method compares two; use one group of 2"):
        simclr(3, 4)(views, progress())


# ---------------------------------------------------------------------------- workers


def _steps(rank: int, world: int, memory_size: int) -> dict[str, Any]:
    """Three steps of a network with batch norm over eight images, in `world` workers."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 5, bias=False))
    method = simclr(5, 8, body, features=6, temperature=0.2, memory_size=memory_size, memory_momentum=0.9)
    if world > 1:
        convert_sync_batchnorm(method)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.2, momentum=0.9)
    losses, gradients = [], {}
    for step in range(3):
        x1, x2 = torch.randn(2, 8, 6, dtype=torch.float64).chunk(world, dim=1)[rank]
        method.before_step(progress(step))
        out = method(two_views(x1, x2), progress(step))
        optimizer.zero_grad()
        out.loss.backward()
        average_gradients(method.parameters())
        gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
        optimizer.step()
        method.after_step([out.outputs], progress(step))
        losses.append(float(all_gather_rows(out.loss.detach()[None]).mean()))
    average_statistics(method)
    return {"losses": losses, "gradients": gradients, "state": copy.deepcopy(method.state_dict())}


def _original_ranks(rank: int, world: int) -> dict[str, Tensor]:
    """The original's inputs for several workers: embeddings, and an encoder under averaged gradients."""
    values = dict(np.load(Path(os.environ["MANYVIEWS_REFERENCE"]) / "golden" / "contrastive_simclr.npz"))
    h1, h2 = (torch.from_numpy(values[name]).flatten(0, 1).chunk(world)[rank].clone().requires_grad_() for name in ("mw_h1", "mw_h2"))
    loss = simclr(16, 12, temperature=float(values["mw_temperature"]))(two_views(h1, h2), progress()).loss
    loss.backward()
    encoder = nn.Linear(6, 5, bias=False).double()
    method = simclr(5, 8, encoder, features=6, temperature=float(values["ddp_tau"]))
    with torch.no_grad():
        encoder.weight.copy_(torch.from_numpy(values["ddp_w"]))
    x1, x2 = (torch.from_numpy(values[name]).flatten(0, 1).chunk(world)[rank] for name in ("ddp_x1", "ddp_x2"))
    ddp_loss = method(two_views(x1, x2), progress()).loss
    ddp_loss.backward()
    average_gradients(method.parameters())
    mean = all_gather_rows(torch.stack([loss.detach(), ddp_loss.detach()])[None]).mean(0)
    return {"h1": h1.grad / world, "h2": h2.grad / world, "losses": mean, "w": encoder.weight.grad}


def _all(rank: int, world: int) -> dict[str, Any]:
    return {"plain": _steps(rank, world, 0), "memory": _steps(rank, world, 11), "original": _original_ranks(rank, world)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYVIEWS_REFERENCE", str(reference))
        return in_processes(2, tmp_path_factory.mktemp("two"), _all)


@pytest.mark.parametrize(("case", "memory_size"), [("plain", 0), ("memory", 11)])
def test_two_workers_equal_one_on_the_joined_batch(case: str, memory_size: int, two: list[dict[str, Any]]) -> None:
    one = _steps(0, 1, memory_size)
    for worker in two:
        np.testing.assert_allclose(worker[case]["losses"], one["losses"], rtol=1e-10)
        for kind in ("gradients", "state"):
            assert worker[case][kind].keys() == one[kind].keys()
            for name, value in one[kind].items():
                torch.testing.assert_close(worker[case][kind][name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_two_workers_equal_the_original(golden, two: list[dict[str, Any]]) -> None:
    values = golden("contrastive_simclr")
    for name in ("h1", "h2"):
        got = torch.cat([worker["original"][name] for worker in two]).numpy()
        np.testing.assert_allclose(got, values[f"mw_grad_{name}"].reshape(12, 16), **EXACT)
    wrong = values["mw_nograd_grad_h1"].reshape(12, 16)
    assert np.abs(got - wrong).max() > 1e-3
    for worker in two:
        np.testing.assert_allclose(worker["original"]["losses"], [values["mw_loss_global"], values["ddp_loss"]], **EXACT)
        np.testing.assert_allclose(worker["original"]["w"], values["ddp_grad_w"], **EXACT)
