"""Searches for real: ASHA cuts, failing trials, PBT, a killed driver, one process for many trials. Groups of workers: test_jobs.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import from_yaml
from pipeline.metrics_log import read_points
from tests.conftest import USERS_ENV
from tests.e2e.test_one_machine import here

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parent.parent.parent
TINY = [
    "swav-small",
    "--data.path=patches:per_photo=16",
    "--train.global-batch-size=32",
    "--backbone.width=0.125",
    "--method.projector-hidden=64",
    "--method.num-prototypes=16",
    "--evaluate.knn-queries=64",
    "--train.steps=12",
    "--evaluate.knn-every=4",
]


def results(sweep: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(sweep.glob("trial-*/trial.json"))]


def mlflow_runs(runs: Path) -> dict[str, Any]:
    from pipeline.tracking.client import mlflow_client

    client = mlflow_client(f"sqlite:///{runs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("manyviews")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture(scope="module")
def asha(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Four trials, half of them with a learning rate of nearly 0; and what was printed."""
    runs = tmp_path_factory.mktemp("tune")
    space = ["--space", "optim.base_lr=choice:4e-3,1e-9", "method.num_prototypes=choice:16,32", "--search", "grid", "--grace", "8"]
    done = here("tune", *TINY, *space, f"--runs-dir={runs}", "--name=first", f"--json={runs / 'first.json'}")
    return runs, done.stdout


def test_asha_cuts_the_worse_trials_and_ranks_the_others(asha: tuple[Path, str]) -> None:
    runs, said = asha
    facts, trials = json.loads((runs / "first" / "sweep.json").read_text()), results(runs / "first")
    assert (facts["status"], facts["rungs"], facts["trials"]) == ("finished", [8], 4)
    stopped = [t for t in trials if t["status"] == "stopped"]
    assert stopped and all(t["step"] == 8 and t["score"] is not None for t in stopped)
    assert {t["status"] for t in trials} == {"finished", "stopped"}
    for trial in trials:
        points = read_points(runs / "first" / f"trial-{trial['number']:03d}")
        scores = {p["step"]: p["metrics"] for p in points if "score" in p["metrics"]}
        assert scores[trial["step"]]["score"] == scores[trial["step"]]["knn"] == trial["score"]
    assert "on held-out training images" in said and "manyviews pretrain swav-small --optim.base-lr" in said
    assert json.loads((runs / "first.json").read_text())["results"] == trials


def test_the_test_split_is_not_read_and_the_best_is_champion(asha: tuple[Path, str]) -> None:
    runs, _ = asha
    facts = json.loads((runs / "first" / "sweep.json").read_text())
    assert not list((runs / "first").glob("trial-*/evaluation.json"))
    best = max((t for t in results(runs / "first") if t["status"] == "finished"), key=lambda t: t["score"])
    assert facts["best"] == best["number"]
    from pipeline.tracking.client import mlflow_client

    version = mlflow_client(f"sqlite:///{runs / 'mlflow.db'}").get_model_version_by_alias("swav-small", "champion")
    assert version.tags["trial"] == f"trial-{best['number']:03d}" and version.tags["sweep"] == "first"


def test_mlflow_nests_the_trials_and_leaves_none_running(asha: tuple[Path, str]) -> None:
    runs, _ = asha
    found = mlflow_runs(runs)
    parent = found["first"]
    children = {name: run for name, run in found.items() if name.startswith("first/")}
    assert len(children) == 4 and {run.info.status for run in found.values()} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert {run.data.tags["trial"] for run in children.values()} == {"finished", "stopped"}
    assert parent.data.params["space.optim.base_lr"].startswith("choice:") and parent.data.metrics["best_score"] > 0
    assert {run.data.params["method.num_prototypes"] for run in children.values()} == {"16", "32"}
    assert all("score" in run.data.metrics for run in children.values())


def test_one_process_served_all_trials_also_after_a_cut(asha: tuple[Path, str]) -> None:
    runs, _ = asha
    trials = results(runs / "first")
    pids = {json.loads((runs / "first" / f"trial-{t['number']:03d}" / "run.json").read_text())["pid"] for t in trials}
    assert len(pids) == 1
    assert all(t["start_seconds"] > 0 for t in trials[1:])  # how soon: benchmarks/sweeps.py


def test_a_trial_is_an_ordinary_run_that_goes_on_after_a_cut(asha: tuple[Path, str]) -> None:
    runs, _ = asha
    cut = next(t for t in results(runs / "first") if t["status"] == "stopped")
    done = here("resume", f"first/trial-{cut['number']:03d}", f"--runs-dir={runs}")
    assert "from step 8" in done.stdout and "step 12/12" in done.stdout
    listed = here("runs", f"--runs-dir={runs}").stdout
    assert "first" in listed and "4/4" in listed and "report" in listed


def test_a_failing_trial_is_recorded_and_the_others_go_on(ray_local: None, tmp_path: Path) -> None:
    space = ["--space", "optim.base_lr=choice:4e-3,1e38", "--search", "grid", "--scheduler", "none", "--track.no-register"]
    done = here("tune", *TINY, *space, f"--runs-dir={tmp_path}", "--name=bad", "--score", "rankme", "--train.log-every=1")
    good, bad = results(tmp_path / "bad")
    assert (good["status"], bad["status"]) == ("finished", "failed")
    assert "loss is" in bad["error"] and bad["error"] in done.stdout.replace("\n", " ")
    assert 0 < good["score"] <= 1
    statuses = {name: run.info.status for name, run in mlflow_runs(tmp_path).items()}
    assert statuses == {"bad": "FINISHED", "bad/trial-000": "FINISHED", "bad/trial-001": "FAILED"}


def test_pbt_takes_over_a_better_trials_state_with_other_values(ray_local: None, tmp_path: Path) -> None:
    space = ["--space", "optim.base_lr=log:1e-9:1e-2", "--scheduler", "pbt", "--trials", "2", "--grace", "4", "--concurrent", "1"]
    here("tune", *TINY, *space, f"--runs-dir={tmp_path}", "--name=pbt", "--train.steps=12", "--track.no-register")
    trials = results(tmp_path / "pbt")
    assert {t["status"] for t in trials} == {"finished"}
    heirs = [t for t in trials if t["from"]]
    assert heirs, "at least one exploit"
    for heir in heirs:
        assert set(heir["from"]) <= {0, 1} - {heir["number"]}
        trained = from_yaml((tmp_path / "pbt" / f"trial-{heir['number']:03d}" / "config.yaml").read_text())
        assert trained.optim.base_lr == heir["values"]["optim.base_lr"]


def begin(runs: Path, name: str, *settings: str) -> subprocess.Popen[bytes]:
    """Start a search over two temperatures in a process of its own; what it prints goes to `runs / "log"`."""
    space = ["--space", "method.temperature=choice:0.1,0.2", "--search", "grid", "--scheduler", "none", "--track.no-register"]
    command = [sys.executable, str(ROOT / "manyviews.py"), "tune", *TINY, *space, f"--runs-dir={runs}", f"--name={name}", *settings]
    with open(runs / "log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=USERS_ENV)


def wait_for(file: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 480
    while not file.exists():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def test_ctrl_c_ends_with_whole_checkpoints_and_no_open_run(tmp_path: Path) -> None:
    process = begin(tmp_path, "stopped", "--train.steps=4000", "--evaluate.knn-every=1000", "--train.checkpoint-every=10")
    first = tmp_path / "stopped" / "trial-000"
    wait_for(first / "checkpoints" / "last.json", process, tmp_path / "log")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=480) == 1, (tmp_path / "log").read_text()
    assert "go on with:" in (tmp_path / "log").read_text()
    assert [t["status"] for t in results(tmp_path / "stopped")] == ["interrupted", "waiting"]
    run, last = json.loads((first / "run.json").read_text()), json.loads((first / "checkpoints" / "last.json").read_text())
    assert run["message"] == f"stopped at step {last['step']}; its checkpoint is whole" and last["step"] < 1000
    found = {name: run.info.status for name, run in mlflow_runs(tmp_path).items()}
    assert found == {"stopped": "KILLED", "stopped/trial-000": "KILLED"}


def test_a_killed_search_goes_on_and_leaves_no_run_open(tmp_path: Path) -> None:
    process = begin(tmp_path, "killed", "--train.steps=40")
    second = tmp_path / "killed" / "trial-001"
    wait_for(second / "checkpoints" / "last.json", process, tmp_path / "log")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "killed" / "ray").glob("experiment_state-*.json")), "what Ray Tune goes on from"
    before = results(tmp_path / "killed")[0]
    reached = json.loads((second / "checkpoints" / "last.json").read_text())["step"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "manyviews.py"), "resume", "killed", f"--runs-dir={tmp_path}"],
        capture_output=True, text=True, env=USERS_ENV, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = results(tmp_path / "killed")
    assert before["status"] == "finished" and first == before, "kept as it was"
    assert (last["status"], last["step"]) == ("finished", 40)
    steps = [p["step"] for p in read_points(second) if "score" in p["metrics"]]
    assert steps == sorted(set(steps)) and 0 < reached <= 40, "no step was measured twice: it went on from its checkpoint"
    found = mlflow_runs(tmp_path)
    assert {name: run.info.status for name, run in found.items()} == dict.fromkeys(
        ["killed", "killed/trial-000", "killed/trial-001"], "FINISHED"
    )
