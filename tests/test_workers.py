"""Several workers give what one gives on the joined batch; and placing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from methods.parts.contract import Progress, find
from methods.parts.distributed import average_gradients, gather_with_gradient
from methods.parts.errors import ConfigError
from methods.parts.norms import (
    BATCH_NORMS,
    SplitBatchNorm,
    SyncBatchNorm,
    average_statistics,
    convert_split_batchnorm,
    convert_sync_batchnorm,
)
from methods.parts.views import Views
from pipeline.config import TrainConfig, override
from pipeline.recipes import load_recipe
from pipeline.resolve import resolve
from pipeline.train.loop import exchange, mean_over_workers
from pipeline.train.placement import CPU_WORKER, GPU_WORKER, fits
from tests.parity.common import in_processes
from tests.test_methods import BATCH, SMALL, built

pytestmark = pytest.mark.timeout(600)  # the first test of a number of workers starts them
Several = Callable[[int], list[dict[str, Any]]]  # by the number of workers

# ---------------------------------------------------------------------------- batch norm


def _images() -> torch.Tensor:
    return torch.randn(12, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 100


def _norm_step(rank: int, world: int, sync: bool = True, bf16: bool = False) -> dict[str, Any]:
    """One forward and backward pass; rank 0 holds eight rows, the others share the rest. In bf16 only what flows is bf16."""
    torch.manual_seed(1)
    norm: nn.Module = nn.BatchNorm2d(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm = norm.float() if bf16 else norm
    rows = torch.arange(12).split([8, *[4 // (world - 1)] * (world - 1)])[rank] if world > 1 else torch.arange(12)
    images, dy = _images(), torch.sin(_images())
    x, dy = (
        part[rows].to(torch.bfloat16 if bf16 else torch.float64).contiguous(memory_format=torch.channels_last) for part in (images, dy)
    )
    x.requires_grad_()
    net = nn.Sequential(norm)
    net = convert_sync_batchnorm(net) if sync else net
    out = net(x)
    out.backward(dy)
    weights = [norm.weight.grad, norm.bias.grad]
    return {"out": out.detach(), "dx": x.grad, "weights": weights, "state": net.state_dict()}


@pytest.mark.parametrize("world", [2, 3])
def test_batch_norm_over_workers_is_that_of_the_joined_batch(world: int, several: Several) -> None:
    want = _norm_step(0, 1, sync=False)
    parts = [worker["norm"] for worker in several(world)]
    for key in ("out", "dx"):
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), want[key], rtol=1e-10, atol=1e-10)
    for i in (0, 1):
        torch.testing.assert_close(sum(part["weights"][i] for part in parts), want["weights"][i], rtol=1e-10, atol=1e-10)
    for part in parts:
        assert part["state"].keys() == want["state"].keys()
        for key, value in want["state"].items():
            torch.testing.assert_close(part["state"][key], value, rtol=1e-12, atol=0)


def test_batch_norm_over_workers_in_bf16_rounds_only_what_it_stores(several: Several) -> None:
    parts = [worker["norm in bf16"] for worker in several(2)]
    got = {key: torch.cat([part[key] for part in parts]) for key in ("out", "dx")}
    assert got["out"].dtype == got["dx"].dtype == torch.bfloat16
    exact = nn.BatchNorm2d(6).double()
    state = {key: value.double() for key, value in parts[0]["state"].items()}
    exact.load_state_dict({key.removeprefix("0."): value for key, value in state.items()})
    x = _images().bfloat16().double().requires_grad_()
    out = exact(x)
    out.backward(torch.sin(_images()).bfloat16().double())
    for key, want in (("out", out), ("dx", x.grad)):
        assert (got[key].double() - want).norm() < 2**-8 * want.norm()
    for i, weight in enumerate((exact.weight, exact.bias)):
        got_sum = sum(part["weights"][i] for part in parts)
        assert got_sum.dtype == torch.float32
        torch.testing.assert_close(got_sum.double(), weight.grad, rtol=1e-4, atol=1e-4)


def test_synchronized_norms_keep_names_and_are_plain_ones_in_one_process() -> None:
    method, views = built("swav-small")
    twin = copy.deepcopy(method)
    convert_sync_batchnorm(twin)
    assert list(twin.state_dict()) == list(method.state_dict())
    assert sum(isinstance(m, SyncBatchNorm) for m in twin.modules()) == sum(
        isinstance(m, BATCH_NORMS) for m in method.modules()
    )
    for mode in (True, False):
        a, b = (m.train(mode).evaluation_backbone()(views.crops[0]) for m in (method, twin))
        assert torch.equal(a, b)


def test_on_a_gpu_norms_are_those_of_torch_and_timm() -> None:
    """The structure only: torch's refuse CPU tensors between workers. Both ways keep names, parameters, buffers and values."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ModuleDict({"act": BatchNormAct2d(4), "plain": nn.BatchNorm1d(4)}))
    net.append(convert_split_batchnorm(nn.Sequential(nn.BatchNorm2d(4)), 2)).eval()
    objects = dict(net.named_parameters()) | dict(net.named_buffers())
    act = net[2]["act"].act
    there, here = convert_sync_batchnorm(copy.deepcopy(net), "cuda"), convert_sync_batchnorm(copy.deepcopy(net), "cpu")
    assert list(there.state_dict()) == list(here.state_dict()) == list(net.state_dict())
    kinds = (nn.SyncBatchNorm, SyncBatchNormAct, nn.SyncBatchNorm, SplitBatchNorm)
    assert [type(m) for m in (there[1], there[2]["act"], there[2]["plain"], there[3][0])] == list(kinds)
    assert there[3][0].groups == 2 and not any(m.training for m in there.modules())
    x = torch.randn(2, 4, 3, 3)
    for way in (there, here):
        assert torch.equal(way[2]["act"](x), net[2]["act"](x))
    convert_sync_batchnorm(net, "cuda")
    assert net[2]["act"].act is act
    assert all(value is objects[name] for name, value in (dict(net.named_parameters()) | dict(net.named_buffers())).items())
    assert convert_sync_batchnorm(there, "cuda")[1] is there[1]  # once is enough


def _averaged(rank: int, world: int) -> torch.Tensor:
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(rank)
    average_statistics(nn.Sequential(norm))
    return norm.running_mean


def test_running_statistics_are_averaged(several: Several) -> None:
    for worker in several(2):
        assert worker["averaged"].tolist() == [0.5, 0.5, 0.5]


# ---------------------------------------------------------------------------- every method


def _own_rows(views: Views, rank: int, world: int) -> Views:
    rows = torch.arange(BATCH).chunk(world)[rank]
    stacks = {name: torch.cat([crop[rows] for crop in stack.chunk(views.counts[name])]) for name, stack in views.stacks.items()}
    return Views(stacks=stacks, counts=views.counts, roles=views.roles, image_ids=views.image_ids[rows], labels=views.labels[rows])


# DINOv2's masks and neighbours are those of a worker; `tests/parity/test_dinov2.py` compares workers with the same masks
WITHOUT: dict[str, dict[str, float]] = {"dinov2": {"koleo_weight": 0.0, "mask_probability": 0.0}}


def _two_steps(rank: int, world: int, recipe: str, ddp: bool) -> dict[str, Any]:
    """Losses, the gradients of the second step and the whole state after it, in float64."""
    method, views = built(recipe, **WITHOUT.get(find(load_recipe(recipe).method).name, {}))
    method = method.double()
    views.stacks = {name: stack.double() for name, stack in views.stacks.items()}
    views = _own_rows(views, rank, world)
    if world > 1 and method.sync_batchnorm:
        convert_sync_batchnorm(method)
    forward: nn.Module = DistributedDataParallel(method, broadcast_buffers=False) if ddp and world > 1 else method
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    losses = []
    for step in (8, 9):
        progress = Progress(step=step, total_steps=400, steps_per_epoch=4, generator=torch.Generator().manual_seed(step))
        method.before_step(progress)
        optimizer.zero_grad()
        out = forward(views, progress, method.draw_masks(views, progress))
        out.loss.backward()
        if forward is method:
            average_gradients(method.parameters())
        gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
        optimizer.step()
        method.after_step([out.outputs], progress)
        losses.append(mean_over_workers([out.loss.item()])[0])
    average_statistics(method)  # as before every checkpoint
    return {"losses": losses, "gradients": gradients, "state": method.state_dict()}


# one small recipe of every method
RECIPES = list({type(load_recipe(recipe).method): recipe for recipe in reversed(SMALL)}.values())
CASES = [(recipe, ddp) for recipe in RECIPES for ddp in (False, True)]


@pytest.mark.parametrize(("recipe", "ddp"), CASES)
def test_two_workers_train_like_one(recipe: str, ddp: bool, several: Several) -> None:
    one = _two_steps(0, 1, recipe, ddp)
    for worker in several(2):
        two = worker["methods"][recipe, ddp]
        np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-9)
        assert two["gradients"].keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-6, atol=1e-9, msg=name)
        for name, value in one["state"].items():
            torch.testing.assert_close(two["state"][name], value, rtol=1e-6, atol=1e-9, msg=name)


def _talk(rank: int, world: int) -> Any:
    stop, bad = exchange(rank == 1, [f"bad {rank}"] if rank == 1 else [])
    return stop, bad, exchange(False, []), mean_over_workers([1.0 + rank, 4.0])


def test_workers_agree(several: Several) -> None:
    for worker in several(2):
        assert worker["talk"] == (True, ["bad 1"], (False, []), [1.5, 4.0])


# ---------------------------------------------------------------------------- placing


@pytest.mark.parametrize(
    ("workers", "share", "nodes", "fit"),
    [
        (2, CPU_WORKER, [{"CPU": 2}], True),
        (4, CPU_WORKER, [{"CPU": 2}], True),
        (5, CPU_WORKER, [{"CPU": 2}], False),  # 0.75 CPU would stay free: Ray Data would wait for ever
        (3, {"CPU": 0.6}, [{"CPU": 1}] * 3, False),  # 1.2 free in all, but no whole one anywhere
        (2, {"CPU": 0.6}, [{"CPU": 1}] * 3, True),
        (8, GPU_WORKER, [{"CPU": 32, "GPU": 8}], True),
        (8, GPU_WORKER, [{"CPU": 8, "GPU": 8}], False),
        (8, GPU_WORKER, [{"CPU": 8, "GPU": 8}, {"CPU": 4}], True),
        (2, GPU_WORKER, [{"CPU": 4, "GPU": 1}, {"GPU": 1}], False),
        (1, CPU_WORKER, [], False),
    ],
)
def test_workers_fit_only_beside_a_whole_cpu(workers: int, share: dict, nodes: list, fit: bool) -> None:
    assert fits(workers, share, nodes) is fit


@pytest.mark.parametrize("value", ["two", "2:", "4:2", "-1", ":3", "0:4"])
def test_worker_counts_that_mean_nothing_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.workers"):
        TrainConfig(workers=value)


def test_worker_counts_must_divide_the_lanes() -> None:
    config = load_recipe("swav-small")
    for value, good in ((3, False), ("5:7", False), (8, True), ("3:7", True), (0, True)):
        changed = override(config, {"train.workers": value})
        if good:
            resolve(changed, 5000)
        else:
            with pytest.raises(ConfigError, match=r"does not divide data.num_shards=8; use one of 1, 2, 4, 8"):
                resolve(changed, 5000)


# ---------------------------------------------------------------------------- gather


def _contrast(rank: int, world: int) -> Any:
    """The gradient of a contrastive loss: own anchors against the columns of all workers."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    rows = torch.randn(8, 5, dtype=torch.float64).chunk(world)[rank]
    z = layer(rows)
    columns = gather_with_gradient(z)
    labels = torch.arange(len(z)) + rank * len(z)
    nn.functional.cross_entropy(z @ columns.T, labels).backward()
    average_gradients(layer.parameters())
    return layer.weight.grad


@pytest.mark.parametrize("world", [2, 4])
def test_negatives_of_all_workers_need_no_factor(world: int, several: Several) -> None:
    want = _contrast(0, 1)
    for worker in several(world):
        torch.testing.assert_close(worker["contrast"], want, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------- the processes


def _all(rank: int, world: int) -> dict[str, Any]:
    """Everything that the tests above want of `world` workers: starting them costs more than what they do."""
    found: dict[str, Any] = {}
    if world < 4:
        found["norm"] = _norm_step(rank, world)
    if world != 3:
        found["contrast"] = _contrast(rank, world)
    if world == 2:
        found |= {"norm in bf16": _norm_step(rank, world, bf16=True), "averaged": _averaged(rank, world), "talk": _talk(rank, world)}
        found["methods"] = {case: _two_steps(rank, world, *case) for case in CASES}
    return found


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Several:
    """What each of a number of workers found; each number of them is started once."""
    return cache(lambda world: in_processes(world, tmp_path_factory.mktemp(f"world-{world}"), _all))
