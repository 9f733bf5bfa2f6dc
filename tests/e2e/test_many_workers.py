"""Two workers under Ray Train: every registered method. What happens when workers are lost: `make chaos`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import ray

from methods.parts.contract import find, registered
from pipeline.ingest.stream import start_ray
from pipeline.recipes import entries, load_recipe
from tests.e2e.test_one_machine import here

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
SMALL = {find(load_recipe(e.name).method).name: e.name for e in reversed(list(entries())) if e.name.endswith("-small")}
TINY = [
    "--data.path=patches:per_photo=16", "--train.workers=2", "--train.threads=1", "--train.steps=4", "--train.global-batch-size=32",
    "--train.log-every=2", "--evaluate.knn-every=2", "--evaluate.knn-queries=32", "--backbone.width=0.125",
]  # fmt: skip


@pytest.fixture(scope="module")
def ray_with_room(_ray_ends: None) -> None:
    """One Ray for all methods, with a CPU more than tasks need, as a run with workers starts it."""
    ray.shutdown()
    start_ray(extra_cpus=1)


@pytest.mark.parametrize("method", list(registered()))
def test_every_method_trains_on_two_workers(method: str, ray_with_room: None, tmp_path: Path) -> None:
    sizes = [f"--views.{name}.size={16 if name == 'local' else 32}" for name in load_recipe(SMALL[method]).views]
    said = tmp_path / "two.json"
    done = here("pretrain", SMALL[method], *TINY, *sizes, f"--runs-dir={tmp_path}", "--run=two", "--track.no-register", f"--json={said}")
    assert "2 workers" in done.stdout and "step 4/4" in done.stdout
    assert json.loads(said.read_text())["status"] == "finished"
    points = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    losses = {p["step"]: p["metrics"]["loss"] for p in points if "loss" in p["metrics"]}
    assert list(losses) == [2, 4] and all(math.isfinite(loss) for loss in losses.values())
    assert {p.name for p in (tmp_path / "two" / "figures").glob("*.png")} == {"views.png", "curves.png", "neighbours.png", "scores.png"}
    assert (tmp_path / "two" / "model" / "backbone.safetensors").is_file()
    assert not list((tmp_path / "two").glob(".ray-*")), "Ray Train's scratch folder is gone"


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
