"""Two workers under Ray Train: every registered method. What happens when workers are lost: `make chaos`."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from pipeline.train.relay import Listener, Mute, Relay
from pipeline.train.workers import CPU_WORKER
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from methods.parts.contract import Method, find, registered
from pipeline.config import override
from pipeline.ingest.stream import start_ray
from pipeline.recipes import entries, load_recipe
from pipeline.runs import RunFolder, create_run
from pipeline.train import checkpoint
from pipeline.train.prepare import prepare
from tests.e2e.test_one_machine import here

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
SMALL = {find(load_recipe(e.name).method).name: e.name for e in reversed(list(entries())) if e.name.endswith("-small")}
TINY = {
    "data.path": "patches:per_photo=16", "train.workers": 2, "train.threads": 1, "train.steps": 4, "train.global_batch_size": 32,
    "train.log_every": 2, "evaluate.knn_every": 4, "evaluate.knn_queries": 32, "backbone.width": 0.125,
}  # fmt: skip


@pytest.fixture(scope="module")
def ray_with_room(_ray_ends: None) -> None:
    """A Ray with a CPU more than tasks need, as a run with workers starts it."""
    ray.shutdown()
    start_ray(extra_cpus=1)


@pytest.fixture(scope="module")
def trained(ray_with_room: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunFolder, Any]]:
    """Every method by one group of two workers, one after the other: starting a group takes longer than these few steps."""
    root, settings, folders = tmp_path_factory.mktemp("many"), {}, {}
    relay = ray.remote(Relay).options(num_cpus=0).remote()
    listener = Listener(relay, Mute(), root, lambda step: None, restarts=len(SMALL))
    for method, recipe in SMALL.items():
        config = load_recipe(recipe)
        sizes: dict[str, Any] = {f"views.{name}.size": 16 if name == "local" else 32 for name in config.views}
        if find(config.method).method.needs_passes:
            sizes["data.path"] = "patches:per_photo=4"  # two steps to a pass: the first may have no loss
        if hasattr(config.method, "num_prototypes"):
            sizes["method.num_prototypes"] = 16
        ready = prepare(override(config, TINY | sizes))
        folders[method] = create_run(root, method, method)
        run = str(folders[method].path)
        relay.give.remote(run, {"prepared": [ray.put((ready, None))], "evaluate": True})
        settings[method] = {"relay": relay, "run": run, "remote": None, "tasks": 1, "timeout_s": 600.0, "prepares": False}

    def in_turn(settings: dict[str, Any]) -> dict[str, Any]:
        from pipeline.train.worker import run

        return {method: run(one) for method, one in settings.items()}

    trainer = DataParallelTrainer(
        in_turn,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker=CPU_WORKER),
        run_config=RunConfig(name=".ray", storage_path=str(root)),
    )
    pool = ThreadPoolExecutor(1)
    outcome = pool.submit(trainer.fit)
    try:
        while not outcome.done():  # what the driver of a run does meanwhile
            listener.listen(stop=False)
            time.sleep(0.2)
    except BaseException:
        ray.shutdown()  # the group would go on
        raise
    done = outcome.result().return_value
    return {method: (folder, done[method]) for method, folder in folders.items()}


@pytest.mark.parametrize("method", list(registered()))
def test_every_method_trains_on_two_workers(method: str, trained: dict[str, tuple[RunFolder, Any]]) -> None:
    folder, done = trained[method]
    assert done.complete and done.step == 4
    assert done.scores.get("trained") > 0
    points = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    losses = {p["step"]: p["metrics"]["loss"] for p in points if "loss" in p["metrics"]}
    kind = registered()[method].method
    expected = [[2, 4], [4]] if kind.needs_passes else [[2, 4]]
    assert list(losses) in expected and all(math.isfinite(loss) for loss in losses.values())
    pictures = {"views.png", "curves.png", "neighbours.png", "scores.png", "patch_pca.png"}
    clustered = {"clusters.png", "cluster_sizes.png"} if kind.cluster_scores is not Method.cluster_scores else set()
    of_vits = {"attention.png"} if load_recipe(SMALL[method]).backbone.name.startswith("vit_") else set()
    painted = {"reconstructions.png"} if kind.reconstruct is not Method.reconstruct else set()
    assert {p.name for p in folder.figures.glob("*.png")} == pictures | clustered | of_vits | painted
    assert (folder.model / "backbone.safetensors").is_file()
    assert checkpoint.load(checkpoint.pointed_to(folder.checkpoints))["position"]["step"] == 4


def test_more_workers_than_fit_are_refused_with_a_remedy(ray_with_room: None, tmp_path: Path) -> None:
    done = here(
        "pretrain",
        "swav-small",
        "--data.path=patches:per_photo=100",
        "--data.lanes=64",
        "--train.workers=64",
        f"--runs-dir={tmp_path}",
        code=2,
    )
    assert "train.workers=64" in done.stderr and "use fewer workers" in done.stderr
