"""Two workers under Ray Train: every registered method. What happens when workers are lost: `make chaos`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from methods.parts.contract import find, registered
from pipeline.recipes import entries, load_recipe
from tests.e2e.test_one_machine import manyviews

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
SMALL = {find(load_recipe(e.name).method).name: e.name for e in reversed(list(entries())) if e.name.endswith("-small")}


@pytest.mark.parametrize("method", list(registered()))
def test_every_method_trains_on_two_workers(method: str, tmp_path: Path) -> None:
    done = manyviews(
        "pretrain", SMALL[method], "--data.path=patches:per_photo=16", "--train.workers=2", "--train.threads=1", "--train.steps=6",
        "--train.global-batch-size=32", "--train.log-every=2", "--evaluate.knn-every=3", "--backbone.width=0.125", "--views.global.size=32",
        "--views.local.size=16", f"--runs-dir={tmp_path}", "--run=two", f"--json={tmp_path / 'two.json'}",
    )  # fmt: skip
    assert "2 workers" in done.stdout and "step 6/6" in done.stdout
    said = json.loads((tmp_path / "two.json").read_text())
    assert said["status"] == "finished" and said["registered"]["version"] == 1
    points = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [p["step"] for p in points if "loss" in p["metrics"]] == [2, 3, 4, 6]
    assert {p.name for p in (tmp_path / "two" / "figures").glob("*.png")} == {"views.png", "curves.png", "neighbours.png", "scores.png"}
    assert not list((tmp_path / "two").glob(".ray-*")), "Ray Train's scratch folder is gone"


def test_more_workers_than_fit_are_refused_with_a_remedy(tmp_path: Path) -> None:
    done = manyviews(
        "pretrain",
        "swav-small",
        "--data.path=patches:per_photo=100",
        "--data.lanes=64",
        "--train.workers=64",
        f"--runs-dir={tmp_path}",
        code=2,
    )
    assert "train.workers=64" in done.stderr and "use fewer workers" in done.stderr
