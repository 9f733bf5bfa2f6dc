"""Two workers under Ray Train: every registered method. A worker that is killed; more: `make chaos`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from methods.parts.contract import Method, find, registered
from pipeline import checkpoint
from pipeline.build import RunContext, prepare
from pipeline.config import override
from pipeline.data.ray_data import start_ray
from pipeline.recipes import entries, load_recipe
from pipeline.run_folder import RunFolder, create_run
from pipeline.tracking.run_tracker import read_points
from pipeline.train.placement import CPU_WORKER
from pipeline.train.progress import NullReporter
from pipeline.train.ray_trainer import run_workers, worker_main
from pipeline.train.work import TrainResult, evaluate_checkpoint
from tests.conftest import ROOT, USERS_ENV
from tests.e2e.test_one_machine import here as run_here

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
SMALL = {find(load_recipe(e.name).method).name: e.name for e in reversed(list(entries())) if e.name.endswith("-small")}
TINY = {
    "data.path": "patches:per_photo=16", "train.workers": 2, "train.threads": 1, "train.steps": 4, "train.global_batch_size": 32,
    "train.log_every": 2, "evaluate.knn_every": 4, "evaluate.knn_queries": 32, "backbone.width": 0.125,
}  # fmt: skip
KILLED = TINY | {"train.steps": 12, "train.checkpoint_every": 2, "train.deterministic": True, "method.num_prototypes": 16}
SHARDED = ("dino", "mae")  # by FSDP, the others by DDP
EVALUATED = ("swav", "byol", "dino", "mae")  # clusters, none, attention, reconstructions


@pytest.fixture(scope="module")
def ray_with_room(_ray_ends: None) -> None:
    """A Ray with a CPU more than tasks need, as a run with workers starts it."""
    ray.shutdown()
    start_ray(extra_cpus=1)


def every_method(settings: dict[str, Any]) -> dict[str, TrainResult]:
    """What each worker does: the worker function of a run, for one run after the other."""
    common = {key: settings[key] for key in ("channel", "tasks")}
    return {method: worker_main(one | common) for method, one in settings["methods"].items()}


@pytest.fixture(scope="module")
def trained(ray_with_room: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunContext, RunFolder, TrainResult]]:
    """Every method by one group of two workers, one after the other: starting a group takes longer than these few steps."""
    root, settings, runs = tmp_path_factory.mktemp("many"), {}, {}
    configs = {}
    for method, recipe in SMALL.items():
        config = load_recipe(recipe)
        sizes: dict[str, Any] = {f"views.{name}.size": 16 if name == "local" else 32 for name in config.views}
        if find(config.method).method.needs_full_epochs:
            sizes["data.path"] = "patches:per_photo=4"  # two steps to a pass: the first may have no loss
        if hasattr(config.method, "num_prototypes"):
            sizes["method.num_prototypes"] = 16
        if method in SHARDED:
            sizes["train.strategy"] = "fsdp"
        configs[method] = override(config, TINY | sizes)
    configs["left alone"] = override(load_recipe("swav-small"), KILLED)
    for name, config in configs.items():
        ready = prepare(config)
        folder = create_run(root, name, name)
        runs[name] = ready, folder
        settings[name] = {"context": [ray.put((ready, None))], "run": str(folder.path)}
    here = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(here)  # workers cannot import it
    try:
        screen = NullReporter(32)
        done = run_workers(every_method, {"methods": settings}, RunFolder(root), 2, CPU_WORKER, reporter=screen, timeout_s=600)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(here)
    return {name: (ready, folder, done[name]) for name, (ready, folder) in runs.items()}


@pytest.mark.parametrize("method", list(registered()))
def test_every_method_trains_on_two_workers(method: str, trained: dict[str, tuple[RunContext, RunFolder, TrainResult]]) -> None:
    _, folder, done = trained[method]
    assert done == TrainResult(4, complete=True)
    points = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    losses = {p["step"]: p["metrics"]["loss"] for p in points if "loss" in p["metrics"]}
    expected = [[2, 4], [4]] if registered()[method].method.needs_full_epochs else [[2, 4]]
    assert list(losses) in expected and all(math.isfinite(loss) for loss in losses.values())
    assert checkpoint.load(checkpoint.pointed_to(folder.checkpoints))["position"]["step"] == 4


@pytest.mark.parametrize("method", EVALUATED)
def test_the_evaluation_draws_what_a_method_has(method: str, trained: dict[str, tuple[RunContext, RunFolder, TrainResult]]) -> None:
    ready, folder, _ = trained[method]
    assert evaluate_checkpoint(ready, str(folder.path)).scores.get("trained") > 0
    kind = registered()[method].method
    pictures = {"views.png", "curves.png", "neighbours.png", "scores.png", "patch_pca.png"}
    clustered = {"clusters.png", "cluster_sizes.png"} if kind.cluster_scores is not Method.cluster_scores else set()
    of_vits = {"attention.png"} if load_recipe(SMALL[method]).backbone.name.startswith("vit_") else set()
    painted = {"reconstructions.png"} if kind.reconstruct is not Method.reconstruct else set()
    hidden = {"masks.png"} if kind.hidden_patches is not Method.hidden_patches else set()
    assert {p.name for p in folder.figures.glob("*.png")} == pictures | clustered | of_vits | painted | hidden
    assert (folder.model / "backbone.safetensors").is_file()


def test_more_workers_than_fit_are_refused_with_a_remedy(ray_with_room: None, tmp_path: Path) -> None:
    done = run_here(
        "pretrain",
        "swav-small",
        "--data.path=patches:per_photo=100",
        "--data.num_shards=64",
        "--train.workers=64",
        f"--runs-dir={tmp_path}",
        code=2,
    )
    assert "train.workers=64" in done.stderr and "use fewer workers" in done.stderr


def test_a_run_that_loses_a_worker_ends_as_one_left_alone(
    trained: dict[str, tuple[RunContext, RunFolder, TrainResult]], tmp_path: Path
) -> None:
    """The same final state, bit for bit, by the command that users give."""
    ray.shutdown()  # the cores are for the command
    settings = [f"--{key.replace('_', '-')}" + (f"={value}" if value is not True else "") for key, value in KILLED.items()]
    command = [sys.executable, "manyviews.py", "pretrain", "swav-small", *settings, "--track.no-register", f"--runs-dir={tmp_path}"]
    process = subprocess.Popen([*command, "--run=killed"], cwd=ROOT, env=USERS_ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    folder = RunFolder(tmp_path / "killed")
    while folder.state().get("step", 0) < 4 and process.poll() is None:
        time.sleep(0.1)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "TrainWorker" in " ".join(child.cmdline())]
    workers[-1].kill()
    said = process.communicate(timeout=1200)[0].decode()
    assert process.returncode == 0, said
    assert "lost worker" in said
    losses = [point["step"] for point in read_points(folder.path) if "loss" in point["metrics"]]
    assert losses == [2, 4, 6, 8, 10, 12], "a point twice, or none"
    _, alone, _ = trained["left alone"]
    assert checkpoint.hash_of_last(folder.checkpoints) == checkpoint.hash_of_last(alone.checkpoints)
