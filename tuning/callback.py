"""The sweep's books: `trial.json` and the MLflow run of every trial, kept by the driver, who sees every ending.

A trial that is cut is killed as soon as it has reported, so nothing that must happen at its end can be left to it.
"""

from __future__ import annotations

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray import tune

from methods.parts.contract import find
from pipeline import checkpoint
from pipeline.config import flatten, from_yaml
from pipeline.tracking.run_tracker import EndStatus, Tracker, default_uri
from tuning.display import SweepDisplay
from tuning.sweep import ENDED, Sweep, Trial

CLOSING: dict[str, EndStatus] = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class Book(tune.Callback):
    """Ray Tune tells it of every start, result and end of a trial."""

    def __init__(self, sweep: Sweep, parent: Tracker, screen: SweepDisplay) -> None:
        self.sweep, self.parent, self.screen = sweep, parent, screen
        self.facts = sweep.facts()
        self.trackers: dict[int, Tracker] = {}
        self.before: dict[int, float] = {}  # training seconds of earlier lives
        self.closing = ThreadPoolExecutor(1)  # the server may be slow: the next trial does not wait
        self.unsent: list[Any] = []

    # ------------------------------------------------------------------ what Ray Tune calls

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        of = self.sweep.trial(number)
        facts = of.facts()
        self.before.setdefault(number, facts["seconds"])
        changes = {"status": "running", "started": facts["started"] or time.time(), "values": trial.config["values"]}
        of.update(**changes, **({"from": trial.config["from"]} if trial.config["from"] else {}))
        if number not in self.trackers:
            self.trackers[number] = self.open(of)
        elif trial.config["from"]:  # MLflow's parameters cannot change
            self.trackers[number].set_tags({"values": json.dumps(trial.config["values"]), "from": trial.config["from"]})
        self.screen.update(of.facts())

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        number = trial.config["number"]
        of = self.sweep.trial(number)
        if result.get("state") == "failed":
            of.update(error=result["error"])
        else:
            self.before[number] = self.before.get(number, 0.0) + result.get("seconds", 0.0)
            new = {key: result[key] for key in ("step", "images", "score", "start_seconds") if key in result}
            of.update(**new, seconds=round(self.before[number], 2))
        self.trackers[number].wake()
        self.screen.update(of.facts())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        state = trial.last_result.get("state", "failed") if trial.last_result else "failed"
        self.end(trial.config["number"], "stopped" if state == "running" else state)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        file = trial.error_file
        lines = Path(file).read_text().strip().splitlines() if file and Path(file).is_file() else []
        error = lines[-1][:500] if lines else "its process died"
        self.sweep.trial(trial.config["number"]).update(error=error)
        self.sweep.trial(trial.config["number"]).run.update(status="failed", message=error)
        self.end(trial.config["number"], "failed")

    def __reduce__(self) -> Any:
        return object, ()  # Ray Tune pickles what it is given, for a `restore` of its own, which a sweep does without

    # ------------------------------------------------------------------ MLflow

    def open(self, of: Trial) -> Tracker:
        """A trial's MLflow run below the sweep's: a new one, or the one it had."""
        facts, config = of.facts(), from_yaml(of.run.config_text())
        tracker = Tracker.open(
            of.path,
            uri=config.track.uri or default_uri(self.sweep.path.parent),
            experiment=config.track.experiment,
            name=f"{self.sweep.name}/{of.path.name}",
            params=lambda: flatten(config) | {"method": find(config.method).name},
            tags={
                "mlflow.parentRunId": self.facts["mlflow_run"] or "",
                "sweep": self.sweep.name,
                "values": json.dumps(facts["values"]),
                "recipe": config.recipe,
                "method": find(config.method).name,
            },
        )
        return tracker

    def reopen(self, of: Trial) -> None:
        """A half-done trial before it goes on: what lies behind its last checkpoint is forgotten."""
        number = of.facts()["number"]
        self.trackers[number] = self.open(of)
        self.trackers[number].rewind(checkpoint.last_step(of.run.checkpoints))

    def end(self, number: int, status: str) -> None:
        """A trial has ended: write it down, tell MLflow, show it."""
        of = self.sweep.trial(number)
        of.update(status=status, ended=time.time())
        if status == "stopped":
            of.run.update(status="interrupted", message="cut by the search")
        facts = of.facts()
        tracker = self.trackers.pop(number, None)
        if tracker is not None:
            tracker.set_tags(
                {"trial": status, "checkpoint": str(of.run.checkpoints)} | ({"error": facts["error"]} if facts["error"] else {})
            )
            self.unsent.append(self.closing.submit(tracker.close, CLOSING[status]))
        trials = [t.facts() for t in self.sweep.trials()]
        scores = [t["score"] for t in trials if t["status"] == "finished" and t["score"] is not None]
        if scores:
            self.parent.log(sum(t["status"] in ENDED for t in trials), {"best_score": max(scores)})
        self.screen.ended(facts)

    def close(self, status: str) -> int:
        """End what is open; returns how many entries have not reached MLflow."""
        for number in list(self.trackers):
            self.end(number, "interrupted")
        left = sum(future.result() for future in self.unsent)
        self.closing.shutdown()
        return left + self.parent.close(CLOSING[status])


def settle(sweep: Sweep) -> None:
    """End the MLflow runs of trials that had ended when the driver was killed."""
    for of in sweep.trials():
        facts, file = of.facts(), of.path / "tracking.json"
        if facts["status"] not in ENDED or not file.is_file():
            continue
        state = json.loads(file.read_text())
        if state["ended"] is None or state["status"] is not None:
            ended = {"status": CLOSING[facts["status"]], "ended": facts["ended"] or time.time(), "attached": False}
            with contextlib.suppress(Exception):  # a server that is down: `manyviews sync SWEEP/trial-000` later
                Tracker(of.path, state | ended).push()
