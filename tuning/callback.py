"""What the driver writes down of a search: `trial.json` and the MLflow run of every trial.

Ray Tune kills a trial that is cut as soon as it has reported, so nothing that must happen at its end is left to the trial.
"""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray import tune

from methods.parts.contract import find
from pipeline import checkpoint
from pipeline.config import flatten, from_yaml
from pipeline.tracking.run_tracker import EndStatus, Tracker, default_uri
from tuning.sweep import Sweep, Trial

CLOSING: dict[str, EndStatus] = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class SweepCallback(tune.Callback):
    """Ray Tune tells it of every start, result and end of a trial.

    Args:
        scheduler: an `ASHAScheduler`. Ray Tune's snapshots leave its rungs out, so they are kept as the state of the callback.
    """

    def __init__(self, path: Path, scheduler: Any = None) -> None:
        self.path, self.scheduler = path, scheduler
        self.trackers: dict[str, Tracker] = {}  # by the trial's name
        self.interrupted: set[str] = set()  # trials that have left a whole checkpoint, because the search is to end

    def setup(self, **info: Any) -> None:
        """Open the sweep's own MLflow run: a new one, or the one it had."""
        sweep = Sweep.read(self.path)
        facts, config = sweep.facts, sweep.config()
        keys = ("search", "scheduler", "score", "trials", "seeds", "seed", "total_steps", "workers")
        self.parent = Tracker.open(
            self.path,
            uri=facts["track_uri"],
            experiment=config.track.experiment,
            name=sweep.name,
            params=lambda: {f"space.{param.key}": param.text for param in sweep.params} | {key: facts[key] for key in keys},
            tags={"recipe": facts["recipe"], "method": facts["method"], "kind": "sweep"},
        )
        sweep.update(mlflow_run=self.parent.run_id(timeout=60.0))
        self.closing = ThreadPoolExecutor(1)  # the server may be slow: the next trial does not wait
        self.unsent: list[Future[int]] = []

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours, values = self._read(trial), trial.config["trial"]["values"]
        if ours.has_ended:  # unknown to the snapshot that the search goes on from
            return
        self.interrupted.discard(str(trial))
        if str(trial) not in self.trackers:
            self.trackers[str(trial)] = self._open(ours)
        elif json.dumps(ours.values) != json.dumps(values):  # PBT; MLflow's parameters cannot change
            self.trackers[str(trial)].set_tags({"values": json.dumps(values)})
        self.trackers[str(trial)].rewind(checkpoint.last_step(ours.run.checkpoints))  # a trial that goes on repeats what lies behind
        ours.update(status="running", started=ours.started or time.time(), values=values)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        ours = self._read(trial)
        if ours.has_ended:
            return
        if result["state"] == "interrupted":
            self.interrupted.add(str(trial))
        new: dict[str, Any] = {key: result[key] for key in ("step", "images", "score", "start_seconds", "error") if key in result}
        if "took_over" in result:
            copied = [*ours.copied_from, int(result["took_over"]["trial"].removeprefix("trial-"))]
            exploits = [{"step": step} for step in (*ours.exploits, result["took_over"]["step"])]
            new |= {"from": copied, "exploits": exploits}
            self.trackers[str(trial)].set_tags({"from": copied})
        ours.update(**new, seconds=round(ours.seconds + result.get("seconds", 0.0), 2))
        self.trackers[str(trial)].wake()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        state = (trial.last_result or {}).get("state", "failed")
        self._end(str(trial), "stopped" if state == "running" else state)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        file = trial.error_file
        lines = Path(file).read_text().strip().splitlines() if file and Path(file).is_file() else []
        error = lines[-1][:500] if lines else "its process died"
        ours = self._read(trial)
        ours.update(error=error)
        ours.run.update(status="failed", message=error)
        self._end(str(trial), "failed")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """End the search when all running trials have been interrupted. On this signal Ray Tune saves its state and returns."""
        running = {str(trial) for trial in trials if trial.status == "RUNNING"}
        if running <= self.interrupted and Sweep.read(self.path).stopping:
            signal.raise_signal(signal.SIGUSR1)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """End what is open, and note how many entries have not reached MLflow."""
        for name in list(self.trackers):
            self._end(name, "interrupted")
        unsent = sum(future.result() for future in self.unsent)
        self.closing.shutdown()
        sweep = Sweep.read(self.path)
        sweep.update(unsent=unsent + self.parent.close(CLOSING[outcome(sweep)]))

    # ------------------------------------------------------------------ what Ray Tune keeps for a resume

    def get_state(self) -> dict[str, Any] | None:
        if self.scheduler is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            self.scheduler.save(str(Path(folder, "scheduler")))
            return {"scheduler": Path(folder, "scheduler").read_bytes()}

    def set_state(self, state: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "scheduler").write_bytes(state["scheduler"])
            self.scheduler.restore(str(Path(folder, "scheduler")))

    # ------------------------------------------------------------------ trials

    def _read(self, trial: Any) -> Trial:
        return Sweep.read(self.path).trial(str(trial))

    def _open(self, trial: Trial) -> Tracker:
        """Open a trial's MLflow run below the sweep's: a new one, or the one it had."""
        sweep, config = Sweep.read(self.path), from_yaml(trial.run.config_text())
        method = find(config.method).name
        tags = {"mlflow.parentRunId": sweep.facts["mlflow_run"] or "", "sweep": sweep.name, "values": json.dumps(trial.values)}
        return Tracker.open(
            trial.folder,
            uri=config.track.uri or default_uri(self.path.parent),
            experiment=config.track.experiment,
            name=f"{sweep.name}/{trial.folder.name}",
            params=lambda: flatten(config) | {"method": method},
            tags=tags | {"recipe": config.recipe, "method": method},
        )

    def _end(self, name: str, status: str) -> None:
        sweep = Sweep.read(self.path)
        trial = sweep.trial(name)
        if trial.has_ended:
            return
        trial.update(status=status, ended=time.time())
        if status == "stopped":
            trial.run.update(status="interrupted", message="cut by the search")
        tracker = self.trackers.pop(name, None)
        if tracker is not None:
            tags = {"trial": status, "checkpoint": str(trial.run.checkpoints)}
            tracker.set_tags(tags | ({"error": trial.error} if trial.error else {}))
            self.unsent.append(self.closing.submit(tracker.close, CLOSING[status]))
        finished = [t.score for t in sweep.trials() if t.status == "finished" and t.score is not None]
        if finished:
            self.parent.log(sum(t.has_ended for t in sweep.trials()), {"best_score": max(finished)})


def outcome(sweep: Sweep) -> str:
    """Return how a search stands that runs no more: finished, interrupted or failed."""
    trials = sweep.trials()
    if len(trials) < sweep.facts["trials"] or not all(trial.has_ended for trial in trials):
        return "interrupted"
    return "finished" if any(trial.status == "finished" for trial in trials) else "failed"


def close_orphans(sweep: Sweep) -> None:
    """End the MLflow runs that a killed driver has left open; a trial that goes on opens its own again."""
    states = {trial.folder: trial.status for trial in sweep.trials()} | {sweep.path: outcome(sweep)}
    for folder, status in states.items():
        file = folder / "tracking.json"
        state = json.loads(file.read_text()) if file.is_file() else None
        if state and (state["ended"] is None or state["status"] is not None):
            ended = {"status": CLOSING.get(status, "KILLED"), "ended": state["ended"] or time.time(), "attached": False}
            with contextlib.suppress(Exception):  # a server that is down: `manyviews sync SWEEP/trial-000` later
                Tracker(folder, state | ended).push()
