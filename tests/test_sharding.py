"""FSDP beside DDP on two gloo processes: the same training, the same files, and no worker holds whole weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from methods.parts.contract import Method
from methods.parts.distributed import own_shard, rank, world_size
from methods.parts.errors import ConfigError
from methods.parts.norms import convert_sync_batchnorm
from pipeline import checkpoint
from pipeline.build import build_method
from pipeline.config import RunConfig, override
from pipeline.data.crops import COLUMNS
from pipeline.data.loader import Batch
from pipeline.evaluate.clusters import Clusters
from pipeline.recipes import load_recipe
from pipeline.resolve import resolve
from pipeline.run_folder import RunFolder
from pipeline.train.health import HealthMonitor
from pipeline.train.loop import Trainer
from pipeline.train.optim import build_optimizer
from pipeline.train.progress import Display
from pipeline.train.sharding import Sharding
from tests.parity.common import in_processes

pytestmark = pytest.mark.timeout(600)
BATCH, STEPS = 16, 4
CPU = torch.device("cpu")
TINY = {
    "train.global_batch_size": BATCH, "train.steps": STEPS, "train.precision": "float32", "train.checkpoint_every": 2, "train.workers": 2,
    "data.num_shards": 2, "backbone.depth": (2,), "optim.warmup_epochs": 0,
}  # fmt: skip
ADAMW = "dinov2, adamw"
SGD = {"optim.name": "sgd", "optim.base_lr": 0.05}  # its momentum is linear in the gradients, and so are its weights
# each way of clipping, and what a step does to a ViT: each at least once
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dino, frozen prototypes": ("dino-small", SGD | {"method.freeze_prototypes_epochs": 1, "method.unit_prototypes": False}),
    "ibot, recomputed blocks": ("ibot-small", SGD | {"optim.clip_scope": "joint", "train.gradient_checkpointing": True}),
    "dinov2, subsets": (
        "dinov2-small",
        SGD | {"optim.clip_scope": "module", "backbone.drop_path": 0.3, "backbone.drop_path_mode": "subset", "backbone.layer_scale": 0.1},
    ),
    "dinov2, refreshed Gram teacher": (
        "dinov2-small",
        SGD | {"method.gram_weight": 1.0, "method.gram_refresh_steps": 2, "method.shared_head": False, "method.sigreg_weight": 0.05},
    ),
    "msn": ("msn-small", SGD | {"optim.clip_norm": 0.1}),
    "mae, micro-batches": ("mae-small", SGD | {"train.accumulation_steps": 2}),
    "moco-v3, frozen patches": ("moco-v3-small", SGD),
    "dino, bf16": ("dino-small", SGD | {"train.precision": "bf16"}),
    ADAMW: ("dinov2-small", {}),
}


def config_of(case: str, strategy: str) -> RunConfig:
    recipe, changes = CASES[case]
    return override(load_recipe(recipe), TINY | changes | {"train.strategy": strategy})


def batches(config: RunConfig, steps: range) -> Iterator[Batch]:
    """This worker's half of random images, the same in every process."""
    for step in steps:
        draw, own = torch.Generator().manual_seed(step), slice(rank(), None, world_size())
        ids = torch.arange(BATCH)[own]
        crops = {
            name: torch.randint(0, 255, (BATCH, group.count, group.size, group.size, 3), dtype=torch.uint8, generator=draw)[own]
            for name, group in config.views.items()
        }
        tables = {name: torch.zeros(*crop.shape[:2], len(COLUMNS)).numpy() for name, crop in crops.items()}
        yield Batch(crops=crops, tables=tables, ids=ids, labels=ids, epoch=0, step=step, bad=[])


def trainer(config: RunConfig, folder: Path) -> Trainer:
    resolved = resolve(config, 10 * BATCH)
    method = build_method(config, resolved.facts)
    precision = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    if world_size() > 1 and method.sync_batchnorm:
        convert_sync_batchnorm(method)
    sharding = Sharding(method, CPU, precision) if world_size() > 1 and config.train.strategy == "fsdp" else None
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        config=config,
        resolved=resolved,
        method=method,
        optimizer=build_optimizer(config.optim, method.param_groups()),
        folder=RunFolder(folder),
        device=CPU,
        precision=precision,
        reporter=Display(Console(file=io.StringIO()), total_steps=STEPS, start_step=0, batch=BATCH, chance=None),
        report=lambda step, metrics: None,
        images=10 * BATCH,
        sharding=sharding,
    )


def steps_of(made: Trainer, steps: range) -> list[float]:
    return [float(made.step(batch).loss) for batch in batches(made.config, steps)]


def all_runs(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What the tests below want of two workers."""
    found: dict[Any, Any] = {}
    for case in CASES:
        for strategy in ("ddp", "fsdp"):
            made = trainer(config_of(case, strategy), folder / case / strategy)
            found[case, strategy] = {"losses": steps_of(made, range(STEPS)), "state": copy.deepcopy(made.state())}
            if case == ADAMW:
                found["features", strategy] = features(made)
    found["held"] = [(own_shard(t).numel(), t.numel(), isinstance(t, DTensor)) for t in held(made)]
    return found | checkpoints(folder)


def features(made: Trainer) -> list[Tensor]:
    """What the online evaluation sees of the backbone and the clusters: on rank 0 alone, and before another step."""
    found: list[Tensor] = []
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    none = np.zeros(4, np.int64)
    one_cluster = Clusters(images=np.zeros((4, 1, 1, 3), np.uint8), labels=none - 1, assignments=none, scores=none, count=1)

    @torch.no_grad()
    def measured(backbone: nn.Module) -> dict[str, float]:
        found.append(backbone.eval()(images))
        return {"knn": 0.5}

    @torch.no_grad()
    def clusters(method: Method) -> Clusters:
        found.append(method.eval().cluster_scores(images))
        method.train()
        return one_cluster

    if rank() == 0:
        made.online, made.online_clusters = measured, clusters
    made.measure(HealthMonitor(made.hints, patience_steps=1))
    steps_of(made, range(STEPS, STEPS + 1))
    return found


def held(made: Trainer) -> list[Tensor]:
    """Every weight, gradient and moment after a backward pass."""
    made.optimizer.zero_grad = lambda set_to_none: None
    steps_of(made, range(STEPS + 1, STEPS + 2))
    weights = list(made.method.parameters())
    moments = [value for entry in made.optimizer.state.values() for key, value in entry.items() if key != "step"]
    return weights + [p.grad for p in weights if p.grad is not None] + moments


def checkpoints(folder: Path) -> dict[Any, Any]:
    """Checkpoints of both strategies after two steps; and how each strategy goes on from each of them."""
    found: dict[Any, Any] = {}
    for written in ("ddp", "fsdp"):
        first = trainer(config_of(ADAMW, written), folder / f"written by {written}")
        steps_of(first, range(2))
        first.save()
        first.writer.wait()
        torch.distributed.barrier()
        for strategy in ("ddp", "fsdp"):
            made = trainer(config_of(ADAMW, strategy), folder / "unused")
            made.restore(checkpoint.load(checkpoint.pointed_to(first.folder.checkpoints), mapped=strategy == "fsdp"))
            same = copy.deepcopy(made.state())
            found[written, "read by", strategy] = {"state": same, "losses": steps_of(made, range(2, STEPS)), "end": made.state()}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[dict[str, Any]]:
    return in_processes(2, folder, partial(all_runs, folder=folder))


def tensors(state: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(state, dict):
        return {name: value for key, inner in state.items() for name, value in tensors(inner, f"{path}/{key}").items()}
    return {path: state} if isinstance(state, Tensor) else {}


def assert_equal(found: Any, wanted: Any, within: float = 1e-5) -> None:
    found, wanted = tensors(found), tensors(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=within, atol=within, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", [case for case in CASES if case not in (ADAMW, "dino, bf16")])
def test_losses_gradients_and_states_equal_those_of_ddp(case: str, runs: list[dict[str, Any]]) -> None:
    """The state of SGD is a sum of gradients."""
    for worker in runs:
        torch.testing.assert_close(worker[case, "fsdp"]["losses"], worker[case, "ddp"]["losses"], rtol=1e-5, atol=1e-5)
    assert_equal(runs[0][case, "fsdp"]["state"], runs[0][case, "ddp"]["state"])
    start = build_method(config_of(case, "ddp"), resolve(config_of(case, "ddp"), 10 * BATCH).facts).state_dict()
    with pytest.raises(AssertionError):  # it has learned
        assert_equal(runs[0][case, "fsdp"]["state"]["method"], start)


def test_in_bf16_nothing_is_rounded_that_autocast_does_not_round(runs: list[dict[str, Any]]) -> None:
    """Losses of later steps differ a little: gradients of several passes are added in float32, by autocast in bf16."""
    ddp, fsdp = (runs[0]["dino, bf16", strategy]["losses"] for strategy in ("ddp", "fsdp"))
    assert fsdp[0] == pytest.approx(ddp[0], rel=1e-6)
    assert fsdp == pytest.approx(ddp, rel=2e-3)
    assert {value.dtype for name, value in tensors(runs[0]["dino, bf16", "fsdp"]["state"]).items() if "num_batches" not in name} == {
        torch.float32
    }


def test_no_worker_holds_whole_weights_gradients_or_moments(runs: list[dict[str, Any]]) -> None:
    first, second = (worker["held"] for worker in runs)
    assert all(sharded for _, _, sharded in first) and len(first) > 100
    assert [a + b for (a, _, _), (b, _, _) in zip(first, second, strict=True)] == [size for _, size, _ in first]
    for worker in (first, second):
        assert sum(own for own, _, _ in worker) < 0.6 * sum(size for _, size, _ in worker)


def test_online_evaluation_sees_the_weights_of_all_workers(runs: list[dict[str, Any]]) -> None:
    (backbone, scores), wanted = runs[0]["features", "fsdp"], runs[0]["features", "ddp"]
    torch.testing.assert_close([backbone, scores], wanted, rtol=1e-4, atol=1e-4)
    assert runs[1]["features", "fsdp"] == []


@pytest.mark.parametrize("written", ["ddp", "fsdp"])
def test_a_checkpoint_of_either_strategy_loads_in_both_and_in_one_process(written: str, runs: list[dict[str, Any]], folder: Path) -> None:
    saved = checkpoint.load(checkpoint.pointed_to(RunFolder(folder / f"written by {written}").checkpoints))
    alone = trainer(config_of(ADAMW, "fsdp"), folder / "unused")
    alone.restore(saved)
    assert_equal(alone.state(), saved, within=0)
    for strategy in ("ddp", "fsdp"):
        read = runs[0][written, "read by", strategy]
        assert_equal(read["state"], saved, within=0)
        wanted = runs[0][ADAMW, written]["losses"][2:]
        assert read["losses"][0] == pytest.approx(wanted[0], rel=1e-5)
        assert read["losses"][1] == pytest.approx(wanted[1], rel=1e-3)  # AdamW enlarges the rounding of small gradients
    assert_equal(runs[0][written, "read by", written]["end"], runs[0][ADAMW, written]["state"], within=0)  # as if never stopped


RESNET = {"backbone.name": "resnet18", "backbone.depth": None, "backbone.image_size": None, "backbone.patch_size": None}


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("swav-small", {}, "swav needs whole weights .*; use ddp, or one of dino, dinov2, ibot, mae, moco-v3, msn"),
        ("dino-small", RESNET, "shards the blocks of a ViT, and resnet18 has none; use ddp"),
        ("moco-v3-small", {"optim.name": "lars"}, "optim.name=lars needs the norms of whole tensors; use ddp, or optim.name=adamw"),
        ("mae-small", {"train.deterministic": True}, ".*; use ddp with train.deterministic=True"),
    ],
)
def test_what_cannot_be_sharded_is_refused(recipe: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.strategy=fsdp: {message}$"):
        config = override(load_recipe(recipe), {"train.strategy": "fsdp", "train.workers": 2} | changes)
        build_method(config, resolve(config, 5000).facts)
